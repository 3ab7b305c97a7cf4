"""fastadv::window_attention_backward on CUDA: the gradients of q, k and v in one kernel, of the table in two more sums.

Weights are computed again from q and k: nothing but them is kept from the forward pass. No atomics: each program adds
up its images' gradients of the bias in registers and writes them once, so the result does not depend on the order of
programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastadv.kernels.window import (
    SIZES,
    Tile,
    bias_and_mask,
    launch_sizes,
    offsets,
    place,
    raised_scores,
    tile_of_program,
)

# As for the forward pass. Of 172 registers three programs leave 168; so bound, it takes 161 and spills none.
HALF = {
    (16, 16): Tile(warps=1, resident=32),
    (16, 32): Tile(warps=1, resident=18),
    (16, 64): Tile(warps=1, resident=11),
    (64, 16): Tile(warps=4, resident=4),
    (64, 32): Tile(warps=4, resident=3, registers=168),
    (64, 64): Tile(warps=4, resident=2),
}
# The table's gradient takes 32 registers more: where the table learns, the bound would spill and two programs fit.
HALF_LEARNING = HALF | {
    (16, 32): Tile(warps=1, resident=15),
    (64, 16): Tile(warps=4, resident=2),
    (64, 32): Tile(warps=4, resident=2),
}
SINGLE = {
    (16, 16): Tile(warps=1, resident=18),
    (16, 32): Tile(warps=2, resident=10),
    (16, 64): Tile(warps=2, resident=5),
    (64, 16): Tile(warps=8, resident=2),
    (64, 32): Tile(warps=16, resident=2),
    (64, 64): Tile(warps=16, resident=1),
}
# Of 1,832 instructions of windows of 7 with head dimension 32, 667 are an image's.
PROLOGUE = 2


@triton.jit(do_not_specialize=SIZES)
def window_attention_backward_kernel(
    grad_ptr,
    qkv_ptr,
    table_ptr,
    qkv_grad_ptr,
    sums_ptr,
    scale,
    images,
    images_per_program,
    heads,
    height,
    width,
    shift_h,
    shift_w,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    LEARNS: tl.constexpr,
):
    head, window_y, window_x, first, last = tile_of_program(images, images_per_program, heads, height, width, WINDOW)
    token = tl.arange(0, ROWS)
    number, side = place(token, window_y, window_x, height, width, shift_h, shift_w, WINDOW)
    bias = bias_and_mask(table_ptr, token, side, head, heads, WINDOW)
    inside = (token < WINDOW * WINDOW)[:, None]
    grad_at = offsets(number, heads, head, HEAD_DIM)
    q_at = offsets(number, 3 * heads, head, HEAD_DIM)
    to_next = heads * HEAD_DIM
    # Images together exceed int32, an image does not.
    image_size = (height * width * heads).to(tl.int64) * HEAD_DIM
    dtype = qkv_ptr.dtype.element_ty
    if LEARNS:
        bias_grad = tl.zeros((ROWS, ROWS), dtype=tl.float32)
    for image in range(first, last):
        q_ptr = qkv_ptr + image * (3 * image_size)
        q = tl.load(q_ptr + q_at, mask=inside, other=0.0)
        k = tl.load(q_ptr + to_next + q_at, mask=inside, other=0.0)
        v = tl.load(q_ptr + 2 * to_next + q_at, mask=inside, other=0.0)
        # Queries that fill the tile up have a gradient of 0, and with it they add nothing to any sum over queries.
        grad = tl.load(grad_ptr + image * image_size + grad_at, mask=inside, other=0.0)
        raised, total = raised_scores(q, k, scale, bias)
        weight = raised * (1.0 / total)[:, None]
        v_grad = tl.dot(tl.trans(weight.to(dtype)), grad, input_precision="ieee")
        weight_grad = tl.dot(grad, tl.trans(v), input_precision="ieee")
        score_grad = weight * (weight_grad - tl.sum(weight * weight_grad, axis=1)[:, None])
        if LEARNS:
            bias_grad += score_grad
        slope = score_grad.to(dtype)
        q_grad = tl.dot(slope, k, input_precision="ieee") * scale
        k_grad = tl.dot(tl.trans(slope), q, input_precision="ieee") * scale
        q_grad_ptr = qkv_grad_ptr + image * (3 * image_size)
        tl.store(q_grad_ptr + q_at, q_grad.to(dtype), mask=inside)
        tl.store(q_grad_ptr + to_next + q_at, k_grad.to(dtype), mask=inside)
        tl.store(q_grad_ptr + 2 * to_next + q_at, v_grad.to(dtype), mask=inside)
    if LEARNS:
        tokens: tl.constexpr = WINDOW * WINDOW
        sums_at = tl.program_id(0).to(tl.int64) * (tokens * tokens) + token[:, None] * tokens + token[None, :]
        tl.store(sums_ptr + sums_at, bias_grad, mask=inside & (token < tokens)[None, :])


@triton.jit(do_not_specialize=("heads",))
def table_grad_kernel(bias_grad_ptr, table_grad_ptr, heads, WINDOW: tl.constexpr, ROWS: tl.constexpr):
    """Of 16 entries of one head's table: each the sum over the pairs of tokens that lie as far apart as it says."""
    across: tl.constexpr = 2 * WINDOW - 1
    head = tl.program_id(1)
    entry = tl.program_id(0) * 16 + tl.arange(0, 16)
    query = tl.arange(0, ROWS)[None, :]
    # The key's place in the window.
    y = query // WINDOW - (entry // across)[:, None] + WINDOW - 1
    x = query % WINDOW - (entry % across)[:, None] + WINDOW - 1
    inside = (query < WINDOW * WINDOW) & (y >= 0) & (y < WINDOW) & (x >= 0) & (x < WINDOW)
    at = (head * WINDOW * WINDOW + query) * WINDOW * WINDOW + y * WINDOW + x
    total = tl.sum(tl.load(bias_grad_ptr + at, mask=inside, other=0.0), axis=1)
    tl.store(table_grad_ptr + entry * heads + head, total, mask=entry < across * across)


def tiles_for(dtype: torch.dtype, table_learns: bool) -> dict[tuple[int, int], Tile]:
    """How to launch the kernel, by rows of the tile and head dimension."""
    if dtype == torch.float32:
        return SINGLE
    return HALF_LEARNING if table_learns else HALF


def launch_backward(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor,
    heads: int,
    window: int,
    shift_h: int,
    shift_w: int,
    scale: float,
    table_learns: bool,
) -> tuple[Tensor, Tensor]:
    """The op's CUDA body: as :func:`fastadv.window_reference.window_attention_backward`, up to rounding. No sync."""
    tiles = tiles_for(qkv.dtype, table_learns)
    programs, sizes = launch_sizes(qkv, table, heads, window, shift_h, shift_w, tiles, PROLOGUE)
    if grad.dtype != qkv.dtype or grad.shape != (*qkv.shape[:3], qkv.shape[3] // 3) or grad.device != qkv.device:
        found = f"{grad.dtype} of shape {tuple(grad.shape)}"
        raise ValueError(f"window_attention_backward: grad is {found}, qkv is {qkv.dtype} of {tuple(qkv.shape)}")
    if not grad.is_contiguous():
        raise ValueError("window_attention_backward: grad must be contiguous")
    qkv_grad = torch.empty_like(qkv)
    new = {"dtype": torch.float32, "device": qkv.device}
    sums = torch.empty((programs // heads, heads, window**2, window**2) if table_learns else (0,), **new)
    if programs:
        with torch.cuda.device_of(qkv):
            window_attention_backward_kernel[(programs,)](
                grad, qkv, table, qkv_grad, sums, scale, **sizes, LEARNS=table_learns
            )
    if not table_learns:
        return qkv_grad, sums
    table_grad = torch.empty(table.shape, **new)
    with torch.cuda.device_of(qkv):
        table_grad_kernel[(triton.cdiv(len(table), 16), heads)](
            sums.sum(0), table_grad, heads, WINDOW=window, ROWS=sizes["ROWS"], num_warps=4, enable_fp_fusion=True
        )
    return qkv_grad, table_grad
