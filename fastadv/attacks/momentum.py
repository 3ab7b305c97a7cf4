"""The step of APGD: along the gradient, back into the ball, then on by a quarter of the step before.

Shapes: adv, before, grad, x (B, C, H, W) float32; step_size (B,). Source: Croce and Hein, arXiv:2003.01690, equation 4.
"""

from __future__ import annotations

from torch import Tensor

from fastadv import ops
from fastadv.threat import ThreatModel

# The share of the new direction; the rest is the step before. The first step has none before it.
SHARE = 0.75


def exact_step(
    adv: Tensor,
    before: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: Tensor,
    threat: ThreatModel,
    nonfinite: Tensor,
    *,
    first: bool,
) -> Tensor:
    """The next iterate, inside the ball exactly. ``nonfinite``, int32 (B,), becomes 1 where the gradient is not."""
    step = ops.linf_step if threat.norm == "linf" else ops.l2_step
    moved = step(adv.clone(), grad, x, step_size, threat.eps, *threat.box, nonfinite=nonfinite)
    if first:
        return moved
    # adv + SHARE (moved - adv) + (1 - SHARE) (adv - before), in three passes over the images.
    rest = 1 - SHARE
    moved = moved.mul_(SHARE).add_(adv, alpha=2 * rest).sub_(before, alpha=rest)
    # A step of length 0 only projects.
    return step(moved, grad, x, 0.0, threat.eps, *threat.box)


def published_step(
    adv: Tensor, before: Tensor, grad: Tensor, x: Tensor, step_size: Tensor, threat: ThreatModel, *, first: bool
) -> Tensor:
    """The next iterate in the published code's arithmetic, which leaves the ball by rounding, 2.8e-8 at most.

    A change of one unit in the last place is enough to turn signs of the gradient a few steps on, so agreement image
    by image needs every rounding of it.
    """
    share = 1.0 if first else SHARE
    size = step_size.view(-1, 1, 1, 1)
    if threat.norm == "linf":
        low, high = (x - threat.eps).clamp(*threat.box), (x + threat.eps).clamp(*threat.box)
        moved = (adv + size * grad.sign()).clamp(low, high)
        return _joined(adv, before, moved, share).clamp(low, high)
    moved = _shortened(adv + size * unit(grad, "l2"), x, threat)
    return _shortened(_joined(adv, before, moved, share), x, threat)


def unit(images: Tensor, norm: str) -> Tensor:
    """``images`` at length 1 in ``norm``, each."""
    return images / (_length(images, norm) + 1e-12)


def _length(images: Tensor, norm: str) -> Tensor:
    flat = images.flatten(1)
    length = flat.abs().amax(1) if norm == "linf" else flat.square().sum(1).sqrt()
    return length.view(-1, 1, 1, 1)


def _joined(adv: Tensor, before: Tensor, moved: Tensor, share: float) -> Tensor:
    return adv + (moved - adv) * share + (adv - before) * (1 - share)


def _shortened(adv: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
    """``adv`` in the ball, by rescaling, then in the box."""
    offset = adv - x
    length = _length(offset, "l2")
    return (x + offset / (length + 1e-12) * length.clamp(max=threat.eps)).clamp(*threat.box)
