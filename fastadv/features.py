"""A classifier with something else in the place of its head, and the features in front of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastadv.data import ImageSet, in_order
from fastadv.models import Classifier
from fastadv.passes import untouched


def with_head(model: Classifier, head: nn.Module) -> nn.Module:
    """``model`` with another head: (B, C, H, W) -> what ``head`` makes of the features (B, num_features).

    Everything before the head is the model's own; the model keeps its head.
    """
    found = copy.copy(model)
    # A table of children of its own.
    found._modules = {"backbone": model.backbone, "head": head}
    return found


def features(model: Classifier, images: ImageSet, batch_size: int) -> Iterator[Tensor]:
    """What the backbone makes of every image, in order: float32 (B, num_features) per batch, on the model's device."""
    trunk = with_head(model, nn.Identity())
    with untouched(trunk), torch.no_grad():
        for x, _ in in_order(images, batch_size, model.mean.device):
            yield trunk(x)
