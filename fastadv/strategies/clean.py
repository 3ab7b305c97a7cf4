"""Training on clean images alone: what a head, or a whole model, inherits from its backbone without any attack."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

from fastadv.heads import small
from fastadv.losses import clean_ce
from fastadv.recipe import Recipe
from fastadv.strategies import Stage, strategy
from fastadv.strategies.finetune import clean_probe
from fastadv.tuning import full


@strategy("clean-linear", source="arXiv:2401.15248")
def clean_linear(recipe: Recipe) -> Iterator[Stage]:
    """Trains only a linear head, from a small one, on clean images; --loss has no meaning here."""
    yield from (dataclasses.replace(probe, head=small) for probe in clean_probe(recipe))


@strategy("clean-full", source="arXiv:2401.15248")
def clean_full(recipe: Recipe) -> Iterator[Stage]:
    """Fine-tunes everything on clean images, from a small head; --loss has no meaning here."""
    yield everything(recipe, "finetune")


def everything(recipe: Recipe, name: str, ema: float = 0.0) -> Stage:
    """The stage of that name that trains the whole model on clean images, from a small head."""
    return Stage(
        name=name,
        tuning=full,
        loss=partial(clean_ce, label_smoothing=recipe.label_smoothing),
        epochs=recipe.epochs,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        optimizer=recipe.optimizer,
        head=small,
        robust=False,
        ema=ema,
    )
