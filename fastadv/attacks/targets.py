"""Which classes a targeted attack aims at, and the loss that pulls towards one of them.

Shapes: logits (B, classes) float32; y, target (B,) int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.errors import SettingsError
from fastadv.losses import ATTACK_LOSSES


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The logit of ``target`` minus that of class y, divided by the spread of the logits, (B,). Needs four classes.

    The spread is the largest logit minus the mean of the third and the fourth. Source: Croce and Hein,
    arXiv:2003.01690, equation 7.
    """
    if logits.shape[1] < 4:
        raise SettingsError(
            f"loss is 'dlr-targeted', but the model has {logits.shape[1]} classes", "use loss='ce': it needs four"
        )
    ranked = logits.sort(1).values
    gap = -(logits.gather(1, y[:, None]) - logits.gather(1, target[:, None])).squeeze(1)
    # The published code's constant: it keeps four equal logits from dividing by zero.
    return gap / (ranked[:, -1] - 0.5 * (ranked[:, -3] + ranked[:, -4]) + 1e-12)


def likely_targets(logits: Tensor, num: int) -> Tensor:
    """The classes with the second to the (num + 1)-th largest logit, likeliest first, (B, num); at most all others."""
    num = min(num, logits.shape[1] - 1)
    # A whole sort, as the published code has it, so that equal logits come in its order.
    return logits.sort(1).indices.flip(1)[:, 1 : 1 + num]


class Objective:
    """What APGD climbs, called as (logits, y) -> (B,). dlr-targeted reads ``target``, one class per image."""

    target: Tensor

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        """The loss of each image, (B,)."""
        if self.name == "dlr-targeted":
            return dlr_targeted(logits, y, self.target)
        return ATTACK_LOSSES[self.name](logits, y)

    def value(self, logits: Tensor, y: Tensor) -> Tensor:
        """The same without a graph."""
        with torch.no_grad():
            return self(logits, y)
