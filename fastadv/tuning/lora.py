"""LoRA: low-rank updates of the attention's queries and values, or of a ResNet's convolutions, and the head learn.

Source: Hu et al., arXiv:2106.09685; on q and v with rank 16 and alpha 16 as in arXiv:2312.05716.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.errors import SettingsError
from fastadv.models import Classifier


class LoraAttention(nn.Module):
    """The joint linear layer of queries, keys and values (d -> 3d) with a low-rank update of queries and values."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        width = base.in_features
        self.base, self.scale, self.dropout = base, alpha / rank, nn.Dropout(dropout)
        like = base.weight
        self.lora_a_q, self.lora_a_v = (nn.Parameter(like.new_empty(rank, width)) for _ in "qv")
        self.lora_b_q, self.lora_b_v = (nn.Parameter(like.new_zeros(width, rank)) for _ in "qv")
        for factor in (self.lora_a_q, self.lora_a_v):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Queries, keys and values (..., 3d) of x (..., d)."""
        q, k, v = self.base(x).chunk(3, -1)
        x = self.dropout(x)
        q = q + self.scale * F.linear(F.linear(x, self.lora_a_q), self.lora_b_q)
        v = v + self.scale * F.linear(F.linear(x, self.lora_a_v), self.lora_b_v)
        return torch.cat([q, k, v], -1)

    def merged(self) -> Tensor:
        """The weight (3d, d) of one plain layer that gives the same in eval mode."""
        updates = [self.lora_b_q @ self.lora_a_q, torch.zeros_like(self.base.weight[: self.base.in_features])]
        return self.base.weight + self.scale * torch.cat([*updates, self.lora_b_v @ self.lora_a_v])


class LoraConv(nn.Module):
    """A convolution with a low-rank update: the same convolution to ``rank`` channels, then 1x1."""

    def __init__(self, base: nn.Conv2d, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base, alpha / rank, nn.Dropout(dropout)
        like = base.weight
        self.lora_a = nn.Parameter(like.new_empty(rank, *like.shape[1:]))
        self.lora_b = nn.Parameter(like.new_zeros(base.out_channels, rank, 1, 1))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of x (B, C, H, W)."""
        base = self.base
        low = F.conv2d(self.dropout(x), self.lora_a, None, base.stride, base.padding, base.dilation)
        out: Tensor = base(x) + self.scale * F.conv2d(low, self.lora_b)
        return out

    def merged(self) -> Tensor:
        """The weight of one plain convolution that gives the same in eval mode."""
        return self.base.weight + self.scale * torch.einsum("or,rikl->oikl", self.lora_b[:, :, 0, 0], self.lora_a)


Lora = LoraAttention | LoraConv


def lora(model: Classifier, *, rank: int = 16, alpha: float = 16.0, dropout: float = 0.1) -> list[nn.Module]:
    """Add a low-rank update to queries and values of every attention (Swin, ViT), or to every block's convolutions.

    It starts as zero (A kaiming uniform, B zero). Updates, dropout and head are in train mode, the rest in eval mode.
    Raises SettingsError for a backbone with neither, and for a rank below 1.
    """
    if rank < 1 or not 0 <= dropout < 1:
        raise SettingsError(f"LoRA rank is {rank}, dropout {dropout}", "a rank of 1 or more, a dropout below 1")
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    added: list[nn.Module] = []
    for name, module in list(model.backbone.named_modules()):
        if name.endswith("attn.qkv") and isinstance(module, nn.Linear):
            update: Lora = LoraAttention(module, rank, alpha, dropout)
        # The stem sees pixels; what is in the stages is what the published code updates (AutoLoRa, arXiv:2310.01818).
        elif isinstance(module, nn.Conv2d) and name.startswith("layer") and module.groups == 1:
            update = LoraConv(module, rank, alpha, dropout)
        else:
            continue
        model.backbone.set_submodule(name, update)
        added.append(update.dropout)
    if not added:
        raise SettingsError(
            f"{model.name} has no attention and no residual stages to add LoRA to", "--model with a Swin, ViT or ResNet"
        )
    return [model.head, *added]


def merge(model: Classifier) -> int:
    """Replace every LoRA layer by one plain layer with equal outputs, in place; gives how many there were."""
    updates = [(name, module) for name, module in model.named_modules() if isinstance(module, Lora)]
    for name, module in updates:
        with torch.no_grad():
            module.base.weight.copy_(module.merged())
        model.set_submodule(name, module.base)
    return len(updates)
