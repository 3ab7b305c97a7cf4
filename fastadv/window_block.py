"""timm's Swin block with its attention computed by ``fastadv::window_attention``.

A block changes its class and nothing else: there is no wrapper that a state_dict, a copy or a hook could meet.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from fastadv import ops
from fastadv.window_attention import DTYPES, HEAD_DIMS, WINDOWS, window_attention


class WindowBlock(SwinTransformerBlock):
    """A :class:`SwinTransformerBlock` whose qkv and proj layers run on the map as it is, one op between them."""

    def _attn(self, x: Tensor) -> Tensor:
        # timm's annotations allow for less than its code does.
        block: Any = self
        if not _serves(block, x):
            whole: Any = SwinTransformerBlock
            out: Tensor = whole._attn(block, x)
            return out
        attn, window, shifts = block.attn, block.window_size[0], block.shift_size
        # As modules: what a tuning has wrapped around them stays in force.
        qkv, table = attn.qkv(x), attn.relative_position_bias_table
        mixed = window_attention(qkv, table, attn.num_heads, window, shifts[0], shifts[1], attn.scale)
        out = attn.proj_drop(attn.proj(mixed))
        return out


def insert(model: nn.Module) -> int:
    """As :func:`fastadv.window_attention.insert`."""
    return _change_class(model, SwinTransformerBlock, WindowBlock, _fits)


def remove(model: nn.Module) -> int:
    """As :func:`fastadv.window_attention.remove`."""
    return _change_class(model, WindowBlock, SwinTransformerBlock, lambda block: True)


def _change_class(model: nn.Module, old: type, new: Any, wanted: Any) -> int:
    # Not isinstance: what somebody derived from timm's block has an attention of its own.
    blocks = [module for module in model.modules() if type(module) is old and wanted(module)]
    for block in blocks:
        block.__class__ = new
    return len(blocks)


def _fits(block: Any) -> bool:
    """Whether the op serves this block, and a fast body runs it where the block's weights are."""
    attn = block.attn
    if type(attn) is not WindowAttention or not hasattr(SwinTransformerBlock, "_attn"):
        return False
    # The layers may be wrapped; the table is not, and the scale tells the head dimension.
    table, dim = attn.relative_position_bias_table, round(attn.scale**-2)
    served = dim in HEAD_DIMS and table.dtype in DTYPES and _serves_map(block, *block.input_resolution)
    return served and ops.body("window_attention", table.device) != "reference"


def _serves_map(block: Any, height: int, width: int) -> bool:
    down, across = block.window_size
    return down == across and down in WINDOWS and not height % down and not width % across


def _serves(block: Any, x: Tensor) -> bool:
    """Whether the op serves this input, as the block is now."""
    _, height, width, _ = x.shape
    attn = block.attn
    # A mask made beforehand is for one size of map; timm refuses others.
    any_size = getattr(block, "dynamic_mask", False) or not any(block.shift_size)
    dtype = x.dtype
    # Autocast leaves float64 alone.
    if dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    return (
        _serves_map(block, height, width)
        and (any_size or (height, width) == tuple(block.input_resolution))
        and not (attn.attn_drop.training and attn.attn_drop.p > 0)
        # Tensor cores in half precision are what the Triton kernels are for.
        and dtype in (DTYPES[1:] if x.is_cuda else DTYPES)
        and not any(_hooked(module) for module in (attn, attn.softmax, attn.attn_drop))
    )


def _hooked(module: nn.Module) -> bool:
    """Whether someone waits for a call of ``module``, which the op would not make."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
