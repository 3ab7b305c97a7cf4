"""What a check found, and whether chance alone could have done it.

Shapes: right, many, few (B,) bool.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

# How rarely chance alone may make one check suspicious: a dozen of them then accuse about 1 % of sound models.
ALARM = 1e-3
# The share of the images a gradient attack leaves right that a weaker attack may break on a sound model.
STRAY = 0.02


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    name: str
    """Which check."""
    passed: bool | None
    """True: nothing wrong. False: suspicious. None: not applicable."""
    sentence: str
    """Why, with the numbers."""


def judged(name: str, sound: bool, told: str, trouble: str) -> Finding:
    """The finding that ``told`` (numbers, in lower case) is sound, or that it shows ``trouble``."""
    return Finding(name, sound, f"{told[0].upper()}{told[1:]}." if sound else f"{trouble}: {told}.")


def beaten(name: str, who: str, broken: int, survivors: int) -> Finding:
    """Whether a weaker attack breaks more of the gradient attack's survivors than the few that it may by chance."""
    told = f"{who} {broken} of {survivors} images that the gradient attack leaves right"
    if tail(survivors, survivors, STRAY) >= ALARM:
        return Finding(name, None, f"Too few survivors to tell: {told}.")
    return judged(name, tail(broken, survivors, STRAY) >= ALARM, told, "The gradient attack is beaten")


def beats(many: Tensor, few: Tensor) -> bool:
    """Whether ``many`` holds more than ``few``, beyond chance: the sign test on the images in which they differ."""
    gained, lost = int((many & ~few).sum()), int((few & ~many).sum())
    return tail(gained, gained + lost, 0.5) < ALARM


def tail(hits: int, n: int, share: float) -> float:
    """The probability of ``hits`` or more among ``n`` where each has the probability ``share``."""
    if hits <= 0 or share >= 1:
        return 1.0

    def exactly(k: int) -> float:
        ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        return math.exp(ways + k * math.log(share) + (n - k) * math.log1p(-share))

    return sum(exactly(k) for k in range(hits, n + 1))
