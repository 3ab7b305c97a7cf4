"""Reports: counts against models whose answer is known, and intervals against published values."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from fastadv.attacks.autoattack import AutoAttack
from fastadv.data import ImageSet
from fastadv.measure import curve, evaluate, measure, wilson
from fastadv.pgd import PGD
from fastadv.threat import ThreatModel

# n images whose first pixel's brightness is their distance from the boundary at 0.5.
LEVELS = torch.tensor([0, 100, 120, 127, 128, 135, 160, 255], dtype=torch.uint8)


class Brightness(nn.Module):
    """Class 1 if the first pixel is brighter than a half; nothing else matters, so the worst case is known."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, x: Tensor) -> Tensor:
        value = self.scale * (x[:, 0, 0, 0] - 0.5)
        return torch.stack([-value, value], 1)


def images() -> ImageSet:
    pixels = torch.zeros(len(LEVELS), 3, 4, 4, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = LEVELS
    labels = (LEVELS > 127).long()
    labels[0] = 1  # one that is wrong to begin with
    return ImageSet(pixels, labels, ("dark", "bright"))


ATTACK = PGD(steps=5, step_size=4 / 255, keep="success")


@pytest.mark.parametrize(("eps", "robust"), [(0, 7), (2 / 255, 5), (8.6 / 255, 3), (40 / 255, 1), (1, 0)])
def test_robust_counts_are_those_of_the_closed_form(eps: float, robust: int) -> None:
    attack = PGD(steps=40, step_size=8 / 255, keep="success")
    found = measure(Brightness(), images(), attack, ThreatModel(eps=eps), batch_size=3)
    assert (found.n, found.clean, found.robust) == (8, 7, robust)


def test_the_model_is_left_in_its_mode() -> None:
    model = nn.Sequential(Brightness(), nn.Dropout()).train()
    model[1].eval()
    measure(model, images(), ATTACK, ThreatModel(), batch_size=8)
    assert model[0].training
    assert not model[1].training


def test_nan_logits_count_as_wrong() -> None:
    class Nan(Brightness):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.nan

    assert measure(Nan(), images(), None, ThreatModel(), batch_size=8).clean == 0


def test_a_batch_with_no_image_right_is_robust_nowhere() -> None:
    dark = ImageSet(torch.zeros(3, 3, 4, 4, dtype=torch.uint8), torch.ones(3, dtype=torch.int64), ("dark", "bright"))
    found = measure(Brightness(), dark, ATTACK, ThreatModel("l2", 2.0))
    assert (found.n, found.clean, found.robust) == (3, 0, 0)


def test_the_report_names_its_conditions() -> None:
    report, verdict = evaluate(Brightness(), images(), ATTACK, ThreatModel(eps=8 / 255), seed=3)
    assert (verdict.n, verdict.clean, verdict.robust) == (8, 7, round(8 * report.robust))
    assert (report.n, report.eps, report.attack, report.verdict) == (8, 8 / 255, "PGD-5", "worst")
    assert (report.precision, report.device, report.seed) == ("fp32", "cpu", 3)
    assert report.clean_interval == wilson(7, 8)
    assert report.row()["threat"] == "linf 8/255"
    assert dataclasses.replace(report, norm="l2", eps=1.0).row()["threat"] == "l2 1"


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    # The first from reliability tables of the score interval; the second is its limit z^2 / (n + z^2).
    [(50, 100, 0.4038, 0.5962), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (0, 0, 0.0, 1.0)],
)
def test_wilson_intervals(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == pytest.approx((low, high), abs=1e-4)


def test_a_verdict_is_about_every_single_image() -> None:
    """At 8/255 whatever lies less than 8 grey levels from the boundary falls; the first was wrong to begin with."""
    attack = PGD(steps=40, step_size=2 / 255, keep="success")
    found = measure(Brightness(), images(), attack, ThreatModel(eps=8 / 255), batch_size=3)
    assert found.right.tolist() == [False] + [True] * 7
    assert found.survived.tolist() == [level not in (0, 120, 127, 128, 135) for level in LEVELS.tolist()]


def test_an_autoattack_tells_how_far_it_is() -> None:
    class Sides(Brightness):
        """Two more classes, of which nothing is: dlr needs three."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super().forward(x), torch.full((len(x), 2), -50.0)], 1)

    said: list[str] = []
    evaluate(Sides(), images(), AutoAttack(version="standard"), ThreatModel(eps=0.6), say=said.append)
    assert any("apgd-ce" in line for line in said)


def test_the_curve_falls_where_the_closed_form_does() -> None:
    """An image survives a radius that is smaller than its distance from the boundary; the last radius leaves none."""
    attack = PGD(steps=40, step_size=1, keep="success")
    right = measure(Brightness(), images(), None, ThreatModel()).right
    found = curve(Brightness(), images(), attack, ThreatModel(eps=8 / 255), right=right)
    assert found.eps[:5] == pytest.approx([0, 2 / 255, 4 / 255, 8 / 255, 16 / 255])
    distance = (LEVELS / 255.0 - 0.5).abs()
    for eps, survived in zip(found.eps, found.survived, strict=True):
        assert torch.equal(survived, right & (distance > eps)), eps
    # The darkest right one is 155/255 from the boundary's brighter side, 255 levels less a half: 127.5/255.
    assert found.eps[-2] < 0.5 <= found.eps[-1]
    assert not found.survived[-1].any()


@pytest.mark.parametrize(("threat", "widest"), [(ThreatModel(eps=8 / 255), 1.0), (ThreatModel("l2", 1.0), 48**0.5)])
def test_the_curve_of_a_model_that_cannot_be_attacked_ends_with_the_box(threat: ThreatModel, widest: float) -> None:
    class Constant(Brightness):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0 + torch.tensor([1.0, 0.0])

    right = measure(Constant(), images(), None, ThreatModel()).right
    found = curve(Constant(), images(), ATTACK, threat, right=right)
    assert right.any()
    assert found.eps[-1] == pytest.approx(widest)
    assert torch.equal(found.survived[-1], right)


def test_a_curve_without_a_right_image_is_its_start() -> None:
    found = curve(Brightness(), images(), ATTACK, ThreatModel(), right=torch.zeros(8, dtype=torch.bool))
    assert found.eps == (0.0,)
