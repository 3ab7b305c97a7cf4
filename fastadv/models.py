"""Classifiers that take pixels: timm backbones with their pixel statistics, and the resize where asked, inside."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from fastadv import weightfile
from fastadv.errors import SettingsError

FAMILIES = ("swin_", "vit_", "deit_", "resnet")
MICRO = "swin_micro_64"
SHIPPED = ("robust", "standard")
WEIGHTS = Path(__file__).parent / "weights"


class Classifier(nn.Module):
    """Logits (B, num_classes) of images (B, 3, H, W) in [0, 1].

    Resizing and normalising happen inside, so an attack works on the pixels the user has, at their own size. The head
    is an ``nn.Linear`` over the backbone's pooled features.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        num_features: int,
        num_classes: int,
        *,
        name: str,
        input_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        resize: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.input_size, self.resize = name, input_size, resize
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.backbone = backbone
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of x (B, 3, H, W) in [0, 1]. Raises SettingsError for a size the backbone refuses."""
        size = (self.input_size, self.input_size)
        if x.shape[-2:] != size:
            if not self.resize:
                raise SettingsError(
                    f"input size is {x.shape[-2]}x{x.shape[-1]}, but {self.name} takes {size[0]}x{size[1]}",
                    "resize=True (--resize) to resize inside the model, or --image-size to resize the images before",
                )
            # Bilinear without antialias, as the published code upsamples CIFAR to 224 (RoLI, build_model.py).
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        logits: Tensor = self.head(self.backbone((x - self.mean) / self.std))
        return logits


def swin_micro_64(drop_path: float = 0.0) -> SwinTransformer:
    """The shipped small Swin's backbone: 64x64 pixels, patch 4, window 4, 1.3 M parameters, 192 features."""
    return SwinTransformer(
        img_size=64,
        patch_size=4,
        window_size=4,
        embed_dim=48,
        depths=(2, 2, 2),
        num_heads=(3, 6, 12),
        num_classes=0,
        drop_path_rate=drop_path,
    )


def input_size(name: str) -> int:
    """Side in pixels of the images that the model ``name`` is built for. Raises SettingsError for an unknown name."""
    if name == MICRO:
        return 64
    check_known(name)
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
    return int(cfg.input_size[-1]) if cfg else 224


def check_known(name: str) -> None:
    """Raise SettingsError unless ``name`` is a Swin, ViT or ResNet that timm knows."""
    if not timm.is_model(name):
        known = [MICRO, *(m for family in FAMILIES for m in timm.list_models(f"{family}*"))]
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"{MICRO}, or a name of timm.list_models()"
        raise SettingsError(f"unknown model {name!r}", hint)
    if not name.startswith(FAMILIES):
        raise SettingsError(f"model {name!r} is of a family that was not tried", f"use one of: {', '.join(FAMILIES)}")


def create(
    name: str, num_classes: int, *, resize: bool = False, drop_path: float = 0.0, image_size: int | None = None
) -> Classifier:
    """A classifier with randomly initialised weights: ``swin_micro_64`` or any Swin, ViT or ResNet of timm.

    ``image_size`` builds a timm transformer for another side than its own. Nothing is downloaded. Raises SettingsError
    for an unknown name, and for a family whose pooled features or pixel statistics are not known to fit.
    """
    if num_classes < 2:
        raise SettingsError(f"num_classes is {num_classes}", "a classifier needs at least 2 classes")
    if name == MICRO:
        if image_size not in (None, 64):
            raise SettingsError(
                f"image_size is {image_size}, but {MICRO} takes 64", "--image-size 64, or another --model"
            )
        return Classifier(
            swin_micro_64(drop_path),
            192,
            num_classes,
            name=name,
            input_size=64,
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            resize=resize,
        )
    check_known(name)
    options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    if image_size is not None and not name.startswith("resnet"):
        options["img_size"] = image_size
    backbone: Any = timm.create_model(name, num_classes=0, **options)
    statistics = backbone.pretrained_cfg
    return Classifier(
        backbone,
        backbone.num_features,
        num_classes,
        name=name,
        input_size=image_size or statistics["input_size"][-1],
        mean=statistics["mean"],
        std=statistics["std"],
        resize=resize,
    )


def load_backbone(model: Classifier, weights: str) -> str:
    """Load backbone weights strictly and give the file they came from.

    ``weights``: ``robust`` or ``standard`` (shipped, for swin_micro_64), ``none`` (keep the random ones), or a
    .safetensors or .pth file. A head in the file is for another task and is left out. Raises CheckpointError for a
    file that cannot be read or does not fit, SettingsError for a name that is not shipped for this model.
    """
    if weights == "none":
        return "none"
    path = Path(weights)
    if weights in SHIPPED:
        if model.name != MICRO:
            raise SettingsError(
                f"weights {weights!r} are shipped for {MICRO} only, not for {model.name}",
                f"--weights FILE (.safetensors or .pth), --weights none, or --model {MICRO}",
            )
        path = WEIGHTS / f"{MICRO}_{weights}.safetensors"
    elif not path.exists():
        raise SettingsError(f"no weights at {weights!r}", f"--weights {'|'.join(SHIPPED)}|none, or the path of a file")
    given = {key.removeprefix("backbone."): value for key, value in weightfile.read(path).items()}
    given = {key: value for key, value in given.items() if not key.startswith(("head.", "fc."))}
    if isinstance(model.backbone, SwinTransformer):
        given = in_timm_layout(given)
    own = model.backbone.state_dict()
    weightfile.match(own, given)
    model.backbone.load_state_dict(given, strict=True)
    return str(path)


def in_timm_layout(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Swin weights by timm's names.

    Official files put a downsampling at the end of the stage before, and hold index buffers. timm 1.0.20's own filter
    shifts a file in timm's layout too when its head is missing.
    """
    kept = {key: value for key, value in given.items() if not key.endswith(("attn_mask", "relative_position_index"))}
    if "layers.0.downsample.reduction.weight" not in kept:
        return kept
    return {re.sub(r"^layers\.(\d+)\.downsample", _next_stage, key): value for key, value in kept.items()}


def _next_stage(found: re.Match[str]) -> str:
    return f"layers.{int(found[1]) + 1}.downsample"
