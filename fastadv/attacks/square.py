"""Square: a random search that needs only logits. It recolours one square per query and keeps what raises the margin.

Shapes: x, adv (B, C, H, W) float32; y, index, success, loss (B,).
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastadv.attacks.ledger import Ledger
from fastadv.attacks.recolouring import Search
from fastadv.engine import PRECISIONS, shadow_passes
from fastadv.errors import DataError, SettingsError
from fastadv.inputs import check_inputs
from fastadv.losses import margin
from fastadv.passes import Passes
from fastadv.pgd import AttackResult
from fastadv.registry import did_you_mean
from fastadv.threat import ThreatModel

Mode = Literal["fast", "parity"]


@dataclass(frozen=True, kw_only=True)
class Square:
    """The settings of Square as a value that is itself the attack, ``(model, x, y, threat) -> adv``.

    All images are asked about the same squares. mode="fast": squares and colours are a function of (seed, restart,
    query), the first stripes of an image also of its number; images leave when they are broken. mode="parity": the
    published code's random numbers, batches and roundings. Source: Andriushchenko et al., arXiv:1912.00049, algorithms
    1 to 3, with the margin loss; parity: pyautoattack 0.2.0 without rescaling the schedule, as AutoAttack uses it.
    """

    queries: int = 5000
    """Images shown to the model in each run, after the stripes it starts from."""
    p_init: float = 0.8
    """Share of the image that the first squares cover. It is halved after 10, 50, 200, 500, ... queries."""
    restarts: int = 1
    """Runs, for the images not broken before."""
    seed: int = 0
    """Of stripes, squares and colours."""
    mode: Mode = "fast"
    """fast or parity."""
    precision: str = "fp32"
    """Of the queries in fast mode: fp32, bf16, or auto. A success counts when float32 confirms it."""

    def __post_init__(self) -> None:
        for name in ("queries", "restarts"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < 1:
                raise SettingsError(f"{name} is {value}", "give a whole number, 1 or more")
        if not 0 < self.p_init <= 1:
            raise SettingsError(f"p_init is {self.p_init}", "give a share above 0, at most 1, as in p_init=0.8")
        for name, known in (("mode", get_args(Mode)), ("precision", PRECISIONS)):
            value = getattr(self, name)
            if value not in known:
                raise SettingsError(f"unknown {name} {value!r}", did_you_mean(str(value), known))
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
        """For each image one that fools the model, else (fast) the one with the largest margin or (parity) x itself.

        index: int64 (B,), the images' numbers, on which their stripes depend in fast mode; 0, 1, 2, ... without it.
        Success is judged in float32, the loss is the margin.
        Raises: SettingsError or DataError for what cannot be meant; NonFiniteGradientError for NaN or infinity.
        """
        given = check_inputs(x, y, threat, None, None)
        if threat.norm == "l2" and min(x.shape[2:]) < 5:
            raise DataError(f"x has shape {tuple(x.shape)}", "Square in l2 tiles images of 5x5 pixels or more")
        names = torch.arange(len(x), device=x.device) if index is None else index.to(x.device)
        if self.mode == "parity":
            passes = Passes(model, margin, "eval", given.num_labels)
        else:
            passes = shadow_passes(model, margin, num_labels=given.num_labels, precision=self.precision)
        with passes.opened(x.device):
            ledger = Ledger(passes, given, threat, names, fast=self.mode == "fast")
            Search(self, passes, threat, ledger).go()
            return ledger.result()
