"""fastadv::linf_step on CUDA: sign, step, ball, box, mask and non-finite flag in one pass over memory, in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastadv.kernels.ball import BLOCK, NUM_WARPS, any_nonfinite, ball_edge, checked, clamp, pixels_of_program


@triton.jit
def linf_step_kernel(
    adv_ptr,
    grad_ptr,
    x_ptr,
    step_ptr,
    eps_ptr,
    mask_ptr,
    nonfinite_ptr,
    lo,
    hi,
    num_groups,
    step_stride,
    eps_stride,
    ALIGN: tl.constexpr,
    MASKED: tl.constexpr,
    FLAGGED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, at, inside = pixels_of_program(num_groups, ALIGN, BLOCK)
    step = tl.load(step_ptr + image * step_stride)
    eps = tl.load(eps_ptr + image * eps_stride)
    adv = tl.load(adv_ptr + at, mask=inside)
    # Upcast at once: the interpreter would compute with the raw bits of a bf16.
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=inside)

    moved = adv + (tl.where(grad > 0, step, 0.0) - tl.where(grad < 0, step, 0.0))
    y = clamp(clamp(moved, ball_edge(x, -eps), ball_edge(x, eps)), lo, hi)
    if MASKED:
        y = tl.where(tl.load(mask_ptr + at, mask=inside, other=0) != 0, y, x)
    tl.store(adv_ptr + at, y, mask=inside)
    if FLAGGED:
        tl.store(nonfinite_ptr + image, 1, mask=any_nonfinite(grad) != 0)


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
    """The op's CUDA body: the meaning of :func:`fastadv.reference.linf_step`, bit for bit. No sync, no allocation."""
    layout = checked("linf_step", adv, grad, x, step_size, eps, mask, nonfinite)
    if not adv.numel():
        return
    grid = (len(adv), triton.cdiv(layout["num_groups"] * layout["ALIGN"], BLOCK))
    with torch.cuda.device_of(adv):
        linf_step_kernel[grid](
            adv,
            grad,
            x,
            step_size,
            eps,
            # Where there is none the compiled kernel never reads the pointer.
            adv if mask is None else mask.view(torch.uint8),
            adv if nonfinite is None else nonfinite,
            lo,
            hi,
            **layout,
            MASKED=mask is not None,
            FLAGGED=nonfinite is not None,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            # An fma has one rounding where the reference has two.
            enable_fp_fusion=False,
        )
