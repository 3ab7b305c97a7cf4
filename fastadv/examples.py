"""The images of an evaluation at its two ends, most fragile and most stable, as pictures for its page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastadv.data import ImageSet, in_order
from fastadv.page import Picture
from fastadv.passes import untouched
from fastadv.pgd import PGD
from fastadv.plots import CHECK, CROSS, TIMES
from fastadv.recipe import show_pixels
from fastadv.seeds import generator
from fastadv.threat import ThreatModel

if TYPE_CHECKING:
    from fastadv.measure import Curve

# Keeps the noise of the pictures apart from that of training (seeded by step) and of evaluation (-1).
PICTURES = -2


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One image before and after an attack: x, adv float32 (3, H, W) in [0, 1], and the logits (classes,) of each."""

    x: Tensor
    adv: Tensor
    label: int
    clean_logits: Tensor
    adv_logits: Tensor
    held: float
    """The largest radius at which the image was still right."""
    broke: float | None
    """The smallest radius at which it was wrong; None where no radius broke it."""
    norm: str = "linf"
    """Of the radii."""


def extremes(curve: Curve, count: int = 4) -> tuple[list[int], list[int]]:
    """Images broken at the smallest radii, most fragile first, and those that held longest, most stable first.

    Both out of those that are right when clean, ``count`` of each at most and none in both; of equals the first.
    """
    held = curve.survived.long().sum(0)
    order = sorted(range(len(held)), key=lambda index: int(held[index]))
    order = [index for index in order if held[index]]
    half = min(count, len(order) // 2)
    fragile = order[:half]
    stable = sorted(order[half:], key=lambda index: -int(held[index]))[: min(count, len(order) - half)]
    return fragile, stable


def attacked(
    model: nn.Module,
    images: ImageSet,
    curve: Curve,
    attack: PGD,
    threat: ThreatModel,
    *,
    seed: int = 0,
    count: int = 4,
) -> tuple[list[Example], list[Example]]:
    """The most fragile and the most stable images of ``curve`` under the strongest point that ``attack`` finds.

    The attack is made once more, on these images alone, and keeps the point of the highest loss.
    """
    fragile, stable = extremes(curve, count)
    chosen = [*fragile, *stable]
    if not chosen:
        return [], []
    device = next(model.parameters()).device
    few = dataclasses.replace(images, images=images.images[chosen], labels=images.labels[chosen])
    x, y = next(iter(in_order(few, len(chosen), device)))
    strongest = dataclasses.replace(attack, keep="best")
    adv = strongest.run(model, x, y, threat, generator=generator(device, seed, PICTURES, 0)).adv
    with untouched(model), torch.no_grad():
        clean, after = (model(images).float().cpu() for images in (x, adv))
    radii = [*curve.eps, None]
    found = []
    for place, index in enumerate(chosen):
        times = int(curve.survived[:, index].sum())
        found.append(
            Example(
                x=x[place].cpu(),
                adv=adv[place].cpu(),
                label=int(y[place]),
                clean_logits=clean[place],
                adv_logits=after[place],
                held=curve.eps[times - 1],
                broke=radii[times],
                norm=threat.norm,
            )
        )
    return found[: len(fragile)], found[len(fragile) :]


def amplification(examples: Sequence[Example]) -> int:
    """The whole number, from 1, that brings the largest pixel change of all ``examples`` nearest to half the range."""
    largest = max((float((example.adv - example.x).abs().max()) for example in examples), default=0.0)
    return max(1, round(0.5 / largest)) if largest else 1


def card(example: Example, classes: Sequence[str], factor: int) -> tuple[str, list[Picture]]:
    """Caption and three pictures of an example: clean, the perturbation ``factor`` times about grey, attacked."""
    name = classes[example.label]
    held = [f"held {show_pixels(example.held, example.norm)}"] if example.held else []
    broke = [] if example.broke is None else [f"broken at {show_pixels(example.broke, example.norm)}"]
    clean, clean_said = _prediction(example.clean_logits, example.label, classes)
    adv, adv_said = _prediction(example.adv_logits, example.label, classes)
    return f"{name}: {', '.join([*held, *broke])}", [
        Picture(pixels=_pixels(example.x), alt=f"Clean image of class {name}, predicted {clean}", label=clean_said),
        Picture(
            pixels=_pixels(0.5 + factor * (example.adv - example.x)),
            alt=f"What the attack adds to it, amplified {factor} times, about grey",
            label=f"perturbation {TIMES}\u00a0{factor}",
        ),
        Picture(pixels=_pixels(example.adv), alt=f"The attacked image, predicted {adv}", label=adv_said),
    ]


def _prediction(logits: Tensor, label: int, classes: Sequence[str]) -> tuple[str, str]:
    """The predicted class, and the same with a mark for right and wrong and with the softmax."""
    guess = int(logits.argmax())
    # No network's confidence deserves a hundred.
    share = min(99.9, 100 * float(logits.softmax(0)[guess]))
    return classes[guess], f"{CHECK if guess == label else CROSS} {classes[guess]}, {share:.3g} %"


def _pixels(image: Tensor) -> npt.NDArray[np.uint8]:
    levels: npt.NDArray[np.uint8] = image.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return levels
