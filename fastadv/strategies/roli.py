"""Robust linear initialisation (RoLI): find a robust head first, then fine-tune from there."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from fastadv.losses import adversarial_ce
from fastadv.recipe import Recipe
from fastadv.strategies import Stage, strategy
from fastadv.strategies.linear import linear_probe
from fastadv.tuning import full


@strategy("roli-full", source="arXiv:2312.05716")
def roli_full(recipe: Recipe) -> Iterator[Stage]:
    """Probe the head adversarially, then fine-tune everything from the best head."""
    yield from linear_probe(recipe)
    yield Stage(
        name="finetune",
        tuning=full,
        loss=partial(adversarial_ce, label_smoothing=recipe.label_smoothing),
        epochs=recipe.epochs,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
    )
