"""Random linear initialisation: the baseline that RoLI is measured against."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from fastadv.heads import ranli
from fastadv.losses import adversarial_ce
from fastadv.recipe import Recipe
from fastadv.strategies import Stage, strategy
from fastadv.tuning import full


@strategy("ranli-full", source="arXiv:2312.05716")
def ranli_full(recipe: Recipe) -> Iterator[Stage]:
    """Fine-tune everything adversarially from a random head."""
    yield Stage(
        name="finetune",
        tuning=full,
        loss=partial(adversarial_ce, label_smoothing=recipe.label_smoothing),
        epochs=recipe.epochs,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        head=ranli,
    )
