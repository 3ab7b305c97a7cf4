"""APGD: projected gradient ascent that needs no step size, on cross-entropy or on the difference of logits ratio.

Shapes: x, adv (B, C, H, W) float32; y, index, success, loss (B,).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastadv.attacks.adaptive import Ascent
from fastadv.attacks.ledger import Ledger
from fastadv.attacks.momentum import unit
from fastadv.attacks.targets import Objective, likely_targets
from fastadv.engine import PRECISIONS, shadow_passes
from fastadv.errors import SettingsError
from fastadv.inputs import check_inputs
from fastadv.passes import Passes
from fastadv.pgd import AttackResult
from fastadv.registry import did_you_mean
from fastadv.seeds import mix
from fastadv.threat import ThreatModel

Loss = Literal["ce", "dlr", "dlr-targeted"]
Mode = Literal["fast", "parity"]


@dataclass(frozen=True, kw_only=True)
class APGD:
    """The settings of APGD as a value that is itself the attack, ``(model, x, y, threat) -> adv``.

    mode="fast": an image leaves the run at the first iterate that fools the model, its noise is a function of (seed,
    its number, loss, run), and iterates stay inside the ball exactly. mode="parity": the published code's random
    numbers, batches and roundings, every image to the end of each run; what comes back is brought into the ball
    exactly, and judged after that. Source: Croce and Hein, arXiv:2003.01690; parity: pyautoattack 0.2.0.
    """

    loss: Loss = "ce"
    """What to climb: cross-entropy, the difference of logits ratio (3 classes), or that towards targets (4 classes)."""
    steps: int = 100
    """Gradient steps of a run."""
    restarts: int = 1
    """Runs from new random starts, for the images not broken before; dlr-targeted: for each target."""
    targets: int = 9
    """Classes dlr-targeted tries, the likeliest first; at most all but y."""
    rho: float = 0.75
    """The step size is halved when the loss rose in at most this share of steps."""
    eot: int = 1
    """Gradients averaged at each step, for models that are random."""
    seed: int = 0
    """Of the random starts."""
    mode: Mode = "fast"
    """fast or parity."""
    precision: str = "fp32"
    """Of the gradient passes in fast mode: fp32, bf16, or auto. A success counts when float32 confirms it."""

    def __post_init__(self) -> None:
        for name in ("steps", "restarts", "targets", "eot"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < 1:
                raise SettingsError(f"{name} is {value}", "give a whole number, 1 or more")
        if not 0 <= self.rho <= 1:
            raise SettingsError(f"rho is {self.rho}", "give a share between 0 and 1, as in rho=0.75")
        for name, known in (("loss", get_args(Loss)), ("mode", get_args(Mode)), ("precision", PRECISIONS)):
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

        index: int64 (B,), the images' numbers, on which their noise depends in fast mode; 0, 1, 2, ... without it.
        Success is judged in float32, the loss is the margin.
        Raises: SettingsError or DataError for what cannot be meant; NonFiniteGradientError for NaN or infinity.
        """
        given = check_inputs(x, y, threat, None, None)
        names = torch.arange(len(x), device=x.device) if index is None else index.to(x.device)
        objective = Objective(self.loss)
        if self.mode == "parity":
            passes = Passes(model, objective, "eval", given.num_labels)
        else:
            # Over several passes of a random model the gradients' lengths matter, so the loss gives them.
            seeded = self.loss == "ce" and self.eot == 1
            passes = shadow_passes(
                model, objective, num_labels=given.num_labels, precision=self.precision, seeded=seeded
            )
        with passes.opened(x.device):
            ledger = Ledger(passes, given, threat, names, fast=self.mode == "fast")
            self._attack(ledger, Ascent(self, passes, objective, threat))
            return ledger.result()

    def _attack(self, ledger: Ledger, ascent: Ascent) -> None:
        noise, parity = torch.Generator().manual_seed(self.seed), self.mode == "parity"
        for rank, run in self._runs(ledger.clean.shape[1]):
            left = ledger.left()
            if not len(left):
                break
            x, y, names = ledger.x[left], ledger.y[left], ledger.names[left]
            target = y
            if self.loss == "dlr-targeted":
                # Parity asks anew, as the last digit of a logit depends on the batch.
                logits = ascent.passes.score(x) if parity else ledger.clean[left]
                target = likely_targets(logits, self.targets)[:, rank]
            found = ascent.run(x, y, target, self._start(x, ledger.threat, names, noise, run), names)
            if parity:
                ledger.offer(left[found.success], found.adv[found.success], only_fooling=True)
            else:
                ledger.offer(left, found.adv)

    def _runs(self, classes: int) -> Iterator[tuple[int, int]]:
        """The rank of the target and the number of the run, for each run."""
        ranks = min(self.targets, classes - 1) if self.loss == "dlr-targeted" else 1
        for run in range(ranks * self.restarts):
            yield run // self.restarts, run

    def _start(self, x: Tensor, threat: ThreatModel, names: Tensor, noise: torch.Generator, run: int) -> Tensor:
        """A random point for each image: noise of length eps in the threat's norm, cut by the box."""
        draw = torch.rand if threat.norm == "linf" else torch.randn
        if self.mode == "parity":
            drawn = draw(x.shape, generator=noise)
        else:
            drawn = torch.empty(x.shape)
            for image, name in zip(drawn, names.tolist(), strict=True):
                noise.manual_seed(mix(self.seed, name, get_args(Loss).index(self.loss), run))
                image.copy_(draw(image.shape, generator=noise))
        if threat.norm == "linf":
            drawn = 2 * drawn - 1
        start = x + unit(drawn.to(x.device), threat.norm) * threat.eps
        # Into a tensor like x, so that the strides are x's: the fused step walks both in memory order.
        return torch.empty_like(x).copy_(
            start.clamp(*threat.box) if self.mode == "parity" else threat.project(start, x)
        )
