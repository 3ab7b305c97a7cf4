"""The page of a comparison: who is ahead, by how much, what it cost, how it was learned, and what was shrunk."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from fastadv import comparison_plots as plots
from fastadv import page
from fastadv.comparison import Comparison
from fastadv.comparison_plots import Panel, Probes, pairs
from fastadv.comparison_results import Group, Result, Row, groups, left_out, table_rows
from fastadv.page import Block, Caution, Data, Points, Section, Table
from fastadv.recipe import Recipe, show_pixels
from fastadv.strategies import load_all

# What every cell has its own of.
OWN = ("strategy", "data", "weights", "seed")
# A probe below so many times chance says little about the arms behind it; of fewer than ten classes, where that is too
# much to ask or more than all, half of the way from chance to all.
TIMES_CHANCE = 5


def write(path: Path, whole: Comparison, results: Sequence[Result], classes: dict[str, int]) -> None:
    """Write the page to ``path``, one HTML file that needs no other. classes: their number in every data set."""
    found = groups(results)
    panels = _panels(whole, found)
    sections = [
        Section(title="", blocks=_lead(whole, results, panels)),
        Section(title="The numbers", blocks=_numbers(whole, found)),
        Section(title="Clean against robust", blocks=[plots.scatter(one, _attack(one)) for one in panels]),
        Section(title="Over the epochs", blocks=_curves(whole, panels, results)),
        Section(title="What a probe foretells", blocks=_probes(whole, found)),
        Section(title="What was set", blocks=_settings(whole)),
        Section(title="What the numbers do not say", blocks=[Points(_limits(whole, results, panels, classes))]),
    ]
    environment = next((result.environment for result in results if result.environment), {})
    text = page.build(
        f"Strategies on {', '.join(whole.data_names.values())}",
        [section for section in sections if section.blocks],
        command="\n".join([*whole.commands, f"python -m fastadv.compare {shlex.quote(str(whole.folder))}"]),
        environment=environment,
    )
    path.write_text(text, encoding="utf-8", errors="replace")


def _panels(whole: Comparison, found: Sequence[Group]) -> list[Panel]:
    """One for every data set and backbone with a result."""
    keys = dict.fromkeys((group.data, group.weights) for group in found if group.rows)
    return [
        Panel(title(whole, *key), [group for group in found if (group.data, group.weights) == key and group.rows])
        for key in keys
    ]


def title(whole: Comparison, data: str, weights: str) -> str:
    """``digits, robust backbone``."""
    kind = {"none": "no pre-training"}.get(weights, f"{whole.weights_names[weights]} backbone")
    return f"{whole.data_names[data]}, {kind}"


def verdict(panels: Sequence[Panel]) -> str:
    """The comparison in one paragraph: RoLI against RanLI where both are there, and who is ahead."""
    joined = [pair for panel in panels for pair in pairs(panel.groups)]
    said = []
    if joined:
        clean, robust = (
            [100 * (after.mean(kind) - before.mean(kind)) for before, after in joined] for kind in ("clean", "robust")
        )
        gains = f"{sum(robust) / len(robust):+.1f} points robust and {sum(clean) / len(clean):+.1f} clean"
        ahead = f", on average over {len(joined)} pairs; robust accuracy rises in {sum(gain > 0 for gain in robust)}"
        said.append(f"From RanLI to RoLI: {gains}{ahead if len(joined) > 1 else ''}.")
    first = [(max(panel.groups, key=lambda group: group.mean("robust")), panel.title) for panel in panels]
    best = "; ".join(f"{group.strategy} on {name} ({100 * group.mean('robust'):.1f} %)" for group, name in first)
    said += [f"Most robust: {best}."] if first else ["No cell has a result yet."]
    return " ".join(said)


def _attack(panel: Panel) -> str:
    row = panel.groups[0].rows[0]
    return f"{row.attack} {row.norm} {show_pixels(row.eps or 0, row.norm)}"


def _lead(whole: Comparison, results: Sequence[Result], panels: Sequence[Panel]) -> list[Block]:
    blocks: list[Block] = [verdict(panels)]
    failed = [(r.cell.strategy, r.row.failure) for r in results if r.row and r.row.failure]
    missing = [result for result in results if result.row is None]
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in dict.fromkeys(failed))
        blocks.append(Caution(f"{len(failed)} of {len(results)} cells failed. {reasons}."))
    if missing:
        blocks.append(Caution(f"{len(missing)} of {len(results)} cells have no result yet."))
    blocks += [Caution(f"Left out: {said}.") for said in left_out(whole, results)]
    odd = _mixed([r.row for r in results if r.row and not r.row.failure])
    if odd:
        blocks.append(Caution(f"The cells differ in {' and '.join(odd)}: their numbers are not of one making."))
    if panels:
        first = panels[0].groups[0].rows[0]
        blocks.append(
            f"Robust: right when clean and at every point that {first.attack} tries at {first.norm} "
            f"{show_pixels(first.eps or 0, first.norm)}, scored in fp32. Means over seeds, behind \u00b1 their "
            "standard deviation; of one seed the 95 % Wilson interval."
        )
    return blocks


def _mixed(rows: Sequence[Row]) -> list[str]:
    return [name for name in ("version", "device", "attack", "eps") if len({getattr(row, name) for row in rows}) > 1]


def _numbers(whole: Comparison, found: Sequence[Group]) -> list[Block]:
    """A table for every data set and backbone."""
    blocks: list[Block] = []
    for data, weights in dict.fromkeys((group.data, group.weights) for group in found):
        rows = table_rows(whole, [group for group in found if (group.data, group.weights) == (data, weights)])
        columns = [name for name in rows[0] if name not in ("data", "weights")]
        cells = [[row[name].replace("+-", "\u00b1") for name in columns] for row in rows]
        blocks.append(Table(columns=columns, rows=cells, caption=title(whole, data, weights)))
    if not blocks:
        return []
    return [
        *blocks,
        'lr: of the last stage; "of 3": the one of three with the best robust validation accuracy at the first seed '
        "(clean, where nothing attacks in validation); undertrained: chosen from fewer than three, or from others than "
        "what it stands against. "
        "encoder, all: parameters that learn in the last stage, in the backbone and with the head. epochs: of every "
        "stage. seconds: of training with its validation, a mean over seeds.",
    ]


def _curves(whole: Comparison, panels: Sequence[Panel], results: Sequence[Result]) -> list[Block]:
    blocks: list[Block] = []
    for panel in panels:
        one = panel.groups[0]
        own = [r for r in results if (r.cell.data, r.cell.weights) == (one.data, one.weights)]
        chosen = [r for r in own if r.history and r.row and r.row.chosen]
        blocks += [plots.curves(panel, chosen)] if chosen else []
    return blocks


def _probes(whole: Comparison, found: Sequence[Group]) -> list[Block]:
    points = []
    for linear in (group for group in found if group.strategy == "linear" and group.rows):
        for group in found:
            clean = [row.probe_clean for row in group.rows if row.probe_clean is not None]
            if (group.data, group.weights) == (linear.data, linear.weights) and clean:
                name = title(whole, linear.data, linear.weights)
                points.append(Probes(name, sum(clean) / len(clean), linear.mean("robust")))
                break
    return [plots.foretold(points)] if points else []


def _settings(whole: Comparison) -> list[Block]:
    """What differs from the strategies' own recipes, and the recipes themselves."""
    known, rows = load_all(), dict[tuple[str, str, str], None]()
    recipes = {cell.strategy: whole.recipe(cell) for cell in whole}
    # The table of numbers has the rate that each was given.
    searched = {cell.strategy for cell in whole if cell.lr}
    for name, recipe in recipes.items():
        own = known[name].recipe
        for field in dataclasses.fields(recipe):
            here, there = (_show(field.name, one) for one in (recipe, own))
            if field.name not in OWN and here != there and not (field.name == "lr" and name in searched):
                rows[field.name, here, there] = None
    blocks: list[Block] = []
    if rows:
        blocks.append(
            Table(columns=("setting", "here", "otherwise"), rows=list(rows), caption="Other than in full-size runs:")
        )
    own_values = {
        name: {
            field: value
            for field, value in dataclasses.asdict(recipe).items()
            if field not in OWN and not (field == "lr" and name in searched)
        }
        for name, recipe in recipes.items()
    }
    return [*blocks, Data(summary="Every setting of every strategy", value=own_values)]


def _show(name: str, recipe: Recipe) -> str:
    value = getattr(recipe, name)
    return show_pixels(value, recipe.norm) if name == "eps" or name.endswith("step_size") else str(value)


def chosen_rates(found: Sequence[Group]) -> str:
    """How far differences between the groups may be ones of learning rates, in a sentence or two."""
    alone = list(dict.fromkeys(group.strategy for group in found if not group.rates))
    if not alone:
        return "Learning rates were chosen from few, on one seed, by one validation split."
    which = "each strategy" if not any(group.rates for group in found) else ", ".join(alone)
    return (
        f"No learning rate was chosen for {which}: one ran, its own or the one that a flag gave to all. A difference "
        "may be one of learning rates, and counts as undertrained until they are chosen (--lrs)."
    )


def _limits(
    whole: Comparison, results: Sequence[Result], panels: Sequence[Panel], classes: dict[str, int]
) -> list[str]:
    seeds = sorted({result.cell.seed for result in results if result.row and not result.row.failure})
    limits = [
        f"{len(seeds)} {'seed says' if len(seeds) == 1 else 'seeds say'} little about the spread over seeds, and the "
        "spread says nothing about other data.",
        *([chosen_rates([group for panel in panels for group in panel.groups])] if panels else []),
        "RoLI and the other strategies with a probe train for more epochs than RanLI does; the column epochs says how "
        "many. A probe that several strategies share is trained once, and its seconds count in each of them.",
        "PGD alone tends to overstate robustness: python -m fastadv.evaluate with --attack autoattack takes the "
        "folder of any cell.",
    ]
    for panel in panels:
        linear = [group for group in panel.groups if group.strategy == "linear"]
        number = classes.get(panel.groups[0].data, 0)
        wanted = min(TIMES_CHANCE / number, (1 + 1 / number) / 2) if number else 0.0
        if linear and linear[0].mean("clean") < wanted:
            limits.append(
                f"Undertrained: on {panel.title} the probe reaches {100 * linear[0].mean('clean'):.1f} % clean, less "
                f"than {100 * wanted:.0f} %, where chance is {100 / number:.1f}. What stands behind it there is no "
                "comparison of methods."
            )
    if any(cell.data == "digits" for cell in whole):
        limits.append("The digits are a demonstration: small, easy, and far from the images the backbone has seen.")
    return limits
