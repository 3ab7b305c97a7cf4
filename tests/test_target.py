"""What an evaluation can be about, and what its command line refuses."""

from __future__ import annotations

from pathlib import Path
from typing import cast

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
from fastadv.evaluate import Settings, pgd_at, radii
from fastadv.pgd import PGD
from fastadv.target import Target
from fastadv.threat import Norm


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


def test_a_sample_is_of_all_classes_and_always_the_same() -> None:
    images = ImageSet(torch.zeros(400, 3, 2, 2, dtype=torch.uint8), torch.arange(400) // 40, tuple("abcdefghij"))
    found = target.sample(images, 60)
    assert len(found) == 60
    # Of 40 in 400 about 6 are to be expected; a class without any has a chance of 1 in 600.
    assert found.labels.bincount(minlength=10).min() > 0
    assert torch.equal(found.labels, target.sample(images, 60).labels)
    assert torch.equal(found.labels, images.labels[target.sample_rows(400, 60)])
    assert len(target.sample(images, None)) == len(target.sample(images, 1000)) == 400


def about(norm: str) -> Target:
    return Target(
        name="x",
        model=torch.nn.Identity(),
        images=image_set(("a", "b")),
        norm=cast(Norm, norm),
        own_norm="linf",
        eps=8 / 255,
        attack=PGD(steps=10, step_size=2 / 255),
        seed=0,
        batch_size=4,
        folder=Path(),
        recipe={},
    )


@pytest.mark.parametrize(
    ("norm", "eps", "flag", "step"),
    [
        ("linf", 8 / 255, None, 2 / 255),
        ("linf", 16 / 255, None, 4 / 255),
        ("l2", 8 / 255, None, 2 / 255),
        ("l2", 3.0, None, 0.75),
        ("l2", 3.0, "0.5", 0.5),
        ("linf", 0.0, None, 2 / 255),
    ],
)
def test_the_step_follows_the_radius_where_it_is_not_the_runs_own(
    norm: str, eps: float, flag: str | None, step: float
) -> None:
    assert pgd_at(about(norm), Settings(eval_step_size=flag), eps).step_size == step


def test_another_norm_needs_a_radius() -> None:
    target.check_radius(Settings(norm="l2", eps="1"), "linf")
    target.check_radius(Settings(norm="l2"), "l2")
    with pytest.raises(SettingsError, match=r"norm is l2 without a radius; --eps 0\.5"):
        target.check_radius(Settings(norm="l2"), "linf")


def test_a_model_from_elsewhere_is_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A timm model, its weights with its head, a folder of images: a table, a page, a JSON line."""
    data = folder_of_images(tmp_path / "pets")
    torch.manual_seed(0)
    save_file(timm.create_model("resnet18", num_classes=2).state_dict(), tmp_path / "w.safetensors")
    flags = ["--model", "resnet18", "--weights", str(tmp_path / "w.safetensors"), "--data", str(data)]
    flags += ["--image-size", "64", "--eval-steps", "2", "--out", str(tmp_path / "out"), "--json"]
    # Somebody else's, whatever it is called.
    (tmp_path / "out" / "autoattack-mine" / "keep").mkdir(parents=True)
    assert command(evaluate.main, flags) == 0
    assert (tmp_path / "out" / "autoattack-mine" / "keep").exists()
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
        (["somewhere", "--seed", "-1"], "seed is -1"),
        (["--images", "3", "somewhere"], "no run in somewhere"),
        (["--check", "--eps=8/255", "--no-page", "somewhere", "--seed", "1"], "no run in somewhere"),
    ],
)
def test_what_is_refused(flags: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command(evaluate.main, flags) == 2
    assert said in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = folder_of_images(tmp_path / "pets")
    save_file(timm.create_model("resnet18", num_classes=2).state_dict(), tmp_path / "w.safetensors")
    monkeypatch.setattr(evaluate, "evaluate", lambda *given, **more: pytest.fail("computed"))
    (tmp_path / "file").touch()
    flags = ["--model", "resnet18", "--weights", str(tmp_path / "w.safetensors"), "--data", str(data)]
    assert command(evaluate.main, [*flags, "--image-size", "64", "--out", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err
