"""FAB: the nearest image of another class, found by projections onto the linearised boundary.

Shapes: x, adv (B, C, H, W) float32; y, index, success, loss (B,).
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastadv.attacks.ledger import Ledger
from fastadv.attacks.nearest import Search, advantage
from fastadv.engine import PRECISIONS, shadow_passes
from fastadv.errors import SettingsError
from fastadv.inputs import check_inputs
from fastadv.passes import Passes
from fastadv.pgd import AttackResult
from fastadv.registry import did_you_mean
from fastadv.threat import ThreatModel

Mode = Literal["fast", "parity"]


@dataclass(frozen=True, kw_only=True)
class FAB:
    """The settings of FAB as a value that is itself the attack, ``(model, x, y, threat) -> adv``.

    It looks for the nearest image of another class, whatever the radius, and succeeds where that is inside the ball.
    mode="fast": one pass through the model and back per step; an image leaves when one inside the ball is found; the
    nearest image found is drawn into the ball at the end of a run, which may fool the model too; noise is a function of
    (seed, the image's number, run). mode="parity": the published code's random numbers, batches and roundings.
    Source: Croce and Hein, arXiv:1907.02044; parity: pyautoattack 0.2.0.
    """

    targeted: bool = True
    """One run for each of the likeliest other classes; else runs towards whichever boundary seems nearest."""
    steps: int = 100
    """Projections of a run."""
    restarts: int = 1
    """Runs, all but the first from a random start, for the images not broken before; targeted: for each class."""
    targets: int = 9
    """Classes a targeted attack tries, the likeliest first; at most all but y."""
    alpha_max: float = 0.1
    """The largest share of the projection of x itself in a step."""
    eta: float = 1.05
    """How far a projection goes: 1 ends on the boundary."""
    beta: float = 0.9
    """An iterate that fools the model is drawn back to this share of its distance from x."""
    seed: int = 0
    """Of the random starts."""
    mode: Mode = "fast"
    """fast or parity."""
    precision: str = "fp32"
    """Of the gradient passes in fast mode: fp32, bf16, or auto. A success counts when float32 confirms it."""

    def __post_init__(self) -> None:
        for name in ("steps", "restarts", "targets"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < 1:
                raise SettingsError(f"{name} is {value}", "give a whole number, 1 or more")
        for name, most in (("alpha_max", 1), ("eta", 2), ("beta", 1)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise SettingsError(f"{name} is {value}", f"give a number between 0 and {most}")
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
        """For each image one in the ball that fools the model, else (fast) the worst one tried or (parity) x itself.

        index: int64 (B,), the images' numbers, on which their noise depends in fast mode; 0, 1, 2, ... without it.
        Success is judged in float32, the loss is the margin.
        Raises: SettingsError or DataError for what cannot be meant; NonFiniteGradientError for NaN or infinity.
        """
        given = check_inputs(x, y, threat, None, None)
        names = torch.arange(len(x), device=x.device) if index is None else index.to(x.device)
        if self.mode == "parity":
            passes = Passes(model, advantage, "eval", given.num_labels)
        else:
            passes = shadow_passes(model, advantage, num_labels=given.num_labels, precision=self.precision)
        with passes.opened(x.device):
            ledger = Ledger(passes, given, threat, names, fast=self.mode == "fast")
            Search(self, passes, threat, ledger).go()
            return ledger.result()
