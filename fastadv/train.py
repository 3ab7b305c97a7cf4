"""``python -m fastadv.train --strategy roli-full``: a robust classifier for your images. Read this file first."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastadv import stopping
from fastadv.cli import command, parse, pick
from fastadv.errors import SettingsError

if TYPE_CHECKING:
    # At run time they are imported inside the functions: Ctrl-C and SIGTERM then work while torch is still loading.
    from fastadv.data import Splits
    from fastadv.recipe import Recipe

PROGRAM = "python -m fastadv.train"

# What a recipe becomes on the built-in digits: minutes on two cores, where the paper's setting takes an hour.
DEMO = {"train_steps": 3, "step_size": 4 / 255, "probe_epochs": 4, "probe_lr": 0.1, "epochs": 8, "val_every": 2}
# Without native bf16 every pass takes twice as long.
DEMO_FP32 = {**DEMO, "probe_epochs": 2, "epochs": 4}


def main(argv: list[str]) -> dict[str, Any] | None:
    """Train what the command line says; gives what report.json holds."""
    picked, flags = pick(argv, "--strategy")
    return run_command(PROGRAM, picked.strategy, flags)


def run_command(program: str, name: str | None, flags: Sequence[str]) -> dict[str, Any] | None:
    """``--resume RUN``, or a new run of strategy ``name``, ``flags`` over its recipe. None after a mere listing."""
    from fastadv import assemble
    from fastadv.strategies import load_all

    strategies = load_all()
    picked, rest = pick(flags, "--resume", "--out")
    if picked.resume:
        if rest or name or picked.out:
            raise SettingsError(
                f"--resume {picked.resume} with other flags", "a run goes on with its own recipe: drop them"
            )
        return train(assemble.saved_recipe(Path(picked.resume)), Path(picked.resume), resume=True)
    if name is None:
        width = max(map(len, strategies))
        print(f"usage: {program} --strategy NAME [--data DATA] [--out FOLDER] ...\n       {program} --resume FOLDER\n")
        print("\n".join(f"  {name:<{width}}  {strategies[name].summary}" for name in strategies))
        print(f"\nAll settings of one: {program} --strategy NAME --help")
        if rest and not {"-h", "--help"} & set(rest):
            raise SettingsError("no strategy given", "--strategy NAME, from the list above")
        return None
    chosen = strategies[name]
    default = with_demo(dataclasses.replace(chosen.recipe, strategy=name), rest)
    recipe = parse(type(default), default, rest, f"{program} --strategy {name}", chosen.summary)
    folder = Path(picked.out) if picked.out else free_folder(f"{name}-{Path(recipe.data.partition(':')[0]).stem}")
    # Absolute, so that the run can be evaluated from any folder.
    return train(dataclasses.replace(recipe, data=absolute(recipe.data), weights=absolute(recipe.weights)), folder)


def absolute(name: str) -> str:
    """``name`` with the path in it, if there is one (``PATH`` or ``cifar10:PATH``), made absolute."""
    from fastadv.models import SHIPPED
    from fastadv.sources import BUILT_IN

    if name in (*BUILT_IN, *SHIPPED, "none"):
        # Also where a file or folder here happens to be called so.
        return name
    before, colon, path = name.rpartition(":")
    return f"{before}{colon}{Path(path).resolve()}" if path and Path(path).exists() else name


def free_folder(name: str) -> Path:
    """``runs/NAME``, or the first of ``runs/NAME-2``, ``runs/NAME-3``, ... that does not exist."""
    folder, count = Path("runs") / name, 1
    while folder.exists():
        count += 1
        folder = Path("runs") / f"{name}-{count}"
    return folder


def with_demo(recipe: Recipe, flags: Sequence[str]) -> Recipe:
    """The demo's smaller values when the built-in digits are the data; every flag still overrides them."""
    from fastadv import assemble
    from fastadv.engine import native_bf16

    if recipe.data != "digits" or pick(flags, "--data")[0].data not in (None, "digits"):
        return recipe
    smaller: dict[str, Any] = DEMO if native_bf16(assemble.device("auto")) else DEMO_FP32
    return dataclasses.replace(recipe, **smaller)


def train(recipe: Recipe, folder: Path, *, resume: bool = False) -> dict[str, Any]:
    """Run the recipe's strategy in ``folder``: stages, evaluation, report. Gives what report.json holds."""
    from fastadv import assemble
    from fastadv.measure import evaluate
    from fastadv.report import of_training
    from fastadv.run import Run
    from fastadv.runfolder import check_new
    from fastadv.runlog import Progress
    from fastadv.strategies import load_all
    from fastadv.trainer import fit

    began = time.monotonic()
    if not resume:
        check_new(folder)
    strategy = load_all()[recipe.strategy]
    device = assemble.device(recipe.device)
    splits = assemble.splits(recipe)
    model = assemble.model(recipe, len(splits.train.classes)).to(device)
    stages = list(strategy.stages(recipe))
    with Progress() as progress, Run(folder, recipe, progress, stages=len(stages), resume=resume) as run:
        progress.note(f"{strategy.name}: {strategy.summary} ({strategy.source})")
        for line in describe(recipe, splits, device):
            progress.note(line)
        run.begin(splits)
        # Inside, a signal waits for the step under way and for its checkpoint.
        with stopping.guard():
            for index, stage in enumerate(stages):
                if index < run.stage:
                    # The modules it added are part of what the checkpoint holds.
                    stage.tuning(model)
                else:
                    fit(model, stage, splits, recipe, run)
                    run.finish_stage(model)
        run.pick_up(model)
        batch_size = 4 * recipe.batch_size
        found = evaluate(model, splits.test, recipe.eval_attack, recipe.threat, seed=recipe.seed, batch_size=batch_size)
        run.log.event("report", **dataclasses.asdict(found[0]))
    # The progress bar is closed: the table below it stays.
    return of_training(folder, recipe, model, splits.test, found, run.history, time.monotonic() - began)


def describe(recipe: Recipe, splits: Splits, device: object) -> Iterator[str]:
    """The plan, a line each: data and what is odd about them, model, threat and attacks."""
    from fastadv.recipe import show_pixels

    sizes = f"{len(splits.train)} train, {len(splits.val)} val, {len(splits.test)} test images"
    yield f"{recipe.data}: {sizes}, {len(splits.train.classes)} classes"
    if recipe.data == "digits":
        yield f"a demonstration, smaller than the paper's PGD-7 recipe: {recipe.probe_epochs}+{recipe.epochs} epochs"
    if splits.skipped:
        yield f"{len(splits.skipped)} files could not be decoded and were left out, first {splits.skipped[0]}"
    if splits.num_shared:
        yield f"{splits.num_shared} test images have a pixel-equal twin in train or val"
    yield (
        f"{recipe.model} ({recipe.weights} weights) on {device}; "
        f"{recipe.norm} {show_pixels(recipe.eps)}, PGD-{recipe.train_steps} training, PGD-{recipe.eval_steps} test"
    )


if __name__ == "__main__":
    sys.exit(command(main, program=PROGRAM))
