"""PGD-10 and a training step: a textbook loop, fastadv.pgd, and the attack bound by ``.on``; equal results first."""

from __future__ import annotations

import dataclasses
import math
import statistics
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from bench_step import taking_turns
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fastadv import models, ops
from fastadv.losses import adversarial_ce
from fastadv.models import Classifier
from fastadv.pgd import PGD
from fastadv.threat import ThreatModel
from fastadv.trainer import low_precision

THREAT = ThreatModel(eps=8 / 255)
ATTACK = PGD(steps=10, step_size=2 / 255)
# Images a batch; small at 224, where ten steps of swin_tiny take seconds on two cores.
BATCH = {"swin_micro_64": 64, "swin_tiny_patch4_window7_224": 2}


def textbook(model: Classifier, x: Tensor, y: Tensor, start: Tensor, steps: int) -> Tensor:
    """PGD as most code has it: gradient by autograd, sign, two clamps. Source: Madry et al., arXiv:1706.06083."""
    adv = start
    for _ in range(steps):
        adv = adv.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(F.cross_entropy(model(adv), y), adv)
        adv = adv.detach() + ATTACK.step_size * grad.sign()
        adv = torch.clamp(torch.min(torch.max(adv, x - THREAT.eps), x + THREAT.eps), 0, 1)
    return adv.detach()


@pytest.fixture(params=list(BATCH))
def case(request: pytest.FixtureRequest, device: torch.device) -> tuple[str, Classifier, Tensor, Tensor]:
    name: str = request.param
    torch.manual_seed(0)
    model = models.create(name, 10)
    if name == models.MICRO:
        models.load_backbone(model, "robust")
    size = model.input_size
    x, y = torch.rand(BATCH[name], 3, size, size), torch.randint(0, 10, (BATCH[name],))
    return name, model.to(device).eval(), x.to(device), y.to(device)


def noise(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(1)


def test_pgd_10(benchmark: BenchmarkFixture, case: tuple[str, Classifier, Tensor, Tensor]) -> None:
    """The three take turns, so that whatever else the machine does meets all of them; the JSON has the medians."""
    name, model, x, y = case
    benchmark.group = f"PGD-10 {name} {x.device.type}, three loops taking turns 3 times"
    start = THREAT.random_start(x, generator=noise(x.device))
    plain, auto = ATTACK.on(model, precision="fp32"), ATTACK.on(model)
    calls = {
        "textbook_fp32": lambda: textbook(model, x, y, start, ATTACK.steps),
        "fastadv_fp32": lambda: plain(x, y, THREAT, generator=noise(x.device)),
        "fastadv_auto": lambda: auto(x, y, THREAT, generator=noise(x.device)),
    }
    assert ops.body("linf_step", x.device) in ("cpp", "triton")
    # The same attack before it is timed: the same pixels, up to the rounding of the ball's edge.
    same = (calls["textbook_fp32"]() - calls["fastadv_fp32"]()).abs() < 1e-6
    assert same.float().mean() > 0.999
    assert (calls["fastadv_auto"]().double() - x.double()).abs().max() <= torch.tensor(THREAT.eps).double()
    seconds = benchmark.pedantic(taking_turns, (calls, 3), rounds=1)
    medians = {f"{side}_s": statistics.median(values) for side, values in seconds.items()}
    spread = {f"{side}_range_s": [min(values), max(values)] for side, values in seconds.items()}
    benchmark.extra_info.update(images=len(x), auto=auto.precision, **medians, **spread)


@pytest.mark.parametrize("side", ["textbook fp32", "fastadv auto"])
def test_training_step(benchmark: BenchmarkFixture, device: torch.device, side: str) -> None:
    """One update of full adversarial fine-tuning with PGD-7 on the shipped Swin."""
    torch.manual_seed(0)
    model = models.create(models.MICRO, 10)
    models.load_backbone(model, "robust")
    model.to(device).train()
    x, y = torch.rand(64, 3, 64, 64, device=device), torch.randint(0, 10, (64,), device=device)
    attack = dataclasses.replace(ATTACK, steps=7)
    fast = attack.on(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=side.startswith("fastadv"))

    def plain_step() -> Tensor:
        model.eval()
        adv = textbook(model, x, y, THREAT.random_start(x), attack.steps)
        model.train()
        return F.cross_entropy(model(adv), y)

    def fast_step() -> Tensor:
        return adversarial_ce(low_precision(model, fast.precision), x, y, partial(fast, threat=THREAT, wait=False))

    def step() -> float:
        loss = fast_step() if side.startswith("fastadv") else plain_step()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        fast.refresh()
        return float(loss.detach())

    benchmark.group = f"training step, PGD-7 swin_micro_64 {device.type}"
    before = model.head.weight.detach().clone()
    losses = [step(), benchmark.pedantic(step, rounds=3)]
    benchmark.extra_info.update(images=len(x), precision="fp32" if side.startswith("textbook") else fast.precision)
    assert all(math.isfinite(loss) for loss in losses)
    assert not torch.equal(model.head.weight, before)
