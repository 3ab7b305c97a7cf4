"""One run of APGD: steps whose size is halved, image by image, where the loss stops rising.

Shapes: x, adv, grad (B, C, H, W) float32; y, loss, place (B,). Source: Croce and Hein, arXiv:2003.01690, algorithm 1.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastadv.attacks.momentum import exact_step, published_step
from fastadv.attacks.targets import Objective
from fastadv.errors import NonFiniteGradientError
from fastadv.losses import misclassified
from fastadv.passes import Passes
from fastadv.threat import ThreatModel

if TYPE_CHECKING:
    from fastadv.attacks.apgd import APGD

# Finished images leave the batch once they are an eighth of it: to copy the others costs about one step.
LEAVING = 8


class Found(NamedTuple):
    """What a run found for each image it was given."""

    adv: Tensor
    """An iterate that fooled the model (parity: the last one, fast: the first), else the one with the highest loss."""
    success: Tensor
    """Whether an iterate fooled the model, bool (B,)."""


@dataclass
class Rows:
    """The images still in the run, one row each in every tensor."""

    place: Tensor
    """Where the image was in the batch at the start."""
    x: Tensor
    y: Tensor
    target: Tensor
    adv: Tensor
    before: Tensor
    """The iterate before ``adv``."""
    grad: Tensor
    best: Tensor
    best_grad: Tensor
    best_loss: Tensor
    loss: Tensor
    """The loss at ``adv``."""
    checked: Tensor
    """The highest loss at the last checkpoint."""
    rises: Tensor
    """How often the loss rose since the last checkpoint."""
    halved: Tensor
    """Whether the last checkpoint halved the step size."""
    step_size: Tensor
    done: Tensor
    """Whether the image may leave."""
    bad: Tensor
    """1 where logits or gradients were NaN or infinite, int32."""

    def keep(self, rows: Tensor) -> None:
        """Only ``rows``, bool (B,), stay."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name)[rows])


def checkpoints(steps: int) -> dict[int, int]:
    """After how many steps the step sizes are looked at, and how many steps each look is about.

    The gaps are 22 % of all steps at first and shrink by 3 %, down to 6 %. Source: section 3.1, rounded as in the
    published code.
    """
    gap, less, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    looks, at = {}, gap
    while at <= steps:
        looks[at] = gap
        gap = max(gap - less, least)
        at += gap
    return looks


class Ascent:
    """Runs of APGD through ``passes``, which are open."""

    def __init__(self, attack: APGD, passes: Passes, objective: Objective, threat: ThreatModel) -> None:
        self.attack, self.passes, self.objective, self.threat = attack, passes, objective, threat
        self.parity = attack.mode == "parity"

    def run(self, x: Tensor, y: Tensor, target: Tensor, start: Tensor, names: Tensor) -> Found:
        """Climb from ``start``. Parity keeps every image to the end, fast lets go of those that are finished.

        Raises: NonFiniteGradientError naming images by ``names``.
        """
        looks, steps = checkpoints(self.attack.steps), self.attack.steps
        found = Found(start.clone(), torch.zeros_like(y, dtype=torch.bool))
        rows = self._opened(x, y, target, start, found)
        for step in range(1, steps + 1):
            if not self.parity and not _let_go(rows):
                break
            self._advance(rows, first=step == 1)
            self._look(rows, found, last=step == steps)
            if step in looks:
                _refuse_nonfinite(rows, names, step)
                if step < steps:
                    self._halve(rows, looks[step])
        _refuse_nonfinite(rows, names, steps)
        left = ~found.success[rows.place]
        found.adv[rows.place[left]] = rows.best[left]
        return found

    def _opened(self, x: Tensor, y: Tensor, target: Tensor, start: Tensor, found: Found) -> Rows:
        """All images at ``start``, judged."""
        n = len(x)
        rows = Rows(
            place=torch.arange(n, device=x.device),
            x=x,
            y=y,
            target=target,
            adv=start,
            before=start,
            grad=start,
            best=torch.empty_like(start),
            best_grad=torch.empty_like(start),
            best_loss=start.new_full((n,), -torch.inf),
            loss=start.new_zeros(n),
            checked=start.new_zeros(n),
            rises=start.new_zeros(n),
            # As if halved just before: the first checkpoint has none before it to compare with.
            halved=torch.ones_like(y, dtype=torch.bool),
            step_size=start.new_full((n,), 2 * self.threat.eps),
            done=torch.zeros_like(y, dtype=torch.bool),
            bad=torch.zeros_like(y, dtype=torch.int32),
        )
        self._look(rows, found, last=False)
        # The published code compares the loss after the first step with 0, not with that of the start.
        rows.loss, rows.rises = start.new_zeros(n), start.new_zeros(n)
        rows.checked = rows.best_loss.clone()
        return rows

    def _advance(self, rows: Rows, *, first: bool) -> None:
        """One step."""
        where = (rows.adv, rows.before, rows.grad, rows.x, rows.step_size, self.threat)
        moved = published_step(*where, first=first) if self.parity else exact_step(*where, rows.bad, first=first)
        rows.before, rows.adv = rows.adv, moved

    def _look(self, rows: Rows, found: Found, *, last: bool) -> None:
        """One pass at ``adv``: the gradient there, whom it fools, whose loss is the highest so far."""
        self.objective.target = rows.target
        if last and not self.parity:
            logits = self.passes.score(rows.adv)
        else:
            logits, rows.grad = self._gradient(rows)
        rows.bad |= ~logits.isfinite().all(1)
        fresh = (misclassified(logits, rows.y) & (rows.bad == 0) & ~rows.done).nonzero().squeeze(1)
        if len(fresh) and self.passes.rounded:
            fresh = fresh[misclassified(self.passes.score(rows.adv[fresh]), rows.y[fresh])]
        if len(fresh):
            found.adv[rows.place[fresh]] = rows.adv[fresh]
            found.success[rows.place[fresh]] = True
            rows.done[fresh] = not self.parity
        loss = self.objective.value(logits, rows.y)
        rows.rises += loss > rows.loss
        rows.loss = loss
        better = loss > rows.best_loss
        torch.where(better, loss, rows.best_loss, out=rows.best_loss)
        better = better.view(-1, 1, 1, 1)
        torch.where(better, rows.adv, rows.best, out=rows.best)
        torch.where(better, rows.grad, rows.best_grad, out=rows.best_grad)

    def _gradient(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Logits and gradient at ``adv``; the gradient is the mean of ``eot`` passes, the logits are the last ones."""
        logits, grad = self.passes.gradient(rows.adv, rows.y)
        for _ in range(self.attack.eot - 1):
            logits, more = self.passes.gradient(rows.adv, rows.y)
            grad = grad + more
        if self.attack.eot > 1:
            grad = grad / self.attack.eot
        if self.parity:
            rows.bad |= ~grad.isfinite().flatten(1).all(1)
        return logits, grad

    def _halve(self, rows: Rows, steps: int) -> None:
        """Halve the step sizes of images that got stuck in the last ``steps`` and send them back to their best point.

        Stuck: the loss rose in a share rho of the steps at most, or the step size is that of the last checkpoint and so
        is the highest loss. Source: section 3.1, conditions 1 and 2.
        """
        halve = (rows.rises <= self.attack.rho * steps) | (~rows.halved & (rows.checked >= rows.best_loss))
        rows.halved, rows.checked = halve, rows.best_loss.clone()
        rows.rises = torch.zeros_like(rows.rises)
        rows.step_size = torch.where(halve, rows.step_size / 2, rows.step_size)
        back = halve.view(-1, 1, 1, 1)
        rows.adv, rows.grad = torch.where(back, rows.best, rows.adv), torch.where(back, rows.best_grad, rows.grad)


def _let_go(rows: Rows) -> bool:
    """Whether images are left to attack; once enough of ``rows`` are done, only the others stay in it."""
    num_done = int(rows.done.sum())
    if num_done * LEAVING >= len(rows.done):
        rows.keep(~rows.done)
    return len(rows.done) > 0


def _refuse_nonfinite(rows: Rows, names: Tensor, step: int) -> None:
    """Raise NonFiniteGradientError, naming images, if logits or gradients were NaN or infinite."""
    refuse_nonfinite(rows.bad == 0, names[rows.place], f"up to step {step}")


def refuse_nonfinite(finite: Tensor, names: Tensor, when: str) -> None:
    """Raise NonFiniteGradientError, naming the images that are not ``finite``, bool (B,), by ``names``."""
    images = names[~finite].tolist()
    if images:
        listed = ", ".join(map(str, images[:10])) + (", ..." if len(images) > 10 else "")
        raise NonFiniteGradientError(
            f"logits or gradients are NaN or infinite {when}, in {len(images)} of {len(finite)} images: {listed}",
            "look for NaN or infinite weights: [n for n, p in model.named_parameters() if not p.isfinite().all()]",
        )
