"""``python -m fastadv.train --strategy roli-full``: a robust classifier for your images. Read this file first."""

from __future__ import annotations

import copy
import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastadv import stopping
from fastadv.cli import EVERYWHERE, command, parse, pick, refuse_misspelt
from fastadv.errors import SettingsError

if TYPE_CHECKING:
    # At run time they are imported inside the functions: Ctrl-C and SIGTERM then work while torch is still loading.
    from fastadv.data import Splits
    from fastadv.models import Classifier
    from fastadv.recipe import Recipe
    from fastadv.sharing import Share
    from fastadv.strategies import Stage, Strategy

PROGRAM = "python -m fastadv.train"

# What a recipe becomes on the built-in digits: minutes on two cores, where the paper's setting takes an hour.
DEMO = {"train_steps": 3, "step_size": 4 / 255, "probe_epochs": 4, "probe_lr": 0.1, "epochs": 8, "val_every": 2}
# Without native bf16 every pass takes twice as long.
DEMO_FP32 = {**DEMO, "probe_epochs": 2, "epochs": 4}


def main(argv: list[str]) -> dict[str, Any] | None:
    """Train what the command line says; gives what report.json holds, in the first process of a torchrun alone."""
    from fastadv.sharing import joined

    with joined() as share:
        picked, flags = pick(argv, "--strategy")
        return run_command(PROGRAM, picked.strategy, flags, share)


def run_command(program: str, name: str | None, flags: Sequence[str], share: Share) -> dict[str, Any] | None:
    """``--resume RUN``, or a new run of strategy ``name``, ``flags`` over its recipe.

    None after a mere listing, and in all processes but the first.
    """
    from fastadv import assemble, presets
    from fastadv.strategies import load_all

    strategies = load_all()
    picked, rest = pick(flags, "--resume", "--out", "--preset", switches=["--as-released"])
    if picked.as_released and not picked.preset:
        raise SettingsError("--as-released without a preset", f"--preset NAME, of {', '.join(presets.DATASETS)}")
    if picked.resume:
        if rest or name or picked.out or picked.preset:
            raise SettingsError(
                f"--resume {picked.resume} with other flags", "a run goes on with its own recipe: drop them"
            )
        folder = Path(picked.resume)
        return train(assemble.saved_recipe(folder), folder, resume=True, share=share) or None
    if name is None:
        refuse_misspelt(rest, "--strategy", "--resume", "--preset")
        print(presets.listing(picked.preset) if picked.preset else overview(program, strategies))
        choose = f"--strategy NAME{f' --preset {picked.preset} --weights FILE' if picked.preset else ''}"
        print(f"\nAll settings of one: {program} {choose} --help")
        if rest and not {"-h", "--help"} & set(rest):
            raise SettingsError("no strategy given", f"{choose}, from the list above")
        return None
    chosen = strategies[name]
    default = dataclasses.replace(chosen.recipe, strategy=name)
    notes: list[str] = []
    if picked.preset:
        preset = presets.find(picked.preset, name, picked.as_released)
        default = preset.of(default)
        notes = [f"preset {picked.preset}{' as released' * picked.as_released}: {preset.source}", *preset.notes]
    else:
        default = with_demo(default, rest)
    recipe = parse(type(default), default, rest, f"{program} --strategy {name}", "; ".join([chosen.summary, *notes]))
    check_radius(recipe, default, given=pick(rest, "--eps")[0].eps is not None)
    if picked.preset:
        presets.check_weights(recipe)
    folder = Path(picked.out) if picked.out else free_folder(f"{name}-{Path(recipe.data.partition(':')[0]).stem}")
    # Absolute, so that the run can be evaluated from any folder.
    recipe = dataclasses.replace(recipe, data=absolute(recipe.data), weights=absolute(recipe.weights))
    return train(recipe, folder, notes=notes, share=share) or None


def check_radius(recipe: Recipe, default: Recipe, *, given: bool) -> None:
    """Raise SettingsError for another norm than the default's with the default's radius."""
    if recipe.norm != default.norm and not given:
        raise SettingsError(
            f"norm is {recipe.norm} without a radius", "for l2 --eps 0.5 --step-size 0.125 --eval-step-size 0.125"
        )


def overview(program: str, strategies: Mapping[str, Strategy]) -> str:
    """What a bare call prints: how to call it, and a line for every strategy."""
    from fastadv.presets import DATASETS

    width = max(map(len, strategies))
    usage = (
        f"usage: {program} --strategy NAME [--data DATA] [--out FOLDER] ...\n"
        f"       {program} --strategy NAME --preset {'|'.join(DATASETS)} --weights FILE [--as-released] ...\n"
        f"       {program} --resume FOLDER\n\n{EVERYWHERE}\n"
    )
    return "\n".join([usage, *(f"  {name:<{width}}  {strategies[name].summary}" for name in strategies)])


def absolute(name: str) -> str:
    """``name`` with the paths in it, if any (``PATH``, ``cifar10:PATH``, ``cub:PATH:PATH``), made absolute."""
    from fastadv.models import SHIPPED
    from fastadv.sources import BUILT_IN

    if name in (*BUILT_IN, *SHIPPED, "none"):
        # Also where a file or folder here happens to be called so.
        return name
    first, *paths = name.split(":")
    if first in BUILT_IN:
        return ":".join([first, *(str(Path(path).resolve()) if Path(path).exists() else path for path in paths)])
    return str(Path(name).resolve()) if Path(name).exists() else name


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


def train(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    page: bool = True,
    notes: Sequence[str] = (),
    share: Share | None = None,
) -> dict[str, Any]:
    """Run the recipe's strategy in ``folder``: stages, evaluation, report. Gives what report.json holds.

    Without ``page`` there is no report.html, whose curve attacks many more times than the evaluation does.
    The processes of a ``share`` train and evaluate together; the first writes the report, the others get an empty one.
    """
    from fastadv import assemble
    from fastadv.measure import evaluate
    from fastadv.parallel import check_shares
    from fastadv.report import of_training
    from fastadv.run import Run
    from fastadv.runfolder import check_new
    from fastadv.runlog import Progress
    from fastadv.sharing import ALONE
    from fastadv.strategies import load_all
    from fastadv.trainer import fit

    began, share = time.monotonic(), share or ALONE
    if share.first and not resume:
        check_new(folder)
    strategy = load_all()[recipe.strategy]
    device = assemble.device(recipe.device)
    splits = assemble.splits(recipe)
    check_shares(recipe, len(splits.train), share.size)
    model = assemble.model(recipe, len(splits.train.classes)).to(device)
    stages = list(strategy.stages(recipe))
    check_tunings(model, stages)
    with Progress() as progress, Run(folder, recipe, progress, stages=len(stages), resume=resume, share=share) as run:
        progress.note(f"{strategy.name}: {strategy.summary} ({strategy.source})")
        for line in (*describe(recipe, splits, device, share.size), *notes):
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
        how: dict[str, Any] = {"seed": recipe.seed, "batch_size": 4 * recipe.batch_size, "share": share}
        found = evaluate(model, splits.test, recipe.eval_attack, recipe.threat, **how)
        run.log.event("report", **dataclasses.asdict(found[0]))
    if not share.first:
        return {}
    # The progress bar is closed: the table below it stays.
    return of_training(folder, recipe, model, splits.test, found, run.history, time.monotonic() - began, page=page)


def check_tunings(model: Classifier, stages: Sequence[Stage]) -> None:
    """Raise SettingsError where a stage's tuning refuses the model, before a run folder is made for it."""
    trial = copy.deepcopy(model).to("meta")
    for stage in stages:
        stage.tuning(trial)


def describe(recipe: Recipe, splits: Splits, device: object, processes: int = 1) -> Iterator[str]:
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
        f"{recipe.norm} {show_pixels(recipe.eps, recipe.norm)}, "
        f"PGD-{recipe.train_steps} training, PGD-{recipe.eval_steps} test"
    )
    for name, steps, size in (
        ("training", recipe.train_steps, recipe.step_size),
        ("test", recipe.eval_steps, recipe.eval_step_size),
    ):
        if steps * size < recipe.eps:
            flag = "--step-size" if name == "training" else "--eval-step-size"
            yield f"the {name} attack's steps reach {steps * size / recipe.eps:.0%} of the radius: {flag} is small"
    if processes > 1:
        yield f"{processes} processes share every batch of {recipe.batch_size} images"


if __name__ == "__main__":
    sys.exit(command(main, program=PROGRAM))
