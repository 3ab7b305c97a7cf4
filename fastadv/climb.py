"""The loop of PGD: what an attack does with a batch, step by step, and what it keeps. Nothing in it waits for a device.

Shapes: x, adv, grad (B, C, H, W) float32; y, loss, success (B,); logits (B, classes) float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastadv.inputs import Inputs
from fastadv.losses import attack_loss, misclassified
from fastadv.passes import Health, Passes
from fastadv.threat import ThreatModel

if TYPE_CHECKING:
    from fastadv.pgd import PGD


class AttackResult(NamedTuple):
    """What an attack found, per image."""

    adv: Tensor
    """The images kept, like x."""
    success: Tensor
    """Whether a scored iterate fooled the model, bool (B,): any iterate, or with keep="last" the final ones alone."""
    loss: Tensor
    """The attack's loss at ``adv``, (B,)."""


def climb(
    settings: PGD,
    passes: Passes,
    given: Inputs,
    threat: ThreatModel,
    generator: torch.Generator | None,
    *,
    scored: bool,
) -> tuple[AttackResult, Health]:
    """The whole attack, with ``passes`` through the model; nothing in it waits for the device.

    scored=False leaves success and loss unset where finding them would cost a forward pass.
    """
    with passes.opened(given.x.device):
        climber = Climber(settings, given, threat, scored=scored)
        for _ in range(settings.restarts if len(given.x) else 0):
            climber.start(starting_point(settings, given, threat, generator))
            climber.ascend(passes)
    return climber.result(), climber.health


def starting_point(settings: PGD, given: Inputs, threat: ThreatModel, generator: torch.Generator | None) -> Tensor:
    """Where one run of the attack starts, before the mask: a random point of the ball, or x itself."""
    return threat.random_start(given.x, given.eps, generator) if settings.random_start else given.x


def room_like(given: Inputs, size: int) -> Inputs:
    """Room for ``size`` images of the kind of ``given``, each with a radius of its own; nothing is in it yet."""
    x, _, eps, mask, num_labels = given
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    room = torch.empty((size, *x.shape[1:]), device=x.device, memory_format=layout)
    masks = None if mask is None else torch.empty_like(room, dtype=torch.bool)
    labels = torch.empty(size, dtype=torch.int64, device=x.device)
    return Inputs(room, labels, eps.new_empty(size), masks, num_labels)


class Climber:
    """A batch on its way up: every tensor that an attack reads or writes, none of which the host reads meanwhile.

    All writing is in place, so what was recorded of ``ascend`` or ``step`` can be replayed. The threat's radius is not
    used: ``given.eps`` is.
    """

    def __init__(self, settings: PGD, given: Inputs, threat: ThreatModel, *, scored: bool) -> None:
        threat.check_step(settings.step_size)
        self.settings, self.threat = settings, threat
        self.x, self.y, self.eps, self.mask, _ = given
        self.scored = scored or settings.keep != "last" or settings.restarts > 1
        self.adv = torch.empty_like(self.x)
        self.kept = Kept(settings, self.x, self.y)
        self.proven = torch.zeros_like(self.kept.success)
        self.health = Health(self.x, passes_per_run=settings.steps + self.scored)
        length = -settings.step_size if settings.targeted else settings.step_size
        self.step_size = torch.full((1,), length, device=self.x.device)

    def load(self, given: Inputs) -> None:
        """Take another batch, as far as there is room; rows left over repeat its first image."""
        count = min(len(given.x), len(self.x))
        mine, theirs = (self.x, self.y, self.eps, self.mask), (given.x, given.y, given.eps, given.mask)
        for here, there in zip(mine, theirs, strict=True):
            if here is not None and there is not None:
                here[:count].copy_(there[:count])
                here[count:].copy_(there[:1])
        self.kept.success.zero_()
        self.kept.loss.fill_(torch.nan)
        self.health.bad.zero_()
        self.health.good_passes.zero_()

    def start(self, point: Tensor) -> None:
        """Begin a run at ``point``, like x or fewer rows of it; masked pixels begin at x."""
        self.proven.copy_(self.kept.success)
        self.adv[: len(point)].copy_(point)
        self.adv[len(point) :].copy_(self.x[len(point) :])
        if self.mask is not None:
            torch.where(self.mask, self.adv, self.x, out=self.adv)

    def ascend(self, passes: Passes) -> None:
        """A whole run: all steps, then the score of where they led."""
        for _ in range(self.settings.steps):
            self.step(passes)
        self.finish(passes)

    def step(self, passes: Passes) -> None:
        """One step up."""
        logits, grad = passes.gradient(self.adv, self.y)
        if self.settings.keep != "last":
            self.kept.offer(self.adv, logits)
        self.threat.ascend(
            self.adv, grad, self.x, self.step_size, eps=self.eps, mask=self.mask, nonfinite=self.health.bad
        )
        self.health.note(logits)

    def finish(self, passes: Passes) -> None:
        """Score the last iterate, and in float32 what the rounded ones before it claimed."""
        if not self.scored:
            return
        if passes.rounded and self.settings.keep != "last" and self.settings.steps:
            self.kept.confirm(passes.score(self.kept.adv), self.proven)
        logits = passes.score(self.adv)
        self.kept.offer(self.adv, logits)
        self.health.note(logits)

    def result(self) -> AttackResult:
        """What was found so far, in the tensors it was found in."""
        kept = self.kept
        return AttackResult(kept.adv if self.scored else self.adv, kept.success, kept.loss)

    def rows(self) -> list[Tensor]:
        """Every tensor with a row for each image; needs a radius for each."""
        masks = [] if self.mask is None else [self.mask]
        return [self.x, self.y, self.eps, *masks, self.adv, self.proven, *self.findings()]

    def findings(self) -> list[Tensor]:
        """Of these, the ones that say what was found."""
        return [self.kept.adv, self.kept.success, self.kept.loss, self.health.bad, self.health.good_passes]


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
        fooled, loss = self.judge(logits, self.y)
        take = ~((loss >= self.loss) if self.settings.targeted else (loss <= self.loss))
        if self.settings.keep != "best":
            take = ~self.success & (fooled | take)
        self.success |= fooled
        torch.where(take, loss, self.loss, out=self.loss)
        torch.where(take.view(-1, 1, 1, 1), adv, self.adv, out=self.adv)

    def confirm(self, logits: Tensor, proven: Tensor) -> None:
        """Judge the images kept by their float32 ``logits``, not by the rounded ones before; ``proven`` stays."""
        fooled, loss = self.judge(logits, self.y)
        self.loss.copy_(loss)
        torch.logical_or(proven, fooled, out=self.success)

    def judge(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Whether ``logits`` are those of a fooled model, bool (B,), and the attack's loss, (B,)."""
        wrong = misclassified(logits, y)
        # NaN logits are wrong, so they reach no target.
        fooled = ~wrong if self.settings.targeted else wrong
        return fooled, self.loss_of(logits, y)
