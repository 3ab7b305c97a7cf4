"""``fastadv::window_attention``: Swin's attention without its copies, and :func:`insert`, which puts it into a model.

The qkv layer works token by token, so it can run on the map as it is; roll, partition, bias, mask, softmax, reverse and
roll back are then one op each way. Meaning: :mod:`fastadv.window_reference`; bodies: csrc and kernels.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from fastadv import ops, window_reference
from fastadv.errors import SettingsError

WINDOWS = (4, 7, 8)
HEAD_DIMS = (16, 32, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_SIZES = "int heads, int window, int shift_h, int shift_w, float scale"
# As in csrc, which registers them when the library is there; a test compares the two.
SCHEMAS = {
    "window_attention": f"(Tensor qkv, Tensor table, {_SIZES}) -> Tensor",
    "window_attention_backward": (
        f"(Tensor grad, Tensor qkv, Tensor table, {_SIZES}, bool table_learns) -> (Tensor, Tensor)"
    ),
}


def window_attention(
    qkv: Tensor, table: Tensor, heads: int, window: int, shift_h: int = 0, shift_w: int = 0, scale: float | None = None
) -> Tensor:
    """Attention inside each window of a map rolled by the shifts: (B, H, W, heads * D) in qkv's dtype, not rolled.

    qkv: (B, H, W, 3 * heads * D), float32, bfloat16 or float16, the last axis q, then k, then v, each heads x D; H and
    W multiples of window. table: ((2 window - 1)^2, heads), float32 or as qkv, added to the scores by offset. Windows
    of 4, 7 or 8, D of 16, 32 or 64. scale: D ** -0.5 where none is given. Differentiable in qkv and table, once.

    Raises: SettingsError for a shape, dtype, device or size that is not served.
    """
    if qkv.ndim != 4 or qkv.dtype not in DTYPES or heads < 1 or qkv.shape[-1] % (3 * heads):
        found = f"{qkv.dtype} of shape {tuple(qkv.shape)} for {heads} heads"
        fix = "give (B, H, W, 3 * heads * D), float32, bfloat16 or float16, as the qkv Linear puts it out"
        raise SettingsError(f"qkv is {found}", fix)
    _, height, width, channels = qkv.shape
    dim = channels // 3 // heads
    if window not in WINDOWS or dim not in HEAD_DIMS:
        fix = f"windows are {WINDOWS}, head dimensions {HEAD_DIMS}; window_reference.window_attention takes any"
        raise SettingsError(f"window={window} with head dimension {dim} is not served", fix)
    if height % window or width % window:
        raise SettingsError(f"a map of {height}x{width} does not divide into windows of {window}", "pad the map")
    if not (0 <= shift_h < window and 0 <= shift_w < window):
        raise SettingsError(f"shifts are {shift_h}, {shift_w} for window={window}", "give 0 <= shift < window")
    expected = ((2 * window - 1) ** 2, heads)
    if table.shape != expected or table.dtype not in (torch.float32, qkv.dtype) or table.device != qkv.device:
        found = f"{table.dtype} of shape {tuple(table.shape)} on {table.device}"
        fix = f"give {expected}, float32 or {qkv.dtype}, on {qkv.device}"
        raise SettingsError(f"table is {found}", fix)
    scale = dim**-0.5 if scale is None else scale
    out: Tensor = torch.ops.fastadv.window_attention(
        qkv.contiguous(), table.contiguous(), heads, window, shift_h, shift_w, scale
    )
    return out


def insert(model: nn.Module) -> int:
    """Make every timm Swin block of ``model`` that this op serves use it, in place; the number of such blocks.

    Parameters, buffers, state_dict and results (up to rounding) stay as they are; copies keep the op. A block that is
    not served, or not with the input it gets (padding, attention dropout in train mode, hooks inside the attention,
    float64, float32 on CUDA), runs timm's own code. 0 where only plain PyTorch could run the op.
    """
    return _blocks().insert(model) if _timm_is_loaded() else 0


def remove(model: nn.Module) -> int:
    """Give every block of ``model`` timm's own attention back; the number of blocks that had the op."""
    return _blocks().remove(model) if _timm_is_loaded() else 0


def _timm_is_loaded() -> bool:
    # Importing timm costs seconds; where nobody has, no model can hold a block of it.
    return "timm.models.swin_transformer" in sys.modules


def _blocks() -> Any:
    from fastadv import window_block

    return window_block


def _forward_on_cuda(qkv: Tensor, table: Tensor, heads: int, window: int, *rest: Any) -> Tensor:
    body = ops.kernels("window_attention")
    if body is None or not body.supports(qkv, heads, window):
        return window_reference.window_attention(qkv, table, heads, window, *rest)
    out: Tensor = body.launch(qkv, table, heads, window, *rest)
    return out


def _backward_on_cuda(
    grad: Tensor, qkv: Tensor, table: Tensor, heads: int, window: int, *rest: Any
) -> tuple[Tensor, Tensor]:
    body = ops.kernels("window_attention_backward")
    if body is None or not body.supports(qkv, heads, window):
        return window_reference.window_attention_backward(grad, qkv, table, heads, window, *rest)
    grads: tuple[Tensor, Tensor] = body.launch_backward(grad, qkv, table, heads, window, *rest)
    return grads


def _out(qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))


def _grads(grad: Tensor, qkv: Tensor, table: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    table_learns = settings[-1]
    return torch.empty_like(qkv), table.new_empty(table.shape if table_learns else 0, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, table, *ctx.settings = inputs
    ctx.save_for_backward(qkv, table)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    qkv, table = ctx.saved_tensors
    table_learns = ctx.needs_input_grad[1]
    qkv_grad, table_grad = torch.ops.fastadv.window_attention_backward(
        grad.contiguous(), qkv, table, *ctx.settings, table_learns
    )
    nothing = (None,) * len(ctx.settings)
    return qkv_grad, table_grad.to(table.dtype) if table_learns else None, *nothing


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise SettingsError(
        "window_attention has no second derivative", "fastadv.window_attention.remove(model) before create_graph=True"
    )


ops.register(
    SCHEMAS,
    {"window_attention": _forward_on_cuda, "window_attention_backward": _backward_on_cuda},
    {"window_attention": _out, "window_attention_backward": _grads},
)
torch.library.register_autograd("fastadv::window_attention", _backward, setup_context=_keep, lib=ops.LIBRARY)
torch.library.register_autograd("fastadv::window_attention_backward", _no_second_derivative, lib=ops.LIBRARY)
