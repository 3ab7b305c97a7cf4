"""What all experiments share: the settings, the worlds that they make, and studies that several of them read."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastadv.errors import SettingsError
from fastadv.page import Block
from fastadv.purification.marks import Mark
from fastadv.purification.network import Activation
from fastadv.purification.sparse import SparseCoding, World
from fastadv.purification.training import Kind, Trained, Training, check_learned
from fastadv.runfolder import write_whole

# Thresholds that training starts from; a hard one has to be near the smallest active feature to purify.
THRESHOLDS: dict[Activation, float] = {"soft": 0.03, "hard": 0.1}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the laboratory; the pass marks belong to the defaults."""

    d: int = 100
    """Features, and dimensions of what is seen."""
    k: float = 5.0
    """Active features on average."""
    sigma: float = 0.02
    """Standard deviation of the noise in every dimension."""
    units: int = 200
    """Hidden units."""
    eps: float = 0.2
    """Radius (l2) of training and evaluation: between 1/sqrt(d) and 0.7/sqrt(k)."""
    steps: int = 1500
    """Of every pre-training."""
    batch_size: int = 256
    """Fresh samples, or pairs, in every step."""
    head_steps: int = 400
    """Of every downstream head."""
    temperature: float = 1.0
    """Of the contrastive loss."""
    samples: int = 1000
    """Samples per seed behind every accuracy."""
    seed: int = 0
    """The first seed."""
    seeds: int = 3
    """How many seeds, counted from the first."""

    def __post_init__(self) -> None:
        SparseCoding(d=self.d, k=self.k, sigma=self.sigma)
        Training(units=self.units, steps=self.steps, batch_size=self.batch_size, temperature=self.temperature)
        if not 0 < self.eps < math.inf:
            raise SettingsError(f"eps is {self.eps:g}", "--eps takes a number above 0")
        if self.batch_size < 2:
            raise SettingsError(
                f"batch_size is {self.batch_size}",
                "--batch-size 2 or more: contrastive batches hold pairs of two kinds",
            )
        for name, least in (("head_steps", 0), ("samples", 2), ("seeds", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise SettingsError(
                    f"{name} is {getattr(self, name)}", f"--{name.replace('_', '-')} takes {least} or more"
                )


@dataclass(frozen=True)
class Lab:
    """The laboratory at these settings; with a folder, studies are kept there and not made twice."""

    settings: Settings
    folder: Path | None = None

    @property
    def seeds(self) -> range:
        """The seeds of all runs."""
        return range(self.settings.seed, self.settings.seed + self.settings.seeds)

    def coding(self, d: int | None = None, sigma: float | None = None) -> SparseCoding:
        """The sparse coding model, possibly with another d or sigma."""
        s = self.settings
        return SparseCoding(d=d or s.d, k=s.k, sigma=s.sigma if sigma is None else sigma)

    def world(self, d: int | None = None, copies: int = 1, sigma: float | None = None) -> World:
        """A world with a run for every seed, ``copies`` times over."""
        return World(self.coding(d, sigma), [*self.seeds] * copies)

    def training(self, activation: Activation = "soft", attack: Kind = "none", **changes: Any) -> Training:
        """How a hidden layer is trained at these settings."""
        s = self.settings
        own = Training(
            attack=attack,
            activation=activation,
            threshold=THRESHOLDS[activation],
            units=s.units,
            steps=s.steps,
            batch_size=s.batch_size,
            temperature=s.temperature,
        )
        return dataclasses.replace(own, **changes)

    def learned(self, trained: Trained, eps: float) -> Trained:
        """The training itself where it learned something. Raises CollapseError elsewhere."""
        check_learned(trained, self.seeds, eps, self.settings.k)
        return trained

    def study(self, name: str, compute: Callable[[Lab], dict[str, Any]]) -> dict[str, Any]:
        """What ``compute(lab)`` finds, read from the folder where an experiment before has left it there."""
        path = self.folder and self.folder / f"study-{name}.json"
        if path and path.exists():
            saved: dict[str, Any] = json.loads(path.read_text())
            return saved
        found = compute(self)
        if path:
            write_whole(path, json.dumps(found))
        return found


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One experiment: ``run`` finds marks and numbers (JSON), ``show`` draws the numbers."""

    key: str
    """E0 to E8."""
    name: str
    """In one or two words, for the command line."""
    title: str
    question: str
    """What is asked, and how, in a few sentences."""
    run: Callable[[Lab], tuple[list[Mark], dict[str, Any]]]
    show: Callable[[dict[str, Any]], Sequence[Block]]
