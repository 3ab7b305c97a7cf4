"""The attack step alone: the fused op against plain PyTorch and against torch.compile of the same lines.

Every baseline is compared with the fused step before it is timed. The ratio is measured in one run in which the bodies
take turns, so that a noisy machine disturbs all of them alike.
"""

import statistics
from collections.abc import Callable

import clock
import pytest
import torch
from torch import Tensor

from fastadv import ops

SHAPES = ((64, 3, 224, 224), (64, 3, 64, 64), (64, 3, 32, 32))
STEP, EPS = 2 / 255, 8 / 255
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUSED_BODY = {"cpu": "cpp", "cuda": "triton"}[DEVICE]


def fused(adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    return ops.linf_step(adv, grad, x, STEP, EPS)


def plain(adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """The lines of the textbook and of every attack library, up to the names."""
    adv = adv + STEP * grad.sign()
    return torch.clamp(x + torch.clamp(adv - x, -EPS, EPS), 0, 1)


def plain_in_place(adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """The same without new tensors where PyTorch can do without: the fairest plain baseline."""
    return adv.add_(grad.sign(), alpha=STEP).sub_(x).clamp_(-EPS, EPS).add_(x).clamp_(0, 1)


def batch(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """adv, grad, x on the device: grey levels, as images have, and adv inside the ball."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, shape, generator=generator) / 255
    adv = (x + EPS * (2 * torch.rand(shape, generator=generator) - 1)).clamp(0, 1)
    return adv.to(DEVICE), torch.randn(shape, generator=generator).to(DEVICE), x.to(DEVICE)


@pytest.fixture(scope="module")
def bodies() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    assert ops.body("linf_step", DEVICE) == FUSED_BODY
    compiled = torch.compile(plain, fullgraph=True, dynamic=False)
    return {"fused": fused, "plain": plain, "plain_in_place": plain_in_place, "compiled": compiled}


def assert_same_step(body: Callable[[Tensor, Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> None:
    """``body`` gives the fused step up to the rounding that puts plain code outside the ball."""
    adv, grad, x = batch(shape)
    expected, got = fused(adv.clone(), grad, x), body(adv.clone(), grad, x)
    assert (expected - got).abs().max() <= 2**-23
    assert ((expected.double() - x.double()).abs() <= torch.tensor(EPS, device=DEVICE).double()).all()


def taking_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Wall seconds per call of each body, one call of each per round, device-synchronised."""
    return {name: [turn.wall for turn in turns] for name, turns in clock.taking_turns(calls, rounds).items()}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("name", ["fused", "plain", "plain_in_place", "compiled"])
def test_step(benchmark, bodies, name, shape):
    body = bodies[name]
    assert_same_step(body, shape)
    adv, grad, x = batch(shape)
    benchmark.extra_info.update(body=FUSED_BODY if name == "fused" else name, device=DEVICE)
    benchmark.group = f"linf step {'x'.join(map(str, shape))} {DEVICE}"
    benchmark.pedantic(body, args=(adv, grad, x), rounds=7, warmup_rounds=1)


def test_step_ratio(benchmark, bodies):
    """The promise: at 64 x 3 x 224 x 224 at least 5 times plain PyTorch and 2 times torch.compile."""
    shape = SHAPES[0]
    for body in bodies.values():
        assert_same_step(body, shape)
    adv, grad, x = batch(shape)
    calls = {name: (lambda body=body: body(adv, grad, x)) for name, body in bodies.items()}
    taking_turns(calls, 1)
    benchmark.group = "linf step, all bodies taking turns 9 times"
    seconds = benchmark.pedantic(taking_turns, args=(calls, 9), rounds=1)
    # Medians for the report; the promise is held to the best of each, which other processes disturb least.
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = {name: min(values) for name, values in seconds.items()}
    benchmark.extra_info.update({f"{name}_median_s": value for name, value in medians.items()})
    for name in ("plain", "plain_in_place", "compiled"):
        benchmark.extra_info[f"{name}_over_fused"] = best[name] / best["fused"]
    if DEVICE == "cpu":
        assert best["plain"] >= 5 * best["fused"], best
        assert best["compiled"] >= 2 * best["fused"], best
