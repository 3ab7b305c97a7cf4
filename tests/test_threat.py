"""ThreatModel: validation, projection, random starts, the step."""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastadv import ops, reference
from fastadv.errors import SettingsError
from fastadv.threat import ThreatModel

NORMS = ("linf", "l2")


def distance(adv: torch.Tensor, x: torch.Tensor, norm: str) -> torch.Tensor:
    """Distance per image in float64."""
    return (adv.double() - x.double()).flatten(1).norm(p=math.inf if norm == "linf" else 2, dim=1)


@pytest.mark.parametrize(
    ("arguments", "named", "cure"),
    [
        ({"norm": "linff"}, "linff", "did you mean 'linf'"),
        ({"eps": 8}, "eps is 8", "did you mean 8/255"),
        ({"eps": 1.01}, "eps is 1.01", "did you mean"),
        ({"eps": -0.1}, "eps is -0.1", "0 or more"),
        ({"eps": math.nan}, "eps is nan", "eps=8/255"),
        ({"eps": math.inf, "norm": "l2"}, "eps is inf", "eps=8/255"),
        ({"eps": "8/255"}, "eps is 8/255", "number"),
        ({"box": (1.0, 0.0)}, "box", "box=(0.0, 1.0)"),
        ({"box": (0.0, math.nan)}, "box", "box=(0.0, 1.0)"),
        ({"eps": 3.0, "box": (-1.0, 1.0)}, "eps is 3", "did you mean"),
    ],
)
def test_a_threat_that_cannot_be_meant_is_refused(arguments, named, cure):
    with pytest.raises(SettingsError) as refusal:
        ThreatModel(**arguments)
    assert named in refusal.value.what
    assert cure in refusal.value.fix


@pytest.mark.parametrize(
    "arguments",
    [
        {"eps": 0},
        {"eps": 1.0},
        {"eps": 2.0, "box": (-1.0, 1.0)},
        {"eps": 8, "box": (0, 255)},
        {"norm": "l2", "eps": 3.0},
    ],
)
def test_a_threat_that_can_be_meant_is_taken(arguments):
    ThreatModel(**arguments)


def test_a_threat_is_a_value():
    assert ThreatModel("linf", 8 / 255) == ThreatModel(norm="linf", eps=8 / 255)
    assert len({ThreatModel(), ThreatModel()}) == 1
    with pytest.raises(AttributeError):
        ThreatModel().eps = 0.1


@st.composite
def cases(draw):
    norm = draw(st.sampled_from(NORMS))
    eps = draw(st.sampled_from([0.0, 1 / 255, 4 / 255, 8 / 255, 0.5, 1.0]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (draw(st.integers(1, 4)), 3, draw(st.integers(1, 6)), 5)
    kind = draw(st.sampled_from(["any", "edges", "bytes"]))
    x = torch.rand(shape, generator=g)
    if kind != "any":
        x = torch.randint(0, 256 if kind == "bytes" else 2, shape, generator=g) / (255.0 if kind == "bytes" else 1.0)
    return ThreatModel(norm, eps), x, torch.randn(2, *shape, generator=g)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_projection_is_feasible_idempotent_and_non_expansive(case):
    threat, x, points = case
    first, second = (threat.project(x + point, x) for point in points)
    assert (distance(first, x, threat.norm) <= torch.tensor(threat.eps).double()).all()
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(threat.project(first, x), first)
    before, after = ((a - b).flatten(1).norm(dim=1) for a, b in (points, (first, second)))
    assert (after <= before * (1 + 1e-5) + 1e-6).all()
    if threat.eps == 0:
        assert torch.equal(first, x)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_takes_one_radius_per_image(norm):
    x, eps = torch.full((3, 3, 4, 4), 0.5), torch.tensor([0.0, 0.05, 0.2])
    adv = ThreatModel(norm, 0.3).project(x + torch.randn_like(x), x, eps)
    torch.testing.assert_close(distance(adv, x, norm), eps.double(), rtol=1e-5, atol=1e-7)
    assert torch.equal(adv[0], x[0])


def test_a_linf_start_is_uniform_in_the_ball():
    x, eps = torch.full((4, 3, 64, 64), 0.5), 0.1
    noise = (ThreatModel("linf", eps).random_start(x) - x).flatten().double()
    # 49,152 draws: four standard errors of mean, second moment and of the share in a tenth of the ball.
    assert abs(noise.mean()) < 4 * eps / math.sqrt(3 * len(noise))
    assert abs(noise.square().mean() / (eps**2 / 3) - 1) < 4 * math.sqrt(4 / 5 / len(noise))
    counts = torch.histc(noise, 10, -eps, eps)
    assert (counts / len(noise) - 0.1).abs().max() < 4 * math.sqrt(0.09 / len(noise))


@pytest.mark.parametrize("pixels", [2, 12])
def test_an_l2_start_is_uniform_in_the_ball(pixels):
    x, eps = torch.full((20_000, 1, 1, pixels), 0.5), 0.1
    start = ThreatModel("l2", eps).random_start(x)
    # (radius / eps)^d is uniform where the points are, and no direction is preferred.
    share = (distance(start, x, "l2") / eps) ** pixels
    assert (torch.histc(share, 10, 0, 1) / len(x) - 0.1).abs().max() < 4 * math.sqrt(0.09 / len(x))
    assert (start - x).mean(0).abs().max() < 4 * eps / math.sqrt(len(x))


@pytest.mark.parametrize("norm", NORMS)
def test_a_start_lies_in_ball_and_box_and_is_laid_out_like_x(norm):
    threat = ThreatModel(norm, 0.25, box=(0.0, 0.75))
    x = (0.75 * torch.rand(5, 3, 6, 6)).to(memory_format=torch.channels_last)
    start = threat.random_start(x)
    assert (distance(start, x, norm) <= 0.25).all()
    assert start.min() >= 0
    assert start.max() <= 0.75
    assert start.stride() == x.stride()


@pytest.mark.parametrize("norm", NORMS)
def test_a_start_with_a_generator_leaves_the_global_stream_alone(norm):
    x, threat = torch.rand(2, 3, 4, 4), ThreatModel(norm, 0.1)
    before = torch.get_rng_state()
    first = threat.random_start(x, generator=torch.Generator().manual_seed(3))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, threat.random_start(x, generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(first, threat.random_start(x, generator=torch.Generator().manual_seed(4)))


def test_a_linf_start_without_a_generator_draws_like_rand():
    x = torch.full((2, 3, 4, 4), 0.5)
    torch.manual_seed(7)
    start = ThreatModel("linf", 0.1).random_start(x)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    noise = torch.rand(x.shape)
    assert torch.equal(after, torch.get_rng_state())
    torch.testing.assert_close(start, x + 0.1 * (2 * noise - 1))


@pytest.mark.parametrize("norm", NORMS)
def test_the_step_is_the_fused_op(norm):
    assert ops.body(f"{norm}_step") == ("reference" if os.environ.get("FASTADV_OPS") == "reference" else "cpp")
    x, grad = torch.rand(3, 3, 4, 4), torch.randn(3, 3, 4, 4)
    grad[1, 0, 0, 0] = math.nan
    mask = torch.rand_like(x) < 0.7
    got, want = x.clone(), x.clone()
    flags = [torch.zeros(3, dtype=torch.int32) for _ in range(2)]
    ThreatModel(norm, 0.1).ascend(got, grad, x, 0.3, mask=mask, nonfinite=flags[0])
    getattr(reference, f"{norm}_step")(want, grad, x, 0.3, 0.1, 0.0, 1.0, mask, flags[1])
    torch.testing.assert_close(got, want, rtol=0, atol=0 if norm == "linf" else 1e-7)
    assert flags[0].tolist() == flags[1].tolist() == [0, 1, 0]
    assert torch.equal(got[~mask], x[~mask])
