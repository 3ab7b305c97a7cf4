"""Contrastive pre-training, clean and adversarial: what ``python -m fastadv.pretrain`` runs without using labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

from fastadv import contrastive
from fastadv.heads import small
from fastadv.losses import TrainingLoss
from fastadv.neighbours import neighbours_accuracy
from fastadv.pretraining import ContrastiveRecipe
from fastadv.recipe import Recipe
from fastadv.strategies import Stage, refuse_changes, strategy
from fastadv.strategies.finetune import clean_probe
from fastadv.views import two_views

# Tiny-ImageNet's 64x64 images and eps 4/255, as for the other pre-trainings. The views are the augmentation.
FROM_SCRATCH = ContrastiveRecipe(
    data="tiny-imagenet",
    weights="none",
    augment=False,
    eps=4 / 255,
    train_steps=1,
    step_size=5 / 255,
    eval_step_size=1 / 255,
    epochs=8,
    probe_epochs=5,
    probe_lr=1e-2,
    lr=1e-3,
    weight_decay=0.05,
    batch_size=128,
    warmup=0.05,
    val_images=1000,
)


def stages(recipe: Recipe, name: str, loss: TrainingLoss) -> Iterator[Stage]:
    """Pairs of views behind a projector; then, to know what the backbone is worth, a head on clean images."""
    assert isinstance(recipe, ContrastiveRecipe)
    refuse_changes(recipe, "loss", "beta")
    yield Stage(
        name=name,
        tuning=partial(contrastive.projected, hidden=recipe.projector_hidden, size=recipe.projector_size),
        loss=loss,
        epochs=recipe.epochs,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        optimizer=recipe.optimizer,
        scaffold=contrastive.PROJECTOR,
        robust=False,
        ema=recipe.ema,
        through=contrastive.embedder,
        bind=partial(contrastive.attack_on_views, pairs=recipe.pairs, temperature=recipe.temperature),
        views=partial(two_views, least_area=recipe.crop, jitter=recipe.jitter, grey=recipe.grey),
        score=neighbours_accuracy,
    )
    yield from (dataclasses.replace(probe, head=small) for probe in clean_probe(recipe))


@strategy("pretrain-contrastive", source="arXiv:2002.05709", recipe=FROM_SCRATCH)
def pretrain_contrastive(recipe: Recipe) -> Iterator[Stage]:
    """Learn without labels: two views of an image alike, all others apart (SimCLR)."""
    refuse_changes(recipe, "pairs")
    assert isinstance(recipe, ContrastiveRecipe)
    yield from stages(recipe, "contrastive", contrastive.contrastive_loss(recipe.temperature))


@strategy("pretrain-adversarial-contrastive", source="arXiv:2010.13337", recipe=FROM_SCRATCH)
def pretrain_adversarial_contrastive(recipe: Recipe) -> Iterator[Stage]:
    """Learn without labels from views that an attack drives apart (ACL, RoCL)."""
    assert isinstance(recipe, ContrastiveRecipe)
    yield from stages(recipe, "contrastive", contrastive.adversarial_contrastive_loss(recipe.pairs, recipe.temperature))
