"""A comparison on disk: which cells it has, the recipe of each, and what must not change when it goes on.

A cell is one strategy on one data set from one backbone with one seed: a run folder of the usual kind. What the cells
of a folder share stands in its compare.json.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastadv import __version__
from fastadv.comparison_rates import best_rate
from fastadv.errors import CheckpointError, SettingsError
from fastadv.recipe import Recipe, read_recipe, read_settings
from fastadv.runfolder import write_whole
from fastadv.strategies import load_all

FORMAT = 1
FILE = "compare.json"

# Of fine-tuning: one of several to choose from, the one chosen of them, or the recipe's own.
Rate = float | Literal["chosen"] | None

# What a recipe becomes on the built-in digits, on every machine the same: a cell takes a minute or less on two cores.
DIGITS: dict[str, Any] = {
    "train_steps": 2,
    "step_size": 5 / 255,
    "per_class": 50,
    "val_images": 100,
    "probe_epochs": 4,
    "probe_lr": 0.1,
    "epochs": 4,
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a comparison."""

    strategy: str
    data: str
    """As the recipe has it, a path made absolute."""
    weights: str
    seed: int
    lr: Rate = None

    @property
    def key(self) -> tuple[str, str, str, int, Rate]:
        """What makes it the only one of its kind."""
        return self.strategy, self.data, self.weights, self.seed, self.lr


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The cells of a folder in the order they are run, and the settings that were given for all of them."""

    folder: Path
    cells: tuple[Cell, ...]
    settings: Mapping[str, Any]
    """Fields of the recipe that flags have set."""
    commands: tuple[str, ...] = ()
    """The command lines that asked for the cells."""

    def __iter__(self) -> Iterator[Cell]:
        return iter(self.cells)

    def recipe(self, cell: Cell) -> Recipe:
        """The cell's recipe: its strategy's own, on the digits a smaller one, and over both what flags have set."""
        recipe = cell_recipe(cell, self.settings)
        rate = self.chosen_rate(cell) if cell.lr == "chosen" else None
        return recipe if rate is None else dataclasses.replace(recipe, lr=rate)

    def candidates(self, cell: Cell) -> list[Cell]:
        """The cells among which the learning rate of ``cell`` is chosen: those of the first seed that has several."""
        found = [other for other in self.cells if other.key[:3] == cell.key[:3] and isinstance(other.lr, float)]
        return [other for other in found if other.seed == found[0].seed]

    def chosen_rate(self, cell: Cell) -> float | None:
        """The learning rate chosen for ``cell`` so far; None where none of its candidates is finished."""
        return best_rate({other.lr: self.path(other) for other in self.candidates(cell) if isinstance(other.lr, float)})

    def name(self, cell: Cell) -> str:
        """The name of the cell's folder: ``roli-full-digits-robust-s0``, one of several rates ``...-s0-lr0.001``."""
        rate = f"-lr{cell.lr}" if isinstance(cell.lr, float) else ""
        return f"{cell.strategy}-{self.data_names[cell.data]}-{self.weights_names[cell.weights]}-s{cell.seed}{rate}"

    def path(self, cell: Cell) -> Path:
        """The cell's run folder."""
        return self.folder / self.name(cell)

    @property
    def data_names(self) -> dict[str, str]:
        """A short name for every data set."""
        return _short([cell.data for cell in self.cells])

    @property
    def weights_names(self) -> dict[str, str]:
        """A short name for every backbone."""
        return _short([cell.weights for cell in self.cells])

    def extended(self, cells: Sequence[Cell], command: str) -> Comparison:
        """This comparison with further cells behind its own."""
        known = dict.fromkeys((*self.cells, *cells))
        commands = dict.fromkeys((*self.commands, command))
        return dataclasses.replace(self, cells=tuple(known), commands=tuple(commands))

    def save(self) -> None:
        """Write compare.json, whole or not at all."""
        content = {
            "format": FORMAT,
            "fastadv": __version__,
            "settings": dict(self.settings),
            "cells": [cell.key for cell in self.cells],
            "commands": self.commands,
        }
        write_whole(self.folder / FILE, json.dumps(content, indent=1) + "\n")


def cell_recipe(cell: Cell, settings: Mapping[str, Any]) -> Recipe:
    """See `Comparison.recipe`. Raises SettingsError for an unknown strategy."""
    smaller = DIGITS if cell.data == "digits" else {}
    rate = {"lr": cell.lr} if isinstance(cell.lr, float) else {}
    given = {**smaller, **settings, **rate, "data": cell.data, "weights": cell.weights, "seed": cell.seed}
    return dataclasses.replace(load_all()[cell.strategy].recipe, strategy=cell.strategy, **given)


def read(folder: Path) -> Comparison:
    """The comparison in ``folder``. Raises SettingsError where there is none or it is another version's."""
    path = folder / FILE
    if not path.is_file():
        raise SettingsError(f"no comparison in {folder}", f"give a folder that holds a {FILE}")
    saved = read_settings(path)
    if saved.get("format") != FORMAT:
        raise SettingsError(
            f"{path} has format {saved.get('format')}, this version reads {FORMAT}", "--out OTHER starts a new one"
        )
    try:
        # Cells had no learning rate of their own at first.
        cells = tuple(
            Cell(strategy=s, data=d, weights=w, seed=n, lr=lr[0] if lr else None) for s, d, w, n, *lr in saved["cells"]
        )
        return Comparison(
            folder=folder, cells=cells, settings=dict(saved["settings"]), commands=tuple(saved["commands"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error})", "--out OTHER starts a new comparison") from error


def begin(folder: Path, cells: Sequence[Cell], settings: Mapping[str, Any], command: str) -> Comparison:
    """A new comparison in ``folder``, or the one there with further cells; nothing is written yet.

    Raises SettingsError for settings that differ from those it began with, and for a folder that holds something else.
    """
    if (folder / FILE).exists():
        found = read(folder)
        _check_same(found.settings, settings, folder)
        whole = found.extended(cells, command)
    else:
        if folder.exists() and (not folder.is_dir() or any(not e.name.startswith(".") for e in folder.iterdir())):
            raise SettingsError(f"{folder} holds something else than a comparison", "--out OTHER, a new folder")
        whole = Comparison(folder=folder, cells=tuple(cells), settings=dict(settings), commands=(command,))
    for cell in cells:
        if cell.lr is None and whole.candidates(cell):
            _refuse_mixed(cell, folder, "without", "the same --lrs")
        if cell.lr and any(other.lr is None and other.key[:3] == cell.key[:3] for other in whole):
            _refuse_mixed(cell, folder, "with", "no --lrs")
        check_recipe(whole, cell)
    return whole


def _refuse_mixed(cell: Cell, folder: Path, how: str, cure: str) -> None:
    what = f"{cell.strategy} {how} --lrs, where {folder} has it the other way"
    raise SettingsError(what, f"{cure}, or --out OTHER for a new comparison")


def check_recipe(whole: Comparison, cell: Cell) -> None:
    """Raise SettingsError, naming the field, where the cell's run began with another recipe than it would have now."""
    path = whole.path(cell) / "recipe.json"
    if path.exists():
        now = whole.recipe(cell)
        # Read as a recipe: a field that came with a later version has its default in older files.
        before = dataclasses.asdict(read_recipe(path, type(now)))
        if cell.lr == "chosen" and before["lr"] != now.lr:
            raise SettingsError(
                f"{whole.path(cell)} was trained with lr {before['lr']:g}, and {now.lr:g} is chosen now",
                "remove that folder: it is trained again",
            )
        _check_same(before, dataclasses.asdict(now), whole.path(cell))


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    for name in dict.fromkeys((*before, *now)):
        old, new = (values.get(name, "not given") for values in (before, now))
        if old != new:
            raise SettingsError(
                f"{name} was {old} when {folder} began, now it is {new}",
                f"--{name.replace('_', '-')} as it was, or --out OTHER for a new comparison",
            )


def _short(values: Sequence[str]) -> dict[str, str]:
    """A name for every value that is fit for a file name: the end of a path, numbered where two end alike."""
    names: dict[str, str] = {}
    for value in dict.fromkeys(values):
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(value.partition(":")[0]).stem) or "data"
        name, count = stem, 1
        while name in names.values():
            count += 1
            name = f"{stem}-{count}"
        names[value] = name
    return names
