"""The most fragile and the most stable images are those, and are shown as they are."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from analytic import DIMS, HalfSpace
from sample_evaluation import example

from fastadv import examples
from fastadv.data import ImageSet
from fastadv.measure import Curve
from fastadv.pgd import PGD
from fastadv.threat import ThreatModel

EPS = (0.0, 2 / 255, 4 / 255, 8 / 255)


def curve(*times: int) -> Curve:
    """A curve on which image i is right at so many of the radii."""
    return Curve(EPS, torch.tensor([[number > level for number in times] for level in range(len(EPS))]))


def test_the_ends_are_found() -> None:
    assert examples.extremes(curve(4, 1, 0, 2, 1, 3, 0, 4), count=2) == ([1, 4], [0, 7])


@pytest.mark.parametrize("times", [(0, 0), (1,), (2, 2), (1, 2, 3), (4, 4, 4, 4, 4)])
def test_no_image_is_at_both_ends_and_none_is_wrong_from_the_start(times: tuple[int, ...]) -> None:
    fragile, stable = examples.extremes(curve(*times), count=4)
    right = [index for index, number in enumerate(times) if number]
    assert not set(fragile) & set(stable)
    assert set(fragile) | set(stable) <= set(right)
    assert len(stable) >= len(fragile)
    assert bool(stable) == bool(right)


def test_they_are_attacked_once_more_and_leave_no_trace() -> None:
    model = HalfSpace().train()
    generator = torch.Generator().manual_seed(1)
    # Grey in the middle, so that no box is in the way and PGD reaches the worst case.
    images = torch.randint(96, 160, (32, *DIMS), generator=generator).to(torch.uint8)
    x = images.float() / 255
    margin = model(x)[:, 1].detach()
    labels = (margin > 0).long()
    # Exact: the smallest radius that turns an image is its distance from the plane in the dual norm.
    radius = margin.abs() / model.w.detach().abs().sum()
    held = sum((radius > eps).long() for eps in EPS)
    assert isinstance(held, torch.Tensor)
    found = curve(*held.tolist())
    before, stream = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    threat = ThreatModel(eps=4 / 255)
    fragile, stable = examples.attacked(
        model, ImageSet(images, labels, ("no", "yes")), found, PGD(steps=20, step_size=1 / 255), threat, count=3
    )
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert [one.held for one in fragile] == sorted(EPS[int(level) - 1] for level in held)[:3]
    assert [one.held for one in stable] == sorted((EPS[int(level) - 1] for level in held), reverse=True)[:3]
    for one in (*fragile, *stable):
        index = next(index for index in range(32) if torch.equal(x[index], one.x))
        assert one.label == labels[index]
        assert float((one.adv.double() - one.x.double()).abs().max()) <= float(torch.tensor(threat.eps))
        assert int(one.clean_logits.argmax()) == one.label
        assert (int(one.adv_logits.argmax()) == one.label) == (float(radius[index]) > threat.eps)
        assert one.broke == next((eps for eps in EPS if eps >= radius[index]), None)


def test_nobody_is_attacked_where_nobody_is_right() -> None:
    images = ImageSet(torch.zeros(2, *DIMS, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), ("no", "yes"))
    assert examples.attacked(HalfSpace(), images, curve(0, 0), PGD(), ThreatModel()) == ([], [])


def test_the_amplification_brings_the_change_to_half_of_the_range() -> None:
    assert examples.amplification([example(0, 1, 0.0, 2 / 255)]) == 16
    still = example(0, 0, 0.0, None)
    assert examples.amplification([copy.copy(still)]) == 16
    assert examples.amplification([]) == 1


def test_a_card_shows_image_change_and_attacked_image() -> None:
    caption, pictures = examples.card(example(0, 1, 2 / 255, 4 / 255), ("cat", "dog"), 8)
    assert caption == "cat: held 2/255, broken at 4/255"
    clean, change, attacked = (picture.pixels for picture in pictures)
    assert {int(value) for value in np.unique(clean)} == {128}
    # 0.5 and eight times 8/255 to either side, in levels of 255.
    assert change[:, :8].min() == change[:, :8].max() == round(127.5 + 64)
    assert change[:, 8:].min() == change[:, 8:].max() == round(127.5 - 64)
    assert attacked[:, :8].min() == round(127.5 + 8)
    assert [picture.label for picture in pictures] == [
        "\u2713 cat, 69.1 %",
        "perturbation \u00d7\u00a08",
        "\u2717 dog, 99.9 %",
    ]
    assert [picture.alt for picture in pictures] == [
        "Clean image of class cat, predicted cat",
        "What the attack adds to it, amplified 8 times, about grey",
        "The attacked image, predicted dog",
    ]


def test_a_caption_says_only_what_was_tried() -> None:
    assert examples.card(example(0, 1, 0.0, 2 / 255), ("cat", "dog"), 8)[0] == "cat: broken at 2/255"
    assert examples.card(example(0, 1, 8 / 255, None), ("cat", "dog"), 8)[0] == "cat: held 8/255"
