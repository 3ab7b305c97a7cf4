"""``python -m fastadv.inherit --data DATA --weights A B``: what clean training inherits from each pre-training."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastadv.cli import EVERYWHERE, command, parse
from fastadv.errors import SettingsError

if TYPE_CHECKING:
    # At run time they are imported inside the functions: Ctrl-C and SIGTERM then work while torch is still loading.
    from fastadv.comparison import Comparison

PROGRAM = "python -m fastadv.inherit"
PAGE = "inherit.html"
# What is trained on every backbone, in the order of the paper's argument.
ARMS = ("clean-linear", "clean-full", "linear")
# Where the command line says nothing. On the digits a comparison trains for fewer epochs: a head that is not done yet
# tells nothing about what it stands on.
OWN = {
    "--seeds": "1",
    "--out": "runs/inherit",
    "--probe-epochs": "20",
    "--probe-lr": "0.03",
    "--epochs": "20",
}
USAGE = f"""\
usage: {PROGRAM} --weights WEIGHTS [WEIGHTS ...] [--data DATA ...] [--model NAME] [--seeds N]
           [--lrs LR ...] [--out FOLDER] [--jobs N] [any setting of a recipe]
       {PROGRAM} --resume FOLDER
       {PROGRAM} FOLDER

From each of the given backbones: a linear probe on clean images, fine-tuning of everything on clean images, and a
linear probe on adversarial images; clean and PGD accuracy of each, and the filters of the first layer. Writes
FOLDER/results.csv and FOLDER/{PAGE}. The same command again goes on where it was stopped: what is done is not done
again.

  --weights     robust, standard, contrastive, adversarial-contrastive, none, or files, as many as are to be told apart
  --data        data sets, as for training (default: digits)
  --model       the backbones' network (default: swin_micro_64)
  --seeds       how many, counted from --seed (default: 1, from 0)
  --lrs         learning rates to choose from, as in fastadv.compare; heads alone have one of their own (--probe-lr)
  --out         the folder (default: runs/inherit)
  --jobs        cells at a time, in processes of one thread each (default: one per GPU; on a CPU 1, with all threads)
  --resume      go on with what is in a folder
  FOLDER alone, or --page-only: write table and page again from what is there
  {EVERYWHERE}
"""


def main(argv: list[str]) -> dict[str, Any] | None:
    """Run what the command line asks for; gives the rows of results.csv. None after a mere listing."""
    if not argv or {"-h", "--help"} & set(argv):
        _list(settings=bool(argv))
        return None
    from fastadv import compare, comparison, comparison_plan
    from fastadv.runfolder import RunLock, run_folder

    goes_on = not argv[0].startswith("-") or "--page-only" in argv or any(a.startswith("--resume") for a in argv)
    asked = comparison_plan.take_apart(argv if goes_on else _completed(argv), PROGRAM)
    if asked.only:
        raise SettingsError("--only is for comparisons", f"{PROGRAM} --resume {asked.out}")
    if asked.page_only or asked.resume:
        whole = comparison.read(asked.out)
        if asked.page_only:
            return finish(whole)
    else:
        cells, settings = comparison_plan.plan(asked, PROGRAM)
        whole = comparison.begin(asked.out, cells, settings, shlex.join(("python", "-m", "fastadv.inherit", *argv)))
    run_folder(asked.out, resume=asked.out.is_dir())
    with RunLock(asked.out):
        return compare.run(whole, list(whole), asked.jobs, finish, PROGRAM)


def finish(whole: Comparison) -> dict[str, Any]:
    """Print the table, write results.csv and the page from what is there; gives the rows and the filters' roughness."""
    from dataclasses import asdict

    from fastadv import inheritance_page
    from fastadv.comparison_results import collect, groups, table_rows, write_csv
    from fastadv.first_layer import of_weights
    from fastadv.runlog import table

    results = collect(whole)
    write_csv(whole.folder, results)
    rows = table_rows(whole, groups(results))
    if rows:
        table([{name: row[name] for name in row if name not in ("encoder", "all")} for row in rows])
    for failed in (result for result in results if result.row and result.row.failure):
        print(f"failed: {whole.name(failed.cell)}: {failed.row.failure if failed.row else ''}")
    layers = {weights: of_weights(whole.recipe(cell)) for weights, cell in {c.weights: c for c in whole}.items()}
    inheritance_page.write(whole.folder / PAGE, whole, results, layers)
    print(f"files in {whole.folder}: {PAGE}, results.csv")
    return {
        "folder": str(whole.folder),
        "rows": [asdict(result.row) for result in results if result.row],
        "roughness": {weights: layer.roughness for weights, layer in layers.items()},
    }


def _completed(argv: Sequence[str]) -> list[str]:
    """The command line as that of a comparison of the arms. Raises SettingsError for what is decided here."""
    names = {word.partition("=")[0] for word in argv}
    for name in ("--strategies", "--strategy"):
        if name in names:
            raise SettingsError(f"{name} is decided here", f"leave it out: {', '.join(ARMS)}")
    if "--weights" not in names:
        raise SettingsError("no weights given", "--weights robust standard, or the files of several pre-trainings")
    own = [word for name, value in OWN.items() if name not in names for word in (name, value)]
    return [*argv, *own, "--strategies", *ARMS]


def _list(settings: bool) -> None:
    from fastadv.compare import about_settings
    from fastadv.comparison import DIGITS
    from fastadv.recipe import Recipe
    from fastadv.strategies import load_all

    known = load_all()
    width = max(map(len, ARMS))
    print(USAGE)
    print("\n".join(f"  {name:<{width}}  {known[name].summary}" for name in ARMS), flush=True)
    if settings:
        print()
        digits = {name: value for name, value in DIGITS.items() if f"--{name.replace('_', '-')}" not in OWN}
        about = about_settings("--weights and --data", digits)
        parse(Recipe, None, ["--help"], f"{PROGRAM} --weights WEIGHTS ...", about)


if __name__ == "__main__":
    sys.exit(command(main, program=PROGRAM))
