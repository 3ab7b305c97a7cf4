"""Loops as others wrote them, in our own words: what the published code does, step by step, nothing made slower.

Shapes: x, start, adv (B, C, H, W) float32; y (B,) int64. Every loop starts from ``start`` and leaves eval mode behind.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loop = Callable[..., Tensor]


def ascended(adv: Tensor, grad: Tensor, x: Tensor, step_size: float, eps: float) -> Tensor:
    """The step all of them take: along the sign, clamped into the ball, then into the box. Madry, arXiv:1706.06083."""
    adv = adv.detach() + step_size * grad.sign()
    return torch.clamp(x + torch.clamp(adv - x, -eps, eps), 0, 1)


def keep_higher(loss: Tensor, adv: Tensor, best_loss: Tensor, best: Tensor) -> None:
    """Copy into ``best`` what has a higher loss, chosen by a boolean mask, as MadryLab's and RoLI's replace_best do.

    A loss that is a mean over the batch is a mask of no dimension: it takes the whole batch or nothing.
    """
    higher = loss > best_loss
    best[higher] = adv[higher]
    best_loss[higher] = loss[higher]


def textbook(
    model: nn.Module, x: Tensor, y: Tensor, start: Tensor, *, steps: int, step_size: float, eps: float
) -> Tensor:
    """PGD as most code has it: gradient by autograd, sign, two clamps; the final iterate. Source: arXiv:1706.06083."""
    model.eval()
    adv = start
    for _ in range(steps):
        adv = adv.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(F.cross_entropy(model(adv), y), adv)
        adv = ascended(adv, grad, x, step_size, eps)
    return adv.detach()


def madry(model: nn.Module, x: Tensor, y: Tensor, start: Tensor, *, steps: int, step_size: float, eps: float) -> Tensor:
    """The best iterate of each image, with one more forward pass to judge the final one.

    Source: MadryLab/robustness 1.2.1, attacker.py, Attacker.forward with use_best, its default: per-image losses, the
    gradient of their mean with respect to the images alone, replace_best before each step and after the last.
    """
    model.eval()
    adv = start
    best, best_loss = start.clone(), x.new_full((len(x),), -torch.inf)
    for _ in range(steps):
        adv = adv.clone().detach().requires_grad_(True)
        losses = F.cross_entropy(model(adv), y, reduction="none")
        (grad,) = torch.autograd.grad(losses.mean(), adv)
        with torch.no_grad():
            keep_higher(losses, adv, best_loss, best)
            adv = ascended(adv, grad, x, step_size, eps)
    losses = F.cross_entropy(model(adv), y, reduction="none").detach()
    keep_higher(losses, adv, best_loss, best)
    return best


def roli(model: nn.Module, x: Tensor, y: Tensor, start: Tensor, *, steps: int, step_size: float, eps: float) -> Tensor:
    """The best iterate of the whole batch, by ``.backward()``: what learns gets a gradient in each step.

    Source: DongXzz/RoLI at 5f34b8f, src/adv_func.py, lines 120-160, with use_best as its trainer calls it: the loss is
    a mean over the batch already, so the bookkeeping takes whole batches, and the final iterate is judged in one more
    forward pass, with its graph. Parameter gradients pile up in ``p.grad``; the trainer clears them before its update.
    """
    model.eval()
    adv = start
    best, best_loss = start.clone(), x.new_tensor(-torch.inf)
    for _ in range(steps):
        adv = adv.clone().detach().requires_grad_(True)
        loss = F.cross_entropy(model(adv), y)
        loss.backward()
        assert adv.grad is not None
        with torch.no_grad():
            keep_higher(loss.detach(), adv.detach(), best_loss, best)
            adv = ascended(adv, adv.grad, x, step_size, eps)
    loss = F.cross_entropy(model(adv), y).detach()
    keep_higher(loss, adv, best_loss, best)
    return best


def uniform_start(x: Tensor, eps: float) -> Tensor:
    """A random start as all of them draw it, from the global stream."""
    return torch.clamp(x + torch.empty_like(x).uniform_(-eps, eps), 0, 1)


def training_step(
    model: nn.Module,
    training: list[nn.Module],
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    attack: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """One update on adversarial images; gives the loss, detached.

    As RoLI's trainer (src/trainer.py, lines 105-185): attack in eval mode, back to train mode, forward, zero_grad,
    backward, step. Its AdamW is a Python loop; torch's own is used here, so the baseline is not slower than need be.
    """
    adv = attack(x, y)
    for module in training:
        module.train()
    loss = F.cross_entropy(model(adv), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()
