"""Deep visual prompt tuning: every transformer block sees a few learned tokens beside those of the image.

Shapes: T prompts of width C; Swin's tokens (B, H, W, C), ViT's (B, tokens, C).
Source: Jia et al., arXiv:2203.12119 (VPT-deep, prepended, 10 tokens), Swin's windows as in its released code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fastadv.errors import SettingsError
from fastadv.models import Classifier


class PromptedSwinBlock(nn.Module):
    """A Swin block whose every window also attends to the prompts, without relative bias and without mask.

    What the block makes of its prompts is dropped, because the next block brings its own; the ``last`` block averages
    it over the windows and appends it to the tokens, (B, H * W + T, 1, C), so that the pooling takes it in.
    """

    # timm's annotations allow for less than its blocks hold.
    block: Any

    def __init__(self, block: SwinTransformerBlock, num_tokens: int, bound: float, dropout: float, last: bool) -> None:
        super().__init__()
        self.block, self.last, self.dropout = block, last, nn.Dropout(dropout)
        like = self.block.norm1.weight
        self.prompt = nn.Parameter(like.new_empty(num_tokens, len(like)).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of x (B, H, W, C)."""
        block, (b, h, w, c), t = self.block, x.shape, len(self.prompt)
        prompt = self.dropout(self.prompt).expand(b, t, c)
        shift = tuple(block.shift_size)
        rolled = torch.roll(block.norm1(x), (-shift[0], -shift[1]), (1, 2)) if any(shift) else block.norm1(x)
        windows = window_partition(rolled, block.window_size).reshape(b, -1, block.window_area, c)
        num_windows = windows.shape[1]
        beside = block.norm1(prompt)[:, None].expand(b, num_windows, t, c)
        attended = self._attend(torch.cat([beside, windows], 2).flatten(0, 1), num_windows)
        merged = window_reverse(attended[:, t:].reshape(-1, *block.window_size, c), block.window_size, h, w)
        merged = torch.roll(merged, shift, (1, 2)) if any(shift) else merged
        tokens: Tensor = (x + block.drop_path1(merged)).flatten(1, 2)
        if self.last:
            prompt = prompt + block.drop_path1(attended[:, :t].reshape(b, num_windows, t, c).mean(1))
            tokens = torch.cat([tokens, prompt], 1)
        tokens = tokens + block.drop_path2(block.mlp(block.norm2(tokens)))
        return tokens.unsqueeze(2) if self.last else tokens.view(b, h, w, c)

    def _attend(self, tokens: Tensor, num_windows: int) -> Tensor:
        """The attention of the windows' tokens (B * windows, T + N, C), prompts first."""
        attn, area, t = self.block.attn, self.block.window_area, len(self.prompt)
        q, k, v = attn.qkv(tokens).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        table = attn.relative_position_bias_table[attn.relative_position_index.flatten()]
        bias = table.view(1, area, area, -1).permute(0, 3, 1, 2)
        if self.block.attn_mask is not None:
            bias = bias + self.block.attn_mask[:, None]
        bias = F.pad(bias, (t, 0, t, 0)).to(q.dtype)
        bias = bias.repeat(len(tokens) // num_windows, 1, 1, 1) if len(bias) > 1 else bias
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attn.scale)
        mixed: Tensor = attn.proj_drop(attn.proj(out.transpose(1, 2).flatten(2)))
        return mixed


class PromptedVitBlock(nn.Module):
    """A ViT block with its prompts between the class token and the patches; they leave again behind it."""

    block: Any

    def __init__(self, block: Block, num_prefix: int, num_tokens: int, bound: float, dropout: float) -> None:
        super().__init__()
        self.block, self.num_prefix, self.dropout = block, num_prefix, nn.Dropout(dropout)
        like = self.block.norm1.weight
        self.prompt = nn.Parameter(like.new_empty(num_tokens, len(like)).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of x (B, tokens, C)."""
        prompt = self.dropout(self.prompt).expand(len(x), -1, -1)
        before, after = x[:, : self.num_prefix], x[:, self.num_prefix :]
        x = self.block(torch.cat([before, prompt.to(x.dtype), after], 1))
        return torch.cat([x[:, : self.num_prefix], x[:, self.num_prefix + prompt.shape[1] :]], 1)


def prompt(model: Classifier, *, num_tokens: int = 10, dropout: float = 0.1) -> list[nn.Module]:
    """Give every block of a Swin or ViT ``num_tokens`` learned tokens; they, their dropout and the head learn.

    Raises SettingsError for other backbones, and for a Swin whose maps are no multiple of its windows.
    """
    if num_tokens < 1 or not 0 <= dropout < 1:
        raise SettingsError(f"{num_tokens} prompts, dropout {dropout}", "1 token or more, a dropout below 1")
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    blocks: list[tuple[str, Any]] = [
        (n, m) for n, m in model.backbone.named_modules() if isinstance(m, SwinTransformerBlock | Block)
    ]
    if not blocks:
        raise SettingsError(f"{model.name} has no transformer blocks to prompt", "--model with a Swin or ViT")
    # To mypy a backbone is any module; Swin and ViT have these parts.
    backbone: Any = model.backbone
    patch: nn.Conv2d = backbone.patch_embed.proj
    # The published code's bound, the same for every block: Glorot's over a patch and the first width.
    bound = math.sqrt(6 / (patch.weight[0].numel() + patch.out_channels))
    added: list[nn.Module] = []
    for name, block in blocks:
        if isinstance(block, Block):
            prompted: nn.Module = PromptedVitBlock(block, backbone.num_prefix_tokens, num_tokens, bound, dropout)
        else:
            if any(side % window for side, window in zip(block.input_resolution, block.window_size, strict=True)):
                raise SettingsError(
                    f"{model.name}: a map of {block.input_resolution} is no multiple of its window {block.window_size}",
                    "--image-size at which every map is one",
                )
            prompted = PromptedSwinBlock(block, num_tokens, bound, dropout, last=name == blocks[-1][0])
        model.backbone.set_submodule(name, prompted)
        added.append(prompted.get_submodule("dropout"))
    return [model.head, *added]
