"""Classifiers that others trained: a timm or torchvision name and a weights file become a model that takes pixels."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from fastadv import layouts, models, weightfile
from fastadv.errors import CheckpointError, SettingsError

# What torchvision adds when it loads these two itself: their published weights want other pixel statistics.
_TORCHVISION: dict[str, dict[str, Any]] = {
    name: {"transform_input": True, "init_weights": False} for name in ("googlenet", "inception_v3")
}


class Foreign(nn.Module):
    """Logits (B, num_classes) of images (B, 3, H, W) in [0, 1]: a network with its own head, normalising inside."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        *,
        name: str,
        input_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        any_size: bool,
    ) -> None:
        super().__init__()
        self.network, self.num_classes, self.name, self.input_size = network, num_classes, name, input_size
        self.any_size = any_size
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of x (B, 3, H, W) in [0, 1]. Raises SettingsError for a size the network refuses."""
        size = self.input_size
        if not self.any_size and x.shape[-2:] != (size, size):
            raise SettingsError(
                f"input size is {x.shape[-2]}x{x.shape[-1]}, but {self.name} takes {size}x{size}",
                f"--image-size {size}",
            )
        logits: Tensor = self.network((x - self.mean) / self.std)
        return logits


class _Plan(NamedTuple):
    """How to build a network (``build(num_classes=...)``), what its head is called, and the pixels it wants."""

    build: Callable[..., nn.Module]
    head: str
    keys: frozenset[str]
    mean: Sequence[float]
    std: Sequence[float]
    input_size: int
    any_size: bool


def load(name: str, weights: str | Path, num_classes: int | None = None, image_size: int | None = None) -> Foreign:
    """The model ``name`` of timm or torchvision with the weights in a file (.safetensors, .pth), in eval mode.

    The head is the file's own, and so is the number of classes; ``num_classes`` only asserts it. Where both libraries
    know the name, the one whose layout the file has is taken. Pixel statistics in the file go before the library's.
    weights: also a name of `models.SHIPPED`, where it is shipped for the model. Nothing is downloaded.
    image_size: side in pixels of the images, where it is not the model's own.

    Raises: SettingsError for an unknown name; CheckpointError for a file that is missing, or one that does not fit,
    with the list.
    """
    plans = _plans(name, image_size)
    shipped = name in models.MICROS and str(weights) in models.SHIPPED
    path = models.weights_file(name, str(weights)) if shipped else Path(weights)
    given, statistics = layouts.unwrapped(weightfile.read(path))
    mean, std = statistics or (None, None)
    # Of a name in both libraries, and of a layout of either, what the file fits best.
    plan, given = max(
        product(plans, (given, layouts.in_timm_names(given))), key=lambda pair: len(pair[0].keys & pair[1].keys())
    )
    if f"{plan.head}.weight" not in given:
        # In official Swin files and in runs of this package.
        given = {_under(plan.head, key): value for key, value in given.items()}
    if f"{plan.head}.weight" not in given:
        trainable = name in models.MICROS or name.startswith(models.FAMILIES)
        raise CheckpointError(
            f"the weights file {path} has no head ({plan.head}.weight)",
            f"train one: python -m fastadv.train --strategy roli-full --model {name} --weights {path}"
            if trainable
            else "give the weights of a whole classifier",
        )
    classes = len(given[f"{plan.head}.weight"])
    if num_classes not in (None, classes):
        raise CheckpointError(f"the head in {path} has {classes} classes, not {num_classes}", "give the data it is for")
    network = plan.build(num_classes=classes)
    own = network.state_dict()
    given = layouts.with_counts(given, own)
    weightfile.match(own, given)
    network.load_state_dict(given, strict=True)
    return Foreign(
        network,
        classes,
        name=name,
        input_size=plan.input_size,
        mean=mean or plan.mean,
        std=std or plan.std,
        any_size=plan.any_size,
    ).eval()


def _plans(name: str, image_size: int | None) -> list[_Plan]:
    """The ways to build ``name``, at least one. Raises SettingsError for an unknown name, with the nearest ones."""
    if name in models.MICROS:
        return [_own(name, image_size)]
    in_torchvision = torchvision.models.list_models(module=torchvision.models)
    plans = [_timm(name, image_size)] if timm.is_model(name) else []
    plans += [_torchvision(name, image_size)] if name in in_torchvision else []
    if not plans:
        near = difflib.get_close_matches(name, [*models.MICROS, *timm.list_models(), *in_torchvision], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "a name of timm.list_models() or torchvision.models"
        raise SettingsError(f"unknown model {name!r}", hint)
    return plans


def _own(name: str, image_size: int | None) -> _Plan:
    """A small network of this package."""
    any_size = name != models.MICRO
    if image_size not in (None, 64) and not any_size:
        raise SettingsError(f"image_size is {image_size}, but {name} takes 64", "leave it out")

    def build(num_classes: int = 2) -> nn.Module:
        network: Any = models.MICROS[name]()
        network.reset_classifier(num_classes)
        whole: nn.Module = network
        return whole

    network: Any = build()
    head = next(part for part, module in network.named_modules() if module is network.get_classifier())
    size = image_size or 64
    return _Plan(build, head, _keys(build), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, size, any_size=any_size)


def _timm(name: str, image_size: int | None) -> _Plan:
    try:
        config: Any = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise SettingsError(f"unknown model {name!r} ({error})", f"one of timm.list_pretrained({name!r})") from error
    if config is None or not config.classifier:
        raise SettingsError(f"timm does not say which part of {name!r} is the head", "use another --model")
    head = config.classifier if isinstance(config.classifier, str) else config.classifier[0]
    sized: dict[str, Any] = {"img_size": image_size} if image_size and config.fixed_input_size else {}

    def build(**options: Any) -> nn.Module:
        network: nn.Module = timm.create_model(name, **sized, **options)
        return network

    size = image_size or config.input_size[-1]
    return _Plan(build, head, _keys(build), config.mean, config.std, size, any_size=not config.fixed_input_size)


def _torchvision(name: str, image_size: int | None) -> _Plan:
    pixels = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    fixed = name.startswith(("vit_", "maxvit_"))
    size = image_size or pixels.crop_size[0]
    sized: dict[str, Any] = {"image_size": size} if name.startswith("vit_") else {}
    sized |= {"input_size": (size, size)} if name.startswith("maxvit_") else {}

    def build(**options: Any) -> nn.Module:
        network: nn.Module = torchvision.models.get_model(name, **sized, **_TORCHVISION.get(name, {}), **options)
        return network

    # RegNets compute their widths with tensors, which takes numbers.
    with torch.device("cpu" if name.startswith("regnet_") else "meta"):
        network = build()
    heads = [key for key, part in network.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    keys = frozenset(network.state_dict())
    return _Plan(build, heads[-1], keys, pixels.mean, pixels.std, size, any_size=not fixed)


def _keys(build: Callable[[], nn.Module]) -> frozenset[str]:
    with torch.device("meta"):
        return frozenset(build().state_dict())


def _under(head: str, key: str) -> str:
    return f"{head}.{key.removeprefix('head.')}" if key in ("head.weight", "head.bias") else key
