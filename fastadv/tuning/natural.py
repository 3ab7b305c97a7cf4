"""A branch for clean images: the same network with a low-rank update on its weights, dropped after training.

Source: AutoLoRa, arXiv:2310.01818.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastadv.errors import SettingsError
from fastadv.losses import Forward
from fastadv.models import Classifier
from fastadv.shadow import holding
from fastadv.standins import Slot, detached

NATURAL = "natural"


class LowRank(nn.Module):
    """What turns a weight W (out, in, k, k) or (out, in) into W + scale * B A, k = 1 for the latter.

    A is (rank * k, in * k), normal with deviation 1; B is (out * k, rank * k), zero: it starts without effect.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        k = weight.shape[-1] if weight.ndim == 4 else 1
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(torch.randn_like(weight.new_empty(rank * k, weight.shape[1] * k)))
        self.lora_b = nn.Parameter(weight.new_zeros(len(weight) * k, rank * k))

    def forward(self, weight: Tensor) -> Tensor:
        """The updated weight, of the same shape."""
        return weight + self.scale * (self.lora_b @ self.lora_a).view_as(weight)


class Natural(nn.Module):
    """The updates of a model's layers, and how well the branch does."""

    accuracy: Tensor

    def __init__(self, layers: list[nn.Module], rank: int, alpha: float) -> None:
        super().__init__()
        self.updates = nn.ModuleList(LowRank(layer.get_parameter("weight").detach(), rank, alpha) for layer in layers)
        # A buffer: in every checkpoint, and at an address that a recorded step may hold.
        self.register_buffer("accuracy", torch.zeros(()))


def natural(model: Classifier, *, rank: int = 8, alpha: float = 1.0) -> list[nn.Module]:
    """Let everything learn, and add a low-rank update of every block's convolutions or linear layers for clean images.

    It is in ``model.natural`` and takes effect inside of :func:`natural_branch` alone. Raises SettingsError for a rank
    below 1, and for a backbone with neither.
    """
    if rank < 1:
        raise SettingsError(f"LoRA rank is {rank}", "--rank 1 or more")
    layers = _layers(model)
    if not layers:
        raise SettingsError(
            f"{model.name} has no blocks to add a natural branch to", "--model with a Swin, ViT or ResNet"
        )
    model.requires_grad_(True)
    model.set_submodule(NATURAL, Natural(layers, rank, alpha).to(layers[0].get_parameter("weight").device))
    return [model.backbone, model.head]


@contextmanager
def natural_branch(model: Classifier) -> Iterator[None]:
    """Inside, the model's layers have their low-rank updates, and only these and the head get gradients."""
    slots = detached(model.backbone).slots
    for layer, update in zip(_layers(model), branch_of(model).updates, strict=True):
        slots.append(Slot(layer._parameters, "weight", update(layer.get_parameter("weight").detach())))
    # The last entry for a slot counts.
    with holding(slots):
        yield


@torch.no_grad()
def score(model: Classifier, forward: Forward, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Note in ``model.natural.accuracy`` which share of the images the natural branch gets right, in eval mode.

    One image at least counts as right: with a share of 0 the backbone would get no gradient for an epoch.
    """
    model.eval()
    branch = branch_of(model)
    hits, count = torch.zeros_like(branch.accuracy), 0
    with natural_branch(model):
        for x, y in batches:
            hits += (forward(x).argmax(1) == y).sum()
            count += len(y)
    branch.accuracy.copy_(hits.clamp(min=1) / count)


def branch_of(model: Classifier) -> Natural:
    """The branch that :func:`natural` added."""
    branch = model.get_submodule(NATURAL)
    assert isinstance(branch, Natural)
    return branch


def _layers(model: Classifier) -> list[nn.Module]:
    """The layers that are updated: convolutions of a ResNet's stages, linear layers of a transformer's blocks."""
    # The published code has 52 on a ResNet-50, all but the stem. Its natural pass runs those of each stage's last block
    # only: its Sequential keeps the branch from the others.
    return [
        part
        for name, part in model.backbone.named_modules()
        if (isinstance(part, nn.Conv2d) and name.startswith("layer") and part.groups == 1)
        or (isinstance(part, nn.Linear) and "blocks." in name)
    ]
