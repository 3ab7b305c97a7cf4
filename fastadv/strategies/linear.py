"""Adversarial linear probing: the first stage of RoLI, and a strategy of its own."""

from __future__ import annotations

from collections.abc import Iterator

from fastadv.heads import ranli
from fastadv.losses import training_loss
from fastadv.recipe import Recipe
from fastadv.strategies import Stage, strategy
from fastadv.tuning import linear


@strategy("linear", source="arXiv:2312.05716")
def linear_probe(recipe: Recipe) -> Iterator[Stage]:
    """Train only a linear head, on adversarial images; the backbone rests."""
    yield Stage(
        name="probe",
        tuning=linear,
        loss=training_loss(recipe.loss, recipe.beta, recipe.label_smoothing),
        epochs=recipe.probe_epochs,
        lr=recipe.probe_lr,
        weight_decay=recipe.probe_weight_decay,
        optimizer=recipe.probe_optimizer,
        head=ranli,
    )
