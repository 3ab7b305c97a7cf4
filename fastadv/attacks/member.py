"""What the attacks of AutoAttack have in common: a value that is the attack, in a fast and in a parity mode.

Shapes: x, adv (B, C, H, W) float32; y, index, success, loss (B,).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastadv.attacks.ledger import Ledger
from fastadv.engine import PRECISIONS, shadow_passes
from fastadv.errors import SettingsError
from fastadv.inputs import check_inputs
from fastadv.losses import AttackLoss
from fastadv.passes import Passes
from fastadv.pgd import AttackResult
from fastadv.registry import did_you_mean
from fastadv.threat import ThreatModel

Mode = Literal["fast", "parity"]


@dataclass(frozen=True, kw_only=True)
class Member(ABC):
    """An attack as a frozen value, ``(model, x, y, threat) -> adv``."""

    seed: int = 0
    """Of everything random."""
    mode: Mode = "fast"
    """fast or parity."""
    precision: str = "fp32"
    """Of the passes in fast mode: fp32, bf16, or auto. A success counts when float32 confirms it."""

    def __post_init__(self) -> None:
        for name, known in (("mode", get_args(Mode)), ("precision", PRECISIONS)):
            self._check_word(name, known)
        if self.mode == "parity" and self.precision != "fp32":
            raise SettingsError(f"precision is {self.precision!r} in parity mode", 'precision="fp32", or mode="fast"')

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, *, index: Tensor | None = None
    ) -> Tensor:
        """The images found, like x. See :meth:`run`."""
        return self.run(model, x, y, threat, index=index).adv

    def run(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, *, index: Tensor | None = None
    ) -> AttackResult:
        """For each image one in the ball that fools the model, else (fast) the worst one tried or (parity) x itself.

        index: int64 (B,), the images' numbers, on which their noise depends in fast mode; 0, 1, 2, ... without it.
        Success is judged in float32, the loss is the margin.
        Raises: SettingsError or DataError for what cannot be meant; NonFiniteGradientError for NaN or infinity.
        """
        given = check_inputs(x, y, threat, None, None)
        names = torch.arange(len(x), device=x.device) if index is None else index.to(x.device)
        objective = self._objective()
        if self.mode == "parity":
            passes = Passes(model, objective, "eval", given.num_labels)
        else:
            labels, seeded = given.num_labels, self._is_seeded()
            passes = shadow_passes(model, objective, num_labels=labels, precision=self.precision, seeded=seeded)
        with passes.opened(x.device):
            ledger = Ledger(passes, given, threat, names, fast=self.mode == "fast")
            self._attack(passes, ledger, threat)
            return ledger.result()

    @abstractmethod
    def _objective(self) -> AttackLoss:
        """What the passes' gradients climb."""

    @abstractmethod
    def _attack(self, passes: Passes, ledger: Ledger, threat: ThreatModel) -> None:
        """Offer the ledger what is found; ``passes`` are open."""

    def _is_seeded(self) -> bool:
        """Whether gradients may start from cross-entropy's own, without computing the loss."""
        return False

    def _check_count(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < 1:
                raise SettingsError(f"{name} is {value}", "give a whole number, 1 or more")

    def _check_word(self, name: str, known: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in known:
            raise SettingsError(f"unknown {name} {value!r}", did_you_mean(str(value), known))
