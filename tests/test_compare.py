"""A comparison runs every cell once, shares the probe in the same bits, goes on where it was stopped, loses nothing."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sample_comparison import pretend

from fastadv import compare, comparison, comparison_cells, comparison_page, comparison_probe, report, train
from fastadv.cli import command
from fastadv.comparison import Cell, Comparison
from fastadv.comparison_cells import Failure
from fastadv.comparison_results import Row, collect, groups, table_rows
from fastadv.errors import CheckpointError
from fastadv.losses import adversarial_ce, clean_ce
from fastadv.models import create
from fastadv.page import Figure
from fastadv.recipe import Recipe
from fastadv.run import Run
from fastadv.runlog import read
from fastadv.strategies import STRATEGIES, Stage, Strategy
from fastadv.tuning import linear

SETTINGS = [
    *("--val-images", "6", "--train-steps", "1", "--eval-steps", "1", "--batch-size", "6"),
    *("--epochs", "1", "--probe-epochs", "2", "--precision", "fp32"),
]
LINEAR, ROLI, RANLI = (f"{name}-shades-none-s0" for name in ("linear", "roli-bias", "ranli-bias"))


@pytest.fixture(scope="module", autouse=True)
def no_pictures() -> Any:
    """Each run would draw two: half of its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report.plots, "curves", lambda *args, **more: None)
        patch.setattr(report, "draw_examples", lambda *args, **more: None)
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes told apart by their brightness: 18 training images, 6 of them for validation, and 12 for tests."""
    folder, rng = tmp_path_factory.mktemp("data") / "shades", np.random.default_rng(0)
    folder.mkdir()
    for part, number in (("train", 18), ("test", 12)):
        labels = np.arange(number) % 3
        pixels = 60 + 60 * labels[:, None, None, None] + rng.integers(-30, 30, (number, 64, 64, 3))
        classes = ["dark", "grey", "light"]
        np.savez(folder / f"{part}.npz", images=pixels.astype(np.uint8), labels=labels, classes=classes)
    return folder


def asked(images: Path, out: Path, *strategies: str, weights: str = "none", seeds: int = 1) -> list[str]:
    """The command line of a small comparison."""
    where = ["--data", str(images), "--weights", weights, "--seeds", str(seeds), "--out", str(out)]
    return ["--strategies", *strategies, *SETTINGS, *where]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the processes of --jobs have: another number of threads sums in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def grid(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of three strategies, two of which share their probe."""
    folder = tmp_path_factory.mktemp("comparisons") / "grid"
    assert command(compare.main, asked(images, folder, "linear", "roli-bias", "ranli-bias")) == 0
    return folder


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cells are not run but leave what a run leaves; gives the names of those that were asked for."""
    names: list[str] = []

    def run_cell(whole: Comparison, cell: Cell) -> None:
        names.append(whole.name(cell))
        pretend(whole, cell)

    monkeypatch.setattr(comparison_cells, "run_cell", run_cell)
    # Drawn in other tests.
    monkeypatch.setattr(comparison_page, "write", lambda path, *args: path.write_text("a page"))
    return names


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights(run: Path) -> bytes:
    return (run / "best" / "model.safetensors").read_bytes()


def shared(run: Path) -> list[str]:
    return [event["source"] for event in read(run / "log.jsonl") if event["event"] == "shared"]


def refused(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    """Exit code, error and fix of a refusal."""
    capsys.readouterr()
    code = command(compare.main, [str(arg) for arg in argv])
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["error", "fix"], lines
    return code, lines[0].removeprefix("error: "), lines[1].removeprefix("fix: ")


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_cell_is_a_run_and_a_row(grid: Path) -> None:
    names = [LINEAR, ROLI, RANLI]
    assert sorted(path.name for path in grid.iterdir() if path.is_dir()) == sorted(names)
    for row, name in zip(rows(grid), names, strict=True):
        found = json.loads((grid / name / "report.json").read_text())["reports"][0]
        assert float(row["clean"]) == found["clean"]
        assert [float(row[f"robust_{end}"]) for end in ("low", "high")] == found["robust_interval"]
        assert row["strategy"] == name.partition("-shades")[0]
        assert (row["n"], row["attack"], row["failure"]) == ("12", "PGD-1", "")
        assert float(row["train_seconds"]) > 0
    assert [row["epochs"] for row in rows(grid)] == ["2", "2+1", "1"]
    # The head alone: 192 features and a bias, three classes.
    assert [int(row["trainable_all"]) - int(row["trainable_encoder"]) for row in rows(grid)] == [3 * 193] * 3
    assert [int(row["trainable_encoder"]) > 0 for row in rows(grid)] == [False, True, True]
    text = (grid / "compare.html").read_text()
    assert "Clean against robust" in text
    # Two points joined, and one alone.
    assert "Arrows lead" in text


def test_a_run_behind_a_shared_probe_ends_in_the_bits_of_one_that_did_it_all(
    grid: Path, images: Path, tmp_path: Path
) -> None:
    assert shared(grid / ROLI) == [LINEAR]
    alone = tmp_path / "alone"
    flags = ["--strategy", "roli-bias", *SETTINGS, "--data", str(images), "--weights", "none", "--out", str(alone)]
    assert command(train.main, flags) == 0
    assert shared(alone) == []
    assert weights(grid / ROLI) == weights(alone)
    found = [
        json.loads((run / "report.json").read_text())["reports"][0] | {"seconds": 0} for run in (grid / ROLI, alone)
    ]
    assert found[0] == found[1]


def test_the_other_way_round_too_and_what_is_finished_is_not_run_again(
    grid: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``linear`` behind the probe of roli: nothing is trained any more."""
    folder = tmp_path / "grid"
    shutil.copytree(grid, folder)
    shutil.rmtree(folder / LINEAR)
    monkeypatch.setattr("fastadv.trainer.fit", None)
    before = everything(folder / ROLI)
    assert command(compare.main, asked(images, folder, "linear", "roli-bias", "ranli-bias")) == 0
    assert "2 of 3 cells have a result already" in capsys.readouterr().out
    assert shared(folder / LINEAR) == [ROLI]
    assert weights(folder / LINEAR) == weights(grid / LINEAR)
    assert everything(folder / ROLI) == before
    fresh, old = ([row | {"train_seconds": "", "eval_seconds": ""} for row in rows(one)] for one in (folder, grid))
    assert fresh == old


def test_a_probe_of_other_weights_is_noticed(grid: Path, tmp_path: Path) -> None:
    """The test above can fail: a run behind a probe with one other weight ends elsewhere."""
    whole = comparison.read(grid)
    folder = tmp_path / "planted"
    shutil.copytree(grid / LINEAR, tmp_path / LINEAR)
    path = tmp_path / LINEAR / "best" / "model.safetensors"
    from fastadv.checkpoint import load, save

    files, meta = load(path.parent)
    files["model.safetensors"]["head.bias"][0] += 1e-3
    save(path.parent, files, meta)
    recipe = whole.recipe(whole.cells[1])
    folder.mkdir()
    assert comparison_probe.begin_behind(folder, recipe, [tmp_path / LINEAR]) == tmp_path / LINEAR
    train.train(recipe, folder, resume=True, page=False)
    assert weights(folder) != weights(grid / ROLI)


def test_a_comparison_stopped_in_a_cell_goes_on_in_the_same_bits(
    grid: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, end_epoch = tmp_path / "grid", Run.end_epoch

    def stopped(run: Run, *args: Any) -> None:
        end_epoch(run, *args)
        signal.raise_signal(signal.SIGTERM)

    flags = asked(images, folder, "roli-bias")
    monkeypatch.setattr(Run, "end_epoch", stopped)
    assert command(compare.main, flags, program=compare.PROGRAM) == 75
    assert f"continue with: {compare.PROGRAM} --resume {folder}" in capsys.readouterr().err
    assert not (folder / ROLI / "report.json").exists()
    monkeypatch.setattr(Run, "end_epoch", end_epoch)
    assert command(compare.main, ["--resume", str(folder)]) == 0
    assert [event["event"] for event in read(folder / ROLI / "log.jsonl")].count("resume") == 1
    assert weights(folder / ROLI) == weights(grid / ROLI)


def test_a_strategy_that_cannot_serve_the_backbone_fails_alone(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters need transformer blocks, which a ResNet has not. ``linear`` is only pretended here."""
    run_cell = comparison_cells.run_cell

    def chosen(whole: Comparison, cell: Cell) -> Failure | None:
        return pretend(whole, cell) if cell.strategy == "linear" else run_cell(whole, cell)

    monkeypatch.setattr(comparison_cells, "run_cell", chosen)
    folder = tmp_path / "grid"
    flags = [*asked(images, folder, "ranli-adapter", "linear"), "--model", "resnet18", "--image-size", "32"]
    code, what, _ = refused(capsys, *flags)
    assert (code, "1 of 2 cells failed" in what, "no transformer blocks" in what) == (2, True, True)
    adapter, other = rows(folder)
    assert (adapter["clean"], "no transformer blocks" in adapter["failure"]) == ("", True)
    assert (other["clean"], other["failure"]) == ("0.75", "")
    # Its page says so, also when made again.
    (folder / "compare.html").unlink()
    assert command(compare.main, [str(folder)]) == 0
    assert "failed: ranli-adapter-shades-none-s0: resnet18 has no transformer blocks" in capsys.readouterr().out
    assert "no transformer blocks" in (folder / "compare.html").read_text()
    # The next time it is tried again, and once it succeeds nothing is said of the failure.
    monkeypatch.setattr(comparison_cells, "run_cell", pretend)
    assert command(compare.main, ["--resume", str(folder)]) == 0
    assert [row["failure"] for row in rows(folder)] == ["", ""]


def pretended_run(folder: Path) -> None:
    """A run that ends in an error of its own."""
    raise RuntimeError("a fault of the strategy\nwith a second line")


def test_an_error_of_a_strategys_own_is_a_failed_cell(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "train", lambda recipe, folder, **more: pretended_run(folder))
    assert command(compare.main, asked(images, tmp_path / "grid", "linear")) == 1
    assert [row["failure"] for row in rows(tmp_path / "grid")] == ["RuntimeError: a fault of the strategy"]


@pytest.mark.parametrize(
    ("flags", "error", "fix"),
    [
        (["--strategies", "roli-ful"], "unknown strategy 'roli-ful'", "did you mean 'roli-full'?"),
        (["--data", "digits"], "no strategies given", "--strategies NAME"),
        (["--strategies"], "--strategies has no value", "--help"),
        (["--strategies", "linear", "--strategy", "twins"], "--strategy in a comparison", "--strategies NAME"),
        (["--strategy", "linear"], "unknown option --strategy", "did you mean --strategies?"),
        (["--strategies", "linear", "--model", "resnet18"], "'robust' are shipped for", "--weights none"),
        (["--strategies", "linear", "--model", "resnet8", "--weights", "none"], "unknown model 'resnet8'", "resnet18"),
        (["--strategies", "linear", "--seeds", "0"], "--seeds is 0", "1 or more"),
        (["--strategies", "linear", "--seeds", "x"], "--seeds is x", "1 or more"),
        (["--strategies", "linear", "--jobs", "-1"], "--jobs is -1", "1 or more"),
        (["--strategies", "roli-full", "--lrs", "1e-3"], "--lrs is 1e-3", "two or more"),
        (["--strategies", "roli-full", "--lrs", "1e-3", "0"], "--lrs is 1e-3 0", "two or more"),
        (["--strategies", "roli-full", "--lrs", "1e-3", "inf"], "--lrs is 1e-3 inf", "two or more"),
        (["--strategies", "roli-full", "--lrs", "1e-3", "fast"], "--lrs is 1e-3 fast", "two or more"),
        (["--strategies", "roli-full", "--lrs", "1", "2", "--lr", "3"], "--lr beside --lrs", "among the others"),
        (["nowhere", "--lrs", "1", "2"], "has a folder and settings", "alone"),
        (["--strategies", "linear", "--lrr", "1"], "Unrecognized options: --lrr", "did you mean --lr"),
        (["--strategies", "linear", "--eps", "8"], "eps is 8", "did you mean 8/255?"),
        (["--strategies", "linear", "--data", "digit"], "digit", "did you mean digits?"),
        (["--resume", "nowhere"], "no comparison in nowhere", "compare.json"),
        (["nowhere"], "no comparison in nowhere", "compare.json"),
        (["nowhere", "--epochs", "3"], "has a folder and settings", "alone"),
        (["--strategies", "linear", "--weights", "robust", "best.pth"], "no weights at 'best.pth'", "robust|standard"),
        (["--strategies", "linear", "twins", "--loss", "mart"], "loss is mart, which twins does not use", "--loss"),
        (["--strategies", "linear", "--norm", "l2"], "norm is l2 without a radius", "--eps 0.5"),
        (["--page-only"], "--page-only without a folder", "FOLDER"),
        (["--strategies", "linear", "--only", "linear"], "--only without --resume", "--resume FOLDER"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    error: str,
    fix: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, what, cure = refused(capsys, *flags)
    assert code in (2, 3)
    assert error in what
    assert fix in cure
    assert list(tmp_path.iterdir()) == []


def test_a_changed_setting_is_named(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pretended: list[str]
) -> None:
    folder = tmp_path / "grid"
    flags = asked(images, folder, "linear")
    assert command(compare.main, flags) == 0
    for change, said in (
        (["--epochs", "2"], f"epochs was 1 when {folder} began, now it is 2"),
        (["--lr", "0.1"], "lr was not given when"),
        (["--no-augment"], "augment was not given when"),
    ):
        code, what, cure = refused(capsys, *flags, *change)
        assert (code, said in what, "--out OTHER" in cure) == (2, True, True), what
    code, what, _ = refused(capsys, *[flag for flag in flags if flag not in ("--precision", "fp32")])
    assert (code, "precision was fp32 when" in what) == (2, True)
    # A strategy whose own recipe has changed since.
    saved = folder / LINEAR / "recipe.json"
    saved.write_text(saved.read_text().replace('"probe_lr": 0.03', '"probe_lr": 0.02'))
    code, what, _ = refused(capsys, *flags)
    assert (code, "probe_lr was 0.02 when" in what) == (2, True)
    assert pretended == [LINEAR]


def test_further_cells_join_those_that_are_there(
    images: Path, tmp_path: Path, pretended: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "grid"
    assert command(compare.main, asked(images, folder, "linear")) == 0
    assert command(compare.main, asked(images, folder, "roli-bias", seeds=2)) == 0
    assert pretended == [LINEAR, ROLI, "roli-bias-shades-none-s1"]
    assert [row["seed"] for row in rows(folder)] == ["0", "0", "1"]
    assert command(compare.main, [*asked(images, folder, "linear"), "--seed", "7"]) == 0
    assert pretended[3:] == ["linear-shades-none-s7"]
    commands = comparison.read(folder).commands
    assert [command.split()[4] for command in commands] == ["linear", "roli-bias", "linear"]


def rates(images: Path, folder: Path, *lrs: str, seeds: int = 1) -> list[str]:
    return [*asked(images, folder, "linear", "ranli-bias", seeds=seeds), "--lrs", *lrs]


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Cells are not run; the nearer their rate is to 0.02, the better they validate. Gives names and rates."""
    found: list[tuple[str, float]] = []

    def run_cell(whole: Comparison, cell: Cell) -> Failure | None:
        comparison_cells.check_rate(whole, cell)
        lr = whole.recipe(cell).lr
        found.append((whole.name(cell), lr))
        if lr > 1:
            whole.path(cell).mkdir(parents=True)
            return comparison_cells._failed(whole.path(cell), "the loss is not a number", 5)
        # Clean accuracy falls where robust accuracy rises: the latter decides.
        far = round(300 * abs(lr - 0.02))
        pretend(whole, cell, clean=far, robust=9 - far)
        return None

    monkeypatch.setattr(comparison_cells, "run_cell", run_cell)
    return found


def test_a_learning_rate_is_chosen_at_the_first_seed_and_serves_the_others(
    images: Path, tmp_path: Path, tried: list[tuple[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, bias, linear = tmp_path / "grid", "ranli-bias-shades-none", "linear-shades-none"
    assert command(compare.main, rates(images, folder, "0.01", "0.02", "0.03", seeds=2)) == 0
    lrs = [(f"{bias}-s0-lr{lr:g}", lr) for lr in (0.01, 0.02, 0.03)]
    own = Recipe().lr
    # A probe alone has no rate of fine-tuning.
    assert tried == [(f"{linear}-s0", own), *lrs, (f"{linear}-s1", own), (f"{bias}-s1", 0.02)]
    table = [(row["seed"], row["lr"], row["chosen"], row["val_robust"]) for row in rows(folder)][1:]
    robust = [str(6 / 12), str(9 / 12), str(6 / 12)]
    assert table[:3] == [
        ("0", lr, str(lr == "0.02"), r) for lr, r in zip(("0.01", "0.02", "0.03"), robust, strict=True)
    ]
    assert table[4] == ("1", "0.02", "True", "0.75")
    said = capsys.readouterr().out
    assert "0.02 of 3" in said and "75.0 +- 0.0" in said
    page = (folder / "compare.html").read_text()
    assert "0.02 of 3" in page and "No learning rate was chosen for linear:" in page
    # It is all there: nothing runs again, and the saved comparison reads the same.
    del tried[:]
    assert command(compare.main, ["--resume", str(folder)]) == 0
    assert tried == []


def test_a_better_rate_that_comes_later_leaves_seeds_with_another_out_of_the_mean(
    images: Path, tmp_path: Path, tried: list[tuple[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "grid"
    assert command(compare.main, rates(images, folder, "0.01", "0.03", seeds=2)) == 0
    # Two that validate alike: the first.
    assert tried[-1] == ("ranli-bias-shades-none-s1", 0.01)
    assert command(compare.main, rates(images, folder, "0.01", "0.02")) == 0
    chosen = [(row["seed"], row["lr"]) for row in rows(folder) if row["chosen"] == "True"]
    assert chosen == [("0", "0.03"), ("1", "0.03"), ("0", "0.02")]
    assert f"left out: {RANLI.replace('s0', 's1')}: trained with lr 0.01, 0.02 is chosen now" in capsys.readouterr().out
    assert "Left out" in (folder / "compare.html").read_text()
    # Its own run is not thrown away without a word.
    code, what, cure = refused(capsys, *rates(images, folder, "0.01", "0.02", seeds=2))
    assert (code, "lr 0.01, and 0.02 is chosen" in what, "remove that folder" in cure) == (2, True, True), what
    shutil.rmtree(folder / "ranli-bias-shades-none-s1")
    assert command(compare.main, rates(images, folder, "0.01", "0.02", seeds=2)) == 0
    assert tried[-1] == ("ranli-bias-shades-none-s1", 0.02)


def test_a_run_at_another_rate_is_no_first_stage(grid: Path, tmp_path: Path) -> None:
    """What counts is the rate in the folder, not the one its cell would have today."""
    whole = comparison.read(grid)
    (ranli,) = (cell for cell in whole if cell.strategy == "ranli-bias")
    recipe, folder = whole.recipe(ranli), tmp_path / "behind"
    folder.mkdir()
    other = replace(recipe, lr=2 * recipe.lr)
    assert comparison_probe.begin_behind(folder, other, [whole.path(ranli)]) is None
    assert list(folder.iterdir()) == []
    assert comparison_probe.begin_behind(folder, recipe, [whole.path(ranli)]) == whole.path(ranli)


def test_a_choice_of_rates_is_made_from_the_start_or_not_at_all(
    images: Path, tmp_path: Path, tried: list[tuple[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    assert command(compare.main, asked(images, before, "ranli-bias")) == 0
    assert command(compare.main, rates(images, after, "0.01", "0.02")) == 0
    number = len(tried)
    for flags, said in (
        (rates(images, before, "0.01", "0.02"), "ranli-bias with --lrs"),
        (asked(images, after, "ranli-bias", seeds=2), "ranli-bias without --lrs"),
    ):
        code, what, cure = refused(capsys, *flags)
        assert (code, said in what, "--out OTHER" in cure, len(tried)) == (2, True, True, number)
    # A probe has no rate to choose.
    assert command(compare.main, asked(images, after, "linear", seeds=2)) == 0


def test_rates_that_join_later_are_tried_before_another_seed_wants_the_best(
    images: Path, tmp_path: Path, tried: list[tuple[str, float]]
) -> None:
    folder = tmp_path / "grid"
    assert command(compare.main, rates(images, folder, "0.01", "0.03")) == 0
    # Both were asked for, and nothing was run, as when it is killed at once.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison_cells, "run_here", lambda *args: None)
        assert command(compare.main, rates(images, folder, "0.01", "0.03", seeds=2)) == 0
        assert command(compare.main, rates(images, folder, "0.01", "0.02")) == 0
    assert command(compare.main, ["--resume", str(folder)]) == 0
    assert tried[-2:] == [("ranli-bias-shades-none-s0-lr0.02", 0.02), ("ranli-bias-shades-none-s1", 0.02)]


def test_results_outlive_the_checkpoints_they_came_from(
    images: Path, tmp_path: Path, grid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "grid"
    shutil.copytree(grid, folder)
    before = rows(folder)
    for step in folder.glob("*/step-*"):
        shutil.rmtree(step)
    assert command(compare.main, [str(folder)]) == 0
    assert rows(folder) == before and before[2]["val_robust"]


@pytest.mark.parametrize(
    ("lrs", "others", "said"),
    [
        ((), (), "undertrained"),
        (("0.01", "0.02"), ("0.01", "0.02"), "of 2 undertrained"),
        (("0.01", "0.02", "0.03"), ("0.01", "0.02", "0.03"), "of 3"),
        (("0.01", "0.02", "0.03"), ("0.01", "0.02", "0.04"), "of 3 undertrained"),
    ],
)
def test_a_row_says_whether_its_rate_was_chosen_as_its_counterparts(
    images: Path, tmp_path: Path, tried: list[tuple[str, float]], capsys: Any, lrs: Any, others: Any, said: str
) -> None:
    folder = tmp_path / "grid"
    for strategy, own in (("ranli-bias", lrs), ("roli-bias", others), ("linear", ())):
        assert command(compare.main, [*asked(images, folder, strategy), *(["--lrs", *own] if own else [])]) == 0
    whole = comparison.read(folder)
    ranli, roli, linear = table_rows(whole, groups(collect(whole)))
    assert ranli["lr"].partition(" ")[2] == roli["lr"].partition(" ")[2] == said
    assert linear["lr"] == "0.03"


def test_the_curves_are_those_of_the_chosen_rate(images: Path, tmp_path: Path, tried: list[tuple[str, float]]) -> None:
    folder = tmp_path / "grid"
    assert command(compare.main, rates(images, folder, "0.01", "0.02")) == 0
    whole = comparison.read(folder)
    panels = comparison_page._panels(whole, groups(collect(whole)))
    (figure,) = comparison_page._curves(whole, panels, collect(whole))
    assert isinstance(figure, Figure) and figure.table
    (row,) = (row for row in figure.table.rows if row[0] == "ranli-bias")
    assert row[1] == "75.0 %", row


def test_a_rate_that_fails_is_not_chosen(
    images: Path, tmp_path: Path, tried: list[tuple[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "grid"
    assert command(compare.main, rates(images, folder, "2", "0.03", seeds=2)) == 5
    assert "1 of 5 cells failed" in capsys.readouterr().err
    assert tried[-1] == ("ranli-bias-shades-none-s1", 0.03)
    found = [(row["lr"], row["failure"] != "", row["chosen"]) for row in rows(folder)]
    assert found[1:3] == [("2.0", True, "False"), ("0.03", False, "True")]


def test_a_cell_waits_for_the_rate_it_is_given(tmp_path: Path) -> None:
    def cell(seed: int, lr: Any) -> Cell:
        return Cell(strategy="ranli-bias", data="digits", weights="none", seed=seed, lr=lr)

    low, high, later = cell(0, 0.01), cell(0, 0.02), cell(1, "chosen")
    whole = Comparison(folder=tmp_path, cells=(low, high, later), settings={})
    startable = partial(comparison_cells._startable, whole)
    assert startable([later, low], []) == low
    assert startable([later], [low]) is None
    for missing in (f"{whole.name(low)}, {whole.name(high)}", whole.name(high)):
        found = comparison_cells.run_cell(whole, later)
        assert found and found.reason.startswith("its learning rate is not chosen") and missing in found.reason
        if missing != whole.name(high):
            pretend(whole, low)
    pretend(whole, high, robust=7)
    assert startable([later], []) == later
    assert whole.recipe(later).lr == 0.02
    # Written down and read again.
    whole.save()
    assert comparison.read(tmp_path).cells == whole.cells
    old = json.loads((tmp_path / "compare.json").read_text())
    old["cells"] = [each[:4] for each in old["cells"]]
    (tmp_path / "compare.json").write_text(json.dumps(old))
    assert {each.lr for each in comparison.read(tmp_path)} == {None}


def test_a_csv_of_another_version_is_left_alone(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pretended: list[str]
) -> None:
    folder = tmp_path / "grid"
    flags = asked(images, folder, "linear")
    assert command(compare.main, flags) == 0
    good = (folder / "results.csv").read_text()
    for text, said in (
        (good.replace("trainable_all", "learn_all"), "other columns than this version's (learn_all, trainable_all)"),
        (good.replace("seed,lr", "lr,seed"), "other columns than this version's (their order)"),
        ("", "other columns"),
        (good.replace(",0.1.0,", ",0.0.9,"), "has results of fastadv 0.0.9"),
    ):
        assert text != good
        (folder / "results.csv").write_text(text)
        code, what, _ = refused(capsys, *flags)
        assert (code, said in what) == (2, True), what
        assert (folder / "results.csv").read_text() == text
    # Of the same columns it may be made again from the cells.
    assert command(compare.main, [str(folder)]) == 0
    assert (folder / "results.csv").read_text() == good


def test_a_folder_of_something_else_is_left_alone(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pretended: list[str]
) -> None:
    for name in ("results.csv", "compare.html", "notes.txt"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("mine")
        for flags in (asked(images, folder, "linear"), [str(folder)]):
            assert refused(capsys, *flags)[0] == 2
        assert {path.name: path.read_text() for path in folder.iterdir()} == {name: "mine"}
    file = tmp_path / "file"
    file.write_text("mine")
    assert refused(capsys, *asked(images, file, "linear"))[0] == 2
    assert (file.read_text(), pretended) == ("mine", [])


@pytest.mark.parametrize("content", ["{", '{"format": 2}', '{"format": 1, "cells": [[1]], "settings": {}}'])
def test_a_damaged_or_newer_compare_json_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "compare.json").write_text(content)
    code, what, _ = refused(capsys, "--resume", tmp_path)
    assert (code, "compare.json" in what) == (2 if "2" in content else 4, True)


def test_help_lists_strategies_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(compare.main, ["--help"]) == 0
    said = capsys.readouterr().out
    for word in ("--strategies", "--seeds", "--jobs", "--page-only", "roli-full", "--train-steps", "--per-class"):
        assert word in said
    # What the list of settings gives as defaults is not what the digits have.
    assert "On digits, unless given: --train-steps 2, --step-size 5/255" in said and "--probe-epochs 4" in said
    assert f"usage: {compare.PROGRAM} --strategies NAME ..." in said
    assert command(compare.main, []) == 0
    said = capsys.readouterr().out
    assert "roli-full" in said and "--json" in said and "--debug" in said


def test_data_sets_with_the_same_last_name_are_kept_apart(tmp_path: Path) -> None:
    cells = [
        Cell(strategy="linear", data=data, weights="none", seed=0) for data in ("/a/pets", "/b/pets", "cifar10:/a b")
    ]
    whole = Comparison(folder=tmp_path, cells=tuple(cells), settings={})
    assert [whole.name(cell) for cell in cells] == [f"linear-{data}-none-s0" for data in ("pets", "pets-2", "cifar10")]
    hidden = Cell(strategy="linear", data="/a/../..", weights="none", seed=0)
    assert Comparison(folder=tmp_path, cells=(hidden,), settings={}).path(hidden).parent == tmp_path


def test_digits_are_smaller_than_a_recipe_and_flags_above_both() -> None:
    def cell(data: str) -> Cell:
        return Cell(strategy="roli-full", data=data, weights="robust", seed=3)

    small, large = (comparison.cell_recipe(cell(data), {}) for data in ("digits", "/flowers"))
    assert (small.train_steps, small.epochs, large.train_steps, large.epochs) == (2, 4, 7, 20)
    assert comparison.cell_recipe(cell("digits"), {"train_steps": 5}).train_steps == 5
    assert (small.seed, small.strategy, small.data) == (3, "roli-full", "digits")


def key(strategy: str, **changes: Any) -> tuple[Any, ...]:
    return comparison_probe.first_stage_key(Recipe(strategy=strategy, **changes))


def test_first_stages_are_compared_by_their_settings() -> None:
    assert key("linear") == key("roli-full") == key("roli-lora", lr=0.3, epochs=1)
    assert key("lp-full") == key("lp-bias")
    different = [
        *(key("linear"), key("lp-full"), key("ranli-full"), key("ranli-lora"), key("linear", seed=1)),
        *(key("linear", probe_epochs=3), key("linear", probe_lr=0.3), key("linear", eps=4 / 255)),
        *(key("linear", weights="standard"), key("linear", per_class=3), key("linear", label_smoothing=0.1)),
        *(key("linear", val_every=2), key("linear", precision="fp32"), key("linear", train_steps=3)),
    ]
    assert all(one != other for place, one in enumerate(different) for other in different[:place])


@pytest.mark.parametrize(
    ("loss", "equal"),
    [
        (lambda: partial(adversarial_ce, label_smoothing=0.0), True),
        (lambda: partial(clean_ce, label_smoothing=0.0), False),
        # Made anew at every call: what it does cannot be told, so that it is never shared.
        (lambda: lambda *args: adversarial_ce(*args), False),
    ],
)
def test_a_strategy_of_another_name_shares_what_is_equal(
    monkeypatch: pytest.MonkeyPatch, loss: Callable[[], Any], equal: bool
) -> None:
    def stages(recipe: Recipe) -> Any:
        """A strategy from elsewhere."""
        probe = comparison_probe.stages(Recipe(strategy="linear"))[0]
        yield Stage(name="warm-up", tuning=linear, loss=loss(), epochs=probe.epochs, lr=probe.lr, head=probe.head)

    foreign = Strategy(name="foreign", stages=stages, recipe=Recipe(), source="arXiv:0000.00000")
    monkeypatch.setitem(STRATEGIES._items, "foreign", foreign)
    assert (key("foreign") == key("linear")) == equal
    assert (key("foreign") == key("foreign")) == (loss().__class__ is partial)


def test_a_running_probe_is_waited_for(tmp_path: Path) -> None:
    names = ("linear", "roli-bias", "ranli-bias")
    cells = [Cell(strategy=name, data="digits", weights="none", seed=0) for name in names]
    whole = Comparison(folder=tmp_path, cells=tuple(cells), settings={})
    probe, behind, other = cells
    startable = partial(comparison_cells._startable, whole)
    assert startable([behind, other], []) == behind
    assert startable([behind, other], [probe]) == other
    assert startable([behind], [probe]) is None
    # As soon as its first stage stands on the disk, the others may begin.
    pretend(whole, probe)
    assert startable([behind], [probe]) == behind


def test_processes_take_turns_and_a_dead_one_is_a_failed_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slots for three cells, one of which is killed from outside, as the kernel does without memory."""
    names = ("ranli-bias", "ranli-full", "ranli-lora")
    cells = [Cell(strategy=name, data="digits", weights="none", seed=0) for name in names]
    whole = Comparison(folder=tmp_path, cells=tuple(cells), settings={})
    used: list[str] = []
    done: dict[str, Failure | None] = {}

    def start(whole: Comparison, cell: Cell, slot: dict[str, str]) -> subprocess.Popen[bytes]:
        used.append(slot["SLOT"])
        if cell.strategy == "ranli-full":
            whole.path(cell).mkdir()
            return subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
        pretend(whole, cell)
        return subprocess.Popen([sys.executable, "-c", "pass"])

    monkeypatch.setattr(comparison_cells, "_start", start)
    slots = [{"SLOT": "a"}, {"SLOT": "b"}]
    comparison_cells.run_processes(whole, cells, slots, lambda cell, failed: done.update({cell.strategy: failed}))
    assert used[:2] == ["a", "b"]
    assert {name: failed is None for name, failed in done.items()} == dict(zip(names, (True, False, True), strict=True))
    assert [bool(one.row and one.row.failure) for one in collect(whole)] == [False, True, False]
    assert "signal 9" in str(done["ranli-full"])


def test_no_process_is_left_behind_where_the_table_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [Cell(strategy=name, data="digits", weights="none", seed=0) for name in ("ranli-bias", "ranli-full")]
    whole = Comparison(folder=tmp_path, cells=tuple(cells), settings={})
    started: list[subprocess.Popen[bytes]] = []

    def start(whole: Comparison, cell: Cell, slot: dict[str, str]) -> subprocess.Popen[bytes]:
        seconds = 0 if cell.strategy == "ranli-bias" else 60
        started.append(subprocess.Popen([sys.executable, "-S", "-c", f"import time; time.sleep({seconds})"]))
        return started[-1]

    def full(cell: Cell, failed: Failure | None) -> None:
        raise CheckpointError("could not write results.csv", "free some space")

    monkeypatch.setattr(comparison_cells, "_start", start)
    try:
        with pytest.raises(CheckpointError, match="could not write"):
            comparison_cells.run_processes(whole, cells, [{}, {}], full)
        assert [process.poll() for process in started] == [0, -signal.SIGTERM]
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_a_killed_second_attempt_does_not_give_the_reason_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell(strategy="ranli-bias", data="digits", weights="none", seed=0)
    whole = Comparison(folder=tmp_path, cells=(cell,), settings={})
    whole.path(cell).mkdir()
    comparison_cells._failed(whole.path(cell), "no space", 4)

    def killed(recipe: Recipe, folder: Path, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        comparison_cells.run_cell(whole, cell)
    assert comparison_cells.failure(whole.path(cell)) is None
    comparison_cells._failed(whole.path(cell), "no space", 4)
    # A child that dies while it is still importing.
    monkeypatch.setattr(comparison_cells.sys, "executable", shutil.which("false"))
    process = comparison_cells._start(whole, cell, {})
    assert comparison_cells._outcome(whole.path(cell), process.wait()) == Failure(
        "its process ended with exit code 1, see output.txt", 1
    )


@pytest.mark.parametrize("strategy", ["twins", "autolora"])
def test_what_a_strategy_adds_beside_the_backbone_counts_as_learning(tmp_path: Path, strategy: str) -> None:
    cell = Cell(strategy=strategy, data="digits", weights="none", seed=0)
    whole = Comparison(folder=tmp_path, cells=(cell,), settings={})
    whole.path(cell).mkdir()
    (whole.path(cell) / "split.json").write_text(json.dumps({"classes": list("abc")}))
    found = comparison_cells.facts(whole, cell)
    backbone = sum(p.numel() for p in create("resnet_micro_64", 3).backbone.parameters())
    assert found["trainable_all"] - found["trainable_encoder"] == 3 * 257
    assert found["trainable_encoder"] > backbone


@pytest.mark.slow
def test_two_real_processes_end_in_the_same_bits(grid: Path, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "grid"
    assert command(compare.main, [*asked(images, folder, "linear", "roli-bias", "ranli-bias"), "--jobs", "2"]) == 0
    assert shared(folder / ROLI) == [LINEAR]
    for name in (LINEAR, ROLI, RANLI):
        assert weights(folder / name) == weights(grid / name)


def test_the_columns_are_those_that_are_promised() -> None:
    promised = "strategy data weights seed n clean clean_low clean_high robust robust_low robust_high trainable_encoder"
    promised += " trainable_all epochs train_seconds eval_seconds device version recipe_sha256 failure"
    assert set(promised.split()) <= {field.name for field in fields(Row)}
