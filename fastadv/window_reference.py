"""The meaning of window attention, forward and backward, in plain PyTorch.

Shapes: qkv (B, H, W, 3 * heads * D) as a Linear layer gives it, the last axis q, then k, then v, each heads x D; table
((2 window - 1)^2, heads), the bias between two tokens of a window by their offset; out and grad (B, H, W, heads * D).
H and W are multiples of window. Arithmetic is in float32, or in float64 where qkv is float64.
Source: Liu et al., Swin Transformer, arXiv:2103.14030, section 3.2 and equation 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

OPS = ("window_attention", "window_attention_backward")
# Added to the score of two tokens that only the roll made neighbours. Source: timm, models/swin_transformer.py.
HIDDEN = -100.0


def window_attention(
    qkv: Tensor, table: Tensor, heads: int, window: int, shift_h: int, shift_w: int, scale: float
) -> Tensor:
    """Softmax attention inside each window of the map rolled up and left by the shifts; out in qkv's dtype.

    In a rolled map the last windows hold tokens from opposite sides; such tokens do not see each other.
    """
    q, k, v = _windows(_wide(qkv), 3 * heads, window, shift_h, shift_w).chunk(3, 1)
    weights = _weights(q, k, table, window, shift_h, shift_w, scale, qkv.shape)
    return _map(weights @ v, qkv.shape, window, shift_h, shift_w).to(qkv.dtype)


def window_attention_backward(
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
    """The gradients of qkv, in its dtype, and of table, in float32: of shape (0,) unless table_learns."""
    q, k, v = _windows(_wide(qkv), 3 * heads, window, shift_h, shift_w).chunk(3, 1)
    out = _windows(_wide(grad), heads, window, shift_h, shift_w)
    weights = _weights(q, k, table, window, shift_h, shift_w, scale, qkv.shape)
    slopes = out @ v.mT
    slopes = weights * (slopes - (weights * slopes).sum(-1, keepdim=True))
    grads = torch.cat([slopes @ k * scale, slopes.mT @ q * scale, weights.mT @ out], 1)
    qkv_grad = _map(grads, qkv.shape, window, shift_h, shift_w).to(qkv.dtype)
    if not table_learns:
        return qkv_grad, table.new_empty(0, dtype=torch.float32)
    entries = slopes.sum(0).flatten(1).mT.to(table.dtype if table.dtype == torch.float64 else torch.float32)
    sums = torch.zeros(table.shape, dtype=entries.dtype, device=table.device)
    return qkv_grad, sums.index_add(0, _entries(window, table.device).flatten(), entries)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _windows(tokens: Tensor, groups: int, window: int, shift_h: int, shift_w: int) -> Tensor:
    """(B, H, W, groups * D) -> (B * windows, groups, window^2, D) of the rolled map."""
    batch, height, width, channels = tokens.shape
    cut = tokens.roll((-shift_h, -shift_w), (1, 2)).view(
        batch, height // window, window, width // window, window, groups, channels // groups
    )
    return cut.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, groups, window * window, channels // groups)


def _map(windows: Tensor, shape: torch.Size, window: int, shift_h: int, shift_w: int) -> Tensor:
    """The way back of :func:`_windows` to a map of the first three sizes of ``shape``."""
    _, groups, _, dim = windows.shape
    batch, height, width = shape[:3]
    cut = windows.view(batch, height // window, width // window, groups, window, window, dim)
    return cut.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, height, width, groups * dim).roll((shift_h, shift_w), (1, 2))


def _weights(
    q: Tensor, k: Tensor, table: Tensor, window: int, shift_h: int, shift_w: int, scale: float, shape: torch.Size
) -> Tensor:
    """(B * windows, heads, window^2, window^2): how much each query takes from each key."""
    bias = table.to(q.dtype)[_entries(window, table.device)].permute(2, 0, 1)
    scores = (q * scale) @ k.mT + bias
    if shift_h or shift_w:
        hidden = _regions_differ(shape[1], shape[2], window, shift_h, shift_w, q.device).to(q.dtype) * HIDDEN
        scores = (scores.unflatten(0, (shape[0], -1)) + hidden.unsqueeze(1)).flatten(0, 1)
    return scores.softmax(-1)


def _entries(window: int, device: torch.device) -> Tensor:
    """(window^2, window^2): the row of the table for a query and a key."""
    place = torch.arange(window, device=device)
    offset = place.unsqueeze(1) - place + window - 1
    rows, columns = offset[:, None, :, None], offset[None, :, None, :]
    return (rows * (2 * window - 1) + columns).reshape(window * window, window * window)


def _regions_differ(height: int, width: int, window: int, shift_h: int, shift_w: int, device: torch.device) -> Tensor:
    """(windows, window^2, window^2): whether a query and a key come from different sides of the map."""
    # Without a shift nothing is rolled around, and no row or column number reaches the bound.
    below = torch.arange(height, device=device) >= height - shift_h
    right = torch.arange(width, device=device) >= width - shift_w
    sides = 2 * below.long().unsqueeze(1) + right.long()
    cut = sides.view(height // window, window, width // window, window).permute(0, 2, 1, 3).reshape(-1, window * window)
    return cut.unsqueeze(2) != cut.unsqueeze(1)
