"""Strategies: one short file each. A strategy is a named generator of stages.

Adding one touches no other file: put a file into this folder, or register a module under the entry-point group
``fastadv.strategies``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Literal

import torch
from torch import Tensor, nn

from fastadv.data import Splits
from fastadv.engine import Fast
from fastadv.errors import SettingsError
from fastadv.heads import HeadStart
from fastadv.losses import Forward, TrainingLoss, adversarial_ce
from fastadv.models import Classifier
from fastadv.pgd import PGD
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
    """Decay, on matrices only; adamw decouples it from the gradient."""
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
    ema: float = 0.0
    """Decay of the average of the weights that is validated and kept in their place; 0: the weights themselves."""
    views: Callable[[Tensor, Tensor, torch.Generator, bool], tuple[Tensor, Tensor]] | None = None
    """Makes (x, y) of an update of a batch's, by a generator of its own; the bool: a mirrored image keeps its class."""
    through: Callable[[Classifier], nn.Module] | None = None
    """Makes the module that loss and attack go through, of the model's own parameters; None: the model."""
    bind: Callable[..., Fast] = PGD.on
    """Binds the recipe's attack to that module; its keywords are those of `PGD.on`."""
    score: Callable[[Classifier, Splits, Recipe], dict[str, float]] | None = None
    """Validates where the model's own head says nothing: ``{"clean": share}``."""


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
    """Every strategy: the files of this folder, and those that other packages register as entry points.

    Raises SettingsError naming the package whose module cannot be imported.
    """
    _import_all()
    return STRATEGIES


# Reading what is installed takes 5 ms, and a comparison asks for the stages of its cells thousands of times.
@cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for entry in entry_points(group="fastadv.strategies"):
        try:
            entry.load()
        except Exception as error:
            owner = entry.dist.name if entry.dist else entry.value
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise SettingsError(
                f"the strategies of {owner} cannot be imported: {reason}", f"repair {owner}, or pip uninstall {owner}"
            ) from error
