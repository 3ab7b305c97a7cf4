"""What both ways of window attention share: where a window's tokens lie, bias and mask, sizes of the launch, checks.

A program serves one window and one head of several images. Nothing but an address changes from one image to the next,
so roll, partition, relative bias and shift mask are worked out once per program and stay in registers. The kernels
read q, k and v where the Linear layer left them, and write where the next one reads.
Meaning: :mod:`fastadv.window_reference`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastadv import window_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (16, 32, 64)
# exp2 is the instruction there is.
LOG2E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(window_reference.HIDDEN)
# Compiled for the properties of their values, a network would need a kernel per layer: seconds for each.
SIZES = ("images", "images_per_program", "heads", "height", "width", "shift_h", "shift_w")


@triton.jit
def tile_of_program(images, images_per_program, heads, height, width, WINDOW: tl.constexpr):
    """Head, row and column of the window, first and last image. Programs side by side read bytes side by side."""
    head = tl.program_id(0) % heads
    window = tl.program_id(0) // heads
    windows = (height // WINDOW) * (width // WINDOW)
    first = window // windows * images_per_program
    window = window % windows
    last = tl.minimum(first + images_per_program, images)
    return head, window // (width // WINDOW), window % (width // WINDOW), first, last


@triton.jit
def place(token, window_y, window_x, height, width, shift_h, shift_w, WINDOW: tl.constexpr):
    """Where each token of the window lies in the image, and from which of four sides of the map the roll took it."""
    y = window_y * WINDOW + token // WINDOW + shift_h
    x = window_x * WINDOW + token % WINDOW + shift_w
    below = y >= height
    right = x >= width
    number = tl.where(below, y - height, y) * width + tl.where(right, x - width, x)
    return number, below.to(tl.int32) * 2 + right.to(tl.int32)


@triton.jit
def offsets(number, heads, head, HEAD_DIM: tl.constexpr):
    """Where a head's channels of each token lie in an image of tokens, each heads * HEAD_DIM long.

    As a product with HEAD_DIM: the compiler sees the alignment, and uses 16-byte accesses.
    """
    return (number * heads + head)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]


@triton.jit
def bias_and_mask(table_ptr, token, side, head, heads, WINDOW: tl.constexpr):
    """What is added to the scaled products of queries (rows) and keys (columns)."""
    inside = token < WINDOW * WINDOW
    steps = token // WINDOW * (2 * WINDOW - 1) + token % WINDOW
    entry = steps[:, None] - steps[None, :] + 2 * WINDOW * (WINDOW - 1)
    bias = tl.load(table_ptr + entry * heads + head, mask=inside[:, None] & inside[None, :], other=0.0).to(tl.float32)
    bias += tl.where(side[:, None] != side[None, :], HIDDEN, 0.0)
    # Keys that only fill the tile up weigh nothing; queries that do stay finite, and nothing of them is stored.
    return tl.where(inside[None, :], bias, float("-inf"))


@triton.jit
def raised_scores(q, k, scale, bias):
    """The softmax over keys before its division, and what to divide each query's row by."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias
    # The factor comes after the difference: folded into scale and bias it would round the large numbers (2.2 times
    # plain PyTorch's error for saturated scores in float32), as an fma it could leave a largest score above 0.
    raised = tl.exp2((scores - tl.max(scores, axis=1)[:, None]) * LOG2E)
    return raised, tl.sum(raised, axis=1)


class Tile(NamedTuple):
    """How a kernel is launched: warps of a program, and how many programs a multiprocessor (sm_90) holds at a time.

    registers: where the compiler takes a few more than that number of programs leaves each thread, the bound to keep.
    """

    warps: int
    resident: int
    registers: int | None = None


@functools.cache
def images_per_program(images: int, tiles: int, resident: int, prologue: int) -> int:
    """How many images a program serves, so that all programs together take least time.

    tiles: programs needed if each served every image; resident: programs running at a time; prologue: what a program
    does before its first image, in times of an image.
    """

    def time(served: int) -> int:
        return triton.cdiv(tiles * triton.cdiv(images, served), resident) * (prologue + served)

    return min(range(1, images + 1), key=time)


def supports(qkv: Tensor, heads: int, window: int) -> bool:
    """Whether the kernels serve this tensor (B, H, W, 3 * heads * D): windows of 4, 7 or 8, D of 16, 32 or 64."""
    if qkv.ndim != 4 or qkv.dtype not in DTYPES or window not in (4, 7, 8) or heads < 1:
        return False
    _, height, width, channels = qkv.shape
    # Inside an image offsets are int32.
    fits = height * width * channels < 2**31
    return fits and channels in [3 * heads * d for d in HEAD_DIMS] and height % window == width % window == 0


def launch_sizes(
    qkv: Tensor,
    table: Tensor,
    heads: int,
    window: int,
    shift_h: int,
    shift_w: int,
    tiles: Mapping[tuple[int, int], Tile],
    prologue: int,
) -> tuple[int, dict[str, Any]]:
    """Number of programs, and the kernels' sizes and options by name.

    Raises: ValueError where the op's contract is broken; :mod:`fastadv.window_attention` meets it for its callers.
    """
    found = f"{qkv.dtype} of shape {tuple(qkv.shape)}"
    if not supports(qkv, heads, window) or not qkv.is_contiguous():
        raise ValueError(f"window_attention: no kernel for {heads} heads, windows of {window}, qkv {found}")
    if table.shape != ((2 * window - 1) ** 2, heads) or table.dtype not in (torch.float32, qkv.dtype):
        raise ValueError(f"window_attention: table is {table.dtype} of shape {tuple(table.shape)}, qkv is {found}")
    if not table.is_contiguous() or table.device != qkv.device:
        raise ValueError(f"window_attention: table must be contiguous and on {qkv.device}")
    if not (0 <= shift_h < window and 0 <= shift_w < window):
        raise ValueError(f"window_attention: shifts must be 0 to {window - 1}, got {shift_h}, {shift_w}")
    images, height, width, channels = qkv.shape
    head_dim = channels // (3 * heads)
    rows = rows_of_tile(window)
    tile = tiles[rows, head_dim]
    programs = (height // window) * (width // window) * heads
    resident, capability = tile.resident, (0, 0)
    if qkv.is_cuda:
        card = torch.cuda.get_device_properties(qkv.device)
        resident, capability = tile.resident * card.multi_processor_count, (card.major, card.minor)
    served = images_per_program(images, programs, resident, prologue) if qkv.numel() else 1
    return programs * triton.cdiv(images, served), {
        "images": images,
        "images_per_program": served,
        "heads": heads,
        "height": height,
        "width": width,
        "shift_h": shift_h,
        "shift_w": shift_w,
        "WINDOW": window,
        "HEAD_DIM": head_dim,
        "ROWS": rows,
        **compile_options(tile, qkv.dtype, capability),
    }


def rows_of_tile(window: int) -> int:
    """Rows for the tokens of a window: a power of 2, as Triton wants, and at least the 16 of a tensor core."""
    rows: int = triton.next_power_of_2(window * window)
    return rows


def compile_options(tile: Tile, dtype: torch.dtype, capability: tuple[int, int]) -> dict[str, Any]:
    """What the compiler is told besides the kernel's own constants."""
    return {
        "num_warps": tile.warps,
        # Half precision: the next image is on its way while this one is computed. In float32 the arithmetic takes
        # longer than the loads, and the second buffer's addresses spill.
        "num_stages": 1 if dtype == torch.float32 else 2,
        # sm_80 needs a quarter more registers for the same products, and would spill.
        "maxnreg": tile.registers if capability >= (9, 0) else None,
        # Said, because its default changes with Triton's version.
        "enable_fp_fusion": True,
    }
