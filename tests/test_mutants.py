"""A test of the tests: attacks broken on purpose, each of which must fail a check that the real ones pass.

The checks take an attack ``(model, x, y, threat, steps, step_size) -> adv`` without a random start.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from analytic import Affine, HalfSpace, images
from conftest import tiny_net
from torch import Tensor, nn

from fastadv.pgd import PGD, pgd
from fastadv.threat import ThreatModel

THREAT = ThreatModel("linf", 0.05)
FIVE = torch.arange(8) % 5


def check_ball(attack):
    """Inside the ball, exactly, and inside the box, also for images on its edge."""
    for x in (images(8), torch.rand(8, 3, 8, 8).round(), torch.randint(256, (8, 3, 8, 8)) / 255):
        adv = attack(Affine(), x, FIVE, THREAT, 6, 0.02)
        assert (adv.double() - x.double()).abs().max() <= torch.tensor(0.05).double()
        assert adv.min() >= 0
        assert adv.max() <= 1


def check_optimum(attack):
    """The worst case of a half-space is reached."""
    model, x, y = HalfSpace(), images(8), torch.ones(8, dtype=torch.int64)
    torch.testing.assert_close(attack(model, x, y, THREAT, 6, 0.01), model.worst(x, "linf", 0.05), rtol=0, atol=1e-6)


def check_loss_rises(attack):
    """Every image is worse for the model than before."""
    model, x = Affine(), images(8)
    before, after = (
        F.cross_entropy(model(z), FIVE, reduction="none") for z in (x, attack(model, x, FIVE, THREAT, 3, 0.02))
    )
    assert (after > before).all()


def check_faint_gradients(attack):
    """An image the model is sure about, in a large batch, still moves to the worst case."""
    model, x, y = HalfSpace(), images(64), torch.ones(64, dtype=torch.int64)
    with torch.no_grad():
        model.b.fill_(12.0)
    torch.testing.assert_close(attack(model, x, y, THREAT, 6, 0.01), model.worst(x, "linf", 0.05), rtol=0, atol=1e-6)


def check_batch_is_its_images(attack):
    """No image sees the others, also where the model has batch norm and dropout and is training."""
    model, x = tiny_net(), images(8)
    together = attack(model, x, FIVE, THREAT, 2, 0.02)
    alone = torch.cat([attack(model, x[i : i + 1], FIVE[i : i + 1], THREAT, 2, 0.02) for i in range(8)])
    assert ((alone - together).abs() < 1e-6).float().mean() > 0.99


def check_modes_and_statistics(attack):
    """A batch norm frozen by hand stays frozen, what trains goes on training, running statistics stay."""
    model = tiny_net().train()
    model[1].eval()
    twin = copy.deepcopy(model)
    attack(model, images(8), FIVE, THREAT, 2, 0.02)
    assert [m.training for m in model.modules()] == [m.training for m in twin.modules()]
    model.train()
    attack(model, images(8), FIVE, THREAT, 2, 0.02)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


CHECKS = {check.__name__: check for name, check in list(globals().items()) if name.startswith("check_")}


@dataclasses.dataclass(frozen=True)
class Loop:
    """A textbook PGD with defects to choose from; without one it passes every check."""

    project: str = "exact"
    sign: int = 1
    swap: bool = False
    std: float = 1.0
    half_mean: bool = False
    mode: str = "restored"

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, steps: int, step_size: float
    ) -> Tensor:
        flags = [(module, module.training) for module in model.modules()]
        if self.mode != "training":
            model.eval()
        eps = threat.eps * self.std
        if self.swap:
            eps, step_size = step_size, eps
        adv = x.clone()
        for _ in range(steps):
            grad = self.gradient(model, adv, y)
            adv = adv + self.sign * step_size * self.std * grad.sign()
            if self.project == "exact":
                adv = dataclasses.replace(threat, eps=eps).project(adv, x)
            elif self.project == "rounded":
                adv = adv.clamp(x - eps, x + eps).clamp(0, 1)
        if self.mode == "left in train":
            model.train()
        elif self.mode == "restored":
            for module, training in flags:
                module.training = training
        return adv

    def gradient(self, model: nn.Module, adv: Tensor, y: Tensor) -> Tensor:
        if self.half_mean:
            model, adv = copy.deepcopy(model).half(), adv.half()
        leaf = adv.requires_grad_()
        loss = F.cross_entropy(model(leaf), y, reduction="mean" if self.half_mean else "sum")
        return torch.autograd.grad(loss, leaf)[0].float()


REAL = {
    "pgd": lambda model, x, y, threat, steps, step_size: pgd(
        model, x, y, threat, steps=steps, step_size=step_size, random_start=False
    ),
    "fast": lambda model, x, y, threat, steps, step_size: PGD(steps=steps, step_size=step_size, random_start=False).on(
        model, precision="fp32"
    )(x, y, threat),
    "a textbook loop without a defect": Loop(),
}

MUTANTS = {
    "no projection": (Loop(project="none"), {"check_ball", "check_optimum"}),
    "a ball that rounding leaves": (Loop(project="rounded"), {"check_ball"}),
    "wrong sign": (Loop(sign=-1), {"check_optimum", "check_loss_rises", "check_faint_gradients"}),
    "eps and step swapped": (Loop(swap=True), {"check_optimum", "check_faint_gradients"}),
    # Pixels normalised by std 0.25: eps and step are a quarter of what was asked for.
    "attack in normalised space": (Loop(std=0.25), {"check_optimum", "check_faint_gradients"}),
    "mean loss in fp16": (Loop(half_mean=True), {"check_faint_gradients"}),
    "attacked in train mode": (Loop(mode="training"), {"check_batch_is_its_images", "check_modes_and_statistics"}),
    "left in train mode": (Loop(mode="left in train"), {"check_modes_and_statistics"}),
    "left in eval mode": (Loop(mode="left in eval"), {"check_modes_and_statistics"}),
}


def fails(check, attack):
    torch.manual_seed(0)
    try:
        check(attack)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("attack", REAL.values(), ids=REAL)
def test_the_real_attack_passes_every_check(attack, check):
    torch.manual_seed(0)
    check(attack)


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_fails_the_checks_made_for_it(name):
    attack, expected = MUTANTS[name]
    caught = {check for check in CHECKS if fails(CHECKS[check], attack)}
    assert expected
    assert caught >= expected


def test_every_check_catches_a_mutant():
    assert {check for _, expected in MUTANTS.values() for check in expected} == set(CHECKS)
