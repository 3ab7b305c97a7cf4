"""The sparse coding model: features X of which about k are active, seen as Z = M X + noise with an orthogonal M.

Several runs stand side by side in the leading dimension R. Runs with the same seed see the same numbers.
Shapes: x, z (R, B, d); y (R, B, 1) of -1 and 1; theta (R, d, 1); dictionary M (R, d, d).
Source: arXiv:2401.15248, section 4. The law of the active features and the noise are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastadv.errors import SettingsError
from fastadv.seeds import generator

# What a random stream is for: the first part of its seed after that of the run.
DICTIONARY, TASK, WEIGHTS, TRAINING, HEAD, TEST = range(6)


@dataclass(frozen=True, kw_only=True)
class SparseCoding:
    """How the features are drawn. Each is active with probability k/d, and then +-U(0.5, 1.5)/sqrt(k)."""

    d: int = 100
    """Features, and dimensions of what is seen."""
    k: float = 5.0
    """Active features on average."""
    sigma: float = 0.02
    """Standard deviation of the noise in every dimension of z."""

    def __post_init__(self) -> None:
        if self.d < 2:
            raise SettingsError(f"d is {self.d}", "--d takes a whole number, 2 or more")
        if not 0 < self.k <= self.d:
            raise SettingsError(f"k is {self.k:g} of d = {self.d} features", f"--k above 0, at most {self.d}")
        if not 0 <= self.sigma < math.inf:
            raise SettingsError(f"sigma is {self.sigma:g}", "--sigma takes 0 or more")


class Draw(NamedTuple):
    """A batch: features x and what is seen of them, z."""

    x: Tensor
    z: Tensor


class Pairs(NamedTuple):
    """A batch of pairs z and other; sign (R, B, 1) is 1 where both show the same features, -1 elsewhere."""

    z: Tensor
    other: Tensor
    sign: Tensor


class World:
    """R problems: a dictionary for each seed, and the streams and tasks that belong to it."""

    def __init__(self, coding: SparseCoding, seeds: Sequence[int]) -> None:
        self.coding, self.seeds = coding, tuple(seeds)
        self.dictionary = torch.stack([self._dictionary(seed) for seed in self.seeds])

    def theta(self, task: int) -> Tensor:
        """The weights (R, d, 1) of -1 and 1 of a task: 0 is that of pre-training, 1 that of the user downstream."""
        bits = [torch.rand(self.coding.d, 1, generator=generator("cpu", seed, TASK, task)) for seed in self.seeds]
        return torch.sign(torch.stack(bits) - 0.5)

    def stream(self, purpose: int) -> Stream:
        """Random batches, the same ones for the same purpose."""
        return Stream(self, purpose)

    def _dictionary(self, seed: int) -> Tensor:
        square = torch.randn(self.coding.d, self.coding.d, generator=generator("cpu", seed, DICTIONARY))
        orthogonal: Tensor = torch.linalg.qr(square)[0]
        return orthogonal


class Stream:
    """Fresh batches of a world, one random stream per seed."""

    def __init__(self, world: World, purpose: int) -> None:
        self.world, coding = world, world.coding
        self._generators = {seed: generator("cpu", seed, purpose) for seed in dict.fromkeys(world.seeds)}
        self._places = torch.tensor([list(self._generators).index(seed) for seed in world.seeds])
        self._mixed = world.dictionary.mT.contiguous()
        self._share, self._scale = coding.k / coding.d, 1 / math.sqrt(coding.k)

    def features(self, n: int) -> Tensor:
        """x (R, n, d)."""
        # One number says all: below the share the feature is active, and where below tells its sign and its size.
        place = self.uniform(n, self.world.coding.d) / self._share
        size = torch.where(place < 0.5, 0.5 + 2 * place, 0.5 - 2 * place) * self._scale
        return torch.where(place < 1, size, 0.0)

    def see(self, x: Tensor) -> Tensor:
        """What is seen of the features, with fresh noise."""
        return torch.baddbmm(self.normal(*x.shape[1:]), x, self._mixed, beta=self.world.coding.sigma)

    def draw(self, n: int) -> Draw:
        """n samples for every run."""
        x = self.features(n)
        return Draw(x, self.see(x))

    def pairs(self, n: int) -> Pairs:
        """n pairs for every run: the first half similar (same features, own noise), the others independent."""
        x, half = self.features(n), n // 2
        sign = torch.ones(len(x), n, 1)
        sign[:, half:] = -1
        return Pairs(self.see(x), self.see(torch.cat([x[:, :half], self.features(n - half)], 1)), sign)

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers (R, *shape)."""
        return self._runs([torch.randn(shape, generator=each) for each in self._generators.values()])

    def uniform(self, *shape: int) -> Tensor:
        """Numbers of [0, 1), (R, *shape)."""
        return self._runs([torch.rand(shape, generator=each) for each in self._generators.values()])

    def _runs(self, drawn: list[Tensor]) -> Tensor:
        stacked = torch.stack(drawn)
        return stacked if len(drawn) == len(self._places) else stacked[self._places]


def label(x: Tensor, theta: Tensor) -> Tensor:
    """y (R, B, 1): the sign of theta . x, 1 where nothing is active."""
    return torch.where(x @ theta >= 0, 1.0, -1.0)
