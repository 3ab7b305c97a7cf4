"""The page of an inheritance: what a clean head keeps of each pre-training, and what the first layers look like."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from fastadv import page
from fastadv.comparison import Comparison
from fastadv.comparison_page import TIMES_CHANCE, chosen_rates
from fastadv.comparison_results import Group, Result, Row, groups, num_classes, table_rows
from fastadv.evaluation_plots import percent
from fastadv.first_layer import FirstLayer
from fastadv.page import Block, Caution, Data, Figure, Gallery, Picture, Points, Section, Table
from fastadv.recipe import show_pixels
from fastadv.runfolder import write_whole
from fastadv.svg import BLUE, INK, MUTED, VERMILION, label

# What each arm is called on the page.
ARMS = {
    "clean-linear": "clean head, frozen backbone",
    "clean-full": "clean, everything learns",
    "linear": "adversarial head, frozen backbone",
}
# Of a comparison's table.
SHOWN = ("clean %", "robust %", "seeds", "lr", "epochs", "seconds")
# A picture of filters is a few dozen pixels wide: on a page each of them becomes so many.
ENLARGED = 8


def write(path: Path, whole: Comparison, results: Sequence[Result], layers: Mapping[str, FirstLayer]) -> None:
    """Write the page to ``path``, one HTML file that needs no other. layers: the first layer of every backbone."""
    found = [group for group in groups(results) if group.rows]
    sections = [
        Section(title="", blocks=_lead(whole, results, found)),
        Section(title="The numbers", blocks=_numbers(whole, found)),
        Section(title="First-layer filters", blocks=_filters(whole, layers)),
        Section(title="What the numbers do not say", blocks=[Points(_limits(whole, found))]),
        Section(title="What was set", blocks=[Data(summary="Every setting of every arm", value=_settings(whole))]),
    ]
    environment = next((result.environment for result in results if result.environment), {})
    text = page.build(
        f"What is inherited on {', '.join(whole.data_names.values())}",
        [section for section in sections if section.blocks],
        command="\n".join([*whole.commands, f"python -m fastadv.inherit {shlex.quote(str(whole.folder))}"]),
        environment=environment,
    )
    write_whole(path, text)


def verdict(whole: Comparison, found: Sequence[Group]) -> str:
    """What a clean head on a frozen backbone keeps under attack, for every backbone, in a sentence per data set."""
    said = []
    for data in dict.fromkeys(group.data for group in found):
        probes = [group for group in found if (group.strategy, group.data) == ("clean-linear", data)]
        parts = [
            f"{100 * group.mean('robust'):.1f} % of the test images from {whole.weights_names[group.weights]} "
            f"pre-training ({100 * group.mean('clean'):.1f} % clean)"
            for group in probes
        ]
        if parts:
            said.append(
                f"On {whole.data_names[data]} a head trained on clean images alone, the backbone frozen, stays right "
                f"under attack on {', '.join(parts)}."
            )
    return " ".join(said) or "No clean probe has a result yet."


def _lead(whole: Comparison, results: Sequence[Result], found: Sequence[Group]) -> list[Block]:
    blocks: list[Block] = [verdict(whole, found)]
    failed = [result.row for result in results if result.row and result.row.failure]
    missing = [result for result in results if result.row is None]
    if failed:
        reasons = "; ".join(dict.fromkeys(f"{row.strategy}: {row.failure}" for row in failed))
        blocks.append(Caution(f"{len(failed)} of {len(results)} cells failed. {reasons}."))
    if missing:
        blocks.append(Caution(f"{len(missing)} of {len(results)} cells have no result yet."))
    blocks.append(
        "The claim of arXiv:2401.15248: robustness that a backbone was pre-trained for passes on to another task when "
        "only a head is trained there, and on clean images. A backbone pre-trained without attacks has nothing to pass "
        "on."
    )
    if found:
        row = found[0].rows[0]
        blocks.append(
            f"Robust: right when clean and at every point that {row.attack} tries at {row.norm} "
            f"{show_pixels(row.eps or 0, row.norm)}, scored in fp32. Intervals are 95 % Wilson intervals over the test "
            "images of one seed."
        )
    return blocks


def _numbers(whole: Comparison, found: Sequence[Group]) -> list[Block]:
    blocks: list[Block] = []
    for data in dict.fromkeys(group.data for group in found):
        chosen = [group for group in found if group.data == data]
        blocks.append(_bars(whole, data, chosen))
        rows = [
            (
                ARMS.get(row["strategy"], row["strategy"]),
                row["weights"],
                *(row[name].replace("+-", "\u00b1") for name in SHOWN),
            )
            for row in table_rows(whole, chosen)
        ]
        columns = ("what learns", "pre-training", *SHOWN)
        blocks.append(Table(columns=columns, rows=rows, caption=f"{whole.data_names[data]}, means over seeds"))
    return blocks


def _bars(whole: Comparison, data: str, chosen: Sequence[Group]) -> Figure:
    """A line for every arm and backbone: clean accuracy a filled mark, robust accuracy a hollow one, with intervals."""
    arms = [arm for arm in ARMS if any(group.strategy == arm for group in chosen)]
    lines: list[tuple[str, Row | None]] = []
    for arm in arms:
        lines.append((ARMS[arm], None))
        for group in chosen:
            name = whole.weights_names[group.weights]
            lines += [(name, row) for row in group.rows if group.strategy == arm]

    def paint(canvas: Canvas, wide: bool) -> None:
        axes = canvas.add_subplot()
        axes.set(xlim=(-2, 102), ylim=(len(lines) - 0.4, -0.8), xlabel="accuracy (%)")
        axes.grid(axis="x")
        axes.set_yticks([place for place, (_, row) in enumerate(lines) if row])
        axes.set_yticklabels([label(name, 24 if wide else 12) for name, row in lines if row], parse_math=False)
        axes.tick_params(axis="y", length=0)
        for place, (name, row) in enumerate(lines):
            if row is None:
                axes.annotate(name, (0, place), xycoords=axes.get_yaxis_transform(), va="center", fontweight="bold")
                continue
            for value, low, high, colour, fill, lift in (
                (row.clean, row.clean_low, row.clean_high, BLUE, BLUE, -0.12),
                (row.robust, row.robust_low, row.robust_high, VERMILION, "none", 0.12),
            ):
                ends = [100 * (end or 0) for end in (low, high)]
                axes.plot(ends, [place + lift] * 2, color=colour, linewidth=2)
                axes.plot([100 * (value or 0)], [place + lift], "o", markersize=7, color=colour, markerfacecolor=fill)
        marks = [
            Line2D([], [], marker="o", linestyle="", color=BLUE, label="clean"),
            Line2D([], [], marker="o", linestyle="", color=VERMILION, markerfacecolor="none", label="robust"),
        ]
        canvas.legend(handles=marks, loc="outside upper right", ncols=2, labelcolor=INK)
        axes.spines["left"].set_color(MUTED)

    said = (
        f"{whole.data_names[data]}. Clean (blue, filled) and robust (vermilion, hollow) test accuracy of every seed, "
        "with 95 % Wilson intervals."
    )
    rows = [
        (
            ARMS.get(group.strategy, group.strategy),
            whole.weights_names[group.weights],
            str(row.seed),
            *(percent(round((value or 0) * (row.n or 0)), row.n or 0) for value in (row.clean, row.robust)),
        )
        for group in chosen
        for row in group.rows
    ]
    table = Table(columns=("what learns", "pre-training", "seed", "clean", "robust"), rows=rows)
    height = 70 + 30 * len(lines)
    return Figure(paint=paint, heights=(height, height), alt=f"Marks. {said}", caption=said, table=table)


def _filters(whole: Comparison, layers: Mapping[str, FirstLayer]) -> list[Block]:
    cards = []
    for weights, layer in layers.items():
        name = whole.weights_names[weights]
        pixels = layer.picture().repeat(ENLARGED, 0).repeat(ENLARGED, 1)
        number, _, height, width = layer.filters.shape
        alt = f"{number} filters of {width}x{height} pixels, {name} pre-training"
        cards.append((name, [Picture(pixels=pixels, alt=alt, label=f"roughness {layer.roughness:.2f}")]))
    return [
        "The filters that meet the pixels first, each scaled by its own largest weight, grey being zero (figure 5 of "
        "the paper). Roughness is the mean squared difference of neighbouring weights over the mean squared weight: 0 "
        "for a filter of one colour, 2 for white noise.",
        Gallery(cards=cards),
    ]


def _settings(whole: Comparison) -> dict[str, object]:
    return {cell.strategy: dataclasses.asdict(whole.recipe(cell)) for cell in whole}


def _limits(whole: Comparison, found: Sequence[Group]) -> list[str]:
    seeds = {row.seed for group in found for row in group.rows}
    limits = [
        f"{len(seeds)} {'seed says' if len(seeds) == 1 else 'seeds say'} little about the spread over seeds.",
        "The backbones may differ in more than the attack in their pre-training: in data, epochs and clean accuracy.",
        *([chosen_rates(found)] if found else []),
        "PGD alone tends to overstate robustness: python -m fastadv.evaluate with --attack autoattack takes the "
        "folder of any cell.",
    ]
    for data, number in num_classes(whole).items():
        wanted = min(TIMES_CHANCE / number, (1 + 1 / number) / 2)
        probes = [group for group in found if (group.strategy, group.data) == ("clean-linear", data)]
        weak = [whole.weights_names[group.weights] for group in probes if group.mean("clean") < wanted]
        if weak:
            limits.append(
                f"Undertrained: on {whole.data_names[data]} a clean head reaches less than {100 * wanted:.0f} % clean "
                f"from {', '.join(weak)}, where chance is {100 / number:.1f} %. What little it keeps says little."
            )
    if any(cell.data == "digits" for cell in whole):
        limits.append("The digits are a demonstration: small, easy, and far from the images the backbone has seen.")
    return limits
