"""What is inherited: three arms per backbone, run once, on one page that says so; filters as they are."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sample_comparison import invented

from fastadv import comparison_cells, inherit, inheritance_page, report
from fastadv.cli import command
from fastadv.first_layer import FirstLayer, first_layer, of_weights
from fastadv.models import create
from fastadv.recipe import Recipe
from fastadv.strategies import load_all
from fastadv.tuning import full, linear

FLAGS = [
    *("--model", "resnet_micro_64", "--image-size", "32", "--per-class", "2", "--val-images", "10"),
    *("--batch-size", "8", "--epochs", "1", "--probe-epochs", "1", "--eval-steps", "1", "--train-steps", "1"),
    *("--precision", "fp32"),
]


@pytest.fixture(scope="module", autouse=True)
def no_pictures() -> Any:
    """Each run would draw two: half of its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report.plots, "curves", lambda *args, **more: None)
        patch.setattr(report, "draw_examples", lambda *args, **more: None)
        yield


def test_every_arm_is_run_once_and_all_is_on_one_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    argv = ["--weights", "none", *FLAGS, "--out", str(out)]
    assert command(inherit.main, [*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["strategy"] for row in found["rows"]] == list(inherit.ARMS)
    assert all(row["n"] == 400 and row["attack"] == "PGD-1" for row in found["rows"])
    assert set(found["roughness"]) == {"none"}
    with (out / "results.csv").open() as file:
        assert [row["strategy"] for row in csv.DictReader(file)] == list(inherit.ARMS)
    text = (out / "inherit.html").read_text()
    # One step of training: the page says that this is too little.
    assert "Undertrained: on digits" in text
    for said in ("clean head, frozen backbone", "First-layer filters", "arXiv:2401.15248", "data:image/png;base64,"):
        assert said in text, said
    # Again: nothing is run, the same comes out.
    monkeypatch.setattr(comparison_cells, "run_cell", lambda *args: pytest.fail("run again"))
    assert command(inherit.main, [*argv, "--json"]) == 0
    said = capsys.readouterr().out
    assert "3 of 3 cells have a result already" in said
    assert json.loads(said.splitlines()[-1])["rows"] == found["rows"]
    (out / "inherit.html").unlink()
    assert command(inherit.main, [str(out)]) == 0
    assert (out / "inherit.html").exists()


def test_the_arms_are_what_they_are_called() -> None:
    stages = {name: list(load_all()[name].stages(Recipe(epochs=3, probe_epochs=2))) for name in inherit.ARMS}
    assert all(len(found) == 1 for found in stages.values())
    only = {name: found[0] for name, found in stages.items()}
    assert [only[name].tuning for name in inherit.ARMS] == [linear, full, linear]
    assert [only[name].robust for name in inherit.ARMS] == [False, False, True]
    assert [only[name].epochs for name in inherit.ARMS] == [2, 3, 2]
    # On clean images the attack is never called.
    x, y = torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
    for name in inherit.ARMS[:2]:
        only[name].loss(lambda images: images.mean((2, 3)), x, y, lambda *args: pytest.fail("attacked"))


def refused(
    capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], Any], *argv: str | Path
) -> tuple[int, str, str]:
    code = command(main, [str(arg) for arg in argv])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2, lines
    return code, lines[0].removeprefix("error: "), lines[1].removeprefix("fix: ")


@pytest.mark.parametrize(
    ("argv", "code", "what", "fix"),
    [
        (["--data", "digits"], 2, "no weights given", "--weights robust standard"),
        (["--weights", "robus"], 2, "no weights at 'robus'", "--weights robust|standard|contrastive|"),
        (["--weights", "none", "--strategies", "linear"], 2, "--strategies is decided here", "leave it out"),
        (["--weights", "none", "--strategy", "linear"], 2, "--strategy is decided here", "leave it out"),
        (["--weights", "robust", "--model", "resnet18"], 2, "'robust' are shipped for", "--weights none"),
        (["--weights", "none", "--epoch", "3"], 2, "--epoch", "did you mean --epochs"),
        (["nowhere"], 2, "no comparison in nowhere", "compare.json"),
        (["--resume", "nowhere"], 2, "no comparison in nowhere", "compare.json"),
        (["--weights", "none", "--data", "nowhere"], 3, "nowhere", ""),
    ],
)
def test_what_cannot_be_meant_is_refused(
    argv: list[str], code: int, what: str, fix: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = [] if argv[0] in ("nowhere", "--resume") else ["--out", str(tmp_path / "out")]
    found = refused(capsys, inherit.main, *argv, *out)
    assert found[0] == code
    assert what in found[1]
    assert fix in found[2]
    assert not (tmp_path / "out").exists()


def test_help_lists_the_arms_and_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(inherit.main, ["--help"]) == 0
    said = capsys.readouterr().out
    for name in (*inherit.ARMS, "--weights", "--probe-epochs", "--eps", "--json", "--debug"):
        assert name in said
    # Its own defaults hold on the digits too, all others are those of a comparison.
    assert "--val-images 100" in said and "--probe-epochs 4" not in said
    assert f"usage: {inherit.PROGRAM} --weights WEIGHTS ..." in said


def test_the_page_shows_numbers_gaps_and_failures(tmp_path: Path) -> None:
    numbers = {"clean-linear": (7000, 3100), "clean-full": (9000, 1200), "linear": (6500, 3500)}
    whole, results = invented(tmp_path, numbers, weights=("robust", "standard"), seeds=2)
    layers = {name: FirstLayer(torch.randn(6, 3, 4, 4)) for name in ("robust", "standard")}
    inheritance_page.write(tmp_path / "inherit.html", whole, results[:-1], layers)
    text = (tmp_path / "inherit.html").read_text()
    assert "31.5" in text  # The mean of 31.0 % and 32.0 %.
    assert "adversarial head, frozen backbone" in text
    assert text.count("data:image/png;base64,") == 2
    for outside in ("http://", "https://", "<script"):
        assert outside not in text.replace("http://www.w3.org", "")
    inheritance_page.write(tmp_path / "empty.html", whole, [], layers)
    assert "No clean probe has a result yet." in (tmp_path / "empty.html").read_text()


def test_roughness_has_known_values() -> None:
    assert FirstLayer(torch.ones(2, 3, 4, 4)).roughness == 0
    noise = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert FirstLayer(noise).roughness == pytest.approx(2, abs=0.05)
    # A checkerboard is as rough as a filter can be: every neighbour has the other sign.
    board = torch.tensor([1.0, -1.0]).repeat(2)
    assert FirstLayer((board[:, None] * board).expand(1, 3, 4, 4)).roughness == pytest.approx(4)
    # Whatever the scale.
    assert FirstLayer(1e-3 * noise).roughness == pytest.approx(FirstLayer(noise).roughness)


def test_the_picture_holds_every_filter() -> None:
    filters = torch.zeros(5, 3, 2, 2)
    filters[3, 0] = 0.5
    filters[4, 2, 1, 1] = -2
    found = FirstLayer(filters).picture()
    # Three columns and two lines of 2x2 pixels with gaps.
    assert found.shape == (5, 8, 3)
    assert np.array_equal(found[3:, 0:2], np.broadcast_to(np.array([255, 128, 128], dtype=np.uint8), (2, 2, 3)))
    assert found[4, 4].tolist() == [128, 128, 0]
    assert (found[2] == 255).all()


@pytest.mark.parametrize(
    ("name", "shape"),
    [("swin_micro_64", (48, 3, 4, 4)), ("resnet_micro_64", (8, 3, 3, 3)), ("resnet18", (64, 3, 7, 7))],
)
def test_the_first_layer_is_the_one_that_sees_the_pixels(name: str, shape: tuple[int, ...]) -> None:
    assert first_layer(create(name, 2)).filters.shape == shape


def test_the_shipped_robust_backbone_has_the_smoother_filters() -> None:
    robust, standard, random = (of_weights(Recipe(weights=name)).roughness for name in ("robust", "standard", "none"))
    assert robust < standard < random
