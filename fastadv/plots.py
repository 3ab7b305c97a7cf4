"""The two pictures of a run: its accuracies per epoch, and what the attack does to single images.

Nothing is told by colour alone, text is black, and no global state of matplotlib is touched: a caller's own figures and
backend stay as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from torch import Tensor

# Okabe and Ito's blue and vermilion: told apart with every kind of colour vision, and in grey by fill and line style.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#767676"
CHECK, CROSS, TIMES = "\u2713", "\u2717", "\u00d7"
# Twice the pixels of a common screen, so that text stays sharp when the picture is shown at half size.
DPI = 160


def curves(path: Path, history: Sequence[Mapping[str, Any]], chance: float | None = None) -> None:
    """Write a PNG of clean (filled) and robust (hollow) validation accuracy per epoch, the stages one after another.

    history: one mapping per epoch with "stage" and, as fractions, "clean" and "robust" (None: not measured).
    chance: accuracy of guessing, a fraction; drawn as a dotted line.
    """
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.add_subplot()
    highest = max((100 * (row[name] or 0) for row in history for name in ("clean", "robust")), default=0)
    axes.set(xlim=(0.5, max(1, len(history)) + 0.5), ylim=(0, min(100, 10 * (highest * 1.12 // 10 + 1))))
    axes.set(xlabel="epoch", ylabel="validation accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    labels = {}
    if chance is not None:
        axes.axhline(100 * chance, color=GREY, linestyle=":", linewidth=1.4)
        labels[f"chance {100 * chance:.3g} %"] = 100 * chance
    starts = [i for i, row in enumerate(history) if i == 0 or row["stage"] != history[i - 1]["stage"]]
    for begin, end in pairwise([*starts, len(history)]):
        ends = _draw_stage(axes, history[begin:end], begin)
        if end == len(history):
            labels |= {f"{name} {value:.1f} %": value for name, (_, value) in ends.items()}
            continue
        for epoch, value in ends.values():
            axes.annotate(f"{value:.1f}", (epoch, value), (0, 6), textcoords="offset points", ha="center", fontsize=8.5)
    for text, value, height in _spread(labels, gap=0.058 * axes.get_ylim()[1]):
        arrow = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)}
        tip, place = (1.005, value), (1.025, height)
        frame = axes.get_yaxis_transform()
        axes.annotate(text, tip, place, frame, frame, va="center", arrowprops=arrow, annotation_clip=False)
    _save(figure, path)


def examples(
    path: Path,
    x: Tensor,
    adv: Tensor,
    y: Tensor,
    clean_pred: Tensor,
    adv_pred: Tensor,
    classes: Sequence[str],
    eps: float,
) -> None:
    """Write a PNG with one column per image: clean, perturbation amplified about grey, adversarial, with predictions.

    x, adv: (N, 3, H, W) in [0, 1], N >= 1; y, clean_pred, adv_pred: (N,) class ids. Eight columns are a good number.
    eps: the radius that the title names, in pixel units.
    """
    number = len(x)
    x, adv = x.detach().float().cpu(), adv.detach().float().cpu()
    largest = float((adv - x).abs().max())
    factor = max(1, round(0.5 / largest)) if largest else 1
    rows = (
        ("clean", x, clean_pred),
        (f"perturbation\n{TIMES} {factor} about grey", (0.5 + factor * (adv - x)).clamp(0, 1), None),
        ("adversarial", adv, adv_pred),
    )
    layout = ConstrainedLayoutEngine(h_pad=0.03, w_pad=0.03, hspace=0, wspace=0)
    figure = Figure(figsize=(1.45 + 1.15 * number, 4.5), layout=layout)
    before, after = (int((prediction.cpu() == y.cpu()).sum()) for prediction in (clean_pred, adv_pred))
    title = f"eps {_fraction(eps)}: {before} of {number} right before the attack, {after} after"
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(len(rows), number, squeeze=False)
    for line, (label, images, predictions) in zip(grid, rows, strict=True):
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=10, fontsize=10, fontweight="bold")
        for index, axes in enumerate(line):
            axes.imshow(images[index].permute(1, 2, 0).numpy(), vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(color="#BBBBBB", linewidth=0.8)
            if predictions is not None:
                guess = int(predictions[index])
                _verdict(axes, _shortened(classes[guess]), right=guess == int(y[index]))
        if predictions is not None:
            _row_note(line[0], "predicted", -0.055, "top")
    for index, axes in enumerate(grid[0]):
        axes.set_title(_shortened(classes[int(y[index])]), fontsize=9, pad=4, parse_math=False)
    _row_note(grid[0][0], "true class", 1.045, "baseline")
    _save(figure, path)


def _draw_stage(axes: Axes, rows: Sequence[Mapping[str, Any]], begin: int) -> dict[str, tuple[int, float]]:
    """Draw both curves of one stage with its name above and a boundary on its left; the last point of each curve."""
    if begin:
        axes.axvline(begin + 0.5, color=GREY, linewidth=1.0)
    name, top_left = str(rows[0]["stage"]), (begin + 0.5, 1)
    style: dict[str, Any] = {"va": "bottom", "fontsize": 10, "fontweight": "bold", "parse_math": False}
    axes.annotate(name, top_left, (6, 3), axes.get_xaxis_transform(), "offset points", **style)
    size = 5 if len(axes.lines) + len(rows) < 40 else 3
    ends = {}
    for name, color, fill, line in (("clean", BLUE, BLUE, "-"), ("robust", VERMILION, "white", "--")):
        points = [(begin + 1 + i, 100 * row[name]) for i, row in enumerate(rows) if row[name] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), line, color=color, marker="o", markersize=size, markerfacecolor=fill)
            ends[name] = points[-1]
    return ends


def _spread(labels: Mapping[str, float], gap: float) -> list[tuple[str, float, float]]:
    """Label, value and height of its text, lowest first, the texts at least ``gap`` apart."""
    placed: list[tuple[str, float, float]] = []
    for text, value in sorted(labels.items(), key=lambda item: item[1]):
        height = max(value, placed[-1][2] + gap) if placed else value
        placed.append((text, value, height))
    return placed


def _verdict(axes: Axes, guess: str, right: bool) -> None:
    """The predicted class under an image, with a mark for right and wrong."""
    mark, color, weight, width = (CHECK, BLUE, "normal", 1.0) if right else (CROSS, VERMILION, "bold", 2.2)
    axes.set_xlabel(f"{mark} {guess}", fontsize=9, fontweight=weight, labelpad=3, parse_math=False)
    axes.spines[:].set(color=color, linewidth=width)


def _row_note(axes: Axes, text: str, height: float, anchor: str) -> None:
    axes.text(-0.1, height, text, transform=axes.transAxes, ha="right", va=anchor, fontsize=9, color="#444444")


def _fraction(eps: float) -> str:
    """``8/255`` where that is what was meant, else the number."""
    levels = round(255 * eps)
    return f"{levels}/255" if levels and abs(255 * eps - levels) < 1e-4 else f"{eps:g}"


def _shortened(name: str) -> str:
    return name if len(name) <= 13 else f"{name[:10]}..."


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # Class names may be written in letters that the font lacks: boxes instead of letters do not stop a run.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(path, dpi=DPI, facecolor="white")
