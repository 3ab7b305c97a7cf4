"""Adversarial linear probing: the first stage of RoLI, and a strategy of its own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from fastadv.heads import ranli
from fastadv.losses import adversarial_ce
from fastadv.recipe import Recipe
from fastadv.strategies import Stage, strategy
from fastadv.tuning import linear


@strategy("linear", source="arXiv:2312.05716")
def linear_probe(recipe: Recipe) -> Iterator[Stage]:
    """Train only a linear head, on adversarial images; the backbone rests."""
    yield Stage(
        name="probe",
        tuning=linear,
        loss=partial(adversarial_ce, label_smoothing=recipe.label_smoothing),
        epochs=recipe.probe_epochs,
        lr=recipe.probe_lr,
        head=ranli,
    )
