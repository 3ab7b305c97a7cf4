"""The command line of a comparison taken apart, and the cells that it asks for."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastadv.cli import parse, refuse_misspelt
from fastadv.errors import SettingsError

if TYPE_CHECKING:
    # At run time they are imported inside the functions: Ctrl-C and SIGTERM then work while torch is still loading.
    from fastadv.comparison import Cell, Rate

PROGRAM = "python -m fastadv.compare"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The command line, taken apart; ``flags`` are those of the recipe."""

    strategies: tuple[str, ...]
    data: tuple[str, ...]
    weights: tuple[str, ...]
    seeds: int
    lrs: tuple[float, ...]
    out: Path
    jobs: int | None
    page_only: bool
    resume: bool
    only: tuple[str, ...]
    flags: tuple[str, ...]


def take_apart(argv: Sequence[str], program: str = PROGRAM) -> Asked:
    """The command line in parts. Raises SettingsError for what does not go together."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--strategies", "--data", "--weights", "--lrs", "--only"):
        parser.add_argument(name, nargs="+", default=())
    for name in ("--out", "--resume", "--seeds", "--jobs"):
        parser.add_argument(name)
    parser.add_argument("--page-only", action="store_true")
    first = argv[0] if argv and not argv[0].startswith("-") else None
    try:
        given, flags = parser.parse_known_args(argv[1:] if first else argv)
    except argparse.ArgumentError as error:
        raise SettingsError(f"{error.argument_name} has no value", f"see {program} --help") from error
    folders = [folder for folder in (first, given.resume, given.out) if folder]
    alone = bool(first or given.resume or given.page_only)
    if not folders and alone:
        raise SettingsError("--page-only without a folder", f"{program} FOLDER")
    if alone and (
        len(folders) != 1 or flags or given.strategies or given.data or given.weights or given.seeds or given.lrs
    ):
        raise SettingsError(
            f"{shlex.join(argv)} has a folder and settings", "a comparison goes on with its own: give its folder alone"
        )
    if given.only and not given.resume:
        raise SettingsError("--only without --resume", f"{PROGRAM} --resume FOLDER --only CELL")
    return Asked(
        strategies=tuple(given.strategies),
        data=tuple(given.data) or ("digits",),
        weights=tuple(given.weights) or ("robust",),
        seeds=_count("--seeds", given.seeds, 3),
        lrs=_rates(given.lrs),
        out=Path(folders[0]) if folders else Path("runs") / "compare",
        jobs=_count("--jobs", given.jobs, 1) if given.jobs else None,
        page_only=bool(first or given.page_only),
        resume=bool(given.resume),
        only=tuple(given.only),
        flags=tuple(flags),
    )


def plan(asked: Asked, program: str = PROGRAM) -> tuple[list[Cell], dict[str, Any]]:
    """The cells asked for, seed by seed, and what the flags set. Raises SettingsError for what cannot be meant."""
    from fastadv.comparison import Cell, cell_recipe
    from fastadv.comparison_probe import has_rate, stages
    from fastadv.models import input_size, weights_file
    from fastadv.sources import open_source
    from fastadv.strategies import load_all
    from fastadv.train import absolute, check_radius

    known = load_all()
    if not asked.strategies:
        refuse_misspelt(asked.flags, "--strategies")
        raise SettingsError("no strategies given", f"--strategies NAME ..., from the list of {PROGRAM}")
    settings: dict[str, Any] = {}
    for name in asked.strategies:
        default = known[name].recipe
        heading = f"{program} --strategies {name}" if program == PROGRAM else program
        recipe = parse(type(default), default, asked.flags, heading, known[name].summary)
        settings = {field: getattr(recipe, field) for field in _set_by(asked.flags, recipe)}
        check_radius(recipe, default, given="eps" in settings)
    if "strategy" in settings:
        raise SettingsError("--strategy in a comparison", "--strategies NAME ...")
    if "lr" in settings and asked.lrs:
        raise SettingsError("--lr beside --lrs", "--lrs alone, with that rate among the others")
    first = settings.pop("seed", 0)
    data = [absolute(name) for name in asked.data]
    # A wrong name is told now, not once for every cell.
    for name in data:
        open_source(name)
    # The first seed chooses for the others.
    others: Sequence[Rate] = ("chosen",) if asked.lrs else (None,)
    cells = [
        Cell(strategy=strategy, data=one, weights=weights, seed=seed, lr=lr)
        for seed in range(first, first + asked.seeds)
        for one in data
        for weights in map(absolute, asked.weights)
        for strategy in asked.strategies
        for lr in (asked.lrs if asked.lrs and seed == first else others)
    ]
    for place, cell in enumerate(cells):
        recipe = cell_recipe(cell, settings)
        stages(recipe)
        if cell.lr and not has_rate(recipe):
            cells[place] = dataclasses.replace(cell, lr=None)
        input_size(recipe.model)
        if recipe.weights != "none":
            weights_file(recipe.model, recipe.weights)
    return list(dict.fromkeys(cells)), settings


def _rates(texts: Sequence[str]) -> tuple[float, ...]:
    try:
        rates = tuple(dict.fromkeys(map(float, texts)))
    except ValueError:
        rates = (0.0,)
    if len(rates) == 1 or not all(0 < rate < math.inf for rate in rates):
        raise SettingsError(f"--lrs is {' '.join(texts)}", "--lrs takes two or more rates, as in 5e-4 1.5e-3 4.5e-3")
    return rates


def _count(name: str, text: str | None, default: int) -> int:
    try:
        number = default if text is None else int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise SettingsError(f"{name} is {text}", f"{name} takes a number, 1 or more")
    return number


def _set_by(flags: Sequence[str], recipe: object) -> list[str]:
    """The fields that the flags set: ``--lr``, ``--lr=1`` and ``--no-augment`` name theirs."""
    words = [flag[2:].partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")]
    return [word if hasattr(recipe, word) else word.removeprefix("no_") for word in words]
