"""By which names weight files of others call the parts of a network, and how they become timm's names.

Known are, each bare or inside the wrappers of training scripts: timm; official Swin files (microsoft/Swin-Transformer
and what was trained with that code, as ARES' robust ones); torchvision's ViT; RobustBench's zoo (statistics beside
``model.``); RoLI's own checkpoints (``0.mean``, ``1.enc.``, ``1.head.last_layer.``); MadryLab's robustness package,
which keeps every tensor a second time under ``attacker.``; runs of this package (``backbone.``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

# Put in front of every name by DataParallel and DDP, Lightning and similar, torch.compile.
PREFIXES = ("module.", "model.", "_orig_mod.")
# Names of the pixel statistics beside a network: three of RobustBench's zoo (the last also RoLI's), one of robustness.
STATISTICS = (
    ("normalize.mean", "normalize.std"),
    ("mu", "sigma"),
    ("mean", "std"),
    ("normalizer.new_mean", "normalizer.new_std"),
)
# What only training needs is in a run's best/ too: the second batch norms of twins, the branch of autolora.
SCAFFOLDS = ("frozen.", "natural.")
# A sequence of modules in RoLI's checkpoints: [resize,] statistics, network.
_ROLI = re.compile(r"^\d\.(?:enc\.|(?=head\.|mean$|std$))")
_TORCHVISION_VIT = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    # linear_1 and linear_2 in the files of torchvision 0.12.
    (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
)


class Network(NamedTuple):
    """The tensors of one network by name, and the pixel mean and std it wants, where the file tells."""

    tensors: dict[str, Tensor]
    statistics: tuple[list[float], list[float]] | None


def without_prefixes(name: str) -> str:
    """``name`` without what wrappers put in front of it, however often."""
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name


def unwrapped(given: Mapping[str, Tensor]) -> Network:
    """The network of a file (`weightfile.read`) alone, by its own library's names, without copies and statistics."""
    if any(_ROLI.match(name) and ".enc." in name for name in given):
        given = {_ROLI.sub("", name).replace("head.last_layer.", "head."): value for name, value in given.items()}
    if any(name.startswith("backbone.") for name in given):
        given = {name: value for name, value in given.items() if not name.startswith(SCAFFOLDS)}
    tensors = {
        name.removeprefix("backbone."): value for name, value in given.items() if not name.startswith("attacker.")
    }
    pair = next((pair for pair in STATISTICS if set(pair) <= tensors.keys()), None)
    if pair is None:
        # torchvision has no other statistics for its ViTs; timm has others for most of its own.
        known = _is_torchvision_vit(tensors)
        return Network(tensors, (list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)) if known else None)
    mean, std = (tensors.pop(name).flatten().tolist() for name in pair)
    return Network(tensors, (mean, std))


def in_timm_names(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an official Swin or a torchvision ViT by timm's names; others as they are.

    Official Swin files put a downsampling at the end of the stage before, and hold index buffers. timm 1.0.20's own
    filter shifts a file in timm's layout too when its head is missing.
    """
    if _is_torchvision_vit(given):
        return {_renamed(name): value for name, value in given.items()}
    if "layers.0.blocks.0.attn.relative_position_bias_table" not in given:
        return dict(given)
    kept = {name: value for name, value in given.items() if not name.endswith(("attn_mask", "relative_position_index"))}
    if "layers.0.downsample.reduction.weight" not in kept:
        return kept
    return {re.sub(r"^layers\.(\d+)\.downsample", _next_stage, name): value for name, value in kept.items()}


def with_counts(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``given`` and, from ``own``, the BatchNorm counts that files of torch before 0.4.1 lack and eval mode ignores."""
    ending = "num_batches_tracked"
    norms = {name.removesuffix("running_mean") for name in given if name.endswith("running_mean")}
    counts = {name: own[name] for name in own if name.endswith(ending) and name.removesuffix(ending) in norms}
    return {**counts, **given}


def same_statistics(mean: Tensor, std: Tensor, statistics: tuple[list[float], list[float]]) -> bool:
    """Whether ``statistics`` are mean and std: to 0.002, as files round them (0.456 and 0.4564 mean the same)."""
    found = zip((mean, std), statistics, strict=True)
    return all(torch.allclose(own.flatten().cpu(), torch.tensor(other), rtol=0, atol=2e-3) for own, other in found)


def _is_torchvision_vit(given: Mapping[str, Tensor]) -> bool:
    return "encoder.pos_embedding" in given and "conv_proj.weight" in given


def _renamed(name: str) -> str:
    for pattern, replacement in _TORCHVISION_VIT:
        name = re.sub(pattern, replacement, name)
    return name


def _next_stage(found: re.Match[str]) -> str:
    return f"layers.{int(found[1]) + 1}.downsample"
