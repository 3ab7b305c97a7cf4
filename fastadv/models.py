"""Classifiers that take pixels: timm backbones with their pixel statistics, and the resize where asked, inside."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from fastadv import layouts, weightfile
from fastadv.errors import CheckpointError, SettingsError

FAMILIES = ("swin_", "vit_", "deit_", "resnet")
MICRO = "swin_micro_64"
SHIPPED = ("robust", "standard", "contrastive", "adversarial-contrastive")
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


def resnet_micro_64(drop_path: float = 0.0) -> ResNet:
    """The shipped small ResNet's backbone, with BatchNorm: 64x64 pixels or others, 1.2 M parameters, 256 features."""
    block: Any = BasicBlock
    # A stem of 16 channels: with 32 a pass takes twice as long on a CPU.
    return ResNet(
        block,
        layers=(1, 1, 1, 1),
        channels=(32, 64, 128, 256),
        stem_type="deep",
        stem_width=8,
        num_classes=0,
        drop_path_rate=drop_path,
        # At zero, timm's default, nothing inside of a block learns before its last norm does.
        zero_init_last=False,
    )


# Our own small networks: all take ImageNet's pixel statistics.
MICROS = {MICRO: swin_micro_64, "resnet_micro_64": resnet_micro_64}


def input_size(name: str) -> int:
    """Side in pixels of the images that the model ``name`` is built for. Raises SettingsError for an unknown name."""
    if name in MICROS:
        return 64
    check_known(name)
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
    return int(cfg.input_size[-1]) if cfg else 224


def check_known(name: str) -> None:
    """Raise SettingsError unless ``name`` is a Swin, ViT or ResNet that timm knows."""
    if not timm.is_model(name):
        known = [*MICROS, *(m for family in FAMILIES for m in timm.list_models(f"{family}*"))]
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"{MICRO}, or a name of timm.list_models()"
        raise SettingsError(f"unknown model {name!r}", hint)
    if not name.startswith(FAMILIES):
        raise SettingsError(f"model {name!r} is of a family that was not tried", f"use one of: {', '.join(FAMILIES)}")


def create(
    name: str, num_classes: int, *, resize: bool = False, drop_path: float = 0.0, image_size: int | None = None
) -> Classifier:
    """A classifier with randomly initialised weights: one of `MICROS`, or any Swin, ViT or ResNet of timm.

    ``image_size`` builds a timm transformer for another side than its own, and lets a ResNet take it. Nothing is
    downloaded. Raises SettingsError for an unknown name, and for a family whose pooled features or pixel statistics are
    not known to fit.
    """
    if num_classes < 2:
        raise SettingsError(f"num_classes is {num_classes}", "a classifier needs at least 2 classes")
    if name in MICROS:
        if name == MICRO and image_size not in (None, 64):
            raise SettingsError(
                f"image_size is {image_size}, but {MICRO} takes 64", "--image-size 64, or another --model"
            )
        small: Any = MICROS[name](drop_path)
        return Classifier(
            small,
            small.num_features,
            num_classes,
            name=name,
            input_size=image_size or 64,
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


def weights_file(model: str, weights: str) -> Path:
    """Where the backbone weights called ``weights``, or in a file of that path, lie for the model of that name.

    Raises SettingsError for a name that is not shipped for it, and where there is no such file.
    """
    if weights in SHIPPED:
        path = WEIGHTS / f"{model}_{weights}.safetensors"
        if not path.exists():
            having = [name for name in MICROS if (WEIGHTS / f"{name}_{weights}.safetensors").exists()]
            raise SettingsError(
                f"weights {weights!r} are shipped for {' and '.join(having)} only, not for {model}",
                f"--weights FILE (.safetensors or .pth), --weights none, or --model {MICRO}",
            )
        return path
    if not Path(weights).is_file():
        raise SettingsError(f"no weights at {weights!r}", f"--weights {'|'.join(SHIPPED)}|none, or the path of a file")
    return Path(weights)


def load_backbone(model: Classifier, weights: str) -> str:
    """Load backbone weights strictly and give the file they came from.

    ``weights``: one of `SHIPPED` (for those of `MICROS` that have such a file), ``none`` (keep the random ones), or a
    .safetensors or .pth file in any layout of `fastadv.layouts`. A head in the file is for another task and is left
    out. Raises CheckpointError for a file that cannot be read or does not fit, also in the pixel statistics it was
    trained with; SettingsError for a name that is not shipped for this model.
    """
    if weights == "none":
        return "none"
    path = weights_file(model.name, weights)
    given, statistics = layouts.unwrapped(weightfile.read(path))
    if statistics and not layouts.same_statistics(model.mean, model.std, statistics):
        own_pixels = [[round(value, 3) for value in part.flatten().tolist()] for part in (model.mean, model.std)]
        raise CheckpointError(
            f"{path} is for pixels of mean and std {statistics}, {model.name} for {own_pixels}",
            "--model of the same network with those (deit_base_patch16_224 is vit_base_patch16_224 with ImageNet's)",
        )
    own = model.backbone.state_dict()
    trunk = {key: value for key, value in layouts.in_timm_names(given).items() if not key.startswith(("head.", "fc."))}
    trunk = layouts.with_counts(trunk, own)
    weightfile.match(own, trunk)
    model.backbone.load_state_dict(trunk, strict=True)
    return str(path)
