"""Learning rates over a stage: the factor on the peak at a step, by the name that a recipe gives."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "epoch-cosine", "drops"]


def factor(kind: Schedule, step: int, epochs: int, epoch_steps: int, warmup: float) -> float:
    """Factor in [0, 1] on the peak learning rate at ``step`` of ``epochs * epoch_steps``, counted from 0.

    cosine: a linear rise over ``warmup`` of the steps, never 0, and a cosine to zero. epoch-cosine: both change with
    the epoch only, and the first epoch has 0. drops: 1, 0.1 after half of the epochs, 0.01 after five sixths.

    Source: epoch-cosine is what the released code of arXiv:2312.05716 runs, with 10 epochs of warm-up; drops is
    TWINS' (CVPR 2023): epochs 30 and 50 of 60.
    """
    epoch = step // epoch_steps
    if kind == "drops":
        return 0.1 ** ((2 * epoch >= epochs) + (6 * epoch >= 5 * epochs))
    if kind == "epoch-cosine":
        # Rounded: 10 of 60 epochs are no float's share. An epoch at the peak at least: at rate 0 nothing learns.
        rise = min(round(warmup * epochs), epochs - 1)
        return epoch / rise if epoch < rise else _cosine(epoch - rise, epochs - rise)
    total = epochs * epoch_steps
    rise = int(warmup * total)
    return (step + 1) / (rise + 1) if step < rise else _cosine(step - rise, total - rise)


def _cosine(done: int, total: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * done / total))
