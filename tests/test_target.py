"""What an evaluation can be about, and what its command line refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from fastadv import evaluate, target
from fastadv.cli import command
from fastadv.data import ImageSet, load_test
from fastadv.errors import DataError, SettingsError
from fastadv.evaluate import radii


def image_set(classes: tuple[str, ...]) -> ImageSet:
    return ImageSet(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 1, 0]), classes)


def folder_of_images(path: Path, classes: tuple[str, ...] = ("cat", "dog"), size: int = 64) -> Path:
    """Two noisy pictures a class."""
    random = np.random.default_rng(0)
    for name in classes:
        (path / name).mkdir(parents=True)
        for number in range(2):
            pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / name / f"{number}.png")
    return path


def test_radii_are_read_from_a_list() -> None:
    assert radii("4/255,0.5", 1.0) == [4 / 255, 0.5]
    assert radii(None, 0.25) == [0.25]
    with pytest.raises(SettingsError, match="eps is '8/'"):
        radii("8/", 1.0)


def test_folders_in_order_are_the_models_classes() -> None:
    images = image_set(("a", "b"))
    assert target.as_classes_of(images, 2) is images
    with pytest.raises(DataError, match="the data has 2 classes, the model 3"):
        target.as_classes_of(images, 3)


def test_some_of_imagenets_classes_find_their_places_by_their_ids() -> None:
    found = target.as_classes_of(image_set(("n01443537", "n01440764")), 1000)
    # Goldfish is class 1 of ImageNet, tench class 0.
    assert found.labels.tolist() == [1, 0, 0, 1]
    assert len(found.classes) == 1000
    with pytest.raises(DataError, match="the data has 2 classes, the model 1000"):
        target.as_classes_of(image_set(("goldfish", "n01440764")), 1000)


@pytest.mark.parametrize("split", ["", "test", "val"])
def test_images_to_evaluate_need_nothing_to_train_on(tmp_path: Path, split: str) -> None:
    folder_of_images(tmp_path / split)
    images, _ = load_test(tmp_path)
    assert images.classes == ("cat", "dog")
    assert len(images) == 4


def test_the_first_images() -> None:
    images = image_set(("a", "b"))
    assert len(target.first(images, 3)) == 3
    assert len(target.first(images, None)) == 4


def test_a_model_from_elsewhere_is_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A timm model, its weights with its head, a folder of images: a table, a page, a JSON line."""
    data = folder_of_images(tmp_path / "pets")
    torch.manual_seed(0)
    save_file(timm.create_model("resnet18", num_classes=2).state_dict(), tmp_path / "w.safetensors")
    flags = ["--model", "resnet18", "--weights", str(tmp_path / "w.safetensors"), "--data", str(data)]
    flags += ["--image-size", "64", "--eval-steps", "2", "--out", str(tmp_path / "out"), "--json"]
    assert command(evaluate.main, flags) == 0
    said = capsys.readouterr().out
    assert "linf 4/255" in said
    assert "PGD-2 worst, fp32" in said
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    assert (tmp_path / "out" / "report.json").exists()
    assert said.splitlines()[-1].startswith('{"name": "resnet18"')


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "no run given"),
        (["--model", "resnet18"], "--model resnet18 without --weights"),
        (["--model", "resnet18", "--weights", "w"], "--model resnet18 without --data"),
        (["somewhere", "--model", "resnet18"], "both a run (somewhere) and --model resnet18"),
        (["somewhere"], "no run in somewhere"),
        (["somewhere", "--images", "0"], "images is 0"),
    ],
)
def test_what_is_refused(flags: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command(evaluate.main, flags) == 2
    assert said in capsys.readouterr().err
