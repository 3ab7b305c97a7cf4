"""TWINS: two sets of batch norm statistics, those of pre-training and those of the new images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from fastadv.errors import SettingsError
from fastadv.losses import AttackLoss, Forward, TrainingLoss
from fastadv.models import Classifier
from fastadv.recipe import Recipe
from fastadv.strategies import Stage, refuse_changes, strategy
from fastadv.tuning.twins import FROZEN, mixed, twins


@dataclass(frozen=True, kw_only=True)
class TwinsRecipe(Recipe):
    """The published settings; its learning rate is 0.003 (ResNet-50, batches of 128), ours is for the small ResNet."""

    model: str = "resnet_micro_64"
    optimizer: Literal["adamw", "sgd"] = "sgd"
    schedule: Literal["cosine", "epoch-cosine", "drops"] = "drops"
    lr: float = 0.03
    weight_decay: float = 1e-5
    train_steps: int = 10
    clip: float = 1e3
    frozen_weight: float = 1.0
    """Weight of the half of the batch that passes through the statistics of pre-training (0.4 on Caltech-256)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.frozen_weight < math.inf:
            # At 0 the twins would be learners without a gradient.
            raise SettingsError(f"frozen_weight is {self.frozen_weight}", "--frozen-weight takes a positive number")


def twins_loss(model: Classifier, weight: float = 1.0, label_smoothing: float = 0.0) -> TrainingLoss:
    """``weight`` times the mean cross-entropy of the first half of the adversarial batch, through the frozen norms,

    plus that of the second half, the larger of an odd batch, through those that adapt. The attack sees the latter.
    """

    def loss(forward: Forward, x: Tensor, y: Tensor, attack: AttackLoss) -> Tensor:
        adv, half = attack(x, y), len(x) // 2
        with mixed(model, half):
            logits = forward(adv)
        losses = F.cross_entropy(logits, y, reduction="none", label_smoothing=label_smoothing)
        return weight * losses[:half].sum() / max(1, half) + losses[half:].mean()

    return loss


@strategy("twins", source="arXiv:2303.11135", recipe=TwinsRecipe())
def twins_at(recipe: Recipe) -> Iterator[Stage]:
    """Fine-tunes everything, half of each batch through the batch norms of pre-training (ResNets)."""
    assert isinstance(recipe, TwinsRecipe)
    refuse_changes(recipe, "loss", "beta")
    yield Stage(
        name="finetune",
        tuning=twins,
        loss_on=partial(twins_loss, weight=recipe.frozen_weight, label_smoothing=recipe.label_smoothing),
        epochs=recipe.epochs,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        optimizer=recipe.optimizer,
        scaffold=FROZEN,
    )
