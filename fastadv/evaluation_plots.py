"""The figures of an evaluation's page: what became of the images, accuracy against radius, classes, stages.

Clean accuracy is blue, robust accuracy vermilion, as in `fastadv.plots`; nothing is told by colour alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator

from fastadv.measure import Curve, Report, Stage, wilson
from fastadv.page import Figure, Table
from fastadv.recipe import show_pixels
from fastadv.svg import BLUE, INK, LINE, MUTED, VERMILION, label

# With more classes than this the bars get small and stand in columns.
LARGE_BARS = 20
# A phone shows the weakest and the strongest of more classes than this; the table below has all.
MOST_NARROW, MOST_WIDE = 60, 240
CLEAN_ALPHA = 0.36


@dataclass(frozen=True, kw_only=True)
class ClassCounts:
    """Of the ``n`` images of a class, how many are right clean and how many stay right under attack."""

    name: str
    n: int
    clean: int
    robust: int


def percent(hits: int, n: int) -> str:
    """``80.0 % (75.8-83.6)``: a share with its 95 % Wilson interval."""
    low, high = wilson(hits, n)
    return f"{100 * hits / max(1, n):.1f} % ({100 * low:.1f}-{100 * high:.1f})"


def fates(n: int, clean: int, robust: int) -> Figure:
    """One bar of all ``n`` images: those that stay right, those that the attack breaks, those wrong without it."""
    parts = (
        ("stay right", robust, VERMILION),
        ("broken by the attack", clean - robust, BLUE),
        ("wrong without it", n - clean, LINE),
    )

    def paint(canvas: Canvas, wide: bool) -> None:
        axes = canvas.add_subplot()
        axes.set(xlim=(0, n), ylim=(-1.0, 1.0) if wide else (-2.6, 1.0))
        axes.axis("off")
        start = 0
        for row, (name, number, colour) in enumerate(parts):
            # A thin gap of paper between the parts: two colours may be alike in grey.
            gap = 0.004 * n if start + number < n else 0
            axes.barh(0.55, max(0, number - gap), left=start, height=0.9, color=colour)
            start += number
            x, y = (row * n / 3, -0.55) if wide else (0, -0.55 - 0.85 * row)
            axes.plot([x + 0.008 * n], [y], marker="s", markersize=9, color=colour, clip_on=False)
            text = f"{number:,} {name}"
            axes.text(x + (0.03 if wide else 0.06) * n, y, text, va="center_baseline", fontsize=13)

    said = ", ".join(f"{number} {name}" for name, number, _ in parts)
    return Figure(paint=paint, heights=(72, 124), alt=f"Of {n} images: {said}.")


def against_radius(curve: Curve, attack: str, report: Report, num_classes: int) -> Figure:
    """Robust accuracy over the radius with its interval, the radii a factor apart as far apart as any other such two.

    attack: what attacked at every radius. report: the headline, marked where it lies.
    """
    n = curve.survived.shape[1]
    hits = [int(row.sum()) for row in curve.survived]
    scale = 255 if report.norm == "linf" else 1
    x = [scale * eps for eps in curve.eps]
    y = [100 * number / n for number in hits]
    bands = [[100 * end for end in wilson(number, n)] for number in hits]
    chance = 100 / num_classes

    def paint(canvas: Canvas, wide: bool) -> None:
        axes = canvas.add_subplot()
        axes.set(ylim=(0, 100 if bands[0][1] > 60 else 20 * (bands[0][1] // 20 + 1)), ylabel="still right (%)")
        axes.set_xlabel(f"radius of the attack ({report.norm}{', in 1/255' if scale == 255 else ''})")
        # Linear from 0 to the first radius, from there on every doubling is one step: most happens at small radii.
        axes.set_xscale("symlog", base=2, linthresh=x[1] if len(x) > 1 else 1, linscale=0.5)
        axes.set_xlim(0, x[-1] or 1)
        axes.set_xticks(x, [f"{value:.3g}" for value in x])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        low, high = zip(*bands, strict=True)
        axes.fill_between(x, low, high, color=VERMILION, alpha=0.18, linewidth=0)
        axes.axhline(chance, color=MUTED, linestyle=(0, (1, 3)), linewidth=1.4)
        axes.plot(x, y, color=VERMILION, marker="o", markersize=5, linewidth=2, clip_on=False, zorder=3)
        axes.annotate(
            f"guessing {chance:.3g} %", (0, chance), (6, 4), textcoords="offset points", color=MUTED, fontsize=11
        )
        _mark(axes, scale * report.eps, 100 * report.robust)

    radii = [show_pixels(eps, report.norm) for eps in curve.eps]
    said = [f"{y[0]:.1f} % are right when nothing is changed."]
    half = next((radius for radius, number in zip(radii, hits, strict=True) if 2 * number < n), None)
    if half and half != radii[0]:
        said.append(f"At {half} fewer than half are left.")
    if hits[-1]:
        said.append(f"Even at {radii[-1]}, the largest radius tried, {y[-1]:.1f} % are left.")
    elif len(radii) > 1:
        said.append(f"At {radii[-1]} none is left.")
    table = Table(
        columns=("radius", "still right", "images"),
        rows=[(radius, percent(number, n), f"{number:,} of {n:,}") for radius, number in zip(radii, hits, strict=True)],
    )
    radius = show_pixels(report.eps, report.norm)
    headline = f"The diamond is {report.attack}, {100 * report.robust:.1f} % of {report.n:,} at {radius}."
    caption = f"{' '.join(said)} {attack} at every radius on {n:,} images, with the 95 % Wilson interval. {headline}"
    return Figure(paint=paint, heights=(340, 280), alt=f"A falling curve. {caption}", caption=caption, table=table)


def class_bars(counts: Sequence[ClassCounts]) -> Figure:
    """Two bars per class, one in the other: right when clean, and of those the ones that stay right. Weakest first."""
    ordered = sorted(counts, key=lambda row: (row.robust / max(1, row.n), row.clean / max(1, row.n)))

    def columns(wide: bool) -> list[list[ClassCounts | int]]:
        most = MOST_WIDE if wide else MOST_NARROW
        rows: list[ClassCounts | int] = list(ordered)
        if len(rows) > most:
            rows = [*rows[: most // 2], len(rows) - most, *rows[-(most // 2) :]]
        number = 1 if not wide or len(rows) <= LARGE_BARS else 2 if len(rows) <= 2 * LARGE_BARS else 3
        height = -(-len(rows) // number)
        return [rows[start : start + height] for start in range(0, len(rows), height)]

    def paint(canvas: Canvas, wide: bool) -> None:
        parts = columns(wide)
        grid = canvas.subplots(1, len(parts), squeeze=False)[0]
        for axes, rows in zip(grid, parts, strict=True):
            _class_column(axes, rows, len(parts[0]), len(counts), longest=22 if wide and len(parts) < 3 else 17)
        marks = [Patch(color=BLUE, alpha=CLEAN_ALPHA, linewidth=0), Line2D([], [], color=VERMILION, linewidth=4)]
        names = ["right when clean (%)", "right under attack (%)"]
        canvas.legend(marks, names, loc="outside upper left", ncols=2, handlelength=1.4, columnspacing=1.6)

    def height(wide: bool) -> int:
        return 78 + round(_row_height(len(counts)) * len(columns(wide)[0]))

    weakest, strongest = _named(ordered[:3]), _named(ordered[:-4:-1])
    sizes = sorted({min(row.n for row in counts), max(row.n for row in counts)})
    images = f"{' to '.join(f'{n:,}' for n in sizes)} images per class"
    caption = f"Weakest under attack: {weakest}. Strongest: {strongest}. Sorted, weakest first; {images}."
    table = Table(
        columns=("class", "images", "clean", "robust"),
        rows=[(row.name, f"{row.n:,}", percent(row.clean, row.n), percent(row.robust, row.n)) for row in ordered],
    )
    return Figure(
        paint=paint, heights=(height(True), height(False)), alt=f"Bars. {caption}", caption=caption, table=table
    )


def stage_bars(stages: Sequence[Stage], clean: int) -> Figure:
    """Images that each stage broke, and its seconds, side by side. clean: how many came into the first one."""
    names = [label(stage.name, 18) for stage in stages]
    panels: list[tuple[str, list[float], str, str]] = [
        ("images broken", [stage.broken for stage in stages], "{:,.0f}", VERMILION),
        ("seconds", [stage.seconds for stage in stages], "{:,.1f}", MUTED),
    ]

    def paint(canvas: Canvas, wide: bool) -> None:
        shape = (1, 2) if wide else (2, 1)
        grid = canvas.subplots(*shape, sharey=wide, squeeze=False).ravel()
        for axes, (title, values, form, colour) in zip(grid, panels, strict=True):
            bars = axes.barh(range(len(stages)), values, height=0.55, color=colour)
            axes.bar_label(bars, [form.format(value) for value in values], padding=5)
            axes.set_title(title, loc="left", fontsize=12, color=MUTED)
            axes.set(xlim=(0, 1.22 * max([*values, 1e-9])), ylim=(len(stages) - 0.4, -0.6), xticks=[])
            axes.set_yticks(range(len(stages)), names, parse_math=False)
            axes.tick_params(axis="y", length=0)
            axes.spines["bottom"].set_visible(False)

    left, rows = clean, []
    for stage in stages:
        left -= stage.broken
        rows.append((stage.name, f"{stage.broken:,}", f"{left:,}", f"{stage.seconds:,.1f}"))
    most = max(stages, key=lambda stage: stage.broken)
    longest = max(stages, key=lambda stage: stage.seconds)
    caption = (
        f"An image counts for the first stage that breaks it. {most.name} breaks most ({most.broken:,} of "
        f"{clean - left:,}), {longest.name} takes longest ({longest.seconds:,.1f} of "
        f"{sum(stage.seconds for stage in stages):,.1f} seconds)."
    )
    table = Table(columns=("stage", "images broken", "still right after it", "seconds"), rows=rows)
    one = 34 * len(stages) + 36
    return Figure(paint=paint, heights=(one, 2 * one), alt=f"Bars. {caption}", caption=caption, table=table)


def _mark(axes: Axes, x: float, y: float) -> None:
    """A hollow diamond, with its number to the lower left: there a falling curve leaves room."""
    axes.plot([x], [y], marker="D", markersize=10, markerfacecolor="none", markeredgecolor=INK, linewidth=0, zorder=4)
    text = f"{y:.1f} %"
    axes.annotate(text, (x, y), (-2, -8), textcoords="offset points", ha="right", va="top", weight="bold")


def _class_column(axes: Axes, rows: Sequence[ClassCounts | int], height: int, num_classes: int, longest: int) -> None:
    """One column of bars; a number among the rows stands for so many classes that are left out."""
    named = [(place, row) for place, row in enumerate(rows) if isinstance(row, ClassCounts)]
    places = [place for place, _ in named]
    clean, robust = ([100 * getattr(row, kind) / max(1, row.n) for _, row in named] for kind in ("clean", "robust"))
    pitch = _row_height(num_classes)
    # Not as bars, and names not as tick labels: with 102 classes matplotlib takes twice as long for those.
    axes.hlines(places, 0, clean, colors=BLUE, alpha=CLEAN_ALPHA, linewidth=0.74 * pitch)
    axes.hlines(places, 0, robust, colors=VERMILION, linewidth=0.3 * pitch)
    if num_classes <= LARGE_BARS:
        for place, before, after in zip(places, clean, robust, strict=True):
            axes.text(102, place, f"{before:.0f} / {after:.0f}", va="center_baseline", color=MUTED)
    size = 12 if num_classes <= LARGE_BARS else 11
    for place, row in enumerate(rows):
        name = label(row.name, longest) if isinstance(row, ClassCounts) else f"\u22ee {row:,} between"
        axes.text(-2, place, name, ha="right", va="center_baseline", fontsize=size, parse_math=False)
    axes.set_yticks([])
    axes.set(xlim=(0, 100), ylim=(height - 0.4, -0.6))
    axes.set_xticks([0, 50, 100], ["0", "50", "100"])
    axes.tick_params(length=0)
    axes.grid(axis="x")
    axes.spines[:].set_visible(False)


def _row_height(num_classes: int) -> float:
    return 26 if num_classes <= LARGE_BARS else 15.5


def _named(rows: Sequence[ClassCounts]) -> str:
    return ", ".join(f"{row.name} ({100 * row.robust / max(1, row.n):.0f} %)" for row in rows)
