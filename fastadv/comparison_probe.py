"""The first stage that cells have in common, run once: the others begin as if they had been killed right behind it.

A run draws its random numbers by (seed, stage, step), so such a run ends in the bits of one that did everything itself.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from fastadv import checkpoint
from fastadv.assemble import saved_recipe
from fastadv.environment import environment
from fastadv.errors import CheckpointError
from fastadv.recipe import Recipe
from fastadv.run import KEPT
from fastadv.runlog import RunLog
from fastadv.strategies import Stage, load_all

# Of a recipe, what a stage carries itself (its length, rates, smoothing) or what leaves the weights alone.
OF_THE_STAGE = (
    *("strategy", "epochs", "lr", "weight_decay", "probe_epochs", "probe_lr", "label_smoothing"),
    "checkpoint_minutes",
)


def stages(recipe: Recipe) -> list[Stage]:
    """The stages of the recipe's strategy."""
    return list(load_all()[recipe.strategy].stages(recipe))


def first_stage_key(recipe: Recipe) -> tuple[Any, ...]:
    """Equal for two recipes, in one process, exactly when their first stages give equal weights.

    Settings count, not names. A loss made anew at every call is equal to no other, so that nothing wrong is shared.
    """
    first = stages(recipe)[0]
    of_stage = [_value(getattr(first, field.name)) for field in dataclasses.fields(first) if field.name != "name"]
    rest = [getattr(recipe, field.name) for field in dataclasses.fields(Recipe) if field.name not in OF_THE_STAGE]
    return (*of_stage, *rest)


def has_rate(recipe: Recipe) -> bool:
    """Whether the last stage of the recipe's strategy has the learning rate of fine-tuning; a probe has its own."""
    other = dataclasses.replace(recipe, lr=recipe.lr / 2)
    return stages(recipe)[-1].lr != stages(other)[-1].lr


def finished_stage(folder: Path) -> dict[str, Any] | None:
    """What the run in ``folder`` knew when its first stage was finished, None if it is not; may be still running."""
    meta = checkpoint.newest_meta(folder)
    if meta.get("stage", 0) < 1 or not (folder / "split.json").exists():
        return None
    history = [row for row in meta["history"] if row["stage_index"] == 0]
    return {"history": history, "step": sum(row["steps"] for row in history)}


def begin_behind(folder: Path, recipe: Recipe, sources: Iterable[Path]) -> Path | None:
    """Let the run of ``recipe`` in ``folder`` begin behind the first stage of one of the ``sources``; gives which.

    None, with nothing written, where none of them has finished it whole. Only for a run that has not begun.
    """
    for source in sources:
        found = finished_stage(source)
        # Not what it would be run with today.
        theirs = saved_recipe(source) if found else None
        if not found or not theirs or not found["history"] or first_stage_key(theirs) != first_stage_key(recipe):
            continue
        try:
            files, meta = checkpoint.load(source / _best(stages(theirs)))
        except CheckpointError:
            continue
        own = stages(recipe)
        history = [row | {"stage": own[0].name} for row in found["history"]]
        state = dict(zip(KEPT, (1, 0, found["step"], 0.0, None, history), strict=True))
        checkpoint.save(folder / _best(own), files, meta)
        checkpoint.save(checkpoint.step_folder(folder, found["step"]), files, state)
        (folder / "env.json").write_text(json.dumps(environment(), indent=2) + "\n")
        with RunLog(folder / "log.jsonl") as log:
            log.event("shared", stage=own[0].name, source=source.name, step=found["step"])
        # Last, as in `Run.begin`: a folder without it is one that never began.
        (folder / "split.json").write_bytes((source / "split.json").read_bytes())
        return source
    return None


def _best(all_stages: list[Stage]) -> str:
    """Where `Run` keeps the first stage's best weights."""
    return "best" if len(all_stages) == 1 else f"best-{all_stages[0].name}"


def _value(value: Any) -> Any:
    """A partial function as what it calls, and with what: two of them never compare equal."""
    if isinstance(value, partial):
        return value.func, value.args, tuple(sorted(value.keywords.items()))
    return value
