"""``python -m fastadv.compare --strategies roli-full ranli-full``: strategies side by side, as one page."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastadv.cli import EVERYWHERE, command, parse, refuse_misspelt
from fastadv.errors import FastadvError, SettingsError

if TYPE_CHECKING:
    # At run time they are imported inside the functions: Ctrl-C and SIGTERM then work while torch is still loading.
    from fastadv.comparison import Cell, Comparison
    from fastadv.comparison_cells import Failure

PROGRAM = "python -m fastadv.compare"
USAGE = f"""\
usage: {PROGRAM} --strategies NAME [NAME ...] [--data DATA ...] [--weights WEIGHTS ...] [--seeds N]
           [--out FOLDER] [--jobs N] [any setting of a recipe]
       {PROGRAM} --resume FOLDER [--only CELL ...]
       {PROGRAM} FOLDER

Trains every strategy on every data set from every backbone with every seed, each as a run folder under FOLDER, and
writes FOLDER/results.csv and FOLDER/compare.html. The same command again goes on where it was stopped; further
strategies, data, weights or seeds are added to what is there.

  --strategies  names, or some of them; without: this text and the list
  --data        data sets, as for training (default: digits)
  --weights     robust, standard, none, or files (default: robust)
  --seeds       how many, counted from --seed (default: 3, from 0)
  --out         the folder (default: runs/compare)
  --jobs        cells at a time, in processes of one thread each (default: one per GPU; on a CPU 1, with all threads)
  --resume      go on with the comparison in a folder
  --only        of it, these cells alone, without table and page; names as of their folders
  FOLDER alone, or --page-only: write table and page again from what is there
  {EVERYWHERE}
"""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The command line, taken apart; ``flags`` are those of the recipe."""

    strategies: tuple[str, ...]
    data: tuple[str, ...]
    weights: tuple[str, ...]
    seeds: int
    out: Path
    jobs: int | None
    page_only: bool
    resume: bool
    only: tuple[str, ...]
    flags: tuple[str, ...]


def main(argv: list[str]) -> dict[str, Any] | None:
    """Run what the command line asks for; gives the rows of results.csv. None after a mere listing."""
    asked = take_apart(argv)
    if {"-h", "--help"} & set(asked.flags) or not argv:
        _list(settings=bool(argv))
        return None
    from fastadv import comparison
    from fastadv.runfolder import RunLock, run_folder

    if asked.page_only or asked.resume:
        whole = comparison.read(asked.out)
        cells = _only(whole, asked.only)
        if asked.only:
            _run_only(whole, cells)
            return None
        if asked.page_only:
            return finish(whole)
    else:
        cells, settings = plan(asked)
        whole = comparison.begin(asked.out, cells, settings, shlex.join(("python", "-m", "fastadv.compare", *argv)))
    run_folder(asked.out, resume=asked.out.is_dir())
    with RunLock(asked.out):
        return run(whole, cells, asked.jobs, finish)


def take_apart(argv: Sequence[str]) -> Asked:
    """The command line in parts. Raises SettingsError for what does not go together."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--strategies", "--data", "--weights", "--only"):
        parser.add_argument(name, nargs="+", default=())
    for name in ("--out", "--resume", "--seeds", "--jobs"):
        parser.add_argument(name)
    parser.add_argument("--page-only", action="store_true")
    first = argv[0] if argv and not argv[0].startswith("-") else None
    try:
        given, flags = parser.parse_known_args(argv[1:] if first else argv)
    except argparse.ArgumentError as error:
        raise SettingsError(f"{error.argument_name} has no value", f"see {PROGRAM} --help") from error
    folders = [folder for folder in (first, given.resume, given.out) if folder]
    alone = bool(first or given.resume or given.page_only)
    if alone and (len(folders) != 1 or flags or given.strategies or given.data or given.weights or given.seeds):
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
        out=Path(folders[0]) if folders else Path("runs") / "compare",
        jobs=_count("--jobs", given.jobs, 1) if given.jobs else None,
        page_only=bool(first or given.page_only),
        resume=bool(given.resume),
        only=tuple(given.only),
        flags=tuple(flags),
    )


def plan(asked: Asked) -> tuple[list[Cell], dict[str, Any]]:
    """The cells asked for, seed by seed, and what the flags set. Raises SettingsError for what cannot be meant."""
    from fastadv.comparison import Cell, cell_recipe
    from fastadv.comparison_probe import stages
    from fastadv.models import input_size, weights_file
    from fastadv.sources import open_source
    from fastadv.strategies import load_all
    from fastadv.train import absolute

    known = load_all()
    if not asked.strategies:
        refuse_misspelt(asked.flags, "--strategies")
        raise SettingsError("no strategies given", f"--strategies NAME ..., from the list of {PROGRAM}")
    settings: dict[str, Any] = {}
    for name in asked.strategies:
        default = known[name].recipe
        recipe = parse(type(default), default, asked.flags, f"{PROGRAM} --strategies {name}", known[name].summary)
        settings = {field: getattr(recipe, field) for field in _set_by(asked.flags, recipe)}
    if "strategy" in settings:
        raise SettingsError("--strategy in a comparison", "--strategies NAME ...")
    first = settings.pop("seed", 0)
    data = [absolute(name) for name in asked.data]
    # A wrong name is told now, not once for every cell.
    for name in data:
        open_source(name)
    cells = [
        Cell(strategy=strategy, data=one, weights=weights, seed=seed)
        for seed in range(first, first + asked.seeds)
        for one in data
        for weights in map(absolute, asked.weights)
        for strategy in asked.strategies
    ]
    for cell in cells:
        recipe = cell_recipe(cell, settings)
        stages(recipe)
        input_size(recipe.model)
        if recipe.weights != "none":
            weights_file(recipe.model, recipe.weights)
    return list(dict.fromkeys(cells)), settings


def run(
    whole: Comparison,
    cells: Sequence[Cell],
    jobs: int | None,
    finish: Callable[[Comparison], dict[str, Any]],
    program: str = PROGRAM,
) -> dict[str, Any]:
    """Run the cells without a result, then ``finish``. Raises FastadvError at the end if one failed."""
    from fastadv.comparison_cells import gpu_slots, is_finished, run_here, run_processes
    from fastadv.comparison_results import check_csv, collect, write_csv

    check_csv(whole.folder, same_version=True)
    whole.save()
    failures: list[Failure] = []

    def done(cell: Cell, failed: Failure | None) -> None:
        print(f"{whole.name(cell)}: {f'failed: {failed.reason}' if failed else 'done'}", flush=True)
        failures.extend([failed] if failed else [])
        write_csv(whole.folder, collect(whole))

    left = [cell for cell in cells if not is_finished(whole.path(cell))]
    if len(left) < len(cells):
        print(f"{len(cells) - len(left)} of {len(cells)} cells have a result already")
    devices = {whole.recipe(cell).device for cell in left}
    gpus = gpu_slots() if devices <= {"auto", "cuda"} else []
    slots = gpus * -(-(jobs or len(gpus)) // len(gpus)) if gpus else [{"OMP_NUM_THREADS": "1"}] * (jobs or 1)
    slots = slots[: jobs or len(slots)]
    if len(slots) > 1 and len(left) > 1:
        run_processes(whole, left, slots, done)
    else:
        run_here(whole, left, done)
    found = finish(whole)
    if failures:
        error = FastadvError(
            f"{len(failures)} of {len(cells)} cells failed, first: {failures[0].reason}",
            f"remove the cause, then {program} --resume {whole.folder}; the others are done",
        )
        error.exit_code = failures[0].exit_code
        raise error
    return found


def finish(whole: Comparison) -> dict[str, Any]:
    """Print the table, write results.csv and compare.html from what is there; gives the rows."""
    from dataclasses import asdict

    from fastadv import comparison_page
    from fastadv.comparison_results import collect, groups, num_classes, table_rows, write_csv
    from fastadv.runlog import table

    results = collect(whole)
    write_csv(whole.folder, results)
    rows = table_rows(whole, groups(results))
    if rows:
        table(rows)
    for failed in (result for result in results if result.row and result.row.failure):
        print(f"failed: {whole.name(failed.cell)}: {failed.row.failure if failed.row else ''}")
    comparison_page.write(whole.folder / "compare.html", whole, results, num_classes(whole))
    print(f"files in {whole.folder}: compare.html, results.csv")
    return {"folder": str(whole.folder), "rows": [asdict(result.row) for result in results if result.row]}


def _run_only(whole: Comparison, cells: Sequence[Cell]) -> None:
    """Run the cells here; the first failure is this command's."""
    from fastadv.comparison_cells import is_finished, run_cell

    for cell in cells:
        failed = None if is_finished(whole.path(cell)) else run_cell(whole, cell)
        if failed:
            error = FastadvError(failed.reason, f"remove the cause, then {PROGRAM} --resume {whole.folder}")
            error.exit_code = failed.exit_code
            raise error


def _only(whole: Comparison, names: Sequence[str]) -> list[Cell]:
    from fastadv.registry import did_you_mean

    by_name = {whole.name(cell): cell for cell in whole}
    for name in names:
        if name not in by_name:
            raise SettingsError(f"unknown cell {name!r}", did_you_mean(name, by_name))
    return [by_name[name] for name in names or by_name]


def _list(settings: bool) -> None:
    from fastadv.comparison import DIGITS
    from fastadv.recipe import Recipe
    from fastadv.strategies import load_all

    known = load_all()
    width = max(map(len, known))
    print(USAGE)
    print("\n".join(f"  {name:<{width}}  {known[name].summary}" for name in known), flush=True)
    if settings:
        print()
        about = about_settings("--strategies, --data and --weights", DIGITS)
        parse(Recipe, None, ["--help"], f"{PROGRAM} --strategies NAME ...", about)


def about_settings(above: str, digits: Mapping[str, Any]) -> str:
    """What is said over the list of settings: which are given otherwise, and what the ``digits`` have instead."""
    from fastadv.recipe import show_pixels

    smaller = {name: show_pixels(value) if name == "step_size" else value for name, value in digits.items()}
    flags = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in smaller.items())
    return f"Settings, for every cell; {above} as said above. On digits, unless given: {flags}."


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


if __name__ == "__main__":
    sys.exit(command(main, program=PROGRAM))
