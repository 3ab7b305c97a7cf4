"""What the cells of a comparison found: a row of results.csv each, the table of means, the curves behind both."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

from fastadv import __version__, checkpoint
from fastadv.assemble import saved_recipe
from fastadv.comparison import Cell, Comparison
from fastadv.comparison_cells import facts, failure
from fastadv.comparison_probe import has_rate, stages
from fastadv.comparison_rates import best_validated, epochs_of, is_finished
from fastadv.errors import SettingsError
from fastadv.runfolder import write_whole

FILE = "results.csv"
# Fewer learning rates to choose from leave open whether a difference is one of rates.
WANTED_RATES = 3


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of results.csv. Accuracies are fractions with 95 % Wilson intervals; of a failed cell they are empty."""

    strategy: str
    data: str
    weights: str
    seed: int
    lr: float | None = None
    """Peak learning rate of the last stage."""
    chosen: bool = True
    """False for a learning rate among several that was not chosen: such rows are in no mean."""
    val_clean: float | None = None
    val_robust: float | None = None
    """Validation accuracies of the last stage's best epoch, by which the rate is chosen."""
    n: int | None = None
    clean: float | None = None
    clean_low: float | None = None
    clean_high: float | None = None
    robust: float | None = None
    robust_low: float | None = None
    robust_high: float | None = None
    norm: str = ""
    eps: float | None = None
    attack: str = ""
    trainable_encoder: int | None = None
    """Parameters that learn in the last stage but the head's: the backbone's, and what the strategy adds."""
    trainable_all: int | None = None
    """The same with the head."""
    probe_clean: float | None = None
    """Clean test accuracy of the first stage, where that is a clean probe."""
    epochs: str = ""
    """Of every stage: ``4+4``."""
    train_seconds: float | None = None
    """Of all stages with their validation; of a shared first stage, what it took where it was run."""
    eval_seconds: float | None = None
    device: str = ""
    version: str = ""
    """Of fastadv."""
    recipe_sha256: str = ""
    failure: str = ""
    """Why there is no result."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A cell with its row, None while it has not been run, and what it went through."""

    cell: Cell
    row: Row | None
    history: Sequence[dict[str, Any]] = ()
    """One mapping per epoch, as `plots.curves` takes them."""
    environment: dict[str, Any] | None = None
    """Versions and machine."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The finished cells that differ in their seeds alone, and how many of them failed."""

    strategy: str
    data: str
    weights: str
    rows: Sequence[Row]
    failures: Sequence[str] = ()
    rates: frozenset[float] = frozenset()
    """The learning rates from which the one of ``rows`` was chosen; none where there was no choice."""

    def mean(self, name: str) -> float:
        """The mean over seeds of a number."""
        values: list[float] = [getattr(row, name) for row in self.rows]
        return sum(values) / len(values)

    def spread(self, name: str) -> float | None:
        """The standard deviation over seeds (n - 1) of a number; None for one seed."""
        if len(self.rows) < 2:
            return None
        mean = self.mean(name)
        return math.sqrt(sum((getattr(row, name) - mean) ** 2 for row in self.rows) / (len(self.rows) - 1))


def collect(whole: Comparison) -> list[Result]:
    """What every cell has found so far."""
    return [result(whole, cell) for cell in whole]


def result(whole: Comparison, cell: Cell) -> Result:
    """What the cell has found so far."""
    folder, known = whole.path(cell), asdict(cell)
    if cell.lr == "chosen":
        known["lr"] = whole.chosen_rate(cell)
    elif cell.lr:
        # Of those that fail.
        known["chosen"] = False
    if not is_finished(folder):
        failed = failure(folder)
        sha = whole.recipe(cell).sha256
        row = Row(**known, version=__version__, recipe_sha256=sha, failure=failed.reason) if failed else None
        return Result(cell=cell, row=row)
    saved = json.loads((folder / "report.json").read_text())
    found, environment = saved["reports"][0], saved["environment"]
    history = epochs_of(folder)
    numbers = list(dict.fromkeys(row["stage_index"] for row in history))
    recipe, validated = saved_recipe(folder), best_validated(folder) or (None, None)
    known |= {"lr": stages(recipe)[-1].lr, "val_robust": validated[0], "val_clean": validated[1]}
    # Not so either where a rate that joined later is better than the one a further seed had.
    known["chosen"] = cell.lr is None or recipe.lr == whole.chosen_rate(cell)
    row = Row(
        **known,
        **{name: found[name] for name in ("n", "clean", "robust", "norm", "eps", "attack", "device")},
        **{f"{name}_{end}": found[f"{name}_interval"][place] for name, end, place in _ENDS},
        **facts(whole, cell),
        epochs="+".join(str(sum(row["stage_index"] == stage for row in history)) for stage in numbers),
        train_seconds=sum(row["seconds"] for row in history),
        eval_seconds=found["seconds"],
        version=environment["fastadv"],
        recipe_sha256=saved["recipe_sha256"],
    )
    return Result(cell=cell, row=row, history=history, environment=environment)


_ENDS = [(name, end, place) for name in ("clean", "robust") for place, end in enumerate(("low", "high"))]


def num_classes(whole: Comparison) -> dict[str, int]:
    """How many classes every data set has of which a cell has begun."""
    begun = {cell.data: path for cell in whole if ((path := whole.path(cell)) / "split.json").exists()}
    return {data: len(checkpoint.read_split(path)["classes"]) for data, path in begun.items()}


def groups(results: Sequence[Result]) -> list[Group]:
    """The cells with a row, by strategy, data and weights, in the order in which they appear; of each its best rate."""
    keys = dict.fromkeys(result.cell.key[:3] for result in results if result.row)
    found = []
    for strategy, data, weights in keys:
        known = [(r.cell, r.row) for r in results if r.row and r.cell.key[:3] == (strategy, data, weights)]
        rows = [row for _, row in known]
        found.append(
            Group(
                strategy=strategy,
                data=data,
                weights=weights,
                rows=[row for row in rows if row.chosen and not row.failure],
                failures=[row.failure for row in rows if row.failure],
                rates=frozenset(cell.lr for cell, _ in known if isinstance(cell.lr, float)),
            )
        )
    return found


def table_rows(whole: Comparison, found: Sequence[Group]) -> list[dict[str, str]]:
    """The table: one row for each strategy, data set and backbone. What learns is counted in the last stage."""
    rows = []
    for group in found:
        row = {
            "strategy": group.strategy,
            "data": whole.data_names[group.data],
            "weights": whole.weights_names[group.weights],
            "seeds": str(len(group.rows)),
            **dict.fromkeys(("clean %", "robust %", "lr", "encoder", "all", "epochs", "seconds"), "-"),
        }
        if group.rows:
            first = group.rows[0]
            row |= {"clean %": _mean(group, "clean"), "robust %": _mean(group, "robust"), "epochs": first.epochs}
            row |= {"encoder": f"{first.trainable_encoder:,}", "all": f"{first.trainable_all:,}"}
            row["lr"] = _rate(whole, group, found)
            row["seconds"] = f"{group.mean('train_seconds'):,.0f}"
        rows.append(row)
    return rows


def left_out(whole: Comparison, results: Sequence[Result]) -> list[str]:
    """A line for every run of a further seed that has another rate than the one chosen now, and is in no mean."""
    return [
        f"{whole.name(r.cell)}: trained with lr {r.row.lr:g}, {whole.chosen_rate(r.cell):g} is chosen now; remove the "
        "folder and it is trained again"
        for r in results
        if r.cell.lr == "chosen" and r.row and not r.row.failure and not r.row.chosen
    ]


def _rate(whole: Comparison, group: Group, found: Sequence[Group]) -> str:
    """``0.0015 of 3``: the rate and among how many it was chosen.

    ``0.0005 undertrained`` without a choice among three, or among others than what it stands against: the same tuning
    behind another head.
    """
    text = f"{group.rows[0].lr:g}" + (f" of {len(group.rates)}" if group.rates else "")
    cell = Cell(strategy=group.strategy, data=group.data, weights=group.weights, seed=group.rows[0].seed)
    if not has_rate(whole.recipe(cell)):
        return text
    place, tuning = (group.data, group.weights), group.strategy.partition("-")[2]
    others = [g for g in found if (g.data, g.weights) == place and g.strategy.partition("-")[2] == tuning]
    fair = len(group.rates) >= WANTED_RATES and all(other.rates == group.rates for other in others)
    return text if fair else f"{text} undertrained"


def _mean(group: Group, name: str) -> str:
    """In percent ``80.0 +- 1.2``, mean and standard deviation over seeds; of one seed its Wilson interval."""
    text, spread = f"{100 * group.mean(name):.1f}", group.spread(name)
    if spread is not None:
        return f"{text} +- {100 * spread:.1f}"
    low, high = (100 * getattr(group.rows[0], f"{name}_{end}") for end in ("low", "high"))
    return f"{text} ({low:.1f}-{high:.1f})"


def write_csv(folder: Path, results: Sequence[Result]) -> None:
    """Write results.csv, whole or not at all. Raises SettingsError, see `check_csv`."""
    check_csv(folder)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Row))
    writer.writerows(astuple(result.row) for result in results if result.row)
    write_whole(folder / FILE, text.getvalue())


def check_csv(folder: Path, *, same_version: bool = False) -> None:
    """Raise SettingsError where a results.csv of other columns would be replaced; asked, also one of other versions."""
    path = folder / FILE
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.DictReader(file)
        columns = [field.name for field in fields(Row)]
        if reader.fieldnames != columns:
            odd = sorted(set(columns) ^ set(reader.fieldnames or ())) or ["their order"]
            raise SettingsError(
                f"{path} has other columns than this version's ({', '.join(odd)})",
                "--out OTHER, or remove it: it is made again from the cells",
            )
        versions = {row["version"] for row in reader} - {__version__}
    if versions and same_version:
        raise SettingsError(
            f"{path} has results of fastadv {', '.join(sorted(map(str, versions)))}, this is {__version__}",
            "--out OTHER: results of two versions are not one comparison",
        )
