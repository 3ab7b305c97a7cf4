"""Pass marks: what was claimed, what was predicted, what was measured over the seeds, and whether it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean, stdev
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A line of the table."""

    claim: str
    predicted: str
    measured: str
    holds: bool
    control: bool = False
    """A negative control: here something must go wrong."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an experiment found. numbers: JSON from which its figures are drawn."""

    marks: list[Mark]
    numbers: dict[str, Any]
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    failure: str = ""
    """Why there is nothing else."""
    environment: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it in JSON's own types."""
        return asdict(self)

    @classmethod
    def of_json(cls, saved: dict[str, Any]) -> Outcome:
        """The outcome that ``to_json`` told."""
        return cls(**{**saved, "marks": [Mark(**mark) for mark in saved["marks"]]})


def spread(values: Sequence[float], form: str = "{:.3f}") -> str:
    """``0.583 +- 0.012``: the mean over seeds and the standard deviation (n - 1); of one seed its number."""
    if len(values) < 2:
        return form.format(values[0])
    return f"{form.format(mean(values))} \u00b1 {form.format(stdev(values))}"
