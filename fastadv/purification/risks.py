"""What the sparse coding model says about accuracies, in closed form: clean, purified, and linear or dense.

A network whose units read one feature each has the slope theta on the active features and 0 elsewhere: an attack of
length eps moves it by eps sqrt(A) where A features are active. One that reads everything moves by eps sqrt(d). Given A,
the sum theta . x sqrt(k) is a sum of A numbers +-U(0.5, 1.5): a sum of signs plus one of uniform numbers, so that its
distribution is a mixture of Irwin-Hall distributions.
Source: arXiv:2401.15248, lemma 4.2, for eps sqrt(|active|); the distribution for our features is worked out here.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from fastadv.purification.sparse import SparseCoding

Array = npt.NDArray[np.float64]
# Beyond so many active features the exact sum loses digits, and a normal distribution is as good.
MOST_EXACT = 40


def clean_accuracy(coding: SparseCoding) -> float:
    """The best without attack and noise: the share with an active feature. Of the rest f is 0, which is not right."""
    return 1 - (1 - coding.k / coding.d) ** coding.d


def robust_accuracy(coding: SparseCoding, eps: float, reads: Literal["active", "all"]) -> float:
    """P(y theta . (x + noise) > eps sqrt(n)), the noise on the n features that are read.

    reads: "active" for a purified network, "all" for a linear one; of samples without an active feature none is robust.
    For eps > 0. A purified network is taken not to let the attack or the noise switch units.
    """
    total = 0.0
    for active in range(1, coding.d + 1):
        share = _binomial(coding.d, active, coding.k / coding.d)
        if share > 1e-12:
            number = active if reads == "active" else coding.d
            total += share * _margin(coding, active, eps * math.sqrt(number), coding.sigma * math.sqrt(number))
    return total


def _margin(coding: SparseCoding, active: int, needed: float, noise: float) -> float:
    """P(|S| + noise N > needed) for the sum S of ``active`` features, N standard normal."""
    if noise == 0:
        return float(_larger(np.array([needed * math.sqrt(coding.k)]), active)[0])
    # E g(|S|) = g(0) + the integral of g'(s) P(|S| > s), with g the normal distribution around ``needed``.
    low, high = max(0.0, needed - 9 * noise), needed + 9 * noise
    s = np.linspace(low, high, 2001)
    density = np.exp(-(((s - needed) / noise) ** 2) / 2) / (noise * math.sqrt(2 * math.pi))
    inner = float(np.trapezoid(density * _larger(s * math.sqrt(coding.k), active), s))
    return math.erfc(needed / noise / math.sqrt(2)) / 2 + inner


def _larger(s: Array, active: int) -> Array:
    """P(|sum of ``active`` numbers +-U(0.5, 1.5)| > s)."""
    above = np.zeros_like(s)
    for positive in range(active + 1):
        centre = 2 * positive - active
        above += math.comb(active, positive) / 2**active * (1 - _irwin_hall(s - centre + active / 2, active))
    # The sum is symmetric.
    return 2 * above


def _irwin_hall(x: Array, n: int) -> Array:
    """The distribution function of the sum of n numbers of U(0, 1)."""
    if n > MOST_EXACT:
        return np.array([0.5 * math.erfc(-(each - n / 2) / math.sqrt(n / 6)) for each in x])
    # Its upper half is one minus the lower: there the terms of the alternating sum stay small.
    lower = np.clip(np.minimum(x, n - x), 0, None)
    terms = [(-1) ** j * math.comb(n, j) * np.clip(lower - j, 0, None) ** n for j in range(n // 2 + 1)]
    value: Array = np.sum(terms, axis=0) / math.factorial(n)
    return np.where(x > n / 2, 1 - value, value)


def _binomial(n: int, hits: int, share: float) -> float:
    if share >= 1:
        return float(hits == n)
    ways = math.lgamma(n + 1) - math.lgamma(hits + 1) - math.lgamma(n - hits + 1)
    return math.exp(ways + hits * math.log(share) + (n - hits) * math.log1p(-share))
