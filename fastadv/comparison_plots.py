"""The figures of a comparison's page: clean against robust accuracy, what probes foretell, and learning curves.

Nothing is told by colour alone: RanLI, the paper's random head, is a hollow mark, every other start a filled one, and
every mark is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from fastadv.comparison_results import Group, Result
from fastadv.evaluation_plots import percent
from fastadv.page import Figure, Table
from fastadv.svg import BLUE, INK, LINE, MUTED, VERMILION, label

BEFORE, AFTER = "ranli-", "roli-"
# Where a name may stand: on which side of its mark, and how many points above it.
OFFSETS = [(side, height) for height in (0, 13, -13, 26, -26) for side in (1, -1)]
# Letters that a name may have, on a phone and on a wide screen.
LONGEST = (18, 30)


class Panel(NamedTuple):
    """The groups of one data set and one backbone."""

    title: str
    groups: Sequence[Group]


class Probes(NamedTuple):
    """Of one data set and backbone: clean accuracy of clean probing, robust accuracy of adversarial probing."""

    title: str
    clean: float
    robust: float


def pairs(groups: Sequence[Group]) -> list[tuple[Group, Group]]:
    """RanLI and RoLI of one tuning, wherever both have a result."""
    by_name = {group.strategy: group for group in groups if group.rows}
    named = [(name, name.replace(BEFORE, AFTER, 1)) for name in by_name if name.startswith(BEFORE)]
    return [(by_name[before], by_name[after]) for before, after in named if after in by_name]


def scatter(panel: Panel, attack: str) -> Figure:
    """Figure 1 of arXiv:2312.05716: a point for every strategy's mean, an arrow from RanLI to RoLI of one tuning."""
    shown = [group for group in panel.groups if group.rows]
    joined = pairs(shown)

    def paint(canvas: Canvas, wide: bool) -> None:
        axes = canvas.add_subplot()
        axes.set(xlabel="clean accuracy (%)", ylabel=f"robust accuracy (%), {attack}")
        axes.grid()
        for group in shown:
            filled = _is_filled(group)
            places = [(100 * (row.clean or 0), 100 * (row.robust or 0)) for row in group.rows]
            if len(places) > 1:
                axes.plot(*zip(*places, strict=True), ".", color=MUTED, markersize=5, alpha=0.7)
            x, y = _place(group)
            fill = _colour(group) if filled else "none"
            axes.plot([x], [y], _mark(group), markersize=9, color=_colour(group), markerfacecolor=fill, zorder=3)
        for before, after in joined:
            style = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.4, "shrinkA": 8, "shrinkB": 8}
            axes.annotate("", _place(after), _place(before), arrowprops=style, zorder=2).set_gid("arrow")
        axes.margins(0.16 if wide else 0.2)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7 if wide else 4))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
        _name(canvas, axes, {group.strategy: _place(group) for group in shown}, LONGEST[wide])

    gains = [_gain(before, after) for before, after in joined]
    said = f"{panel.title}. A point is the mean over seeds, a dot one seed."
    if joined:
        said += " Arrows lead from RanLI (hollow) to RoLI (filled) of one tuning: " + "; ".join(gains) + "."
    rows = [
        (group.strategy, str(row.seed), *(percent(round((value or 0) * (row.n or 0)), row.n or 0) for value in values))
        for group in shown
        for row in group.rows
        for values in [(row.clean, row.robust)]
    ]
    table = Table(columns=("strategy", "seed", "clean", "robust"), rows=rows, caption="With 95 % Wilson intervals.")
    return Figure(paint=paint, heights=(420, 330), alt=f"Points and arrows. {said}", caption=said, table=table)


def curves(panel: Panel, results: Sequence[Result]) -> Figure:
    """Validation accuracy over the epochs, one small drawing per strategy, and how far the end falls behind the best.

    results: the finished ones of the panel, of all seeds.
    """
    names = list(dict.fromkeys(result.cell.strategy for result in results))
    chosen = {name: [result for result in results if result.cell.strategy == name] for name in names}
    gaps = {name: [gap for result in chosen[name] if (gap := overfitting(result.history))] for name in names}
    highest = max((100 * (row["clean"] or 0) for result in results for row in result.history), default=0)

    def paint(canvas: Canvas, wide: bool) -> None:
        columns = 3 if wide else 2
        lines = -(-len(names) // columns)
        grid = canvas.subplots(lines, columns, squeeze=False, sharey=True).ravel()
        for axes, name in zip(grid, names, strict=False):
            for result in chosen[name]:
                _learning(axes, result.history)
            axes.set_title(label(name, 26 if wide else 18), loc="left", fontsize=12, color=INK, parse_math=False)
            axes.set_ylim(0, min(100, highest * 1.12 + 1))
            axes.grid(axis="y")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, steps=[1, 2, 5, 10]))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
            axes.tick_params(axis="y", length=0)
        for axes in grid[len(names) :]:
            axes.axis("off")
        canvas.supxlabel("epoch", fontsize=12, color=MUTED)
        canvas.supylabel("validation accuracy (%)", fontsize=12, color=MUTED)

    means = {name: sum(best - last for best, last in found) / len(found) for name, found in gaps.items() if found}
    worst = max(means, key=lambda name: means[name], default="")
    said = (
        f"{panel.title}. Clean (blue, solid) and robust (vermilion, dashed) validation accuracy of every seed; a grey "
        "line where fine-tuning begins."
    )
    if means and means[worst] > 0:
        said += f" The last epoch falls furthest behind the best one in {worst}, by {100 * means[worst]:.1f} points."
    elif means:
        said += " In no run was the last validated epoch worse than the best one."
    rows = [
        (
            name,
            *(f"{100 * sum(pair[place] for pair in found) / len(found):.1f} %" for place in (0, 1)),
            f"{100 * means[name]:.1f}",
        )
        for name, found in gaps.items()
        if found
    ]
    table = Table(
        columns=("strategy", "best", "last", "gap, points"),
        rows=rows,
        caption="Robust validation accuracy in the last stage, means over seeds. Tests use the best epoch's weights.",
    )
    heights = [42 + 150 * -(-len(names) // columns) for columns in (3, 2)]
    return Figure(
        paint=paint, heights=(heights[0], heights[1]), alt=f"Lines. {said}", caption=said, table=table if rows else None
    )


def overfitting(history: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Best and last robust validation accuracy of the last stage; None where fewer than two were measured."""
    measured = [row["robust"] for row in history if row["stage_index"] == history[-1]["stage_index"]]
    measured = [value for value in measured if value is not None]
    return (max(measured), measured[-1]) if len(measured) > 1 else None


def foretold(points: Sequence[Probes]) -> Figure:
    """Figure 5 of arXiv:2312.05716: does a clean probe tell how robust an adversarial probe will be?"""

    def paint(canvas: Canvas, wide: bool) -> None:
        axes = canvas.add_subplot()
        axes.set(xlabel="clean accuracy of clean probing (%)", ylabel="robust accuracy of\nadversarial probing (%)")
        axes.grid()
        x, y = [100 * point.clean for point in points], [100 * point.robust for point in points]
        axes.plot(x, y, "o", markersize=9, color=VERMILION, zorder=3)
        axes.margins(0.2)
        if len(points) == 1:
            axes.set(xlim=(x[0] - 10, x[0] + 10), ylim=(y[0] - 10, y[0] + 10))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7 if wide else 4))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
        _name(canvas, axes, {point.title: (100 * point.clean, 100 * point.robust) for point in points}, LONGEST[wide])

    said = "A point for every data set and backbone, the mean over seeds."
    if len(points) < 3:
        said += f" {len(points)} {'point is' if len(points) == 1 else 'points are'} too few to speak of a correlation."
    rows = [(point.title, f"{100 * point.clean:.1f} %", f"{100 * point.robust:.1f} %") for point in points]
    table = Table(columns=("data and backbone", "clean probe, clean", "adversarial probe, robust"), rows=rows)
    return Figure(paint=paint, heights=(340, 290), alt=f"Points. {said}", caption=said, table=table)


def _learning(axes: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    """Both curves of one run."""
    for place, row in enumerate(history):
        if place and row["stage_index"] != history[place - 1]["stage_index"]:
            axes.axvline(place + 0.5, color=LINE, linewidth=1.2)
    for kind, colour, line in (("clean", BLUE, "-"), ("robust", VERMILION, "--")):
        points = [(place + 1, 100 * row[kind]) for place, row in enumerate(history) if row[kind] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), line, color=colour, marker="o", markersize=3, linewidth=1.4)


def _place(group: Group) -> tuple[float, float]:
    return 100 * group.mean("clean"), 100 * group.mean("robust")


def _gain(before: Group, after: Group) -> str:
    clean, robust = (100 * (after.mean(kind) - before.mean(kind)) for kind in ("clean", "robust"))
    return f"{after.strategy.removeprefix(AFTER)} {clean:+.1f} clean and {robust:+.1f} robust"


def _is_filled(group: Group) -> bool:
    return not group.strategy.startswith(BEFORE)


def _colour(group: Group) -> str:
    return VERMILION if group.strategy.startswith(AFTER) else BLUE if group.strategy.startswith(BEFORE) else MUTED


def _mark(group: Group) -> str:
    return "o" if group.strategy.startswith((AFTER, BEFORE)) else "s"


def _name(canvas: Canvas, axes: Axes, places: Mapping[str, tuple[float, float]], longest: int) -> None:
    """Write every name beside its point, where it covers no point and no other name."""
    canvas.draw_without_rendering()
    frame = axes.get_window_extent()
    points = {name: axes.transData.transform(place) for name, place in places.items()}
    # In the units of the transform: a point is dpi / 72 of them.
    unit = canvas.dpi / 72
    taken = [Bbox.from_bounds(x - 6 * unit, y - 6 * unit, 12 * unit, 12 * unit) for x, y in points.values()]
    for name, (x, y) in sorted(points.items(), key=lambda item: -item[1][1]):
        note = axes.annotate(
            label(name, longest),
            places[name],
            (0, 0),
            textcoords="offset points",
            va="center_baseline",
            parse_math=False,
        )
        # Else a long name would shrink the axes to nothing.
        note.set_in_layout(False)
        size = note.get_window_extent()
        tried: list[tuple[float, int, float, int, Bbox]] = []
        for side, dy in OFFSETS:
            left = x + (9 * unit if side > 0 else -9 * unit - size.width)
            left = max(0.0, min(left, canvas.bbox.width - size.width))
            box = Bbox.from_bounds(left, y + dy * unit - size.height / 2, size.width, size.height)
            # Outside of the frame is three times as bad as over another name.
            over = sum(_overlap(box, other) for other in taken)
            over += 3 * (size.width * size.height - _overlap(box, frame))
            tried.append((over, len(tried), (left - x) / unit, dy, box))
        _, _, dx, dy, box = min(tried)
        taken.append(box)
        note.set_position((dx, dy))


def _overlap(one: Bbox, other: Bbox) -> float:
    shared = Bbox.intersection(one, other)
    return float(shared.width * shared.height) if shared is not None else 0.0
