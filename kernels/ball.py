"""What the attack steps share: the exact edge of the ball, memory layout of the grid, argument checks.

The grid is (image, block of pixels): an image's step and radius are scalars of the program, so they cost no division
per pixel. Meaning of every op: :mod:`fastadv.reference`, repeated operation by operation.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastadv.ops import image_after_image, same_layout

# 8 pixels per thread, two 16-byte accesses per fp32 tensor; 224 x 224 pixels are 49 blocks per channel, without a rest.
BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def ball_edge(x, offset):
    """x + offset, one float back towards x where rounding carried it further than offset is long."""
    edge = x + offset
    back = edge - x
    error = (x - (edge - back)) + (offset - back)
    up = offset > 0
    too_far = tl.where(up, error < 0, error > 0)
    # The neighbour by its bits: libdevice's nextafter does not run in the interpreter.
    bits = edge.to(tl.int32, bitcast=True)
    above = (bits >> 31) | 1
    bits -= tl.where(too_far, tl.where(up, above, -above), 0)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def clamp(value, low, high):
    """As two comparisons: minimum and maximum treat NaN and zeros of two signs differently from body to body."""
    value = tl.where(value < low, low, value)
    return tl.where(value > high, high, value)


@triton.jit
def pixels_of_program(num_groups, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """Image, offsets into memory and which of them are inside the image, for this program.

    An image has num_groups * ALIGN pixels; written as a product the compiler sees how far addresses and ends are
    aligned, and uses 16-byte accesses.
    """
    image = tl.program_id(0).to(tl.int64)
    num_pixels = num_groups * ALIGN
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return image, image * num_pixels + pixel, pixel < num_pixels


@triton.jit
def any_nonfinite(grad):
    """1 if the block holds NaN or infinity, else 0."""
    return tl.max((~(tl.abs(grad) < float("inf"))).to(tl.int32), axis=0)


def checked(
    op: str,
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: Tensor,
    eps: Tensor,
    mask: Tensor | None,
    nonfinite: Tensor | None,
) -> dict[str, int]:
    """The launch's layout: num_groups and ALIGN, and the strides of step_size and eps (0 reads one value for all).

    Raises: ValueError where the op's contract is broken; :mod:`fastadv.ops` meets it for its callers.
    """
    if adv.dtype != torch.float32 or x.dtype != torch.float32:
        raise ValueError(f"{op}: adv and x must be float32, got {adv.dtype} and {x.dtype}")
    if grad.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{op}: grad must be float32, bfloat16 or float16, got {grad.dtype}")
    if not all(same_layout(adv, t) for t in (grad, x, mask) if t is not None) or not image_after_image(adv):
        raise ValueError(f"{op}: adv, grad, x and mask must be dense batches of one shape and equal strides")
    if adv.numel() and adv.data_ptr() == x.data_ptr():
        raise ValueError(f"{op}: adv and x are the same memory; start from x.clone()")
    for name, value in (("step_size", step_size), ("eps", eps)):
        if value.dtype != torch.float32 or value.numel() not in (1, len(adv)) or not value.is_contiguous():
            raise ValueError(f"{op}: {name} must hold one float32, or one per image, got {value.numel()}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"{op}: mask must be bool, got {mask.dtype}")
    if nonfinite is not None and (nonfinite.dtype != torch.int32 or nonfinite.shape != adv.shape[:1]):
        raise ValueError(f"{op}: nonfinite must be int32 with one value per image")
    num_pixels = adv.numel() // max(len(adv), 1)
    align = math.gcd(num_pixels, 16) or 1
    return {
        "num_groups": num_pixels // align,
        "ALIGN": align,
        "step_stride": int(step_size.numel() > 1),
        "eps_stride": int(eps.numel() > 1),
    }
