"""Cells of a comparison, run: one after the other in this process, or several at a time in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastadv import assemble, checkpoint, stopping
from fastadv.comparison import Cell, Comparison, check_recipe
from fastadv.comparison_probe import begin_behind, finished_stage, first_stage_key, stages
from fastadv.comparison_rates import FACTS, HISTORY, epochs_of, is_finished
from fastadv.errors import FastadvError, SettingsError
from fastadv.measure import measure
from fastadv.runfolder import write_whole

FAILURE, OUTPUT = "failure.json", "output.txt"
POLL_SECONDS = 0.2


class Failure(NamedTuple):
    """Why a cell has no result, and the exit code of the command that it would have been by itself."""

    reason: str
    exit_code: int


def failure(folder: Path) -> Failure | None:
    """Why the cell in ``folder`` failed when it was last run; None if it did not."""
    try:
        saved = json.loads((folder / FAILURE).read_text())
        return Failure(str(saved["reason"]), int(saved["exit_code"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_cell(whole: Comparison, cell: Cell) -> Failure | None:
    """Run or go on with one cell in this process. What fails is written down and given back; only a stop is raised."""
    folder, recipe = whole.path(cell), whole.recipe(cell)
    try:
        from fastadv.train import train

        check_rate(whole, cell)
        check_recipe(whole, cell)
        folder.mkdir(parents=True, exist_ok=True)
        # Of an earlier attempt: this one may be killed before it can say why it failed.
        (folder / FAILURE).unlink(missing_ok=True)
        write_whole(folder / "recipe.json", recipe.to_json() + "\n")
        if not (folder / "split.json").exists():
            begin_behind(folder, recipe, (whole.path(other) for other in _kin(whole, cell)))
        # With the recipe in place a run that never began is resumed like any other.
        train(recipe, folder, resume=True, page=False)
        kept = {**_facts(whole, cell), HISTORY: epochs_of(folder)}
        write_whole(folder / FACTS, json.dumps(kept) + "\n")
        return None
    except stopping.Stopped:
        raise
    except FastadvError as error:
        return _failed(folder, str(error), error.exit_code)
    except Exception as error:
        # A strategy's own fault is no reason to lose the other cells.
        traceback.print_exc()
        said = str(error).partition("\n")[0]
        return _failed(folder, f"{type(error).__name__}: {said}" if said else type(error).__name__, 1)


def check_rate(whole: Comparison, cell: Cell) -> None:
    """Raise SettingsError where the cell's learning rate cannot be chosen yet."""
    if cell.lr == "chosen":
        candidates = [(whole.name(other), whole.path(other)) for other in whole.candidates(cell)]
        untried = [name for name, path in candidates if not is_finished(path) and failure(path) is None]
        if untried or whole.chosen_rate(cell) is None:
            names = ", ".join(untried or [name for name, _ in candidates])
            raise SettingsError("its learning rate is not chosen", f"first a result of {names}")


def facts(whole: Comparison, cell: Cell) -> dict[str, Any]:
    """Of a finished cell: the parameters that learn, in the backbone and in all, and a clean probe's accuracy."""
    try:
        found: dict[str, Any] = json.loads((whole.path(cell) / FACTS).read_text())
        return {name: value for name, value in found.items() if name != HISTORY}
    except (OSError, ValueError):
        return _facts(whole, cell)


def run_here(whole: Comparison, cells: Sequence[Cell], done: Callable[[Cell, Failure | None], None]) -> None:
    """Run the cells one after the other in this process; ``done`` is called behind each. Raises Stopped."""
    for number, cell in enumerate(cells, 1):
        print(f"cell {number} of {len(cells)}: {whole.name(cell)}", flush=True)
        try:
            done(cell, run_cell(whole, cell))
        except stopping.Stopped:
            raise stopping.Stopped(whole.folder) from None
        if stopping.requested():
            raise stopping.Stopped(whole.folder)


def run_processes(
    whole: Comparison,
    cells: Sequence[Cell],
    slots: Sequence[Mapping[str, str]],
    done: Callable[[Cell, Failure | None], None],
) -> None:
    """Run the cells in processes, one for every slot at a time; a slot is what its environment has besides.

    A cell waits while another one is busy with the first stage that both share. Raises Stopped once all have saved;
    no process outlives this call, also where ``done`` fails.
    """
    waiting, running, free = list(cells), dict[Cell, tuple[subprocess.Popen[bytes], Mapping[str, str]]](), list(slots)
    with stopping.guard():
        try:
            while waiting or running:
                if stopping.requested():
                    raise stopping.Stopped(whole.folder)
                while free and (cell := _startable(whole, waiting, list(running))) is not None:
                    waiting.remove(cell)
                    running[cell] = (_start(whole, cell, free[0]), free.pop(0))
                    print(f"started {whole.name(cell)}, {len(waiting)} of {len(cells)} wait", flush=True)
                for cell, (process, slot) in list(running.items()):
                    if process.poll() is not None:
                        del running[cell]
                        free.append(slot)
                        done(cell, _outcome(whole.path(cell), process.returncode))
                time.sleep(POLL_SECONDS)
        finally:
            _stop([process for process, _ in running.values()])


def gpu_slots() -> list[dict[str, str]]:
    """One slot for every GPU that this process sees."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    return [{"CUDA_VISIBLE_DEVICES": number} for number in numbers] if torch.cuda.is_available() else []


def _kin(whole: Comparison, cell: Cell) -> Iterator[Cell]:
    """The other cells whose first stage is this one's."""
    key = _key(whole, cell)
    for other in whole:
        same = (other.data, other.weights, other.seed) == (cell.data, cell.weights, cell.seed)
        if same and other != cell and key is not None and _key(whole, other) == key:
            yield other


def _key(whole: Comparison, cell: Cell) -> tuple[Any, ...] | None:
    try:
        return first_stage_key(whole.recipe(cell))
    except ValueError:
        # The strategy refuses the recipe: its own run will say why.
        return None


def _startable(whole: Comparison, waiting: Sequence[Cell], running: Sequence[Cell]) -> Cell | None:
    for cell in waiting:
        if cell.lr == "chosen" and any(other in running or other in waiting for other in whole.candidates(cell)):
            continue
        busy = [other for other in _kin(whole, cell) if other in running]
        begun = (whole.path(cell) / "split.json").exists()
        if begun or not busy or any(finished_stage(whole.path(other)) for other in busy):
            return cell
    return None


def _start(whole: Comparison, cell: Cell, slot: Mapping[str, str]) -> subprocess.Popen[bytes]:
    folder = whole.path(cell)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILURE).unlink(missing_ok=True)
    argv = [sys.executable, "-m", "fastadv.compare", "--resume", str(whole.folder), "--only", whole.name(cell)]
    with (folder / OUTPUT).open("ab") as output:
        return subprocess.Popen(argv, env={**os.environ, **slot}, stdout=output, stderr=output)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask the processes to save and end, and wait until they have."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


def _outcome(folder: Path, exit_code: int) -> Failure | None:
    if exit_code == 0:
        return None
    known = failure(folder)
    if known is not None:
        return known
    what = f"ended by signal {-exit_code}" if exit_code < 0 else f"ended with exit code {exit_code}"
    return _failed(folder, f"its process {what}, see {OUTPUT}", 1 if exit_code < 0 else exit_code)


def _failed(folder: Path, reason: str, exit_code: int) -> Failure:
    if folder.is_dir():
        write_whole(folder / FAILURE, json.dumps({"reason": reason, "exit_code": exit_code}) + "\n")
    return Failure(reason, exit_code)


def _facts(whole: Comparison, cell: Cell) -> dict[str, Any]:
    recipe, folder = whole.recipe(cell), whole.path(cell)
    classes = checkpoint.read_split(folder)["classes"]
    model = assemble.model(recipe, len(classes)).to(assemble.device(recipe.device))
    probe, *others = stages(recipe)
    probe.tuning(model)
    found: dict[str, Any] = {"probe_clean": None}
    if others and not probe.robust:
        # A run reports its last stage only.
        model.load_state_dict(checkpoint.load(folder / f"best-{probe.name}")[0]["model.safetensors"])
        verdict = measure(model, assemble.test_images(recipe), None, recipe.threat)
        found["probe_clean"] = verdict.clean / verdict.n
    for stage in others:
        stage.tuning(model)
    learn = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    # TWINS and AutoLoRa have what they add beside the backbone.
    found["trainable_encoder"] = sum(size for name, size in learn.items() if not name.startswith("head."))
    return {**found, "trainable_all": sum(learn.values())}
