"""Published settings: every cell of the papers' tables, what is said about the released code, and the command line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from fastadv import presets, train
from fastadv.cli import command
from fastadv.errors import SettingsError
from fastadv.recipe import Recipe
from fastadv.schedule import factor
from fastadv.strategies import load_all

# BASE_LR / WEIGHT_DECAY as the released yaml files have them, in one spelling that is not that of the module.
PAPER = """
linear         0.05/0.01   0.1/0.001    0.5/0.01     1.0/0.001    1.0/0.01
ranli-full     5e-4/0.01   5e-4/0.001   5e-4/1e-4    5e-4/0.001   5e-4/0.01
roli-full      1e-4/0.01   1e-4/0.001   1e-4/1e-4    1e-4/0.01    5e-5/0.001
ranli-lora     0.01/1e-4   0.05/0       0.001/1e-4   0.005/1e-4   0.005/1e-4
roli-lora      0.001/1e-4  0.001/1e-4   1e-4/1e-4    0.005/1e-4   0.001/0.01
ranli-adapter  0.05/0.01   0.005/1e-4   0.005/1e-4   0.05/1e-4    0.005/1e-4
roli-adapter   0.05/0.01   0.05/1e-4    5e-4/0       0.05/0.001   1e-4/1e-4
ranli-bias     0.005/0.001 0.005/0.001  0.001/0.01   0.005/0.001  0.001/1e-4
roli-bias      0.005/0.001 0.005/0.01   1e-5/0       5e-4/1e-4    5e-5/1e-4
ranli-prompt   0.5/0.001   0.5/0.01     0.05/0.001   0.05/0.001   0.05/1e-4
"""
ROWS = {line.split()[0]: line.split()[1:] for line in PAPER.strip().splitlines()}
CELLS = [(name, row, column) for row in ROWS for column, name in enumerate(presets.DATASETS)]
TRAIN = {"cifar10": 50_000, "cifar100": 50_000, "caltech256": 60 * 257, "cub": 5994, "dogs": 12_000}
EPOCHS = {"cifar10": 20, "cifar100": 20, "caltech256": 40, "cub": 60, "dogs": 40}


def cell(row: str, column: int) -> tuple[float, float]:
    rate, _, decay = ROWS[row][column].partition("/")
    return float(rate), float(decay)


@pytest.mark.parametrize(("name", "strategy", "column"), CELLS)
def test_a_cell_is_the_papers(name: str, strategy: str, column: int) -> None:
    found = presets.find(name, strategy)
    recipe = found.of(Recipe(strategy=strategy))
    rate, decay = cell(strategy, column)
    if strategy == "linear":
        assert (recipe.probe_lr, recipe.probe_weight_decay) == (rate / 4, decay)
    else:
        assert (recipe.lr, recipe.weight_decay, recipe.optimizer) == (rate / 4, decay, "adamw")
    probe_rate, probe_decay = cell("linear", column)
    assert (recipe.probe_lr, recipe.probe_weight_decay) == (probe_rate / 4, probe_decay)
    assert (recipe.probe_optimizer, recipe.probe_epochs, recipe.epochs) == ("sgd", EPOCHS[name], EPOCHS[name])
    assert round(recipe.warmup * recipe.epochs) == 10
    assert (recipe.model, recipe.batch_size, recipe.data) == ("swin_base_patch4_window7_224", 64, name)
    assert (recipe.norm, recipe.eps, recipe.train_steps, recipe.step_size) == ("linf", 8 / 255, 7, 2 / 255)
    assert recipe.adam_eps == 1e-6
    assert (recipe.eval_steps, recipe.eval_step_size, recipe.label_smoothing) == (10, 2 / 255, 0)
    # CIFAR is attacked at 32x32 and enlarged in the model, the others at 224.
    assert recipe.resize is name.startswith("cifar") and recipe.image_size is None
    assert recipe.drop_path == (0.5 if strategy.endswith("full") else 0)
    assert recipe.prompt_tokens == (20 if name == "cub" else 10)
    assert found.source.startswith("arXiv:2312.05716") and found.source.endswith(".yaml") and found.notes


@pytest.mark.parametrize(("name", "strategy", "column"), CELLS)
def test_as_released_is_what_the_code_runs(name: str, strategy: str, column: int) -> None:
    found = presets.find(name, strategy, released=True)
    recipe, decay = found.of(Recipe(strategy=strategy)), cell(strategy, column)[1]
    if strategy != "linear":
        assert (recipe.optimizer, recipe.weight_decay) == (("adamw", 0.01) if decay else ("sgd", 0))
    assert (recipe.schedule, recipe.adam_eps) == ("epoch-cosine", 1e-6)
    assert recipe.augment is not name.startswith("cifar")
    assert recipe.drop_path == (0.5 if strategy.endswith("full") else 0)
    assert recipe.lr == presets.find(name, strategy).of(Recipe()).lr
    rates = [factor(recipe.schedule, epoch * 5, recipe.epochs, 5, recipe.warmup) for epoch in range(recipe.epochs)]
    assert rates[:11] == pytest.approx([i / 10 for i in range(11)])
    # What cannot be reproduced is said.
    assert ("zeroes both" in " ".join(found.notes)) == (strategy == "roli-lora")
    assert ("adapter" in " ".join(found.notes)) == strategy.endswith("adapter")
    assert any("last iterate" in note for note in found.notes)


def test_every_setting_is_a_field_and_none_is_what_the_default_is_by_chance() -> None:
    fields = {field.name for field in dataclasses.fields(Recipe)}
    for name in presets.DATASETS:
        for strategy in ROWS:
            for released in (False, True):
                assert presets.find(name, strategy, released).settings.keys() <= fields


def test_where_the_released_code_takes_sgd_instead() -> None:
    """WEIGHT_DECAY 0: three cells."""
    having = {(n, s) for n, s, _ in CELLS if "SGD" in " ".join(presets.find(n, s).notes)}
    assert having == {("cifar100", "ranli-lora"), ("caltech256", "roli-adapter"), ("caltech256", "roli-bias")}


def test_the_listing_has_every_cell_with_its_source() -> None:
    for name in presets.DATASETS:
        said = presets.listing(name)
        for strategy in presets.strategies(name):
            found = presets.find(name, strategy)
            assert any(line.split()[:1] == [strategy] for line in said.splitlines())
            assert found.source in said and all(note in said for note in found.notes)


@pytest.mark.parametrize(
    ("argv", "error", "fix"),
    [
        (["--preset", "cifar"], "unknown preset 'cifar'", "did you mean 'cifar10'"),
        (["--strategy", "roli-full", "--preset", "imagenet"], "unknown preset 'imagenet'", "cub, dogs"),
        (
            ["--strategy", "roli-prompt", "--preset", "cub"],
            "preset cub has no published setting for roli-prompt",
            "ranli-prompt",
        ),
        (["--strategy", "roli-full", "--as-released"], "--as-released without a preset", "--preset NAME"),
        (["--preset", "cub", "--epochs", "3"], "no strategy given", "--strategy NAME --preset cub"),
        (["--strategy", "roli-full", "--preset", "cub"], "needs robust weights", "--weights ARES_Swin_base"),
        (["--strategy", "roli-full", "--preset", "cub", "--eps", "8"], "eps is 8", "did you mean 8/255?"),
        (["--resume", "x", "--preset", "cub"], "--resume x with other flags", "drop them"),
    ],
)
def test_presets_that_cannot_be_meant(
    capsys: pytest.CaptureFixture[str], argv: list[str], error: str, fix: str
) -> None:
    assert command(train.main, argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and error in lines[0] and fix in lines[1]


def test_the_help_of_a_cell_shows_its_values_and_notes(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(train.main, ["--strategy", "roli-full", "--preset", "cub", "--as-released", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert "epoch-cosine" in said and "2.5e-05" in said and "cub_roli.yaml" in said and "norms" in said


def cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10's layout with 4 images of 2 classes a file; torchvision's md5 sums are replaced by ours."""
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    random = np.random.RandomState(0)

    def dump(name: str, content: dict[str, Any]) -> str:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for listing in ("train_list", "test_list"):
        sums = [
            [name, dump(name, {"data": random.randint(0, 256, (4, 3072)).astype(np.uint8), "labels": [0, 1, 0, 1]})]
            for name, _ in getattr(CIFAR10, listing)
        ]
        monkeypatch.setattr(CIFAR10, listing, sums)
    meta = dict(CIFAR10.meta)
    meta["md5"] = dump(meta["filename"], {meta["key"]: ["plane", "car"]})
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return root


SMALL = ["--model", "swin_micro_64", "--epochs", "1", "--probe-epochs", "1", "--train-steps", "1", "--eval-steps", "1"]


@pytest.mark.parametrize(
    ("name", "lr", "decay", "frozen"), [("cifar10", 3e-3, 1e-5, 1), ("caltech256", 3e-3, 1e-3, 0.4)]
)
def test_twins_has_the_two_published_cells(name: str, lr: float, decay: float, frozen: float) -> None:
    chosen = load_all()["twins"]
    found = presets.find(name, "twins")
    recipe = found.of(dataclasses.replace(chosen.recipe, strategy="twins"))
    assert (recipe.lr, recipe.weight_decay, recipe.frozen_weight) == (lr, decay, frozen)
    assert (recipe.optimizer, recipe.batch_size, recipe.epochs, recipe.schedule) == ("sgd", 128, 60, "drops")
    assert (recipe.model, recipe.train_steps, recipe.resize) == ("resnet50", 10, name == "cifar10")
    (stage,) = chosen.stages(recipe)
    assert (stage.lr, stage.epochs, stage.optimizer) == (lr, 60, "sgd")
    assert "frozen_weight" in {field.name for field in dataclasses.fields(recipe)}


def test_autolora_has_one_setting_for_all() -> None:
    chosen = load_all()["autolora"]
    for name in presets.DATASETS:
        recipe = presets.find(name, "autolora").of(dataclasses.replace(chosen.recipe, strategy="autolora"))
        assert (recipe.lr, recipe.weight_decay, recipe.batch_size, recipe.epochs) == (0.01, 1e-4, 128, 60)
        assert (recipe.model, recipe.optimizer, recipe.train_steps) == ("resnet50", "sgd", 10)
        # 5 % of the training images.
        assert abs(recipe.val_images - TRAIN[name] / 20) <= 1
        (stage,) = chosen.stages(recipe)
        assert stage.pace is not None and stage.pace([]).factor == 1


@pytest.mark.parametrize("strategy", ["twins", "autolora"])
def test_what_a_run_does_otherwise_than_the_released_code_is_said(strategy: str) -> None:
    for name in ("cifar10", "caltech256"):
        said = " ".join(presets.find(name, strategy).notes)
        for word in ("norms and biases do not decay", "starts at a random point", "selects on the test images"):
            assert word in said
        assert ("natural branch" in said) == (strategy == "autolora")
        assert ("are of 24" in said) == ((name, strategy) == ("caltech256", "autolora"))


def test_every_published_strategy_exists() -> None:
    for name in presets.DATASETS:
        assert set(presets.strategies(name)) <= set(load_all())


@pytest.mark.parametrize("strategy", ["twins", "autolora"])
def test_as_released_is_about_roli_alone(strategy: str) -> None:
    with pytest.raises(SettingsError, match="--as-released with --strategy"):
        presets.find("cifar10", strategy, released=True)


def test_every_flag_overrides_a_field_of_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Recipe] = []
    monkeypatch.setattr(train, "train", lambda recipe, folder, **others: asked.append(recipe))
    argv = [
        "--strategy",
        "roli-full",
        "--preset",
        "cifar10",
        *SMALL,
        "--lr",
        "0.5",
        "--no-resize",
        "--schedule",
        "drops",
    ]
    assert command(train.main, argv) == 0
    plain = presets.find("cifar10", "roli-full").of(Recipe(strategy="roli-full"))
    changed = {"model": "swin_micro_64", "epochs": 1, "probe_epochs": 1, "train_steps": 1, "eval_steps": 1}
    assert asked == [dataclasses.replace(plain, **changed, lr=0.5, resize=False, schedule="drops")]


def test_a_preset_trains_and_says_what_the_released_code_does_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = f"cifar10:{cifar(tmp_path, monkeypatch)}", tmp_path / "run"
    argv = ["--strategy", "roli-full", "--preset", "cifar10", "--as-released", "--data", data, *SMALL]
    argv += ["--val-images", "2", "--per-class", "1", "--batch-size", "2", "--precision", "fp32", "--out", str(out)]
    assert command(train.main, argv) == 0
    saved = json.loads((out / "recipe.json").read_text())
    assert (saved["model"], saved["epochs"], saved["batch_size"], saved["data"]) == ("swin_micro_64", 1, 2, data)
    # What no flag named is the preset's.
    assert (saved["lr"], saved["probe_lr"], saved["resize"], saved["drop_path"]) == (2.5e-5, 0.0125, True, 0.5)
    assert (saved["schedule"], saved["augment"], saved["probe_optimizer"]) == ("epoch-cosine", False, "sgd")
    said = capsys.readouterr()
    preset = presets.find("cifar10", "roli-full", released=True)
    assert all(line in said.out + said.err for line in (preset.source, *preset.notes))
