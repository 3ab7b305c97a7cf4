"""Comparisons with invented numbers, for tests of their table and page only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastadv import __version__
from fastadv.comparison import Cell, Comparison
from fastadv.comparison_results import Result, Row
from fastadv.measure import wilson

# Figure 1 of arXiv:2312.05716, read off the picture: clean and PGD, means over five data sets, of 10,000.
FIGURE_1 = {
    "linear": (7901, 3747),
    "ranli-full": (7627, 4005),
    "roli-full": (8401, 4627),
    "ranli-adapter": (7793, 4244),
    "roli-adapter": (8001, 4335),
    "ranli-lora": (7765, 4215),
    "roli-lora": (8138, 4437),
    "ranli-bias": (7907, 4375),
    "roli-bias": (8108, 4420),
}
# Markup, mathematics, a place that is no place to break.
DIFFICULT = ("<script>alert(1)</script>", "$x_{", "W" * 70)


def history(strategy: str, clean: float, robust: float) -> list[dict[str, Any]]:
    """Two validated epochs of a probe, where there is one, and three of fine-tuning, the second the best."""
    stages = [] if strategy.startswith("ranli") else [("probe", (0.5, 0.7))]
    stages += [] if strategy == "linear" else [("finetune", (0.8, 1.0, 0.9))]
    return [
        {
            **{"stage": name, "stage_index": index, "clean": share * clean, "robust": share * robust},
            **{"seconds": 10.0, "steps": 3},
        }
        for index, (name, shares) in enumerate(stages)
        for share in shares
    ]


def result(cell: Cell, clean: int, robust: int, n: int = 10_000, **changes: Any) -> Result:
    """A finished cell with so many right of ``n`` images."""
    (clean_low, clean_high), (robust_low, robust_high) = wilson(clean, n), wilson(robust, n)
    known: dict[str, Any] = {
        **{"strategy": cell.strategy, "data": cell.data, "weights": cell.weights, "seed": cell.seed, "n": n},
        **{"clean": clean / n, "clean_low": clean_low, "clean_high": clean_high},
        **{"robust": robust / n, "robust_low": robust_low, "robust_high": robust_high},
        **{"norm": "linf", "eps": 8 / 255, "attack": "PGD-10", "device": "cpu", "version": __version__},
        **{"lr": 5e-4, "trainable_encoder": 770_048, "trainable_all": 780_298, "epochs": "2+3", "train_seconds": 50.0},
        **{"probe_clean": 0.8 if cell.strategy.startswith("lp-") else None},
    }
    epochs = history(cell.strategy, clean / n, robust / n)
    return Result(cell=cell, row=Row(**known | changes), history=epochs, environment={"torch": "2.15.0"})


def failed(cell: Cell, reason: str) -> Result:
    """A cell that failed."""
    return Result(
        cell=cell, row=Row(strategy=cell.strategy, data=cell.data, weights=cell.weights, seed=cell.seed, failure=reason)
    )


def invented(
    folder: Path,
    numbers: dict[str, tuple[int, int]] = FIGURE_1,
    *,
    data: Sequence[str] = ("digits",),
    weights: Sequence[str] = ("robust",),
    seeds: int = 1,
) -> tuple[Comparison, list[Result]]:
    """A comparison whose strategies have ``numbers``, some hundreds away with each further seed, data and weights."""
    cells = [
        Cell(strategy=strategy, data=one, weights=backbone, seed=seed)
        for seed in range(seeds)
        for one in data
        for backbone in weights
        for strategy in numbers
    ]
    results = []
    for cell in cells:
        shift = 100 * (cell.seed + 7 * data.index(cell.data) - 9 * weights.index(cell.weights))
        results.append(result(cell, *(number + shift for number in numbers[cell.strategy])))
    command = "python -m fastadv.compare --strategies 'roli-full' --train-steps 2"
    whole = Comparison(folder=folder, cells=tuple(cells), settings={"train_steps": 2}, commands=(command,))
    return whole, results


def pretend(whole: Comparison, cell: Cell, clean: int = 9, robust: int = 6, n: int = 12) -> None:
    """Leave behind what a run of the cell leaves, but weights."""
    folder = whole.path(cell)
    (folder / "step-00000006").mkdir(parents=True)
    found = result(cell, clean, robust, n)
    assert found.row is not None
    ends = {f"{kind}_interval": wilson(hits, n) for kind, hits in (("clean", clean), ("robust", robust))}
    one = {name: getattr(found.row, name) for name in ("n", "clean", "robust", "norm", "eps", "attack", "device")}
    report = {"reports": [{**one, **ends, "seconds": 3.0}], "environment": {"fastadv": __version__}}
    recipe = whole.recipe(cell)
    contents = {
        "recipe.json": json.loads(recipe.to_json()),
        "split.json": {"classes": ["dark", "grey", "light"]},
        "report.json": {**report, "recipe_sha256": recipe.sha256},
        "cell.json": {"trainable_encoder": 5, "trainable_all": 7, "probe_clean": None},
        "step-00000006/manifest.json": {
            **{"format": 1, "files": {}},
            "meta": {"stage": 1, "history": list(found.history)},
        },
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
