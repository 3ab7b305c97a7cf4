"""The pictures of a run say what the numbers say, and say it without colour too."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from fastadv import plots

ROOT = Path(__file__).resolve().parent.parent
HISTORY = [
    {"stage": "probe", "epoch": 1, "step": 10, "loss": 2.0, "clean": 0.5, "robust": 0.2, "lr": 0.1, "seconds": 1.0},
    {"stage": "probe", "epoch": 2, "step": 20, "loss": 1.9, "clean": 0.6, "robust": 0.3, "lr": 0.1, "seconds": 1.0},
    {"stage": "finetune", "epoch": 1, "step": 30, "loss": 1.8, "clean": 0.7, "robust": 0.4, "lr": 0.1, "seconds": 1.0},
    {"stage": "finetune", "epoch": 2, "step": 40, "loss": 1.7, "clean": 0.8, "robust": None, "lr": 0.1, "seconds": 1.0},
    {"stage": "finetune", "epoch": 3, "step": 50, "loss": 1.6, "clean": 0.9, "robust": 0.55, "lr": 0.1, "seconds": 1.0},
]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that the test writes."""
    figures: list[Figure] = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure) or save(figure, path))
    return figures


def size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_curves_show_both_stages_filled_and_hollow(tmp_path: Path, drawn: list[Figure]) -> None:
    plots.curves(tmp_path / "curves.png", HISTORY, chance=0.1)
    assert size(tmp_path / "curves.png") == (1152, 640)
    (axes,) = drawn[0].axes
    found = [
        (list(line.get_xdata()), list(np.round(line.get_ydata(), 9))) for line in axes.lines if line.get_marker() == "o"
    ]
    assert found == [([1, 2], [50, 60]), ([1, 2], [20, 30]), ([3, 4, 5], [70, 80, 90]), ([3, 5], [40, 55])]
    fills = [line.get_markerfacecolor() for line in axes.lines if line.get_marker() == "o"]
    styles = [line.get_linestyle() for line in axes.lines if line.get_marker() == "o"]
    assert fills == [plots.BLUE, "white"] * 2
    assert styles == ["-", "--"] * 2
    texts = [text.get_text() for text in axes.texts]
    assert set(texts) == {"probe", "finetune", "60.0", "30.0", "clean 90.0 %", "robust 55.0 %", "chance 10 %"}
    assert {text.get_color() for text in axes.texts} == {"black"}
    assert [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == ":"] == [[0, 1]]
    assert [line.get_xdata()[0] for line in axes.lines if line.get_linewidth() == 1.0] == [2.5]
    assert axes.get_ylim() == (0, 100)


@pytest.mark.parametrize("count", [0, 1, 100])
def test_any_number_of_epochs_can_be_drawn(tmp_path: Path, count: int) -> None:
    row: dict[str, Any] = {"stage": "probe", "clean": 0.011, "robust": None}
    plots.curves(tmp_path / "curves.png", [row] * count)
    assert size(tmp_path / "curves.png")


def test_labels_of_equal_values_do_not_cover_each_other() -> None:
    placed = plots._spread({"clean": 50.0, "robust": 49.9, "chance": 10.0}, gap=5.0)
    assert placed == [("chance", 10.0, 10.0), ("robust", 49.9, 49.9), ("clean", 50.0, 54.9)]


def pictures(count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.full((count, 3, 16, 16), 0.5)
    sign = torch.where(torch.arange(16) % 2 == 0, 1.0, -1.0)
    return x, x + 8 / 255 * sign


def test_examples_show_image_amplified_perturbation_and_verdicts(tmp_path: Path, drawn: list[Figure]) -> None:
    x, adv = pictures()
    y, clean, attacked = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 0]), torch.tensor([0, 2, 0])
    plots.examples(
        tmp_path / "examples.png", x, adv.requires_grad_(), y, clean, attacked, ("cat", "dog", "owl"), 8 / 255
    )
    width, height = size(tmp_path / "examples.png")
    assert 600 < width < 1000
    assert 600 < height < 1000
    (figure,) = drawn
    assert figure.get_suptitle() == "eps 8/255: 2 of 3 right before the attack, 1 after"
    rows = [figure.axes[i : i + 3] for i in (0, 3, 6)]
    assert [axes.get_title() for axes in rows[0]] == ["cat", "dog", "owl"]
    marks = [[axes.get_xlabel() for axes in row] for row in rows]
    check, cross = "\u2713", "\u2717"
    assert marks == [
        [f"{check} cat", f"{check} dog", f"{cross} cat"],
        ["", "", ""],
        [f"{check} cat", f"{cross} owl", f"{cross} cat"],
    ]
    assert [row[0].get_ylabel() for row in rows] == ["clean", "perturbation\n\u00d7 16 about grey", "adversarial"]
    image, change, attack = (row[0].images[0].get_array() for row in rows)
    assert float(image.min()) == float(image.max()) == 0.5
    # 16 times 8/255 is a little more than the half that separates grey from black and white.
    assert {float(value) for value in np.unique(change)} == {0.0, 1.0}
    assert np.allclose(attack, adv[0].detach().permute(1, 2, 0))


def test_examples_without_a_perturbation_and_with_difficult_names(tmp_path: Path, drawn: list[Figure]) -> None:
    x, _ = pictures(2)
    names = ("$5 bill_{x", "\u4e2d\u6587 and a long name")
    y = torch.tensor([0, 1])
    plots.examples(tmp_path / "examples.png", x, x, y, y, y, names, 0.5)
    assert size(tmp_path / "examples.png")
    assert drawn[0].axes[2].get_ylabel() == "perturbation\n\u00d7 1 about grey"
    assert drawn[0].axes[2].images[0].get_array().min() == 0.5
    assert drawn[0].axes[1].get_title() == "\u4e2d\u6587 and a l..."
    assert drawn[0].get_suptitle().startswith("eps 0.5:")


def test_no_global_state_of_matplotlib_is_touched(tmp_path: Path) -> None:
    script = f"""
import sys, torch
from pathlib import Path
from fastadv import plots
plots.curves(Path({str(tmp_path)!r}) / "curves.png", [{{"stage": "probe", "clean": 0.5, "robust": 0.1}}])
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=ROOT, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
