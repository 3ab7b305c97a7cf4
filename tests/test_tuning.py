"""Tunings: what they add is as large as the papers say, starts harmless, learns, and leaves the rest alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.errors import SettingsError
from fastadv.models import Classifier, create
from fastadv.tuning import Tuning, adapter, bias, full, linear, lora, prompt
from fastadv.tuning.lora import LoraAttention, LoraConv, merge

TUNINGS = {"full": full, "linear": linear, "bias": bias, "lora": lora, "adapter": adapter, "prompt": prompt}
# Swin-B's encoder in arXiv:2312.05716, counted in its released code; the head comes on top.
PAPER = {"full": 86_743_224, "linear": 0, "bias": 200_760, "lora": 770_048, "adapter": 1_758_432, "prompt": 120_320}
# What only a Swin or ViT has.
NEEDS_BLOCKS = (adapter, prompt)


def learners(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", TUNINGS)
def test_parameter_counts_are_the_papers(name: str) -> None:
    with torch.device("meta"):
        model = create("swin_base_patch4_window7_224", 10)
        TUNINGS[name](model)
    counts = {key: p.numel() for key, p in learners(model).items()}
    assert sum(n for key, n in counts.items() if key.startswith("backbone.")) == PAPER[name]
    assert sum(n for key, n in counts.items() if key.startswith("head.")) == 1025 * 10


def test_bias_tuning_may_leave_the_position_tables_alone() -> None:
    model = create("swin_micro_64", 3)
    bias(model, tables=False)
    assert not any("table" in name for name in learners(model))


@pytest.mark.parametrize("name", TUNINGS)
@pytest.mark.parametrize("backbone", ["swin_micro_64", "vit_tiny_patch16_224", "resnet18"])
def test_what_should_learn_moves_and_nothing_else(name: str, backbone: str) -> None:
    """Two steps: LoRA's A has no gradient before B has moved. The released LoRA and adapters fail here."""
    torch.manual_seed(0)
    model = create(backbone, 3, image_size=None if backbone == "swin_micro_64" else 64)
    if backbone == "resnet18" and TUNINGS[name] in NEEDS_BLOCKS:
        with pytest.raises(SettingsError, match="resnet18 has no transformer blocks"):
            TUNINGS[name](model)
        return
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # timm starts each block's last one at zero; as long as it stays there, nothing inside the block can learn.
            nn.init.ones_(module.weight)
    training = TUNINGS[name](model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    moving = learners(model)
    assert {"head.weight", "head.bias"} <= set(moving)
    optimizer = torch.optim.AdamW(moving.values(), lr=1e-2, weight_decay=0.0)
    model.eval()
    for module in training:
        module.train()
    x, y = torch.rand(6, 3, 64, 64), torch.arange(6) % 3
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for key, value in model.state_dict().items():
        moved = not torch.equal(value, before[key])
        statistic = "running_" in key or "num_batches" in key
        # Only full fine-tuning lets BatchNorm gather statistics.
        assert moved == (name == "full" if statistic else key in moving), key


@pytest.mark.parametrize("tuning", [lora, adapter])
@pytest.mark.parametrize("backbone", ["swin_micro_64", "vit_tiny_patch16_224"])
def test_what_is_added_starts_without_effect(tuning: Tuning, backbone: str) -> None:
    torch.manual_seed(0)
    model = create(backbone, 3, image_size=None if backbone == "swin_micro_64" else 64).eval()
    x = torch.rand(2, 3, 64, 64)
    expected = model(x)
    tuning(model)
    assert torch.equal(model.eval()(x), expected)


@pytest.mark.parametrize("tuning", [lora, prompt])
def test_dropout_drops(tuning: Callable[..., list[nn.Module]]) -> None:
    """In train mode two passes differ, in eval mode they do not. The papers' released LoRA dropout never fires."""
    torch.manual_seed(0)
    model = create("swin_micro_64", 3)
    training = tuning(model, dropout=0.5)
    for name, p in model.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(p, std=0.1)
    x = torch.rand(2, 3, 64, 64)
    model.eval()
    assert torch.equal(model(x), model(x))
    for module in training:
        module.train()
    assert not torch.equal(model(x), model(x))


def set_updates(model: nn.Module) -> None:
    """Give every LoRA layer an update that is not zero."""
    for name, p in model.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(p, std=0.1)


@pytest.mark.parametrize("backbone", ["swin_micro_64", "vit_tiny_patch16_224", "resnet18"])
def test_merged_lora_is_one_plain_layer(backbone: str) -> None:
    torch.manual_seed(0)
    model = create(backbone, 3, image_size=None if backbone == "swin_micro_64" else 64).double().eval()
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    plain, keys = model(x), set(model.state_dict())
    lora(model)
    set_updates(model)
    expected = model.eval()(x)
    assert (expected - plain).abs().max() > 1e-3
    assert merge(model) == {"swin_micro_64": 6, "vit_tiny_patch16_224": 12, "resnet18": 19}[backbone]
    # Rounding alone: sums of a few hundred products in float64.
    assert (model(x) - expected).abs().max() < 1e-12
    assert set(model.state_dict()) == keys


def test_lora_changes_queries_and_values_only() -> None:
    layer = LoraAttention(nn.Linear(8, 24), rank=2, alpha=4.0, dropout=0.0)
    set_updates(layer)
    change = (layer.merged() - layer.base.weight).view(3, 8, 8)
    assert change[0].abs().max() > 0 and change[2].abs().max() > 0
    assert (change[1] == 0).all()
    assert torch.linalg.matrix_rank(change[0]) == torch.linalg.matrix_rank(change[2]) == 2
    assert layer.scale == 2.0


def test_lora_conv_keeps_stride_and_padding() -> None:
    layer = LoraConv(nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), rank=2, alpha=2.0, dropout=0.0).double()
    set_updates(layer)
    x = torch.rand(1, 4, 7, 9, dtype=torch.float64)
    expected = F.conv2d(x, layer.merged(), stride=2, padding=1)
    assert (layer(x) - expected).abs().max() < 1e-12


def test_adapters_sit_behind_the_mlp_inside_its_branch() -> None:
    model = create("swin_micro_64", 3)
    adapter(model)
    block = model.backbone.layers[0].blocks[0]
    nn.init.normal_(block.mlp.up.weight)
    x = torch.rand(1, 16, 16, 48)
    m = block.mlp.mlp(x)
    assert torch.equal(block.mlp(x), m + block.mlp.up(F.gelu(block.mlp.down(m))))
    assert block.mlp.down.out_features == 48 // 8


def attended_by_hand(block: nn.Module, x: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """A shifted window block with prompts, window by window and head by head; tokens and the prompts' mean."""
    inner, attn = block.block, block.block.attn
    (b, h, w, c), t, side, shift = x.shape, len(prompts), inner.window_size[0], inner.shift_size[0]
    rolled = torch.roll(inner.norm1(x), (-shift, -shift), (1, 2))
    out, kept = torch.empty_like(x), torch.zeros(b, t, c)
    windows = [(i, j) for i in range(0, h, side) for j in range(0, w, side)]
    for image in range(b):
        for number, (i, j) in enumerate(windows):
            tokens = torch.cat([inner.norm1(prompts), rolled[image, i : i + side, j : j + side].reshape(-1, c)])
            q, k, v = attn.qkv(tokens).view(len(tokens), 3, attn.num_heads, -1).unbind(1)
            result = torch.empty_like(q)
            for head in range(attn.num_heads):
                scores = q[:, head] @ k[:, head].T / math.sqrt(q.shape[-1])
                table = attn.relative_position_bias_table[attn.relative_position_index.flatten(), head]
                scores[t:, t:] += table.view(side**2, side**2)
                if inner.attn_mask is not None:
                    scores[t:, t:] += inner.attn_mask[number]
                result[:, head] = scores.softmax(1) @ v[:, head]
            projected = attn.proj(result.flatten(1))
            out[image, i : i + side, j : j + side] = projected[t:].view(side, side, c)
            kept[image] += projected[:t] / len(windows)
    x = x + torch.roll(out, (shift, shift), (1, 2))
    prompts = prompts + kept
    return x + inner.mlp(inner.norm2(x)), prompts + inner.mlp(inner.norm2(prompts))


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (2, 1)], ids=["plain", "shifted", "last"])
def test_prompts_join_every_window(place: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = create("swin_micro_64", 3)
    prompt(model, num_tokens=3)
    block = model.eval().backbone.layers[place[0]].blocks[place[1]]
    x = torch.randn(2, *block.block.input_resolution, block.prompt.shape[1])
    with torch.no_grad():
        tokens, prompts = attended_by_hand(block, x, block.prompt)
        got = block(x)
    # Float32 sums in another order.
    if place == (2, 1):
        assert got.shape == (2, 16 + 3, 1, 192)
        torch.testing.assert_close(got[:, 16:, 0], prompts, rtol=1e-4, atol=1e-5)
        got = got[:, :16].reshape(x.shape)
    torch.testing.assert_close(got, tokens, rtol=1e-4, atol=1e-5)


def test_a_vits_prompts_stand_behind_the_class_token_and_leave_again() -> None:
    torch.manual_seed(0)
    model = create("vit_tiny_patch16_224", 3, image_size=64)
    prompt(model, num_tokens=2)
    block = model.eval().backbone.blocks[3]
    x = torch.randn(2, 17, 192)
    with torch.no_grad():
        joined = torch.cat([x[:, :1], block.prompt.expand(2, -1, -1), x[:, 1:]], 1)
        expected = block.block(joined)[:, [0, *range(3, 19)]]
        torch.testing.assert_close(block(x), expected)


def test_prompts_start_within_the_published_bound() -> None:
    model = create("swin_micro_64", 3)
    prompt(model)
    bound = math.sqrt(6 / (3 * 4 * 4 + 48))
    values = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if n.endswith("prompt")])
    assert bound * 0.99 < values.abs().max() <= bound


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: lora(m, rank=0), "LoRA rank is 0"),
        (lambda m: lora(m, dropout=1.0), "dropout 1.0"),
        (lambda m: prompt(m, num_tokens=0), "0 prompts"),
    ],
)
def test_settings_that_cannot_be_meant(call: Callable[[Classifier], object], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        call(create("swin_micro_64", 3))


def test_maps_that_are_no_multiple_of_the_window_are_refused() -> None:
    with torch.device("meta"):
        model = create("swin_tiny_patch4_window7_224", 3)
    model.backbone.layers[0].blocks[0].input_resolution = (64, 64)
    with pytest.raises(SettingsError, match=r"a map of \(64, 64\) is no multiple of its window \(7, 7\)"):
        prompt(model)
