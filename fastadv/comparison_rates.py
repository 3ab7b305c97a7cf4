"""The learning rates a comparison chooses from: the one that validated best at the first seed serves the others too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastadv import checkpoint

# What a finished cell keeps beside its report, so that its checkpoints may be deleted.
FACTS, HISTORY = "cell.json", "history"


def best_rate(runs: Mapping[float, Path]) -> float | None:
    """The learning rate of the finished run with the best validated epoch, the first of equals; None where none is.

    As within a run: by robust accuracy, between equals by clean accuracy, of the last stage.
    """
    scores = {lr: score for lr, folder in runs.items() if is_finished(folder) and (score := best_validated(folder))}
    return max(scores, key=lambda lr: scores[lr]) if scores else None


def best_validated(folder: Path) -> tuple[float, float] | None:
    """Robust and clean validation accuracy of the best epoch of a run's last stage; robust 0 where not measured."""
    history = epochs_of(folder)
    last = [row for row in history if row["stage_index"] == history[-1]["stage_index"] and row["clean"] is not None]
    return max(((row["robust"] or 0.0, row["clean"]) for row in last), default=None)


def is_finished(folder: Path) -> bool:
    """Whether the run in ``folder`` has its result."""
    try:
        return bool(json.loads((folder / "report.json").read_text())["reports"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def epochs_of(folder: Path) -> list[dict[str, Any]]:
    """The epochs of a cell's run: as kept at its end, or as its newest checkpoint remembers; nothing without either."""
    try:
        kept: list[dict[str, Any]] = json.loads((folder / FACTS).read_text())[HISTORY]
        return kept
    except (OSError, ValueError, KeyError):
        # Not finished, or of a time when it was not kept.
        pass
    history: list[dict[str, Any]] = checkpoint.newest_meta(folder).get("history", [])
    return history
