"""What was promised, against what was measured: met, missed, or not measured and why. Nothing is left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from contestants import AUTO, FAST
from subjects import SWIN_TINY

NO_BF16 = "not measurable here: this CPU has no bf16 instructions, it would be emulated"


@dataclass(frozen=True, kw_only=True)
class Target:
    """One promise about a ratio. A speed-up is at least ``bound``; memory, a share, at most."""

    what: str
    bound: float
    at_most: bool = False

    def judged(self, value: float | None, why: str = "") -> dict[str, Any]:
        """The promise beside what came out; ``why``: the reason for which nothing was measured."""
        if value is None:
            verdict = why or "not measured"
        else:
            verdict = "met" if (value <= self.bound if self.at_most else value >= self.bound) else "missed"
        return {"what": self.what, "bound": self.bound, "at_most": self.at_most, "measured": value, "verdict": verdict}


ROLI = "RoLI's loop"
# (promise, cell, our side, their side); ratios of wall seconds in the same rounds, or of peak memory.
CPU_TARGETS = (
    (Target(what="PGD-10 swin_tiny, fp32, against torchattacks", bound=1.2), "attack", FAST, "torchattacks"),
    (Target(what="PGD-10 swin_tiny, fp32, against RoLI's loop", bound=1.7), "attack", FAST, ROLI),
    (Target(what="PGD-10 swin_tiny, bf16, against torchattacks in fp32", bound=2.3), "attack", AUTO, "torchattacks"),
    (Target(what="PGD-10 swin_tiny, bf16, against RoLI's loop in fp32", bound=3.2), "attack", AUTO, ROLI),
    (
        Target(what="training step, PGD-7 full swin_tiny, bf16, against RoLI's loop in fp32", bound=2.8),
        "full",
        AUTO,
        ROLI,
    ),
    (
        Target(what="peak memory of an attack on swin_tiny, share of RoLI's loop", bound=0.6, at_most=True),
        "memory",
        FAST,
        ROLI,
    ),
)
CELLS = {
    "attack": f"attack/{SWIN_TINY}",
    "full": f"training/{SWIN_TINY}/full",
    "memory": f"memory/{SWIN_TINY}",
}


def judged(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every promise for a CPU beside what ``document``, the JSON of peers.py, has for it."""
    found = []
    for target, cell, side, other in CPU_TARGETS:
        rows = document["cells"].get(CELLS[cell], {}).get("rows", {})
        value, why = None, f"not measured: {CELLS[cell]} did not run"
        if side == AUTO and not document["conditions"]["native_bf16"]:
            why = NO_BF16
        elif rows:
            value = ratio(rows.get(side, {}), rows.get(other, {}), cell)
            why = f"not measured: {side} or {other} was not timed"
        found.append(target.judged(value, why))
    return found


def ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any], cell: str) -> float | None:
    """How many times as long theirs takes, or the share of their memory that ours needs; None where one is missing."""
    if cell == "memory" and "peak_bytes" in ours and "peak_bytes" in theirs:
        return float(ours["peak_bytes"] / theirs["peak_bytes"])
    if "wall_ratio" in ours and "wall_ratio" in theirs:
        return float(theirs["wall_ratio"] / ours["wall_ratio"])
    return None


def lines(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """The verdicts as text, one line each."""
    return [
        f"{row['verdict']:>8}  {row['what']}: {shown(row['measured'])} "
        f"(promised {'<=' if row['at_most'] else '>='} {row['bound']:g})"
        for row in found
    ]


def shown(value: float | None) -> str:
    """A measured value, or a dash."""
    return "-" if value is None else f"{value:.2f}"
