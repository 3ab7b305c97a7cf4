"""PGD-10 and a training step: fastadv and two published loops, taking turns; equal results first.

The libraries are in ``make bench-peers``, which takes longer and needs them installed.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import training
from clock import Turn, summary, taking_turns
from contestants import AUTO, CONTESTANTS, FAST, THREAT, Agreement
from pytest_benchmark.fixture import BenchmarkFixture
from subjects import SWIN_TINY, random_weights, robust_swin, twin

from fastadv import models, ops, tuning
from fastadv.engine import native_bf16

# Images a batch; small at 224, where ten steps of swin_tiny take seconds on two cores.
CASES = {models.MICRO: (robust_swin, 64), SWIN_TINY: (lambda: random_weights(SWIN_TINY), 2)}
SIDES = (FAST, AUTO, "RoLI's loop", "MadryLab's loop")


def told(benchmark: BenchmarkFixture, turns: dict[str, list[Turn]], **facts: Any) -> None:
    """Put medians, ranges and ratios of every side into the JSON."""
    benchmark.extra_info.update(facts, **{name: dict(row) for name, row in summary(turns, FAST).items()})


@pytest.mark.parametrize("name", CASES)
def test_pgd_10(benchmark: BenchmarkFixture, device: torch.device, name: str) -> None:
    """The sides take turns, so that whatever else the machine does meets all of them; the JSON has the medians."""
    torch.manual_seed(0)
    make, batch = CASES[name]
    model = make().to(device).eval()
    size = model.input_size
    x, y = torch.rand(batch, 3, size, size).to(device), torch.randint(0, 10, (batch,)).to(device)
    assert ops.body("linf_step", device) in ("cpp", "triton")
    assert ops.body("window_attention", device) in ("cpp", "triton")
    agreement, attacks = Agreement(model, x, y, steps=10), {}
    for side in SIDES:
        share, attacks[side] = agreement.check(CONTESTANTS[side])
        # The same attack before it is timed: the same pixels, up to the rounding of the ball's edge. bf16 has its own.
        assert share > 0.999 or (side == AUTO and native_bf16(device)), f"{side}: {share}"
    assert (attacks[AUTO](x, y).double() - x.double()).abs().max() <= torch.tensor(THREAT.eps).double()
    calls = {side: (lambda attack=attack: attack(x, y)) for side, attack in attacks.items()}
    benchmark.group = f"PGD-10 {name} {device.type}, all sides taking turns 3 times"
    told(benchmark, benchmark.pedantic(taking_turns, (calls, 3), rounds=1), images=batch)


def test_training_step(benchmark: BenchmarkFixture, device: torch.device) -> None:
    """One update of full adversarial fine-tuning with PGD-7 on the shipped Swin."""
    torch.manual_seed(0)
    model = robust_swin().to(device)
    x, y = torch.rand(32, 3, 64, 64, device=device), torch.randint(0, 10, (32,), device=device)
    sides = {}
    for name in SIDES:
        own = twin(model)
        sides[name] = training.side(name, own, tuning.full(own), x, steps=7)
    losses = {name: float(side.step(x, y, seed=1)) for name, side in sides.items()}
    assert all(math.isfinite(loss) for loss in losses.values())
    calls = {name: (lambda side=side: side.step(x, y, seed=2)) for name, side in sides.items()}
    benchmark.group = f"training step, PGD-7 {models.MICRO} {device.type}, all sides taking turns 3 times"
    told(benchmark, benchmark.pedantic(taking_turns, (calls, 3), rounds=1), images=len(x), first_losses=losses)
    for side in sides.values():
        assert not torch.equal(side.model.head.weight, model.head.weight)
