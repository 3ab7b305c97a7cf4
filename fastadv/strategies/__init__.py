"""Strategies: one short file each. A strategy is a named generator of stages.

Adding one touches no other file: put a file into this folder, or register a module under the entry-point group
``fastadv.strategies``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Literal

from torch import Tensor

from fastadv.errors import SettingsError
from fastadv.heads import HeadStart
from fastadv.losses import Forward, TrainingLoss, adversarial_ce
from fastadv.models import Classifier
from fastadv.plateau import Pace
from fastadv.recipe import Recipe
from fastadv.registry import Registry
from fastadv.tuning import Tuning


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What learns, from which loss, how long. A stage starts from the best weights of the one before."""

    name: str
    """Shown in the progress bar, the log and the curves."""
    tuning: Tuning
    """Which parameters learn."""
    loss: TrainingLoss = adversarial_ce
    """(forward, x, y, attack) -> scalar to minimise."""
    loss_on: Callable[[Classifier], TrainingLoss] | None = None
    """Makes a loss that switches branches of the model that the tuning prepared; it takes the place of ``loss``."""
    epochs: int
    """Passes over the training images."""
    lr: float
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled decay, on matrices only."""
    head: HeadStart | None = None
    """Overwrites the head before the stage; None keeps it."""
    robust: bool = True
    """Select the best weights by robust validation accuracy; False: by clean accuracy, without any attack."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd has momentum 0.9."""
    pace: Callable[[list[float]], Pace] | None = None
    """From the validation accuracies so far to the next epoch's learning rate; None: the recipe's schedule."""
    prepare: Callable[[Classifier, Forward, Iterable[tuple[Tensor, Tensor]]], None] | None = None
    """Called before each epoch with the model, its forward pass and the epoch's batches."""
    scaffold: str | None = None
    """The submodule that only training needs, by name: a trained model is without it."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A named way of training: its stages, its default recipe, where it comes from."""

    name: str
    stages: Callable[[Recipe], Iterator[Stage]]
    recipe: Recipe
    source: str
    """The paper, as an arXiv id."""

    @property
    def summary(self) -> str:
        """First line of the generator's docstring: what --help shows."""
        return (self.stages.__doc__ or "").strip().splitlines()[0]


STRATEGIES: Registry[Strategy] = Registry("strategy")


def strategy(
    name: str, *, source: str, recipe: Recipe | None = None
) -> Callable[[Callable[[Recipe], Iterator[Stage]]], Callable[[Recipe], Iterator[Stage]]]:
    """Register the decorated generator of stages under ``name``; it needs a docstring and a ``source``."""

    def register(stages: Callable[[Recipe], Iterator[Stage]]) -> Callable[[Recipe], Iterator[Stage]]:
        if not (stages.__doc__ or "").strip():
            raise SettingsError(f"strategy {name!r} has no docstring", "say in a line what it does: --help shows it")
        STRATEGIES.add(name, Strategy(name=name, stages=stages, recipe=recipe or Recipe(), source=source))
        return stages

    return register


def refuse_changes(recipe: Recipe, *names: str) -> None:
    """Raise SettingsError for a field among ``names`` that is not at its default: the strategy decides it itself."""
    default = type(recipe)()
    for name in names:
        if getattr(recipe, name) != getattr(default, name):
            raise SettingsError(
                f"{name} is {getattr(recipe, name)}, which {recipe.strategy} does not use",
                f"leave out --{name.replace('_', '-')}",
            )


def load_all() -> Registry[Strategy]:
    """Every strategy: the files of this folder, and those that other packages register as entry points."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for entry in entry_points(group="fastadv.strategies"):
        entry.load()
    return STRATEGIES
