"""The filters of a backbone's first layer: as a picture, and how rough they are."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastadv import assemble
from fastadv.models import Classifier
from fastadv.recipe import Recipe

GAP = 1


@dataclass(frozen=True, eq=False)
class FirstLayer:
    """The filters (number, 3, h, w) float32 of a first layer."""

    filters: Tensor

    @property
    def roughness(self) -> float:
        """The mean squared difference of neighbouring weights over the mean squared weight, a mean over filters.

        0 for filters of one colour, 2 for white noise; of 1x1 filters, which have no neighbours, NaN.
        """
        weights = self.filters.double()
        steps = [weights.diff(dim=dim).square().flatten(1) for dim in (2, 3)]
        energy = weights.square().flatten(1).mean(1).clamp(min=1e-30)
        return float((torch.cat(steps, 1).mean(1) / energy).mean())

    def picture(self) -> npt.NDArray[np.uint8]:
        """All filters side by side, uint8 (H, W, 3): grey is 0, each scaled by its own largest weight."""
        largest = self.filters.abs().flatten(1).amax(1).clamp(min=1e-30).view(-1, 1, 1, 1)
        shown = (127.5 + 127.5 * self.filters / largest).round().byte().permute(0, 2, 3, 1).numpy()
        number, height, width, _ = shown.shape
        columns = math.ceil(math.sqrt(1.4 * number))
        lines = -(-number // columns)
        found = np.full((lines * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, dtype=np.uint8)
        for index, each in enumerate(shown):
            top, left = (index // columns) * (height + GAP), (index % columns) * (width + GAP)
            found[top : top + height, left : left + width] = each
        return found


def first_layer(model: Classifier) -> FirstLayer:
    """The first convolution of the backbone: patch embedding of a transformer, stem of a ResNet."""
    stem = next(module for module in model.backbone.modules() if isinstance(module, nn.Conv2d))
    return FirstLayer(stem.weight.detach().float().cpu())


def of_weights(recipe: Recipe) -> FirstLayer:
    """The first layer of the recipe's model with the recipe's weights. Raises as `models.load_backbone`."""
    return first_layer(assemble.model(dataclasses.replace(recipe, device="cpu"), 2))
