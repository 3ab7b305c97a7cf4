"""APGD: projected gradient ascent that needs no step size, on cross-entropy or on the difference of logits ratio.

Shapes: x, adv (B, C, H, W) float32; y, index, success, loss (B,).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fastadv.attacks.adaptive import Ascent
from fastadv.attacks.ledger import Ledger
from fastadv.attacks.member import Member
from fastadv.attacks.momentum import unit
from fastadv.attacks.targets import Objective, likely_targets
from fastadv.errors import SettingsError
from fastadv.passes import Passes
from fastadv.seeds import mix
from fastadv.threat import ThreatModel

Loss = Literal["ce", "dlr", "dlr-targeted"]


@dataclass(frozen=True, kw_only=True)
class APGD(Member):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_count("steps", "restarts", "targets", "eot")
        self._check_word("loss", get_args(Loss))
        if not 0 <= self.rho <= 1:
            raise SettingsError(f"rho is {self.rho}", "give a share between 0 and 1, as in rho=0.75")

    def _objective(self) -> Objective:
        return Objective(self.loss)

    def _is_seeded(self) -> bool:
        # Over several passes of a random model the gradients' lengths matter, so the loss gives them.
        return self.loss == "ce" and self.eot == 1

    def _attack(self, passes: Passes, ledger: Ledger, threat: ThreatModel) -> None:
        assert isinstance(passes.loss, Objective)
        ascent = Ascent(self, passes, passes.loss, threat)
        noise, parity = torch.Generator().manual_seed(self.seed), self.mode == "parity"
        for rank, run in self._runs(ledger.clean.shape[1]):
            left = ledger.left()
            if not len(left):
                break
            x, y, names = ledger.x[left], ledger.y[left], ledger.names[left]
            target = y
            if self.loss == "dlr-targeted":
                # Parity asks anew, as the last digit of a logit depends on the batch.
                logits = passes.score(x) if parity else ledger.clean[left]
                target = likely_targets(logits, self.targets)[:, rank]
            found = ascent.run(x, y, target, self._start(x, threat, names, noise, run), names)
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
