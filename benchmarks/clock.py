"""Seconds of bodies that take turns: whatever else the machine does meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch


class Turn(NamedTuple):
    """One call: seconds on the wall, and seconds of this process on the CPU, all threads together."""

    wall: float
    cpu: float


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Callable[[], object]) -> Turn:
    """What one call takes, with everything it queued on the device."""
    synchronise()
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    synchronise()
    return Turn(time.perf_counter() - wall, time.process_time() - cpu)


def taking_turns(
    calls: Mapping[str, Callable[[], object]], rounds: int, before: Callable[[int], None] | None = None
) -> dict[str, list[Turn]]:
    """The turns of each body, one call of each per round; ``before`` is called with the number of each round.

    Every round starts with another body, so that none always follows the same one.
    """
    names = list(calls)
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    for number in range(rounds):
        if before is not None:
            before(number)
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            turns[name].append(timed(calls[name]))
    return turns


def summary(turns: Mapping[str, list[Turn]], against: str) -> dict[str, dict[str, Any]]:
    """Per body: median and range of wall and CPU seconds, and how many times as long as ``against`` it takes.

    The ratio is the median of the rounds' ratios, with their range: a slow round slows both of its sides.
    """
    found = {}
    for name, own in turns.items():
        row: dict[str, Any] = {"rounds": len(own)}
        for clock in Turn._fields:
            seconds = [getattr(turn, clock) for turn in own]
            ratios = [mine / getattr(base, clock) for mine, base in zip(seconds, turns[against], strict=True)]
            row[f"{clock}_s"], row[f"{clock}_range_s"] = statistics.median(seconds), [min(seconds), max(seconds)]
            row[f"{clock}_ratio"], row[f"{clock}_ratio_range"] = statistics.median(ratios), [min(ratios), max(ratios)]
        found[name] = row
    return found
