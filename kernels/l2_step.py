"""fastadv::l2_step on CUDA: gradient length, move, and pull back into ball and box, one pass over memory each.

Lengths are float64, so that neither a saturated model's gradients of 1e-30 nor large ones leave the range. Each program
writes the sum of its block; the few sums per image are added by PyTorch. No atomics (the result does not depend on the
order of programs), no sync.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastadv.kernels.ball import BLOCK, NUM_WARPS, any_nonfinite, ball_edge, checked, clamp, pixels_of_program
from fastadv.reference import L2_LIMIT, L2_SCALE

SCALE = tl.constexpr(L2_SCALE)
LIMIT = tl.constexpr(L2_LIMIT)


@triton.jit
def grad_squares_kernel(
    grad_ptr,
    sums_ptr,
    mask_ptr,
    nonfinite_ptr,
    num_groups,
    ALIGN: tl.constexpr,
    MASKED: tl.constexpr,
    FLAGGED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, at, inside = pixels_of_program(num_groups, ALIGN, BLOCK)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if FLAGGED:
        tl.store(nonfinite_ptr + image, 1, mask=any_nonfinite(grad) != 0)
    if MASKED:
        grad = tl.where(tl.load(mask_ptr + at, mask=inside, other=0) != 0, grad, 0.0)
    wide = grad.to(tl.float64)
    tl.store(sums_ptr + image * tl.num_programs(1) + tl.program_id(1), tl.sum(wide * wide, axis=0))


@triton.jit
def move_kernel(
    adv_ptr,
    grad_ptr,
    x_ptr,
    step_ptr,
    squares_ptr,
    sums_ptr,
    mask_ptr,
    num_groups,
    step_stride,
    ALIGN: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, at, inside = pixels_of_program(num_groups, ALIGN, BLOCK)
    norm = tl.sqrt(tl.load(squares_ptr + image))
    moves = (norm > 0) & (norm < float("inf"))
    rate = tl.load(step_ptr + image * step_stride).to(tl.float64) / tl.where(moves, norm, 1.0)
    adv = tl.load(adv_ptr + at, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    y = adv + tl.where(moves, (grad.to(tl.float64) * rate).to(tl.float32), 0.0)
    if MASKED:
        y = tl.where(tl.load(mask_ptr + at, mask=inside, other=0) != 0, y, x)
    tl.store(adv_ptr + at, y, mask=inside)
    offset = y.to(tl.float64) - x.to(tl.float64)
    # Pixels outside the image: adv, grad and x are 0 there, and so is the offset.
    tl.store(sums_ptr + image * tl.num_programs(1) + tl.program_id(1), tl.sum(offset * offset, axis=0))


@triton.jit
def project_kernel(
    adv_ptr,
    x_ptr,
    eps_ptr,
    squares_ptr,
    mask_ptr,
    lo,
    hi,
    num_groups,
    eps_stride,
    ALIGN: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, at, inside = pixels_of_program(num_groups, ALIGN, BLOCK)
    length = tl.sqrt(tl.load(squares_ptr + image))
    eps = tl.load(eps_ptr + image * eps_stride).to(tl.float64)
    outside = length > eps * LIMIT
    shrink = eps * SCALE / tl.where(outside, length, 1.0)
    adv = tl.load(adv_ptr + at, mask=inside)
    x = tl.load(x_ptr + at, mask=inside)
    offset = (adv.to(tl.float64) - x.to(tl.float64)) * shrink
    y = clamp(tl.where(outside, ball_edge(x, offset.to(tl.float32)), adv), lo, hi)
    if MASKED:
        y = tl.where(tl.load(mask_ptr + at, mask=inside, other=0) != 0, y, x)
    tl.store(adv_ptr + at, y, mask=inside)


def launch(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: Tensor,
    eps: Tensor,
    lo: float,
    hi: float,
    mask: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> None:
    """The op's CUDA body: the meaning of :func:`fastadv.reference.l2_step`, up to the order of sums. No sync."""
    layout = checked("l2_step", adv, grad, x, step_size, eps, mask, nonfinite)
    if not adv.numel():
        return
    step_stride, eps_stride = layout.pop("step_stride"), layout.pop("eps_stride")
    grid = (len(adv), triton.cdiv(layout["num_groups"] * layout["ALIGN"], BLOCK))
    # Where there is none the compiled kernels never read the pointer.
    mask_data = adv if mask is None else mask.view(torch.uint8)
    flags = adv if nonfinite is None else nonfinite
    # An fma has one rounding where the reference has two.
    options = {"MASKED": mask is not None, "BLOCK": BLOCK, "num_warps": NUM_WARPS, "enable_fp_fusion": False, **layout}
    sums = torch.empty(grid, dtype=torch.float64, device=adv.device)
    with torch.cuda.device_of(adv):
        grad_squares_kernel[grid](grad, sums, mask_data, flags, FLAGGED=nonfinite is not None, **options)
        squares = sums.sum(1)
        move_kernel[grid](adv, grad, x, step_size, squares, sums, mask_data, step_stride=step_stride, **options)
        squares = sums.sum(1)
        project_kernel[grid](adv, x, eps, squares, mask_data, lo, hi, eps_stride=eps_stride, **options)
