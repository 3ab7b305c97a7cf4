"""The list of experiments, and the folder in which they are done one after the other, each only once."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastadv import __version__
from fastadv.environment import environment
from fastadv.errors import CheckpointError, NumericalError, SettingsError
from fastadv.purification.constructed import CLOSED_FORM, LEMMA, PAIRS
from fastadv.purification.contrastive import CONTRASTIVE
from fastadv.purification.controls import CONTROLS
from fastadv.purification.lab import Experiment, Lab, Settings
from fastadv.purification.marks import Outcome
from fastadv.purification.supervised import ATTACKED, INHERITS, PURIFIES
from fastadv.purification.sweeps import SWEEPS
from fastadv.registry import did_you_mean
from fastadv.runfolder import write_whole

EXPERIMENTS = (CLOSED_FORM, LEMMA, PURIFIES, ATTACKED, INHERITS, PAIRS, CONTRASTIVE, SWEEPS, CONTROLS)
SETTINGS, CSV = "settings.json", "results.csv"
# The name under which the version is noted beside the settings.
VERSION = "fastadv"


def choose(names: Sequence[str]) -> list[Experiment]:
    """The experiments of these keys or names, in their own order; ``all`` is every one. SettingsError for others."""
    known = {key: each for each in EXPERIMENTS for key in (each.key.lower(), each.name)}
    for name in names:
        if name.lower() not in ("all", *known):
            raise SettingsError(f"unknown experiment {name!r}", did_you_mean(name, [*known, "all"]))
    chosen = {name.lower() for name in names}
    return [each for each in EXPERIMENTS if chosen & {"all", each.key.lower(), each.name}]


def open_folder(folder: Path, settings: Settings) -> None:
    """Note settings and version in the folder. Raises SettingsError where others are noted there."""
    path, now = folder / SETTINGS, {VERSION: __version__, **dataclasses.asdict(settings)}
    if path.exists():
        before = _read(path)
        for name in now:
            if before.get(name) != now[name]:
                same = "" if name == VERSION else f"--{name.replace('_', '-')} {before.get(name)}, or "
                raise SettingsError(
                    f"{name} was {before.get(name)} when {folder} began, now it is {now[name]}", f"{same}--out OTHER"
                )
    write_whole(path, json.dumps(now, indent=2) + "\n")


def saved_settings(folder: Path) -> Settings:
    """The settings noted in a folder. Raises CheckpointError where there are none."""
    if not (folder / SETTINGS).exists():
        raise CheckpointError(f"no experiment was done in {folder}", "give --page-only the folder of one")
    return Settings(**{name: value for name, value in _read(folder / SETTINGS).items() if name != VERSION})


def finished(folder: Path) -> dict[str, Outcome]:
    """The outcomes in the folder, by key, in the order of the experiments."""
    paths = {each.key: folder / f"{each.key}.json" for each in EXPERIMENTS}
    return {key: Outcome.of_json(_read(path)) for key, path in paths.items() if path.exists()}


def run(lab: Lab, chosen: Sequence[Experiment], say: Callable[[str], None]) -> dict[str, Outcome]:
    """Do the experiments that are not done; gives the outcomes of all chosen ones.

    One whose training collapsed has a failure instead of marks, is kept for the page, and is tried again next time.
    """
    assert lab.folder is not None
    found = {}
    for each in chosen:
        path = lab.folder / f"{each.key}.json"
        if path.exists() and not (before := Outcome.of_json(_read(path))).failure:
            say(f"{each.key} {each.name}: done before, in {before.seconds:.1f} s")
            found[each.key] = before
            continue
        say(f"{each.key} {each.name}: {each.title} ...")
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            marks, numbers = each.run(lab)
            outcome = Outcome(marks=marks, numbers=numbers)
        except NumericalError as error:
            outcome = Outcome(marks=[], numbers={"fix": error.fix}, failure=error.what)
        outcome = dataclasses.replace(
            outcome,
            seconds=time.perf_counter() - wall,
            cpu_seconds=time.process_time() - cpu,
            environment=environment(),
        )
        write_whole(path, json.dumps(outcome.to_json()))
        held = sum(mark.holds for mark in outcome.marks)
        told = f"failed: {outcome.failure}" if outcome.failure else f"{held} of {len(outcome.marks)} hold"
        say(f"{each.key} {each.name}: {told} ({outcome.seconds:.1f} s, {outcome.cpu_seconds:.1f} s of CPU)")
        for mark in (mark for mark in outcome.marks if not mark.holds):
            say(f"  missed: {mark.claim}: predicted {mark.predicted}; measured {mark.measured}")
        found[each.key] = outcome
    return found


def rows(outcomes: Mapping[str, Outcome]) -> list[dict[str, Any]]:
    """A row for every mark: experiment, claim, predicted, measured, holds, control."""
    return [
        {"experiment": key, **dataclasses.asdict(mark)} for key, outcome in outcomes.items() for mark in outcome.marks
    ]


def write_csv(folder: Path, outcomes: Mapping[str, Outcome]) -> None:
    """Write results.csv, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(
        text, ["experiment", "claim", "predicted", "measured", "holds", "control"], lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows(outcomes))
    write_whole(folder / CSV, text.getvalue())


def _read(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return value
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read ({error})", "remove it; it is made again") from error
