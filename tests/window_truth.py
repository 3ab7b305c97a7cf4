"""What timm's own Swin block makes of q, k and v, gradients included: the truth that window attention is held to."""

import timm.layers
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn

HALF = (torch.bfloat16, torch.float16)


class Thrice(nn.Module):
    """In place of the last Linear layer: as many channels as came in, which timm counts on."""

    def forward(self, out):
        return out.repeat(1, 1, 3)


def window_case(window, head_dim, heads, size, shift, images, saturated=False):
    """qkv, table, gradient of the output (float32), and the op's settings: heads, window, shifts, scale.

    Scores and biases are large enough that a wrong bias, mask or scale is seen.
    """
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(images, *size, 3 * heads * head_dim, generator=generator)
    if saturated:
        # Scores that differ by more than the -100 which hides a token.
        qkv[..., : heads * head_dim] *= 100
    table = torch.randn((2 * window - 1) ** 2, heads, generator=generator)
    grad = torch.randn(images, *size, heads * head_dim, generator=generator)
    return qkv, table, grad, (heads, window, *shift, head_dim**-0.5)


def through_timm(qkv, table, grad, settings):
    """Output, gradient of qkv and gradient of table, by timm's block and autograd, in qkv's dtype."""
    heads, window, *shift, scale = settings
    timm.layers.set_fused_attn(False)
    block = SwinTransformerBlock(
        qkv.shape[-1],
        tuple(qkv.shape[1:3]),
        num_heads=heads,
        head_dim=qkv.shape[-1] // (3 * heads),
        window_size=window,
        shift_size=tuple(shift),
        # Or timm would drop the shift where the map is one window.
        always_partition=True,
    )
    assert block.window_size == (window, window)
    assert block.shift_size == tuple(shift)
    assert block.attn.scale == scale
    block.attn.qkv, block.attn.proj = nn.Identity(), Thrice()
    block = block.to(qkv.device, qkv.dtype)
    with torch.no_grad():
        block.attn.relative_position_bias_table.copy_(table)
    qkv = qkv.clone().requires_grad_()
    out = block._attn(qkv)[..., : grad.shape[-1]]
    grads = torch.autograd.grad(out, (qkv, block.attn.relative_position_bias_table), grad.to(qkv.dtype))
    return [t.detach() for t in (out, *grads)]


def errors(results, truth):
    """Of output and the gradients of q, k, v and table, how far they lie from the truth, in its length."""
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(parts(results), parts(truth), strict=True)]


def parts(results):
    """The gradient of qkv taken apart: a fault in one of the three must not hide behind the others."""
    out, qkv_grad, table_grad = results
    return out, *qkv_grad.chunk(3, -1), table_grad
