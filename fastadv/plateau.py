"""The learning rate that answers to validation: halved, and the best weights taken up again, where progress ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Pace(NamedTuple):
    """What the epochs so far mean for the next one."""

    factor: float
    """On the stage's learning rate."""
    back: bool
    """Whether the next epoch starts from the best weights."""
    stop: bool
    """Whether there is none."""


def plateau(
    accuracies: Sequence[float], *, lr: float, every: int = 4, share: float = 0.75, least: float = 1e-5
) -> Pace:
    """The pace after epochs with these robust validation accuracies, from the learning rate ``lr``.

    At every checkpoint (after ``every`` epochs beyond the first) the rate is halved and the best weights come back if
    the accuracy rose in fewer than ``share`` of the epochs since the last one, or if neither the rate nor the best
    accuracy has changed since. Training stops when the rate falls below ``least``.

    A function of the history alone, so a resumed run goes on as it would have. Source: arXiv:2310.01818 (rho = 0.75,
    every 4 epochs, 1e-5), after the step-size rule of arXiv:2003.01690, section 3.
    """
    rate, halved, back = lr, False, False
    best = accuracies[0] if accuracies else 0.0
    for now in range(every, len(accuracies), every):
        rises = sum(accuracies[epoch + 1] > accuracies[epoch] for epoch in range(now - every, now))
        highest = max(accuracies[: now + 1])
        back = rises < share * every or (not halved and highest == best)
        halved, best = back, highest
        if back:
            rate /= 2
        if rate < least:
            return Pace(rate / lr, back, True)
    return Pace(rate / lr, back and (len(accuracies) - 1) % every == 0, False)
