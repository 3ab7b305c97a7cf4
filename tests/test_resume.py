"""A run that is killed, wherever the kill falls, ends in the same bits as one that is not."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastadv import train
from fastadv.checkpoint import steps
from fastadv.cli import command
from fastadv.runlog import read

FLAGS = [
    *("--weights", "none", "--drop-path", "0.2", "--per-class", "5", "--val-images", "20", "--batch-size", "8"),
    *("--train-steps", "1", "--eval-steps", "1", "--probe-epochs", "2", "--epochs", "2", "--precision", "fp32"),
    # A checkpoint after every step.
    *("--checkpoint-minutes", "0"),
]
STEPS = 4 * 6


def start(*argv: str | Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fastadv.train", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def result(folder: Path) -> tuple[str, list[tuple[int, float, float]]]:
    """What the bits of a run are: its weights, and its accuracies by step."""
    weights = hashlib.sha256((folder / "best" / "model.safetensors").read_bytes()).hexdigest()
    epochs = {event["step"]: event for event in read(folder / "log.jsonl") if event["event"] == "epoch"}
    return weights, [(step, event["clean"], event["loss"]) for step, event in sorted(epochs.items())]


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not any(int(path.name[5:]) >= step for path in steps(folder)):
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start("--strategy", "roli-full", *FLAGS, "--out", folder)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return folder


@pytest.mark.slow
def test_kills_inside_an_epoch_a_save_and_an_import_leave_no_trace(tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "run"
    resume = ("--resume", folder)
    # Inside a save: the fourth one never gets its manifest.
    process = start("--strategy", "roli-full", *FLAGS, "--out", folder, FASTADV_FAULT="save:4")
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in folder.glob(".tmp-*")]
    # During the imports, and then at random moments inside an epoch.
    process = start(*resume)
    time.sleep(0.3)
    process.kill()
    process.communicate(timeout=300)
    chance = random.Random(0)
    for goal in (7, 14):
        process = start(*resume)
        wait_for_step(folder, goal, process)
        time.sleep(0.1 * chance.random())
        process.kill()
        process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL
    # While best/ is replaced, between its two renames.
    process = start(*resume, FASTADV_FAULT="replace:1")
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    process = start(*resume)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert result(folder) == result(undisturbed)
    assert not list(folder.glob(".tmp-*")) + list(folder.glob(".old-*"))


@pytest.mark.slow
def test_a_kill_leaves_no_trace_in_what_autolora_measures(tmp_path: Path) -> None:
    """Its learning rate, shares and returns to the best weights follow accuracies; six epochs reach a checkpoint."""
    flags = [*FLAGS, "--image-size", "32", "--strategy", "autolora", "--epochs", "6", "--per-class", "4"]
    for folder in (tmp_path / "whole", tmp_path / "run"):
        process = start(*flags, "--out", folder)
        if folder.name == "run":
            for goal in (7, 24):
                # Inside the second epoch, and in the save that follows the fifth, whose accuracy the rate answers to.
                wait_for_step(folder, goal, process)
                process.kill()
                process.communicate(timeout=300)
                process = start("--resume", folder)
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    assert result(tmp_path / "run") == result(tmp_path / "whole")
    rates = [event["lr"] for event in read(tmp_path / "whole" / "log.jsonl") if event["event"] == "epoch"]
    assert rates == pytest.approx([0.03] * 5 + [0.015])


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_says_how_to_go_on_and_loses_nothing(
    tmp_path: Path, undisturbed: Path, number: signal.Signals, code: int
) -> None:
    folder = tmp_path / "run"
    process = start("--strategy", "roli-full", *FLAGS, "--out", folder)
    wait_for_step(folder, 3, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=300)
    assert process.returncode == code, said
    assert f"python -m fastadv.train --resume {folder}" in said
    assert "Traceback" not in said
    process = start("--resume", folder)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert result(folder) == result(undisturbed)


@pytest.mark.slow
def test_a_full_disk_costs_the_save_and_not_what_was_saved(tmp_path: Path) -> None:
    """The limit on file size stands for a full disk: the small safetensors of best/ fit, the optimizer's do not."""
    folder = tmp_path / "run"

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, 6_000_000))

    process = subprocess.run(
        [sys.executable, "-m", "fastadv.train", "--strategy", "roli-full", *FLAGS, "--out", str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=limited,
    )
    assert process.returncode == 4, process.stderr
    lines = process.stderr.splitlines()
    assert lines[-2].startswith("error: could not save step")
    assert "no space" in lines[-2]
    assert "--resume" in lines[-1]
    # The probe's checkpoints hold no optimizer state of the backbone and fitted; the newest is still whole.
    kept = steps(folder)
    assert kept
    manifest = json.loads((kept[-1] / "manifest.json").read_text())
    assert (kept[-1] / "model.safetensors").stat().st_size == manifest["files"]["model.safetensors"]["bytes"]
    assert not list(folder.glob(".tmp-*"))


def test_same_seed_same_bits_and_another_seed_other_bits(tmp_path: Path) -> None:
    def weights(name: str, seed: str) -> bytes:
        flags = ["--strategy", "linear", *FLAGS[:-2], "--seed", seed, "--out", str(tmp_path / name)]
        assert command(train.main, flags) == 0
        return (tmp_path / name / "best" / "model.safetensors").read_bytes()

    assert weights("a", "0") == weights("b", "0") != weights("c", "1")
