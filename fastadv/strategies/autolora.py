"""AutoLoRa: clean images learn in a low-rank branch of their own, and the settings follow the accuracies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from fastadv.losses import AttackLoss, Forward, TrainingLoss, divergence
from fastadv.models import Classifier
from fastadv.plateau import plateau
from fastadv.recipe import Recipe
from fastadv.strategies import Stage, refuse_changes, strategy
from fastadv.tuning.natural import NATURAL, branch_of, natural, natural_branch, score


@dataclass(frozen=True, kw_only=True)
class AutoLoraRecipe(Recipe):
    """The published settings (ResNet-50, batches of 128); ours start from a larger learning rate, as epochs are few."""

    model: str = "resnet_micro_64"
    optimizer: Literal["adamw", "sgd"] = "sgd"
    lr: float = 0.03
    weight_decay: float = 1e-4
    warmup: float = 0.0
    train_steps: int = 10
    clip: float = 1e3
    rank: int = 8
    """Rank of the natural branch."""


def autolora_loss(model: Classifier, beta: float = 6.0, label_smoothing: float = 0.0) -> TrainingLoss:
    """(1 - S) CE(natural, y) + S CE(adversarial, y) + beta S KL(natural || adversarial), a scalar.

    S is the natural branch's accuracy on the training images. Natural: clean images through the branch, where only its
    updates and the head learn. Adversarial: the plain model.
    """

    def loss(forward: Forward, x: Tensor, y: Tensor, attack: AttackLoss) -> Tensor:
        adv, share = attack(x, y), branch_of(model).accuracy
        with natural_branch(model):
            clean = forward(x)
        logits = forward(adv)
        apart = divergence(clean, logits).mean()
        losses = [F.cross_entropy(z, y, label_smoothing=label_smoothing) for z in (clean, logits)]
        return (1 - share) * losses[0] + share * losses[1] + beta * share * apart

    return loss


@strategy("autolora", source="arXiv:2310.01818", recipe=AutoLoraRecipe())
def autolora(recipe: Recipe) -> Iterator[Stage]:
    """Fine-tunes everything on adversarial images, and a low-rank branch, dropped at the end, on clean ones."""
    assert isinstance(recipe, AutoLoraRecipe)
    refuse_changes(recipe, "loss", "schedule", "warmup")
    yield Stage(
        name="finetune",
        tuning=partial(natural, rank=recipe.rank),
        loss_on=partial(
            autolora_loss, beta=6.0 if recipe.beta is None else recipe.beta, label_smoothing=recipe.label_smoothing
        ),
        epochs=recipe.epochs,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        optimizer=recipe.optimizer,
        pace=partial(plateau, lr=recipe.lr),
        prepare=score,
        scaffold=NATURAL,
    )
