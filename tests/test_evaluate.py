"""Reports: counts against models whose answer is known, and intervals against published values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastadv.data import ImageSet
from fastadv.errors import SettingsError
from fastadv.evaluate import evaluate, measure, radii, wilson
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
    report = evaluate(Brightness(), images(), ATTACK, ThreatModel(eps=8 / 255), seed=3)
    assert (report.n, report.eps, report.attack, report.verdict) == (8, 8 / 255, "PGD-5", "worst")
    assert (report.precision, report.device, report.seed) == ("fp32", "cpu", 3)
    assert report.clean_interval == wilson(7, 8)
    assert report.row()["threat"] == "linf 8/255"


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    # The first from reliability tables of the score interval; the second is its limit z^2 / (n + z^2).
    [(50, 100, 0.4038, 0.5962), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (0, 0, 0.0, 1.0)],
)
def test_wilson_intervals(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == pytest.approx((low, high), abs=1e-4)


def test_radii_are_read_from_a_list() -> None:
    assert radii("4/255,0.5", 1.0) == [4 / 255, 0.5]
    assert radii(None, 0.25) == [0.25]
    with pytest.raises(SettingsError, match="eps is '8/'"):
        radii("8/", 1.0)
