"""AutoAttack: the stages one after another, each on the images that survived those before it.

Shapes: x, adv (n, C, H, W) float32; y, robust, broken_by (n,).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastadv.attacks.adaptive import refuse_nonfinite
from fastadv.attacks.flags import model_flags, square_flag
from fastadv.attacks.stages import Stage, Version, stages
from fastadv.attacks.store import Batch, Store, card
from fastadv.attacks.verdicts import CLEAN_WRONG, SURVIVED, Verdicts
from fastadv.engine import PRECISIONS
from fastadv.errors import SettingsError
from fastadv.inputs import Inputs, check_inputs
from fastadv.losses import margin, misclassified
from fastadv.passes import Passes, unwrapped
from fastadv.registry import did_you_mean
from fastadv.shadow import device_of
from fastadv.sharing import Share, shared
from fastadv.threat import ThreatModel

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class AutoAttack:
    """The settings of AutoAttack. Source: Croce and Hein, arXiv:2003.01690; parity: pyautoattack 0.2.0."""

    version: Version = "standard"
    """standard: apgd-ce, apgd-t, fab-t, square. plus: two more, and more restarts. rand: for models that are random."""
    mode: Literal["fast", "parity"] = "fast"
    """parity: the published code's random numbers and roundings, for the same verdict on every image."""
    seed: int = 0
    """Of all stages."""
    batch_size: int = 256
    """Images in a batch. In parity mode the result depends on it, in fast mode by rounding only."""
    precision: str = "fp32"
    """Of the passes inside the attacks in fast mode: fp32, bf16, or auto. Float32 confirms every success."""

    def __post_init__(self) -> None:
        if not isinstance(self.batch_size, Integral) or self.batch_size < 1:
            raise SettingsError(f"batch_size is {self.batch_size}", "give a whole number, 1 or more")
        known = (("version", get_args(Version)), ("mode", ("fast", "parity")), ("precision", PRECISIONS))
        for name, choices in known:
            value = getattr(self, name)
            if value not in choices:
                raise SettingsError(f"unknown {name} {value!r}", did_you_mean(str(value), choices))
        if self.mode == "parity" and self.precision != "fp32":
            raise SettingsError(f"precision is {self.precision!r} in parity mode", 'precision="fp32", or mode="fast"')

    def __str__(self) -> str:
        return f"AutoAttack {self.version}" + (", parity" if self.mode == "parity" else "")

    def run(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        state: Path | None = None,
        progress: Progress | None = None,
    ) -> Verdicts:
        """The verdict on every image. x and y may lie on another device than the model; results lie where x does.

        state: a folder that remembers every finished batch; with the same model, images and settings an interrupted run
        goes on there. progress: called with each line of the published code's log. Under torchrun, or with a process
        group, every process passes the same x and y, takes every so-many-th batch, and gets the whole verdict.
        Raises: SettingsError or DataError for what cannot be meant; CheckpointError for a state folder of another model
        or other images; NonFiniteGradientError for NaN or infinity, naming images.
        """
        given = check_inputs(x, y, threat, None, None)
        with shared() as share:
            return _Run(self, model, given, threat, share, progress or _silent).go(state)


class _Run:
    """One AutoAttack on its way."""

    def __init__(
        self, attack: AutoAttack, model: nn.Module, given: Inputs, threat: ThreatModel, share: Share, say: Progress
    ) -> None:
        self.attack, self.model, self.threat, self.share, self.say = attack, unwrapped(model), threat, share, say
        self.x, self.y, self.num_labels = given.x, given.y, given.num_labels
        self.device, self.began = device_of(self.model), time.perf_counter()
        self.adv = self.x.clone()
        self.broken_by = torch.full_like(self.y, SURVIVED, dtype=torch.int8)
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []

    def go(self, folder: Path | None) -> Verdicts:
        """All stages."""
        store = self._store(folder)
        if len(self.x):
            chosen = self._prepare()
            for place, stage in enumerate(chosen):
                left = self._left()
                if not len(left):
                    names = ", ".join(stage.name for stage in chosen[place:])
                    self.notes.append(f"no image was left for {names}")
                    self.say("no robust datapoints left, skipping remaining attacks")
                    break
                self._stage(place, stage, left, store)
            self.say(f"robust accuracy: {self._accuracy():.2%}")
        notes = self.notes + store.notes
        robust = self.broken_by == SURVIVED
        return Verdicts(self.adv, robust, self.broken_by, tuple(self.seconds), tuple(self.seconds.values()), notes)

    def _store(self, folder: Path | None) -> Store:
        if folder is None and self.share.size == 1:
            return Store(None, {})
        settings = {"attack": dataclasses.asdict(self.attack), "threat": dataclasses.asdict(self.threat)}
        owner = card(self.model, self.x, self.y, settings)
        self.share.agree(owner)
        with self.share.together():
            if self.share.rank == 0:
                Store(folder, owner)
        # After the first process has made it: together they would write the same file.
        return Store(folder, owner)

    def _prepare(self) -> list[Stage]:
        """The stages, once the model has seen all images as they are: who is right, and what is odd about it."""
        passes = Passes(self.model, margin, "eval", self.num_labels)
        with passes.opened(self.device):
            for rows in torch.arange(len(self.x), device=self.x.device).split(self.attack.batch_size):
                x, y = self.x[rows].to(self.device), self.y[rows].to(self.device)
                logits = passes.score(x)
                refuse_nonfinite(logits.isfinite().all(1), rows.to(self.device), "for images as they are")
                self.broken_by[rows[misclassified(logits, y).to(rows.device)]] = CLEAN_WRONG
                if rows[0] == 0:
                    self.notes += model_flags(passes, x, y, logits, random_expected=self.attack.version == "rand")
        self.say(f"initial accuracy: {self._accuracy():.2%}")
        settings = {"seed": self.attack.seed, "mode": self.attack.mode, "precision": self.attack.precision}
        chosen, notes = stages(self.attack.version, logits.shape[1], **settings)
        self.notes += notes
        self.say(f"using {self.attack.version} version including {', '.join(stage.name for stage in chosen)}.")
        return chosen

    def _stage(self, place: int, stage: Stage, left: Tensor, store: Store) -> None:
        """One stage on the images ``left``: this process's batches, then what all processes found."""
        batches = left.split(self.attack.batch_size)
        found: dict[int, Batch] = {}
        with self.share.together():
            for number, rows in enumerate(batches):
                if self.share.owns(number):
                    known = store.read(stage.name, number, rows)
                    found[number] = known or self._attack(stage, rows)
                    if known is None:
                        store.write(stage.name, number, rows, found[number])
                    if self.share.size == 1:
                        self._note(place, stage, number, len(batches), rows, found.pop(number))
        for number, rows in enumerate(batches if self.share.size > 1 else ()):
            told = self._told(number, rows, found.pop(number, None))
            self._note(place, stage, number, len(batches), rows, told)
        if stage.name == "square" and place:
            self.notes += square_flag(len(left), len(self._left()), len(self.x))
        spent = time.perf_counter() - self.began
        self.say(f"robust accuracy after {stage.name.upper()}: {self._accuracy():.2%} (total time {spent:.1f} s)")

    def _attack(self, stage: Stage, rows: Tensor) -> Batch:
        """What the stage does to the images ``rows``."""
        began = time.perf_counter()
        x, y, index = (tensor[rows].to(self.device) for tensor in (self.x, self.y, torch.arange(len(self.x))))
        result = stage.attack.run(self.model, x, y, self.threat, index=index)
        broken = result.success.to(self.x.device)
        adv = result.adv[result.success].to(self.x.device)
        return Batch(broken, adv, time.perf_counter() - began)

    def _told(self, number: int, rows: Tensor, found: Batch | None) -> Batch:
        """What the owner of a batch found, in every process."""
        blank = Batch(torch.zeros(len(rows), dtype=torch.bool), torch.empty(0), 0.0)
        broken, seconds = (found or blank).broken, (found or blank).seconds
        broken = self.share.tell(number, broken.to(torch.uint8)).bool()
        told = self.share.tell(number, torch.tensor([seconds], dtype=torch.float64))
        adv = found.adv if found else self.x.new_empty(int(broken.sum()), *self.x.shape[1:])
        return Batch(broken, self.share.tell(number, adv), float(told))

    def _note(self, place: int, stage: Stage, number: int, count: int, rows: Tensor, found: Batch) -> None:
        """Enter what a stage did to a batch."""
        broken = rows[found.broken.to(rows.device)]
        self.adv[broken] = found.adv.to(self.x.device)
        self.broken_by[broken] = place
        self.seconds[stage.name] = self.seconds.get(stage.name, 0.0) + found.seconds
        self.say(f"{stage.name} - {number + 1}/{count} - {len(broken)} out of {len(rows)} successfully perturbed")

    def _left(self) -> Tensor:
        """The numbers of the images that survived so far."""
        return (self.broken_by == SURVIVED).nonzero().squeeze(1)

    def _accuracy(self) -> float:
        return len(self._left()) / len(self.x)


def _silent(line: str) -> None:
    """Where nobody asked for progress."""
