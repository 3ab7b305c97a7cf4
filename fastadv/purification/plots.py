"""The laboratory's figures: bars of several arms, lines over a size, histograms, and weights as pictures.

Clean is blue, attacked vermilion, as everywhere on the project's pages; every mark and every bar is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import mean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator, NullLocator
from torch import Tensor

from fastadv.page import Figure, Picture, Table
from fastadv.purification.marks import spread
from fastadv.svg import BLUE, INK, LINE, MUTED, VERMILION

# In this order: the first is what happens without an attack, the last what is to be believed.
COLOURS = (BLUE, MUTED, VERMILION, INK)
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D")
Values = Sequence[float]


def bars(
    rows: Mapping[str, Mapping[str, Values]], unit: str, said: str, *, top: float = 1.0, form: str = "{:.3f}"
) -> Figure:
    """Bars for every row and every name in it, the mean over seeds; all rows have the same names."""
    names = list(next(iter(rows.values())))
    colours = dict(zip(names, COLOURS if len(names) > 1 else (VERMILION,), strict=False))

    def paint(canvas: Canvas, wide: bool) -> None:
        axes = canvas.add_subplot()
        height = 0.8 / len(names)
        for place, row in enumerate(rows.values()):
            for number, name in enumerate(names):
                value, y = mean(row[name]), place - 0.4 + height * (number + 0.5)
                axes.barh(y, value, height=0.9 * height, color=colours[name], label=name if not place else None)
                for seed in row[name]:
                    axes.plot([seed], [y], "|", color=LINE, markersize=0.5 * height * 26)
                axes.text(value + 0.012 * top, y, form.format(value), va="center_baseline", fontsize=11)
        axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, 1.12 * top), xlabel=unit)
        axes.set_yticks(range(len(rows)), [_fold(name, wide) for name in rows])
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5 if wide else 3))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        if len(names) > 1:
            handles, labels = axes.get_legend_handles_labels()
            canvas.legend(handles, labels, loc="outside upper left", ncols=4 if wide else 2, handlelength=1.2)

    table = Table(
        columns=["", *names], rows=[[name, *(spread(row[one], form) for one in names)] for name, row in rows.items()]
    )
    size = 60 + (30 if len(names) > 1 else 0) + len(rows) * max(30, 20 * len(names))
    return Figure(
        paint=paint,
        heights=(size, size + (20 if len(names) > 2 else 0)),
        alt=f"Bars. {said}",
        caption=said,
        table=table,
    )


def lines(
    x: Sequence[float],
    series: Mapping[str, Sequence[Values]],
    axis: str,
    unit: str,
    said: str,
    *,
    doubling: bool = False,
    form: str = "{:.3f}",
) -> Figure:
    """A line for every series over x, the mean over seeds, with a bar from the lowest to the highest seed."""

    def paint(canvas: Canvas, wide: bool) -> None:
        axes = canvas.add_subplot()
        for number, (name, points) in enumerate(series.items()):
            _line(axes, x, points, name, number)
        if doubling:
            axes.set_xscale("log", base=2)
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.set(xlabel=axis, ylabel=unit)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        canvas.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2 if wide else 1)

    rows = [[f"{at:g}", *(spread(points[place], form) for points in series.values())] for place, at in enumerate(x)]
    table = Table(columns=[axis, *series], rows=rows)
    return Figure(paint=paint, heights=(370, 320 + 18 * len(series)), alt=f"Lines. {said}", caption=said, table=table)


def histogram(edges: Sequence[float], counts: Mapping[str, Sequence[int]], axis: str, said: str) -> Figure:
    """One small histogram for every name, over the same edges."""

    def paint(canvas: Canvas, wide: bool) -> None:
        shape = (1, len(counts)) if wide else (len(counts), 1)
        grid = canvas.subplots(*shape, squeeze=False, sharex=True).ravel()
        for axes, (name, heights) in zip(grid, counts.items(), strict=True):
            colour = BLUE if name == next(iter(counts)) else VERMILION
            axes.bar(edges[:-1], heights, width=np.diff(edges), align="edge", color=colour)
            axes.set_title(name, loc="left", fontsize=12, color=INK)
            axes.set_xlim(0, 1)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
            axes.grid(axis="y")
        canvas.supxlabel(axis, fontsize=12, color=MUTED)

    ranges = [f"{low:.2f} to {high:.2f}" for low, high in pairwise(edges)]
    rows = [[name, *(str(heights[place]) for heights in counts.values())] for place, name in enumerate(ranges)]
    table = Table(columns=[axis, *counts], rows=rows)
    return Figure(paint=paint, heights=(230, 150 * len(counts)), alt=f"Histograms. {said}", caption=said, table=table)


def shades(values: Tensor) -> list[list[int]]:
    """Numbers (rows, columns) as levels of grey, as JSON can hold them: 255 for 0, 0 for the largest of its row."""
    levels = values.abs() / values.abs().amax(1, keepdim=True).clamp_min(1e-12)
    rows: list[list[int]] = (255 * (1 - levels)).round().int().tolist()
    return rows


def picture(rows: Sequence[Sequence[int]], alt: str, label: str) -> Picture:
    """Levels of grey as a picture with one pixel for each number."""
    return Picture(pixels=np.array(rows, dtype=np.uint8), alt=alt, label=label)


def _line(axes: Axes, x: Sequence[float], points: Sequence[Values], name: str, number: int) -> None:
    centre = [mean(point) for point in points]
    reach = [
        [middle - min(point) for middle, point in zip(centre, points, strict=True)],
        [max(point) - middle for middle, point in zip(centre, points, strict=True)],
    ]
    place = number % len(COLOURS)
    axes.errorbar(
        x,
        centre,
        yerr=np.clip(reach, 0, None),
        color=COLOURS[place],
        linestyle=STYLES[place],
        marker=MARKERS[place],
        markersize=5,
        linewidth=1.8,
        label=name,
    )


def _fold(name: str, wide: bool) -> str:
    """The name on one line, or on a phone on several."""
    return name if wide else name.replace(", ", ",\n").replace(" on ", "\non ")
