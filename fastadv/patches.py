"""The gradient of a patch embedding towards its pixels as one matrix product, on a CPU.

Where patches do not overlap (a convolution as wide as its stride) each pixel has one patch, so the gradient is a linear
layer's, put back in place. oneDNN's backward convolution takes 4 to 10 times as long into three channels: 41 % of a
gradient pass of the small network in tests/nets.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.standins import ClassOf, Slot

# With 16 channels and more oneDNN is as fast.
_MOST_CHANNELS = 4


class PatchConv(nn.Conv2d):
    """A convolution over patches; its weights get no gradient, and that of its input is a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H // kernel, W // kernel), as :class:`torch.nn.Conv2d`."""
        embedded: Tensor = _Patches.apply(x, self.weight, self.bias)
        return embedded


def patch_layers(model: nn.Module) -> list[Slot]:
    """The classes that make the patch embeddings of ``model`` a :class:`PatchConv` where that pays."""
    return [Slot(ClassOf(module), "__class__", PatchConv) for module in model.modules() if _embeds_patches(module)]


def _embeds_patches(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == module.stride != (1, 1)
        and module.padding in ((0, 0), "valid")
        and module.dilation == (1, 1)
        and module.groups == 1
        and module.in_channels <= _MOST_CHANNELS
        and module.weight.device.type == "cpu"
    )


class _Patches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.size = x.shape
        return F.conv2d(x, weight, bias, weight.shape[2:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        (b, c, height, width), (h, w), (kh, kw) = ctx.size, grad.shape[2:], weight.shape[2:]
        # Under autocast the gradient comes in the type of the output.
        patches = grad.permute(0, 2, 3, 1).flatten(0, 2) @ weight.flatten(1).to(grad.dtype)
        pixels = patches.view(b, h, w, c, kh, kw).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h * kh, w * kw)
        if pixels.shape[2:] != (height, width):
            # A rest too small for a patch is not looked at. Not always: pad copies also where it adds nothing.
            pixels = F.pad(pixels, (0, width - w * kw, 0, height - h * kh))
        return pixels, None, None
