"""What PGD costs in passes, memory and waiting for the device, and what it says when numbers stop being numbers."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from analytic import EPS, Affine, images, seed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastadv import ops
from fastadv.errors import NonFiniteGradientError
from fastadv.pgd import PGD, pgd
from fastadv.threat import ThreatModel

NORMS = ("linf", "l2")


@pytest.mark.parametrize("loss", ["ce", "dlr", "margin"])
@pytest.mark.parametrize("run", [False, True])
def test_a_nan_weight_is_an_error_that_names_step_and_images(loss, run):
    model = Affine()
    with torch.no_grad():
        model.weight[3, 17] = math.nan
    attack = PGD(steps=2, loss=loss)
    with pytest.raises(NonFiniteGradientError, match=r"from step 0 on, in 3 of 3 images: 0, 1, 2;.*named_parameters"):
        (attack.run if run else attack)(model, images(3), torch.zeros(3, dtype=torch.int64), ThreatModel())


class Cliff(nn.Module):
    """A half-space whose logits or gradient break down where the mean pixel has moved by more than ``far``."""

    def __init__(self, x, far, breaks):
        super().__init__()
        self.x, self.far, self.breaks = x, far, breaks

    def forward(self, x):
        moved = (x - self.x).detach().flatten(1).abs().mean(1)
        z = x.flatten(1).mean(1)
        over = moved > self.far
        if self.breaks == "logits":
            z = torch.where(over, math.inf, z)
        else:
            # sqrt at 0: finite forward, infinite backward.
            z = z + torch.where(over[:, None], x.flatten(1) - x.flatten(1).detach(), x.flatten(1)).sqrt().mean(1)
        return torch.stack([z, -z], 1)


@pytest.mark.parametrize("breaks", ["logits", "gradient"])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_the_first_bad_step_and_its_images_are_named(breaks, loss):
    x = images(3)
    model = Cliff(x, torch.tensor([1.0, 0.025, 0.035]), breaks)
    attack = PGD(steps=5, step_size=0.01, random_start=False, loss=loss)
    with pytest.raises(NonFiniteGradientError, match=r"from step 3 on, in 2 of 3 images: 1, 2;"):
        attack(model, x, torch.zeros(3, dtype=torch.int64), ThreatModel("linf", 0.1))


def test_logits_that_break_in_the_last_scoring_only_are_named_too():
    x = images(3)
    model = Cliff(x, torch.tensor([1.0, 0.045, 1.0]), "logits")
    attack = PGD(steps=5, step_size=0.01, random_start=False)
    y = torch.zeros(3, dtype=torch.int64)
    attack(model, x, y, ThreatModel("linf", 0.1))
    with pytest.raises(NonFiniteGradientError, match=r"from step 5 on, in 1 of 3 images: 1;"):
        attack.run(model, x, y, ThreatModel("linf", 0.1))


class Counting(nn.Module):
    """A model that counts its passes."""

    def __init__(self):
        super().__init__()
        self.inner, self.forwards, self.backwards = Affine(), 0, 0

    def forward(self, x):
        self.forwards += 1
        if x.requires_grad:
            x.register_hook(self.count)
        return self.inner(x)

    def count(self, grad):
        self.backwards += 1


@pytest.mark.parametrize(
    ("attack", "call", "run"),
    [
        (PGD(steps=5), (5, 5), (6, 5)),
        (PGD(steps=5, keep="best"), (6, 5), (6, 5)),
        (PGD(steps=5, keep="success"), (6, 5), (6, 5)),
        (PGD(steps=5, restarts=3), (18, 15), (18, 15)),
        (PGD(steps=0), (0, 0), (1, 0)),
    ],
)
def test_the_number_of_passes(attack, call, run):
    x, y = images(2), torch.zeros(2, dtype=torch.int64)
    for method, passes in ((attack, call), (attack.run, run)):
        model = Counting()
        method(model, x, y, ThreatModel())
        assert (model.forwards, model.backwards) == passes


class Watch(TorchDispatchMode):
    """Counts reads by the host, and new tensors as large as x."""

    HOST_READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "index.Tensor")

    def __init__(self, size):
        super().__init__()
        self.size, self.reads, self.large, self.names = size, 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.")
        self.names.append(name)
        self.reads += name.startswith(self.HOST_READS)
        is_view_or_in_place = any(argument.alias_info for argument in func._schema.arguments)
        if isinstance(out, torch.Tensor) and out.numel() >= self.size and not is_view_or_in_place:
            self.large += 1
        return out


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("keep", ["last", "best", "success"])
def test_a_step_reads_nothing_on_the_host_and_allocates_only_the_gradient(norm, keep):
    x, y, eps = images(8), torch.zeros(8, dtype=torch.int64), torch.full((8,), 0.03)

    def watched(steps, restarts=1):
        attack = PGD(steps=steps, keep=keep, restarts=restarts)
        with Watch(x.numel()) as watch:
            attack.run(Affine(), x, y, ThreatModel(norm), eps=eps, mask=torch.ones(8, 8))
        return watch

    few, many, twice = watched(3), watched(13), watched(3, restarts=2)
    assert few.reads == many.reads == twice.reads
    # The product with the weights in the backward pass is the gradient.
    assert many.large - few.large == 10
    assert many.names.count(f"fastadv.{norm}_step.default") == 13


def test_the_watch_sees_a_read_and_an_allocation():
    with Watch(4) as watch:
        float(torch.ones(4).sum())
        torch.ones(4) + 1
    assert watch.reads == 1
    assert watch.large == 3


@pytest.mark.gpu
def test_a_cuda_attack_waits_for_the_device_twice_however_many_steps():
    model, x, y = Affine().cuda(), images(8).cuda(), torch.zeros(8, dtype=torch.int64).cuda()

    def waits(steps):
        attack = PGD(steps=steps, keep="best")
        attack(model, x, y, ThreatModel())
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                attack(model, x, y, ThreatModel())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    assert waits(2) == waits(12) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
def test_cuda_agrees_with_the_cpu(norm):
    assert ops.body(f"{norm}_step", "cuda") == "triton"
    model, x, y = Affine(), images(8), torch.zeros(8, dtype=torch.int64)
    want = pgd(model, x, y, ThreatModel(norm, EPS[norm]), generator=seed(1))
    got = pgd(model.cuda(), x.cuda(), y.cuda(), ThreatModel(norm, EPS[norm]), generator=seed(1))
    assert got.is_cuda
    assert ((got.cpu() - want).abs() < 1e-5).float().mean() > 0.999
