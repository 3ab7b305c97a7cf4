"""Projected gradient descent: its settings and its call, on any module and device. engine.py makes it faster.

Shapes: x, adv (B, C, H, W) float32; y, loss, success (B,); logits (B, classes) float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from fastadv.climb import AttackResult as AttackResult
from fastadv.climb import climb
from fastadv.errors import SettingsError
from fastadv.inputs import check_inputs
from fastadv.losses import ATTACK_LOSSES, AttackLoss, attack_loss
from fastadv.passes import Passes
from fastadv.registry import did_you_mean
from fastadv.threat import ThreatModel

if TYPE_CHECKING:
    from fastadv.engine import Fast

Keep = Literal["last", "best", "success"]
Mode = Literal["eval", "as-is"]


@dataclass(frozen=True, kw_only=True)
class PGD:
    """The settings of :func:`pgd` as a value that is itself the attack, ``(model, x, y, threat) -> adv``."""

    steps: int = 10
    """Gradient steps. 0 gives the start."""
    step_size: float = 2 / 255
    """Length of a step in the threat's norm, in pixel units."""
    random_start: bool = True
    """Start from a random point of the ball instead of x."""
    loss: str | AttackLoss = "ce"
    """What to climb: ce, dlr, margin, or a function (logits, y) -> (B,)."""
    targeted: bool = False
    """y holds the classes to reach; the loss is descended."""
    keep: Keep = "last"
    """Per image: the final iterate, the one with the best loss, or the first that fools the model (else the best)."""
    restarts: int = 1
    """Runs from new random starts. keep="last" then means the first final iterate that fools, else the best one."""
    mode: Mode = "eval"
    """eval: every module in eval mode while attacking. as-is: the model's own modes."""

    def __post_init__(self) -> None:
        for name, value, least in (("steps", self.steps, 0), ("restarts", self.restarts, 1)):
            if not isinstance(value, Integral) or value < least:
                raise SettingsError(f"{name} is {value}", f"give a whole number, {least} or more")
        if not isinstance(self.step_size, Real | Tensor):
            raise SettingsError(f"step_size is {self.step_size!r}", "give a number in pixel units, as in 2/255")
        if not 0 <= self.step_size < math.inf:
            raise SettingsError(f"step_size is {self.step_size}", "give 0 or more; targeted=True descends")
        if self.restarts > 1 and not self.random_start:
            raise SettingsError(
                f"restarts is {self.restarts} without a random start", "random_start=True, or restarts=1"
            )
        if not callable(self.loss) and self.loss not in ATTACK_LOSSES:
            raise SettingsError(f"unknown loss {self.loss!r}", did_you_mean(str(self.loss), ATTACK_LOSSES))
        for name, choice, known in (("keep", self.keep, get_args(Keep)), ("mode", self.mode, get_args(Mode))):
            if choice not in known:
                raise SettingsError(f"unknown {name} {choice!r}", did_you_mean(str(choice), known))

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        eps: Tensor | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The images kept, like x. See :func:`pgd`."""
        return self._attack(model, x, y, threat, eps, mask, generator, scored=False).adv

    def run(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        eps: Tensor | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> AttackResult:
        """The images kept, whether they fool the model, and their loss. keep="last" costs one forward pass more."""
        return self._attack(model, x, y, threat, eps, mask, generator, scored=True)

    def on(self, model: nn.Module, precision: str = "auto", compile: str = "auto", capture: str = "auto") -> Fast:
        """The same attack bound to ``model``, and faster. See :func:`fastadv.engine.accelerate`."""
        from fastadv.engine import accelerate

        return accelerate(self, model, precision=precision, compile=compile, capture=capture)

    def _attack(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        eps: Tensor | None,
        mask: Tensor | None,
        generator: torch.Generator | None,
        *,
        scored: bool,
    ) -> AttackResult:
        given = check_inputs(x, y, threat, eps, mask)
        passes = Passes(model, attack_loss(self.loss), self.mode, given.num_labels)
        result, health = climb(self, passes, given, threat, generator, scored=scored)
        health.check()
        return result


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    steps: int = 10,
    step_size: float = 2 / 255,
    random_start: bool = True,
    loss: str | AttackLoss = "ce",
    targeted: bool = False,
    keep: Keep = "last",
    restarts: int = 1,
    eps: Tensor | None = None,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    mode: Mode = "eval",
) -> Tensor:
    """Images in the ball of ``threat`` around ``x`` that raise the loss of ``model``.

    x: float32 (B, C, H, W) inside the threat's box; y: int64 (B,). The images come back detached, laid out like ``x``
    and inside the ball exactly (in float64). The model is left as it was: modes, buffers, requires_grad, gradients.
    eps (B,) replaces the threat's radius; mask broadcasts to x, 0 where nothing may change; noise is drawn from
    ``generator``, without one from the global stream, as torch.rand does. The other settings: see :class:`PGD`.
    keep="last" costs ``steps`` forward and backward passes; the others, and restarts, score final iterates too.

    Raises: SettingsError or DataError (ValueErrors) for what cannot be meant; NonFiniteGradientError (a ValueError) for
    gradients or logits that are NaN or infinite.
    Source: Madry et al., arXiv:1706.06083, section 2.1.

    Coming from torchattacks, instead of ``PGD(model, eps=8/255, alpha=2/255, steps=10)(x, y)``::

        from fastadv.pgd import pgd
        from fastadv.threat import ThreatModel
        adv = pgd(model, x, y, ThreatModel("linf", 8 / 255), steps=10, step_size=2 / 255)

    Coming from foolbox, instead of ``LinfPGD(rel_stepsize=0.25, steps=10)(PyTorchModel(model, (0, 1)), x, y,
    epsilons=8/255)``::

        from fastadv.pgd import PGD
        from fastadv.threat import ThreatModel
        adv, success, loss = PGD(steps=10, step_size=0.25 * 8 / 255).run(model, x, y, ThreatModel("linf", 8 / 255))
    """
    settings = PGD(
        steps=steps,
        step_size=step_size,
        random_start=random_start,
        loss=loss,
        targeted=targeted,
        keep=keep,
        restarts=restarts,
        mode=mode,
    )
    return settings(model, x, y, threat, eps=eps, mask=mask, generator=generator)
