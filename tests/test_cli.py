"""The command line: two lines for every refusal, the promised exit codes, and help that lists the strategies."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastadv import assemble, evaluate, models, pretrain, train
from fastadv.checkpoint import CheckpointWarning, save, steps
from fastadv.cli import command, parse
from fastadv.data import ImageSet
from fastadv.errors import CheckpointError, DataError, NumericalError, SettingsError
from fastadv.recipe import Recipe

TINY = [
    *("--weights", "none", "--per-class", "5", "--val-images", "20", "--train-steps", "1", "--eval-steps", "1"),
    *("--epochs", "1", "--probe-epochs", "1", "--batch-size", "16", "--precision", "fp32"),
]


def refused(
    capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], Any], *argv: str | Path
) -> tuple[int, str, str]:
    """Exit code, error and fix of a refusal; asserts that these two lines are all that was said."""
    code = command(main, [str(arg) for arg in argv])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2, lines
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("fix: ")
    return code, lines[0].removeprefix("error: "), lines[1].removeprefix("fix: ")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run of `linear`."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert command(train.main, ["--strategy", "linear", *TINY, "--out", str(folder), "--json"]) == 0
    return folder


@pytest.mark.parametrize(
    ("flags", "error", "fix"),
    [
        (["--strategy", "roli-ful"], "unknown strategy 'roli-ful'", "did you mean 'roli-full'?"),
        (["--strategy", "linear", "--eps", "8"], "eps is 8", "did you mean 8/255?"),
        (["--strategy", "linear", "--eps", "nan"], "eps is nan", ""),
        (["--strategy", "linear", "--eps", "-1/255"], "eps is -0.00392157", ""),
        (["--strategy", "linear", "--eps", "8/0"], "--eps", "--help"),
        (["--strategy", "linear", "--train-steps", "-1"], "train_steps is -1", "--train-steps"),
        (["--strategy", "linear", "--eval-step-size", "-1"], "eval_step_size is -1", "--eval-step-size"),
        (["--strategy", "linear", "--step-size", "2"], "step_size is 2", "did you mean 2/255?"),
        (["--strategy", "linear", "--data"], "--data has no value", "--data VALUE"),
        (["--strategy"], "--strategy has no value", "--strategy VALUE"),
        (["--strategy", "linear", "--lrr", "1"], "Unrecognized options: --lrr", "did you mean --lr"),
        (["--strategy", "linear", "--norm", "l3"], "invalid choice 'l3'", "--help"),
        (["--strategy", "linear", "--epochs", "x"], "--epochs", "--help"),
        (["--strategy", "linear", "--model", "swin_micro_46"], "unknown model 'swin_micro_46'", "swin_micro_64"),
        (["--strategy", "linear", "--weights", "nowhere.pth"], "no weights at 'nowhere.pth'", "--weights"),
        (["--strategy", "linear", "--device", "cuda:99"], "device is 'cuda:99'", "--device cpu"),
        (["--strategy", "linear", "--device", "meta"], "device is 'meta'", "--device cpu"),
        (["--resume", "nowhere"], "no run in nowhere", "recipe.json"),
        (["--strategy", "linear", "--beta", "3"], "beta is 3.0 with loss at", "--loss trades"),
        (["--strategy", "linear", "--norm", "l2"], "norm is l2 without a radius", "--eps 0.5"),
        # Told before there is a run folder.
        (
            ["--strategy", "ranli-prompt", "--model", "resnet_micro_64", "--weights", "none"],
            "resnet_micro_64 has no transformer blocks",
            "--model with a Swin or ViT",
        ),
        (["--epochs", "3"], "no strategy given", "--strategy"),
        (["--stategy", "roli-full"], "unknown option --stategy", "did you mean --strategy?"),
        (["--strategies=roli-full"], "unknown option --strategies", "did you mean --strategy?"),
    ],
)
def test_settings_that_cannot_be_meant_exit_with_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: list[str], error: str, fix: str
) -> None:
    out = [] if "--resume" in flags else ["--out", str(tmp_path / "run")]
    code, what, cure = refused(capsys, train.main, *flags, *out)
    assert code == 2
    assert error in what
    assert fix in cure
    assert not (tmp_path / "run").exists()


def test_steps_that_do_not_reach_the_radius_are_told() -> None:
    splits = assemble.splits(Recipe(data="digits", per_class=3, val_images=10))
    said = [
        line
        for eps in (8 / 255, 16 / 255, 32 / 255)
        for line in train.describe(Recipe(data="digits", eps=eps), splits, "cpu")
        if "of the radius" in line
    ]
    # Seven steps of 2/255 in training, ten in the test.
    assert said == [
        "the training attack's steps reach 88% of the radius: --step-size is small",
        "the training attack's steps reach 44% of the radius: --step-size is small",
        "the test attack's steps reach 62% of the radius: --eval-step-size is small",
    ]


def test_data_that_cannot_be_used_exit_with_3(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--strategy", "linear", *TINY, "--out", tmp_path / "run"]
    code, what, _ = refused(capsys, train.main, *flags, "--data", tmp_path / "nowhere")
    assert (code, "nowhere" in what) == (3, True)
    np.savez(tmp_path / "train.npz", images=np.zeros((40, 64, 64, 3), np.uint8), labels=np.arange(40) % 2)
    np.savez(tmp_path / "test.npz", images=np.zeros((40, 64, 64, 3), np.uint8), labels=np.arange(40) / 2)
    code, what, _ = refused(capsys, train.main, *flags, "--data", tmp_path)
    assert (code, "labels" in what) == (3, True)


def test_images_of_a_size_the_model_does_not_take_name_the_flag(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["--strategy", "linear", *TINY, "--image-size", "32", "--out", tmp_path / "run"]
    code, what, cure = refused(capsys, train.main, *flags)
    assert code == 2
    assert "32" in what
    assert "--image-size 64" in cure or "--resize" in cure


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"<!DOCTYPE html><html></html>", "HTML"), (b"", "empty"), (b"\x80\x04junk", "w.pth")],
)
def test_weights_that_are_none_exit_with_4(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, said: str
) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    flags = ["--strategy", "linear", *TINY, "--weights", tmp_path / "w.pth", "--out", tmp_path / "run"]
    code, what, _ = refused(capsys, train.main, *flags)
    assert (code, said in what) == (4, True)
    assert not (tmp_path / "run").exists()


def test_an_existing_run_folder_is_left_alone(capsys: pytest.CaptureFixture[str], finished: Path) -> None:
    before = sorted(finished.rglob("*"))
    code, what, cure = refused(capsys, train.main, "--strategy", "linear", *TINY, "--out", finished)
    assert code == 2
    assert "exists already" in what
    assert f"--resume {finished}" in cure
    assert sorted(finished.rglob("*")) == before


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SettingsError("a", "b"), 2),
        (DataError("a", "b"), 3),
        (CheckpointError("a", "b"), 4),
        (NumericalError("a", "b"), 5),
        (torch.OutOfMemoryError("CUDA out of memory"), 6),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 6),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."), 6),
        (MemoryError(), 6),
        (OSError(errno.ENOSPC, "No space left on device", "report.json"), 4),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(capsys: pytest.CaptureFixture[str], error: BaseException, code: int) -> None:
    def main(argv: list[str]) -> None:
        raise error

    assert refused(capsys, main)[0] == code


JSON = "from fastadv.cli import command; command(lambda argv: {'a': 1}, ['--json'])"


@pytest.mark.parametrize(
    "argv",
    [
        ["-m", "fastadv.train"],
        ["-m", "fastadv.train", "--strategy", "linear", "--help"],
        ["-c", f"import sys; {JSON.replace('command(lambda', 'sys.exit(command(lambda')})"],
    ],
)
def test_a_reader_that_has_seen_enough_ends_the_command_quietly(argv: list[str]) -> None:
    source, sink = os.pipe()
    os.close(source)
    try:
        run = subprocess.run([sys.executable, *argv], stdout=sink, stderr=subprocess.PIPE, check=False, timeout=120)
    finally:
        os.close(sink)
    assert (run.returncode, run.stderr) == (141, b"")


def test_debug_shows_the_traceback() -> None:
    def main(argv: list[str]) -> None:
        raise SettingsError("a", "b")

    with pytest.raises(SettingsError):
        command(main, ["--debug"])


def test_a_fault_of_ours_is_not_dressed_up() -> None:
    def main(argv: list[str]) -> None:
        raise AssertionError("ours")

    with pytest.raises(AssertionError):
        command(main, [])


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_bare_help_lists_every_strategy_with_a_line(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert command(train.main, argv) == 0
    said = capsys.readouterr().out
    for name in ("linear", "ranli-full", "roli-full", "pretrain-adversarial"):
        assert any(line.split()[:1] == [name] and len(line.split()) > 4 for line in said.splitlines()), name
    for flag in ("--out", "--resume", "--preset", "--as-released", "--json", "--debug"):
        assert flag in said


def test_the_help_of_a_strategy_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(train.main, ["--strategy", "roli-full", "--help"]) == 0
    said = capsys.readouterr().out
    for field in dataclasses.fields(Recipe):
        assert f"--{field.name.replace('_', '-')}" in said
    assert "8/255" in said


def test_flags_override_single_fields_of_the_strategys_recipe() -> None:
    found = parse(Recipe, Recipe(lr=0.5), ["--eps", "4/255", "--no-augment"], "x", "y")
    assert (found.eps, found.lr, found.augment) == (4 / 255, 0.5, False)


def test_evaluate_repeats_the_table_from_the_folder_alone(capsys: pytest.CaptureFixture[str], finished: Path) -> None:
    saved = json.loads((finished / "report.json").read_text())["reports"][0]
    assert command(evaluate.main, [str(finished), "--json"]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])["reports"][0]
    assert {**again, "seconds": 0} == {**saved, "seconds": 0}


def test_evaluate_gives_one_row_for_each_eps_and_falls_with_it(
    capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    assert command(evaluate.main, [str(finished), "--eps", "0,4/255,1", "--images", "60", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["reports"]
    assert [row["eps"] for row in rows] == [0, 4 / 255, 1]
    assert rows[0]["robust"] == rows[0]["clean"] >= rows[1]["robust"] >= rows[2]["robust"]
    assert {row["n"] for row in rows} == {60}


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        ([], 2, "no run given"),
        (["nowhere"], 2, "no run in nowhere"),
        (["RUN", "--eps", "eight"], 2, "eps is 'eight'"),
        (["RUN", "--eps", "8"], 2, "eps is 8"),
        (["RUN", "--images", "-3"], 2, "images is -3"),
        (["RUN", "--data", "nowhere"], 3, "nowhere"),
    ],
)
def test_evaluate_refuses(
    capsys: pytest.CaptureFixture[str], finished: Path, argv: list[str], code: int, said: str
) -> None:
    found, what, _ = refused(capsys, evaluate.main, *[str(finished) if arg == "RUN" else arg for arg in argv])
    assert (found, said in what) == (code, True)


def test_evaluate_takes_zero_steps_at_its_word(capsys: pytest.CaptureFixture[str], finished: Path) -> None:
    assert command(evaluate.main, [str(finished), "--eval-steps", "0", "--images", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["reports"][0]["attack"] == "PGD-0"


def test_evaluate_skips_what_the_run_skipped(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished / "best", folder / "best")
    saved = json.loads((finished / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps(saved | {"on_bad_image": "skip"}))
    asked = []

    def test_images(recipe: Recipe) -> None:
        asked.append(recipe.on_bad_image)
        raise DataError("a", "b")

    monkeypatch.setattr(assemble, "test_images", test_images)
    for run in (folder, finished):
        assert refused(capsys, evaluate.main, run)[0] == 3
    assert asked == ["skip", "fail"]


def test_a_name_of_ours_is_no_path_whatever_lies_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "cifar10", "robust", "flowers"):
        (tmp_path / name).mkdir()
    assert [train.absolute(name) for name in ("digits", "cifar10", "robust")] == ["digits", "cifar10", "robust"]
    assert train.absolute("flowers") == str(tmp_path / "flowers")
    assert train.absolute("cifar10:flowers") == f"cifar10:{tmp_path / 'flowers'}"


def test_a_damaged_recipe_exits_with_4(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text('{"strategy": "lin')
    for main, argv in ((train.main, ["--resume", tmp_path]), (evaluate.main, [tmp_path])):
        code, what, _ = refused(capsys, main, *argv)
        assert (code, "recipe.json is not a recipe" in what) == (4, True)


def test_a_finished_run_resumes_to_its_result(capsys: pytest.CaptureFixture[str], finished: Path) -> None:
    before = json.loads((finished / "report.json").read_text())["reports"][0]
    weights = (finished / "best" / "model.safetensors").read_bytes()
    assert command(train.main, ["--resume", str(finished)]) == 0
    after = json.loads((finished / "report.json").read_text())["reports"][0]
    assert {**after, "seconds": 0} == {**before, "seconds": 0}
    assert (finished / "best" / "model.safetensors").read_bytes() == weights
    assert refused(capsys, train.main, "--resume", finished, "--epochs", "3")[0] == 2


def test_a_damaged_newest_checkpoint_is_passed_over(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flags = ["--strategy", "roli-full", *TINY, "--out", str(folder)]
    assert command(train.main, flags) == 0
    weights = (folder / "best" / "model.safetensors").read_bytes()
    file = steps(folder)[-1] / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.warns(CheckpointWarning, match="sha256 differs"):
        assert command(train.main, ["--resume", str(folder)]) == 0
    assert (folder / "best" / "model.safetensors").read_bytes() == weights
    for checkpoint in steps(folder):
        (checkpoint / "manifest.json").write_text("{")
    with pytest.warns(CheckpointWarning):
        code, what, _ = refused(capsys, train.main, "--resume", folder)
    assert (code, "no valid checkpoint" in what) == (4, True)


def test_changed_data_are_not_resumed_on(capsys: pytest.CaptureFixture[str], finished: Path) -> None:
    split = finished / "split.json"
    kept = split.read_text()
    split.write_text(json.dumps(json.loads(kept) | {"train": "0" * 16}))
    code, what, _ = refused(capsys, train.main, "--resume", finished)
    split.write_text(kept)
    assert (code, "are not those" in what) == (2, True)


def test_pretrain_writes_rounded_weights_and_a_card_about_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = [*TINY[:-8], "--epochs", "1", "--batch-size", "16", "--precision", "fp32", "--data", "digits"]
    out = tmp_path / "run"
    assert command(pretrain.main, ["--objective", "standard", *flags, "--out", str(out), "--json"]) == 0
    card = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((out / "card.json").read_text()) == card
    assert card["test"]["n"] == 400
    # The file is a valid start for another task.
    again = ["--strategy", "linear", *TINY[2:], "--weights", str(out / "weights.safetensors")]
    assert command(train.main, [*again, "--out", str(tmp_path / "next")]) == 0
    code, what, _ = refused(capsys, pretrain.main, "--objective", "adverse")
    assert (code, "adverse" in what) == (2, True)


def test_counters_are_not_rounded_in_exported_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(strategy="pretrain-standard", model="resnet18", weights="none", image_size=32, eval_steps=1)
    model = models.create("resnet18", 10, image_size=32)
    # More than float16 can count to.
    model.backbone.bn1.num_batches_tracked.fill_(100_001)
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    save(tmp_path / "best", {"model.safetensors": model.state_dict()}, {})
    images = ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), tuple("abcdefghij"))
    monkeypatch.setattr(assemble, "test_images", lambda recipe: images)
    pretrain.export(tmp_path)
    again = models.create("resnet18", 10, image_size=32)
    models.load_backbone(again, str(tmp_path / "weights.safetensors"))
    assert again.backbone.bn1.num_batches_tracked.item() == 100_001
    assert torch.equal(again.backbone.conv1.weight, model.backbone.conv1.weight.half().float())


def test_the_package_imports_lightly_and_from_anywhere(tmp_path: Path) -> None:
    code = (
        "import sys, fastadv.train, fastadv.cli; assert 'torch' not in sys.modules\n"
        "from fastadv.pgd import PGD, pgd; assert 'triton' not in sys.modules and 'tyro' not in sys.modules\n"
        "import fastadv.pgd; assert fastadv.pgd.PGD is PGD"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)


def test_the_papers_verdict_stands_beside_the_strict_one(capsys: pytest.CaptureFixture[str], finished: Path) -> None:
    assert command(evaluate.main, [str(finished), "--verdict", "last", "--images", "60", "--json"]) == 0
    worst, last = json.loads(capsys.readouterr().out.splitlines()[-1])["reports"]
    assert (worst["verdict"], last["verdict"]) == ("worst", "last")
    assert worst["robust"] <= last["robust"] <= worst["clean"]


def test_evaluate_wants_the_classes_of_the_run(
    capsys: pytest.CaptureFixture[str], finished: Path, tmp_path: Path
) -> None:
    rows = np.zeros((40, 64, 64, 3), np.uint8)
    for name in ("train", "test"):
        np.savez(tmp_path / f"{name}.npz", images=rows, labels=np.arange(40) % 10, classes=[f"c{i}" for i in range(10)])
    code, what, _ = refused(capsys, evaluate.main, finished, "--data", tmp_path)
    assert (code, "does not have the run's 10 classes" in what) == (3, True)


def test_the_best_so_far_of_an_unfinished_run_is_told(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    argv = [str(run), "--images", "4", "--no-page"]
    assert command(evaluate.main, argv) == 0
    for path in run.glob("step-*/manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["meta"]["stage"] = 0
        path.write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match=f"run in {run} is not finished: its best epoch so far is evaluated"):
        assert command(evaluate.main, argv) == 0


def test_an_unfinished_run_is_not_called_damaged(capsys: pytest.CaptureFixture[str], finished: Path) -> None:
    best, away = finished / "best", finished / "away"
    best.rename(away)
    code, what, cure = refused(capsys, evaluate.main, finished)
    away.rename(best)
    assert (code, "is not finished" in what, f"--resume {finished}" in cure) == (2, True, True)
