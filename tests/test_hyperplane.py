"""The projections of FAB against a bisection in float64, against each other, and against the published code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastadv.attacks.hyperplane import published_to_hyperplane, to_hyperplane

NORMS = ("linf", "l2")
UNIT = (0.0, 1.0)
# Float32 adds up 200 slopes of up to 1: the last digits of such a sum are worth 1e-5, of a pixel's move 1e-6.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


def truth(points, w, b, norm, box):
    """The shortest moves, by bisection on t in float64: pixels move by min(t * speed, room)."""
    points, w, b = points.double(), w.double(), b.double()
    over = (w * points).sum(1, keepdim=True) - b.unsqueeze(1)
    way = -over.sign() * w.sign()
    room = torch.where(way > 0, box[1] - points, points - box[0])
    speed = (w != 0).double() if norm == "linf" else w.abs()
    low, high = torch.zeros_like(over), torch.full_like(over, 1e6)
    for _ in range(200):
        middle = (low + high) / 2
        short = (w.abs() * torch.minimum(middle * speed, room)).sum(1, keepdim=True) < over.abs()
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return way * torch.minimum(high * speed, room)


def problems(n=40, dims=200, seed=0, box=UNIT, kind="inside"):
    """Points of the box, slopes, and hyperplanes on both sides at all distances, some of them beyond the box."""
    g = torch.Generator().manual_seed(seed)
    share, w = torch.rand(n, dims, generator=g), torch.randn(n, dims, generator=g)
    if kind == "corners":
        share = share.round()
    if kind == "holes":
        w[torch.rand(n, dims, generator=g) < 0.5] = 0
    points = box[0] + (box[1] - box[0]) * share
    distance = torch.logspace(-5, 0.5, n) * w.abs().sum(1) * (2 * torch.rand(n, generator=g) - 1).sign()
    return points, w, (w * points).sum(1) + distance


def moves(points, *args):
    return to_hyperplane(points.unsqueeze(1), *args).squeeze(1)


def check_optimal(project, norm, kind, box=UNIT):
    points, w, b = problems(kind=kind, box=box)
    expected = truth(points, w, b, norm, box)
    torch.testing.assert_close(project(points, w, b, norm, box).double(), expected, **CLOSE)


@pytest.mark.parametrize("box", [UNIT, (-1.0, 2.0)])
@pytest.mark.parametrize("kind", ["inside", "corners", "holes"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("project", [moves, published_to_hyperplane])
def test_the_move_is_the_shortest(project, norm, kind, box):
    check_optimal(project, norm, kind, box)


@pytest.mark.parametrize("norm", NORMS)
def test_the_problems_have_points_that_reach_the_hyperplane_freely_along_the_box_and_never(norm):
    points, w, b = problems()
    move = truth(points, w, b, norm, UNIT)
    left = ((w * (points + move)).sum(1) - b).abs()
    at_edge = ((points + move <= 1e-9) | (points + move >= 1 - 1e-9)).sum(1)
    assert (left > 1).any()
    assert ((left < 1e-6) & (at_edge > 20)).any()
    assert ((left < 1e-6) & (at_edge == 0)).any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("fault", ["no box", "one round", "no speed"])
def test_a_broken_projection_is_found(norm, fault):
    """The checks can fail."""

    def broken(points, w, b, norm, box):
        if fault == "no box":
            return moves(points, w, b, norm, (-9.0, 9.0))
        if fault == "no speed":
            return moves(points, w, b, {"linf": "l2", "l2": "linf"}[norm], box)
        over = (w * points).sum(1, keepdim=True) - b.unsqueeze(1)
        speed = w.sign() if norm == "linf" else w
        move = -over * speed / (w * speed).sum(1, keepdim=True)
        return (points + move).clamp(*box) - points

    with pytest.raises(AssertionError):
        check_optimal(broken, norm, "inside")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.sampled_from(NORMS), st.sampled_from(["inside", "corners", "holes"]))
def test_laws(seed, norm, kind):
    points, w, b = problems(n=6, dims=30, seed=seed, kind=kind)
    move = moves(points, w, b, norm, UNIT)
    end = points + move
    assert end.min() >= -1e-6
    assert end.max() <= 1 + 1e-6
    assert (move[w == 0] == 0).all()
    # Powers of two change no digit.
    assert torch.equal(moves(points, w * 2**-60, b * 2**-60, norm, UNIT), move)
    assert torch.equal(moves(points, -w, -b, norm, UNIT), move)
    # An image's move is its own, whoever stands beside it.
    alone = torch.cat([moves(points[i : i + 1], w[i : i + 1], b[i : i + 1], norm, UNIT) for i in range(6)])
    assert torch.equal(alone, move)
    both = to_hyperplane(torch.stack([points, points.flip(1)], 1), w, b, norm, UNIT)
    torch.testing.assert_close(both[:, 0], move, **CLOSE)
    torch.testing.assert_close(both[:, 1], moves(points.flip(1), w, b, norm, UNIT), **CLOSE)


@pytest.mark.parametrize("norm", NORMS)
def test_what_cannot_move_stays(norm):
    points, _, _ = problems(n=3)
    flat = torch.zeros_like(points)
    assert torch.equal(moves(points, flat, torch.tensor([0.0, 1.0, -1.0]), norm, UNIT), flat)
    w = torch.ones_like(points)
    on_it = moves(points, w, (w * points).sum(1), norm, UNIT)
    assert on_it.abs().max() < 1e-6


@pytest.mark.parametrize("norm", NORMS)
def test_nan_and_infinity_end(norm):
    points, w, b = problems(n=4)
    w[0], w[1, 0], b[2] = torch.nan, torch.inf, torch.nan
    move = moves(points, w, b, norm, UNIT)
    torch.testing.assert_close(move[3].double(), truth(points, w, b, norm, UNIT)[3], **CLOSE)


@pytest.mark.parametrize("kind", ["inside", "corners", "holes"])
@pytest.mark.parametrize("norm", NORMS)
def test_the_published_one_is_the_published_one_to_the_bit(norm, kind):
    published = pytest.importorskip("pyautoattack.fab_projections")
    points, w, b = problems(kind=kind)
    theirs = getattr(published, f"projection_{norm}")(points, w, b)
    assert torch.equal(published_to_hyperplane(points, w, b, norm, UNIT), theirs)
