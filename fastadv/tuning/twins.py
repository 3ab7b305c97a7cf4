"""Twin batch norms: beside each one that adapts, one that keeps the statistics of pre-training; everything learns.

Source: TWINS, arXiv:2303.11135.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from fastadv.errors import SettingsError
from fastadv.models import Classifier
from fastadv.shadow import holding
from fastadv.standins import Slot

FROZEN = "frozen"


def twins(model: Classifier) -> list[nn.Module]:
    """Let everything learn, and give every BatchNorm of the backbone a twin in ``model.frozen``, affine and all.

    The twins' statistics rest (they stay in eval mode) while their affine learns; only inside of :func:`mixed` are
    they part of the forward pass. Raises SettingsError for a backbone without BatchNorm.
    """
    norms = _norms(model)
    if not norms:
        raise SettingsError(
            f"{model.name} has no BatchNorm, whose statistics of pre-training twins keeps beside the new ones",
            "--model resnet_micro_64 or another ResNet, or --strategy roli-full",
        )
    model.requires_grad_(True)
    model.set_submodule(FROZEN, nn.ModuleList(copy.deepcopy(norm) for _, norm in norms))
    return [model.backbone, model.head]


@contextmanager
def mixed(model: Classifier, half: int) -> Iterator[None]:
    """Inside, the first ``half`` images of a batch pass through the frozen twins, the others through the model's own.

    Both halves are one batch everywhere else.
    """
    slots = []
    for (name, norm), twin in zip(_norms(model), model.get_submodule(FROZEN).children(), strict=True):
        parent, _, child = name.rpartition(".")
        holder = model.backbone.get_submodule(parent)._modules
        slots.append(Slot(holder, child, partial(_halves, twin, norm, half)))
    with holding(slots):
        yield


def _norms(model: Classifier) -> list[tuple[str, nn.Module]]:
    return [(name, part) for name, part in model.backbone.named_modules() if isinstance(part, nn.BatchNorm2d)]


def _halves(twin: nn.Module, norm: nn.Module, half: int, x: Tensor) -> Tensor:
    return torch.cat([twin(x[:half]), norm(x[half:])])
