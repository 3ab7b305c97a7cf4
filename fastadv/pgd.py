"""Projected gradient descent: what the attack is, on any module and device. engine.py makes the same loop faster.

Shapes: x, adv, grad (B, C, H, W) float32; y, loss, success (B,); logits (B, classes) float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fastadv.errors import SettingsError
from fastadv.inputs import Inputs, check_inputs
from fastadv.losses import ATTACK_LOSSES, AttackLoss, attack_loss, misclassified
from fastadv.passes import Health, Passes
from fastadv.registry import did_you_mean
from fastadv.threat import ThreatModel

if TYPE_CHECKING:
    from fastadv.engine import Fast

Keep = Literal["last", "best", "success"]
Mode = Literal["eval", "as-is"]


class AttackResult(NamedTuple):
    """What an attack found, per image."""

    adv: Tensor
    """The images kept, like x."""
    success: Tensor
    """Whether a scored iterate fooled the model, bool (B,): any iterate, or with keep="last" the final ones alone."""
    loss: Tensor
    """The attack's loss at ``adv``, (B,)."""


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


def climb(
    settings: PGD,
    passes: Passes,
    given: Inputs,
    threat: ThreatModel,
    generator: torch.Generator | None,
    *,
    scored: bool,
) -> tuple[AttackResult, Health]:
    """The loop of the attack, with ``passes`` through the model; nothing in it waits for the device.

    scored=False leaves success and loss unset where finding them would cost a forward pass.
    """
    x, y, eps, mask, _ = given
    threat.check_step(settings.step_size)
    scored = scored or settings.keep != "last" or settings.restarts > 1
    with passes.opened(x.device):
        kept, health = Kept(settings, x, y), Health(x, passes_per_run=settings.steps + scored)
        step_size = torch.full((1,), -settings.step_size if settings.targeted else settings.step_size, device=x.device)
        for _ in range(settings.restarts if len(x) else 0):
            proven = kept.success.clone()
            adv = threat.random_start(x, eps, generator) if settings.random_start else x.clone()
            if mask is not None:
                torch.where(mask, adv, x, out=adv)
            for _ in range(settings.steps):
                logits, grad = passes.gradient(adv, y)
                if settings.keep != "last":
                    kept.offer(adv, logits)
                threat.ascend(adv, grad, x, step_size, eps=eps, mask=mask, nonfinite=health.bad)
                health.note(logits)
            if scored:
                if passes.rounded and settings.keep != "last" and settings.steps:
                    kept.confirm(passes.score(kept.adv), proven)
                logits = passes.score(adv)
                kept.offer(adv, logits)
                health.note(logits)
            else:
                kept.adv = adv
    return kept.result(), health


class Kept:
    """The iterate kept for each image, and whether one of those offered fooled the model. Never read on the host."""

    def __init__(self, settings: PGD, x: Tensor, y: Tensor) -> None:
        self.settings, self.y, self.loss_of = settings, y, attack_loss(settings.loss)
        self.adv = torch.empty_like(x)
        self.success = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        # NaN: the first offer is taken, whatever its loss.
        self.loss = torch.full((len(x),), torch.nan, device=x.device)

    def offer(self, adv: Tensor, logits: Tensor) -> None:
        """Take ``adv`` for the images where it is better than what is kept."""
        fooled, loss = self._judge(logits)
        take = ~((loss >= self.loss) if self.settings.targeted else (loss <= self.loss))
        if self.settings.keep != "best":
            take = ~self.success & (fooled | take)
        self.success |= fooled
        torch.where(take, loss, self.loss, out=self.loss)
        torch.where(take.view(-1, 1, 1, 1), adv, self.adv, out=self.adv)

    def confirm(self, logits: Tensor, proven: Tensor) -> None:
        """Judge the images kept by their float32 ``logits``, not by the rounded ones before; ``proven`` stays."""
        fooled, self.loss = self._judge(logits)
        self.success = proven | fooled

    def result(self) -> AttackResult:
        """What was found so far."""
        return AttackResult(self.adv, self.success, self.loss)

    def _judge(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Whether ``logits`` are those of a fooled model, bool (B,), and the attack's loss, (B,)."""
        wrong = misclassified(logits, self.y)
        # NaN logits are wrong, so they reach no target.
        fooled = ~wrong if self.settings.targeted else wrong
        return fooled, self.loss_of(logits, self.y)
