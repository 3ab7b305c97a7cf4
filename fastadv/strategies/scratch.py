"""Training from scratch with labels: what ``python -m fastadv.pretrain`` runs to make backbones."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from fastadv.heads import small
from fastadv.losses import training_loss
from fastadv.pgd import PGD
from fastadv.pretraining import AdversarialRecipe, PretrainRecipe, one_step, wide_noise
from fastadv.recipe import Recipe
from fastadv.strategies import Stage, refuse_changes, strategy
from fastadv.strategies.clean import everything
from fastadv.tuning import full

# Single-step adversarial training with random start: steps of 1.25 eps (arXiv:2001.03994, section 4). Tiny-ImageNet's
# 64x64 images and eps 4/255 as in the source domain of arXiv:2312.05716.
OWN: dict[str, Any] = {
    "data": "tiny-imagenet",
    "weights": "none",
    "eps": 4 / 255,
    "train_steps": 1,
    "step_size": 5 / 255,
    "eval_step_size": 1 / 255,
    "epochs": 8,
    "lr": 1e-3,
    "weight_decay": 0.05,
    "batch_size": 128,
    "warmup": 0.05,
    "label_smoothing": 0.1,
    "val_images": 1000,
}


@strategy("pretrain-adversarial", source="arXiv:2001.03994", recipe=AdversarialRecipe(**OWN))
def pretrain_adversarial(recipe: Recipe) -> Iterator[Stage]:
    """Train everything from scratch on adversarial images (one step by default)."""
    assert isinstance(recipe, AdversarialRecipe)
    wide = recipe.single_step == "n-fgsm"
    yield Stage(
        name="adversarial",
        tuning=full,
        loss=training_loss(recipe.loss, recipe.beta, recipe.label_smoothing),
        epochs=recipe.epochs,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        optimizer=recipe.optimizer,
        head=small,
        ema=recipe.ema,
        views=partial(wide_noise, threat=recipe.threat) if wide else None,
        bind=partial(one_step, length=recipe.eps) if wide else PGD.on,
    )


@strategy("pretrain-standard", source="arXiv:2103.14030", recipe=PretrainRecipe(**OWN))
def pretrain_standard(recipe: Recipe) -> Iterator[Stage]:
    """Train everything from scratch on clean images."""
    assert isinstance(recipe, PretrainRecipe)
    refuse_changes(recipe, "loss", "beta")
    yield everything(recipe, "standard", recipe.ema)
