"""The meaning of every fused op, in plain PyTorch.

Shapes: adv, x, grad, mask (B, ...) with at least one axis after the batch; step_size, eps one number, or a tensor
with one value or one per image. All arithmetic is float32 with one rounding per operation, except the l2 norms, which
are float64. The C++ and Triton bodies repeat the element-wise parts bit for bit: every choice below is a comparison
and a ``where``, because minimum and maximum differ between bodies in what they do with NaN and with zeros of two signs.
"""

from __future__ import annotations

import torch
from torch import Tensor

# An l2 perturbation that is too long is scaled to this fraction of eps: rounding the product moves each pixel by at
# most 2^-24 of itself, so the perturbation stays inside after it. With 1.0 half of the images end outside.
L2_SCALE = 1 - 2**-20
# "Too long" begins this much below eps, so that a norm added up in another order cannot find the image outside.
L2_LIMIT = 1 - 2**-32


def linf_step(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: float | Tensor,
    eps: float | Tensor,
    lo: float,
    hi: float,
    mask: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> None:
    """Move ``adv`` by ``step_size * sign(grad)`` and bring it back into the linf ball around ``x`` and into the box.

    In place. adv, x float32; grad float32, bfloat16 or float16; a negative step_size descends, zero only projects.
    The sign of zero and of NaN is 0. Where mask is False the pixel becomes that of ``x``. nonfinite, int32 (B,), is
    set to 1 for images whose gradient holds NaN or infinity, and never cleared.
    """
    adv.copy_(_keep(mask, project_linf(adv + _signed(grad, step_size), x, eps, lo, hi), x))
    _flag(nonfinite, grad)


def l2_step(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: float | Tensor,
    eps: float | Tensor,
    lo: float,
    hi: float,
    mask: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> None:
    """Move ``adv`` by ``step_size`` along ``grad`` and bring it back into the l2 ball around ``x`` and into the box.

    As :func:`linf_step`, except: the gradient is scaled to length 1 per image, in float64 so that no length underflows;
    masked pixels count as 0 in it; an image whose gradient is zero, or has no finite length, is only projected.
    """
    direction = _keep(mask, grad.double(), torch.zeros((), dtype=torch.float64, device=grad.device))
    norm = _norm(direction)
    moves = (norm > 0) & (norm < torch.inf)
    rate = torch.where(moves, _per_image(step_size, x).double() / norm, 0.0)
    move = torch.where(moves, direction * rate, 0.0).float()
    moved = _keep(mask, adv + move, x)
    adv.copy_(_keep(mask, project_l2(moved, x, eps, lo, hi), x))
    _flag(nonfinite, grad)


def project_linf(adv: Tensor, x: Tensor, eps: float | Tensor, lo: float, hi: float) -> Tensor:
    """The point of {z: |z - x| <= float32(eps), lo <= z <= hi} nearest to ``adv``, as a new float32 tensor.

    x must lie in the box. The bound holds in float64, without tolerance.
    """
    radius = _per_image(eps, x)
    return _clamp(_clamp(adv, ball_edge(x, -radius), ball_edge(x, radius)), _per_image(lo, x), _per_image(hi, x))


def project_l2(adv: Tensor, x: Tensor, eps: float | Tensor, lo: float, hi: float) -> Tensor:
    """A point of {z: ||z - x||_2 <= float32(eps), lo <= z <= hi} close to ``adv``, as a new float32 tensor.

    Scales the perturbation first and then cuts it by the box (not the nearest point of the intersection, but always
    inside it when x lies in the box). The bound holds in float64, without tolerance.
    """
    radius = _per_image(eps, x).double()
    offset = adv.double() - x.double()
    norm = _norm(offset)
    # Rounded towards x, so that no pixel is further away than its share of the radius.
    scaled = ball_edge(x, (offset * (radius * L2_SCALE / norm)).float())
    inside = torch.where(norm > radius * L2_LIMIT, scaled, adv)
    return _clamp(inside, _per_image(lo, x), _per_image(hi, x))


def ball_edge(x: Tensor, offset: Tensor) -> Tensor:
    """``x + offset`` in float32, never further from ``x`` than ``offset`` is long.

    Plain rounding is: for 40 of the 256 grey levels above and 11 below at 8/255. The rounding error of the sum is
    itself a float32 and is found exactly; where the sum went too far it is taken one float back. Source: Knuth, The
    Art of Computer Programming, vol. 2, section 4.2.2, theorem B.
    """
    edge = x + offset
    back = edge - x
    error = (x - (edge - back)) + (offset - back)
    too_far = torch.where(offset > 0, error < 0, error > 0)
    return torch.where(too_far, torch.nextafter(edge, x), edge)


def _clamp(adv: Tensor, low: Tensor, high: Tensor) -> Tensor:
    adv = torch.where(adv < low, low, adv)
    return torch.where(adv > high, high, adv)


def _signed(grad: Tensor, step_size: float | Tensor) -> Tensor:
    step, grad = _per_image(step_size, grad), grad.float()
    return torch.where(grad > 0, step, 0.0) - torch.where(grad < 0, step, 0.0)


def _per_image(value: float | Tensor, like: Tensor) -> Tensor:
    """``value`` as float32 of shape (1 or B, 1, ..., 1). Made on the device: no copy from the host, no sync."""
    if not isinstance(value, Tensor):
        value = torch.full((1,), value, dtype=torch.float32, device=like.device)
    return value.float().reshape(-1, *(1,) * (like.ndim - 1))


def _norm(images: Tensor) -> Tensor:
    """The l2 length of each image, (B, 1, ..., 1)."""
    return images.square().sum(dim=tuple(range(1, images.ndim)), keepdim=True).sqrt()


def _keep(mask: Tensor | None, images: Tensor, otherwise: Tensor) -> Tensor:
    return images if mask is None else torch.where(mask, images, otherwise)


def _flag(nonfinite: Tensor | None, grad: Tensor) -> None:
    if nonfinite is not None:
        nonfinite.masked_fill_(~torch.isfinite(grad).flatten(1).all(1), 1)
