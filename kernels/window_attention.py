"""fastadv::window_attention on CUDA: Swin's attention in one kernel, from the qkv layer's output to proj's input."""

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
    supports,
    tile_of_program,
)
from fastadv.kernels.window_attention_backward import launch_backward

__all__ = ["launch", "launch_backward", "supports"]

# By rows of the tile and head dimension. A window of 4 is a tile of 16 rows and one warp: 137 instructions of a warp
# per window and image (sm_90, head dimension 16). Packed by four into a tile of 64 rows it would take 335, most of them
# for pairs of tokens of different windows.
HALF = {
    (16, 16): Tile(warps=1, resident=32),
    (16, 32): Tile(warps=1, resident=32),
    (16, 64): Tile(warps=1, resident=18),
    (64, 16): Tile(warps=4, resident=5),
    (64, 32): Tile(warps=4, resident=4),
    (64, 64): Tile(warps=4, resident=3),
}
# float32 has no tensor cores that round as it does; more warps share the products and their registers.
SINGLE = {
    (16, 16): Tile(warps=1, resident=23),
    (16, 32): Tile(warps=1, resident=21),
    (16, 64): Tile(warps=2, resident=10),
    (64, 16): Tile(warps=8, resident=2),
    (64, 32): Tile(warps=8, resident=2),
    (64, 64): Tile(warps=16, resident=1),
}
# Of 1,464 instructions of windows of 7 with head dimension 32, 365 are an image's.
PROLOGUE = 3


@triton.jit(do_not_specialize=SIZES)
def window_attention_kernel(
    qkv_ptr,
    table_ptr,
    out_ptr,
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
):
    head, window_y, window_x, first, last = tile_of_program(images, images_per_program, heads, height, width, WINDOW)
    token = tl.arange(0, ROWS)
    number, side = place(token, window_y, window_x, height, width, shift_h, shift_w, WINDOW)
    bias = bias_and_mask(table_ptr, token, side, head, heads, WINDOW)
    inside = (token < WINDOW * WINDOW)[:, None]
    out_at = offsets(number, heads, head, HEAD_DIM)
    q_at = offsets(number, 3 * heads, head, HEAD_DIM)
    to_next = heads * HEAD_DIM
    # Images together exceed int32, an image does not.
    image_size = (height * width * heads).to(tl.int64) * HEAD_DIM
    for image in range(first, last):
        q_ptr = qkv_ptr + image * (3 * image_size)
        q = tl.load(q_ptr + q_at, mask=inside, other=0.0)
        k = tl.load(q_ptr + to_next + q_at, mask=inside, other=0.0)
        v = tl.load(q_ptr + 2 * to_next + q_at, mask=inside, other=0.0)
        raised, total = raised_scores(q, k, scale, bias)
        out = tl.dot(raised.to(v.dtype), v, input_precision="ieee") * (1.0 / total)[:, None]
        tl.store(out_ptr + image * image_size + out_at, out.to(out_ptr.dtype.element_ty), mask=inside)


def tiles_for(dtype: torch.dtype) -> dict[tuple[int, int], Tile]:
    """How to launch the kernel, by rows of the tile and head dimension."""
    return SINGLE if dtype == torch.float32 else HALF


def launch(qkv: Tensor, table: Tensor, heads: int, window: int, shift_h: int, shift_w: int, scale: float) -> Tensor:
    """The op's CUDA body: the meaning of :func:`fastadv.window_reference.window_attention`, up to rounding. No sync."""
    programs, sizes = launch_sizes(qkv, table, heads, window, shift_h, shift_w, tiles_for(qkv.dtype), PROLOGUE)
    out = torch.empty((*qkv.shape[:3], qkv.shape[3] // 3), dtype=qkv.dtype, device=qkv.device)
    if programs:
        with torch.cuda.device_of(qkv):
            window_attention_kernel[(programs,)](qkv, table, out, scale, **sizes)
    return out
