"""Adapters: a small bottleneck after the MLP of every transformer block, and the head, learn."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.errors import SettingsError
from fastadv.models import Classifier


class Adapter(nn.Module):
    """An MLP whose output m becomes m + up(gelu(down(m))), inside the block's residual branch."""

    def __init__(self, mlp: nn.Module, width: int, factor: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.down, self.up = nn.Linear(width, width // factor), nn.Linear(width // factor, width)
        # With up at zero the block starts unchanged. With down at zero too, as released, only up's bias ever moves.
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        """Features of x, of its shape (..., width)."""
        x = self.mlp(x)
        out: Tensor = x + self.up(F.gelu(self.down(x)))
        return out


def adapter(model: Classifier, *, factor: int = 8) -> list[nn.Module]:
    """Add an adapter of width / ``factor`` units after every MLP of a Swin or ViT.

    The backbone stays in eval mode. Raises SettingsError for a backbone without transformer blocks.
    Source: Pfeiffer et al., arXiv:2005.00247; factor 8 as in arXiv:2312.05716.
    """
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    mlps = [
        (name, module)
        for name, module in model.backbone.named_modules()
        if name.endswith(".mlp") and isinstance(getattr(module, "fc2", None), nn.Linear)
    ]
    if not mlps:
        raise SettingsError(f"{model.name} has no transformer blocks to add adapters to", "--model with a Swin or ViT")
    for name, mlp in mlps:
        weight = mlp.get_parameter("fc2.weight")
        model.backbone.set_submodule(name, Adapter(mlp, len(weight), factor).to(weight))
    return [model.head]
