"""``python -m fastadv.compare --strategies roli-full ranli-full``: strategies side by side, as one page."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastadv.cli import EVERYWHERE, command, parse
from fastadv.comparison_plan import PROGRAM, plan, take_apart
from fastadv.errors import FastadvError, SettingsError

if TYPE_CHECKING:
    # At run time they are imported inside the functions: Ctrl-C and SIGTERM then work while torch is still loading.
    from fastadv.comparison import Cell, Comparison
    from fastadv.comparison_cells import Failure

USAGE = f"""\
usage: {PROGRAM} --strategies NAME [NAME ...] [--data DATA ...] [--weights WEIGHTS ...] [--seeds N]
           [--lrs LR ...] [--out FOLDER] [--jobs N] [any setting of a recipe]
       {PROGRAM} --resume FOLDER [--only CELL ...]
       {PROGRAM} FOLDER

Trains every strategy on every data set from every backbone with every seed, each as a run folder under FOLDER, and
writes FOLDER/results.csv and FOLDER/compare.html. The same command again goes on where it was stopped; further
strategies, data, weights or seeds are added to what is there.

  --strategies  names, or some of them; without: this text and the list
  --data        data sets, as for training (default: digits)
  --weights     robust, standard, contrastive, adversarial-contrastive, none, or files (default: robust)
  --seeds       how many, counted from --seed (default: 3, from 0)
  --lrs         learning rates of fine-tuning to choose from, for each strategy on each data set from each backbone: its
                first seed is trained with all, the others with the one that validated best (default: no choice)
  --out         the folder (default: runs/compare)
  --jobs        cells at a time, in processes of one thread each (default: one per GPU; on a CPU 1, with all threads)
  --resume      go on with the comparison in a folder
  --only        of it, these cells alone, without table and page; names as of their folders
  FOLDER alone, or --page-only: write table and page again from what is there
  {EVERYWHERE}
"""


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


def run(
    whole: Comparison,
    cells: Sequence[Cell],
    jobs: int | None,
    finish: Callable[[Comparison], dict[str, Any]],
    program: str = PROGRAM,
) -> dict[str, Any]:
    """Run the cells without a result, then ``finish``. Raises FastadvError at the end if one failed."""
    from fastadv.comparison_cells import gpu_slots, run_here, run_processes
    from fastadv.comparison_rates import is_finished
    from fastadv.comparison_results import check_csv, collect, write_csv

    check_csv(whole.folder, same_version=True)
    whole.save()
    failures: list[Failure] = []

    def done(cell: Cell, failed: Failure | None) -> None:
        print(f"{whole.name(cell)}: {f'failed: {failed.reason}' if failed else 'done'}", flush=True)
        failures.extend([failed] if failed else [])
        write_csv(whole.folder, collect(whole))

    left = [cell for cell in cells if not is_finished(whole.path(cell))]
    # A rate that joined later is tried before another seed wants the best.
    left.sort(key=lambda cell: cell.lr == "chosen")
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
    from fastadv.comparison_results import collect, groups, left_out, num_classes, table_rows, write_csv
    from fastadv.runlog import table

    results = collect(whole)
    write_csv(whole.folder, results)
    rows = table_rows(whole, groups(results))
    if rows:
        table(rows)
    for failed in (result for result in results if result.row and result.row.failure):
        print(f"failed: {whole.name(failed.cell)}: {failed.row.failure if failed.row else ''}")
    for said in left_out(whole, results):
        print(f"left out: {said}")
    comparison_page.write(whole.folder / "compare.html", whole, results, num_classes(whole))
    print(f"files in {whole.folder}: compare.html, results.csv")
    return {"folder": str(whole.folder), "rows": [asdict(result.row) for result in results if result.row]}


def _run_only(whole: Comparison, cells: Sequence[Cell]) -> None:
    """Run the cells here; the first failure is this command's."""
    from fastadv.comparison_cells import run_cell
    from fastadv.comparison_rates import is_finished

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


if __name__ == "__main__":
    sys.exit(command(main, program=PROGRAM))
