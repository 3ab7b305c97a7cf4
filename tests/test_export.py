"""An exported run is found by RobustBench's rule, gives the run's own logits, and says which pixels are attacked."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from fastadv import checkpoint, models
from fastadv.cli import command
from fastadv.errors import CheckpointError, SettingsError
from fastadv.export import main, robustbench
from fastadv.recipe import Recipe
from fastadv.tuning import adapter, lora

RECIPE = Recipe(strategy="roli-full", data="cifar10:/secret/place", weights="none")


def finished(folder: Path, recipe: Recipe = RECIPE, classes: int = 10, model: nn.Module | None = None) -> Path:
    """A run folder as far as an export reads it."""
    folder.mkdir()
    (folder / "recipe.json").write_text(recipe.to_json())
    model = model or models.create(recipe.model, classes, image_size=None if recipe.resize else recipe.image_size)
    checkpoint.save(folder / "best", {"model.safetensors": model.state_dict()}, {})
    (folder / "report.json").write_text(json.dumps({"reports": [{"n": 100, "clean": 0.5}]}))
    return folder


def found(folder: Path, name: str, dataset: str, threat: str) -> nn.Module:
    """RobustBench's way to a model, from utils.py of version 1.1.1: its rule for names, and its call of timm."""
    stem = f"{name.lower().replace('-', '_')}_{dataset.lower()}_{threat.lower()}"
    sys.path.insert(0, str(folder))
    try:
        importlib.import_module(stem)
    finally:
        sys.path.remove(str(folder))
    assert timm.is_model(stem)
    return timm.create_model(stem, num_classes=10, pretrained=True, checkpoint_path="").eval()


def answers(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def test_robustbenchs_rule_finds_the_run_and_its_logits(tmp_path: Path) -> None:
    given = models.create("swin_micro_64", 10, resize=True)
    run = finished(tmp_path / "RoLI-demo", model=given)
    robustbench(run, tmp_path / "out")
    model, x = found(tmp_path / "out", "RoLI-demo", "cifar10", "Linf"), torch.rand(3, 3, 32, 32)
    assert torch.equal(answers(model, x), answers(given, x))
    assert not model.training
    with pytest.raises(ValueError, match="has 10 classes, not 100"):
        timm.create_model("roli_demo_cifar10_linf", num_classes=100)


@pytest.mark.parametrize(
    ("name", "side"), [("resnet10t", None), ("resnet_micro_64", None), ("vit_tiny_patch16_224", 64)]
)
def test_timms_models_are_built_by_their_names(tmp_path: Path, name: str, side: int | None) -> None:
    recipe = dataclasses.replace(RECIPE, model=name, image_size=side, norm="l2", eps=0.5)
    given = models.create(name, 10, image_size=side)
    robustbench(finished(tmp_path / "run", recipe, model=given), tmp_path / "out", f"Else-{name}")
    model, x = (
        found(tmp_path / "out", f"Else-{name}", "cifar10", "L2"),
        torch.rand(1, 3, given.input_size, given.input_size),
    )
    assert torch.equal(answers(model, x), answers(given, x))


def test_a_custom_checkpoint_goes_before_the_weights_beside_it(tmp_path: Path) -> None:
    robustbench(finished(tmp_path / "run"), tmp_path / "out", "one")
    found(tmp_path / "out", "one", "cifar10", "Linf")
    other, file = models.create("swin_micro_64", 10, resize=True), tmp_path / "w.pth"
    torch.save(other.state_dict(), file)
    model = timm.create_model("one_cifar10_linf", num_classes=10, pretrained=True, checkpoint_path=str(file))
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(answers(model, x), answers(other, x))


@pytest.mark.slow
def test_the_exported_file_does_not_need_this_package(tmp_path: Path) -> None:
    robustbench(finished(tmp_path / "run"), tmp_path / "out", "alone")
    code = (
        "import sys; sys.modules['fastadv'] = None; import timm, torch, alone_cifar10_linf; "
        "m = timm.create_model('alone_cifar10_linf', pretrained=True).eval(); print(m(torch.rand(1, 3, 32, 32)).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "out", capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "torch.Size([1, 10])", done.stderr


@pytest.mark.parametrize(
    ("changes", "dataset", "words"),
    [
        ({"resize": True}, None, ["at 32x32, and this model was trained and attacked at 32x32: the same pixels"]),
        ({}, None, ["was trained and attacked at 64x64 after resizing", "not to be compared"]),
        ({"eps": 4 / 255}, None, ["The run's radius is 4/255, the leaderboard's 8/255."]),
        ({"data": "some/folder", "eps": 4 / 255}, "imagenet", ["attacks imagenet at 64x64", "the same pixels."]),
    ],
)
def test_the_note_says_which_pixels_are_attacked(
    tmp_path: Path, changes: dict[str, object], dataset: str | None, words: list[str]
) -> None:
    recipe = dataclasses.replace(RECIPE, **changes)
    run = finished(tmp_path / "run", recipe, classes=1000 if dataset else 10)
    card = robustbench(run, tmp_path / "out", dataset=dataset)
    file = tmp_path / "out" / "model_info" / card["dataset"] / "Linf" / "run.json"
    texts = [card["footnote"], (tmp_path / "out" / "README.md").read_text(), json.loads(file.read_text())["footnote"]]
    assert all(word in text for word in words for text in texts)
    assert card["fastadv"]["resize_inside_the_attack"] is recipe.resize


def test_the_card_has_robustbenchs_fields_and_no_folders_of_this_machine(tmp_path: Path) -> None:
    card = robustbench(finished(tmp_path / "run"), tmp_path / "out")
    known = {
        "name",
        "additional_data",
        "number_forward_passes",
        "dataset",
        "architecture",
        "eps",
        "footnote",
        "fastadv",
    }
    assert set(card) == known
    assert (card["dataset"], card["eps"], card["additional_data"]) == ("cifar10", "8/255", False)
    assert card["fastadv"]["reports"] == [{"n": 100, "clean": 0.5}]
    for file in (tmp_path / "out").rglob("*.*"):
        assert b"/secret/place" not in file.read_bytes()
        assert str(tmp_path).encode() not in file.read_bytes()


def test_lora_is_merged_and_adapters_are_refused(tmp_path: Path) -> None:
    given = models.create("swin_micro_64", 10, resize=True)
    lora(given)
    torch.manual_seed(1)
    for name, parameter in given.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    run = finished(tmp_path / "low", dataclasses.replace(RECIPE, strategy="roli-lora"), model=given)
    robustbench(run, tmp_path / "out")
    x = torch.rand(2, 3, 32, 32)
    theirs = answers(found(tmp_path / "out", "low", "cifar10", "Linf"), x)
    torch.testing.assert_close(theirs, answers(given, x), rtol=1e-4, atol=1e-5)
    added = models.create("swin_micro_64", 10)
    adapter(added)
    run = finished(tmp_path / "more", dataclasses.replace(RECIPE, strategy="roli-adapter"), model=added)
    with pytest.raises(CheckpointError, match="roli-adapter adds modules that timm does not have"):
        robustbench(run, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_robustbench_cannot_load_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run, out = finished(tmp_path / "run"), tmp_path / "out"
    digits = finished(tmp_path / "digits", dataclasses.replace(RECIPE, data="digits"))
    refusals: list[tuple[str, Path, dict[str, str]]] = [
        ("RobustBench has no data 'digits'", digits, {}),
        ("the run has 10 classes, cifar100 100", digits, {"dataset": "cifar100"}),
        (r"cannot be called 'a\.b'", run, {"name": "a.b"}),
        ("no run in", tmp_path, {}),
    ]
    for message, folder, options in refusals:
        with pytest.raises(SettingsError, match=message):
            robustbench(folder, out, **options)
    (finished(tmp_path / "begun") / "best" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="it is missing"):
        robustbench(tmp_path / "begun", out)
    assert not out.exists()
    robustbench(digits, out, dataset="cifar10")
    with pytest.raises(SettingsError, match=r"digits_cifar10_linf\.py exists already; --out OTHER"):
        robustbench(digits, out, dataset="cifar10")


def test_the_command_writes_beside_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished(tmp_path / "run")
    assert command(main, [str(run), "--to", "robustbench", "--json"]) == 0
    assert (run / "robustbench" / "run_cifar10_linf.py").exists()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["dataset"] == "cifar10"
    assert command(main, []) == 2
    assert "no run given" in capsys.readouterr().err
    assert command(main, ["--help"]) == 0
    assert "--dataset" in capsys.readouterr().out
    assert command(main, [str(run), "--to", "elsewhere"]) == 2


def test_robustbench_itself_finds_it(tmp_path: Path) -> None:
    """Where RobustBench is installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        utils = pytest.importorskip("robustbench.utils", reason="RobustBench is not installed")
    given = models.create("swin_micro_64", 10, resize=True)
    robustbench(finished(tmp_path / "Real-RoLI", model=given), tmp_path / "out")
    found(tmp_path / "out", "Real-RoLI", "cifar10", "Linf")
    model, x = utils.load_model("Real-RoLI", dataset="cifar10", threat_model="Linf"), torch.rand(2, 3, 32, 32)
    assert torch.equal(answers(model, x), answers(given, x))
