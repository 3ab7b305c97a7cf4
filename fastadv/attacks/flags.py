"""Signs that a model makes gradient attacks look weaker than they are, or that logits are no logits.

Shapes: x (B, C, H, W) float32; y (B,); logits (B, classes). Thresholds are those of the published AutoAttack.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fastadv.losses import misclassified
from fastadv.passes import Passes

# Forward passes of the same images, and how far apart their logits, scaled to length 1, may lie.
REPEATS, SPREAD = 5, 1e-4
# How far logits may be from adding up to 1 to be taken for probabilities.
PROBABILITY = 1e-5
# More than this share broken by Square alone says that the gradients were no use.
SQUARE_SHARE = 0.002


def model_flags(passes: Passes, x: Tensor, y: Tensor, logits: Tensor, *, random_expected: bool) -> list[str]:
    """What ``passes`` show on one batch, as sentences; ``logits`` are those at ``x``. The passes are open."""
    notes = []
    if looks_like_probabilities(logits):
        notes.append("the model's outputs look like probabilities: give the logits, a softmax hides the gradient")
        warnings.warn(f"fastadv: {notes[0]}", stacklevel=2)
    if not random_expected and looks_random(passes, x, y):
        notes.append('the model gives different logits for the same images: version="rand" averages over that')
    zero = zero_gradients(passes, x[~misclassified(logits, y)], y[~misclassified(logits, y)])
    if zero:
        notes.append(f"the margin's gradient is zero for {zero} of {len(x)} images: gradient attacks cannot move them")
    return notes


def looks_like_probabilities(logits: Tensor) -> bool:
    """Whether all ``logits`` lie between 0 and 1 and add up to 1, image by image."""
    inside = (logits > -PROBABILITY).all() & (logits < 1 + PROBABILITY).all()
    return bool(inside & ((logits.sum(1) - 1).abs() < PROBABILITY).all())


def looks_random(passes: Passes, x: Tensor, y: Tensor) -> bool:
    """Whether repeated passes through the model answer ``x`` differently."""
    answers = torch.stack([passes.score(x) for _ in range(REPEATS)])
    right = torch.stack([(~misclassified(logits, y)).sum() for logits in answers])
    scaled = answers / (answers.norm(dim=2, keepdim=True) + 1e-10)
    spread = torch.stack([(one - other).norm(dim=1).amax() for one in scaled for other in scaled]).amax()
    return bool((right != right[0]).any() | (spread > SPREAD))


def zero_gradients(passes: Passes, x: Tensor, y: Tensor) -> int:
    """How many images the model's margin has no gradient at."""
    return int((passes.gradient(x, y)[1].flatten(1) == 0).all(1).sum()) if len(x) else 0


def square_flag(before: int, after: int, n: int) -> list[str]:
    """A note if Square took many of ``n`` images from the ``before`` that all other attacks had left."""
    if before - after <= SQUARE_SHARE * n:
        return []
    return [
        f"Square broke {(before - after) / n:.1%} of the images after every attack before it had failed: the gradients "
        "mislead, so try Square(queries=20000, restarts=3), and an attack made for this model"
    ]
