"""What a run tells: one JSON line per event in its folder, and a progress bar or plain lines on the terminal."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import rich.progress
import rich.table
from rich.console import Console
from rich.text import Text

from fastadv.errors import CheckpointError

# Seconds after which someone who reads a log wants to know that it goes on.
SILENCE = 180


class RunLog:
    """A file of JSON lines, one per event, each on the disk's side of Python at once. An existing file is continued."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            # Unbuffered and in append mode: an event is one write, which a kill cannot mix with another.
            self._file = self.path.open("ab+", buffering=0)
            if self._file.tell():
                self._file.seek(-1, os.SEEK_END)
                torn = self._file.read(1) != b"\n"
                # The process before was killed in the middle of a line: that line is lost, the next one must not be.
                self._append(b"\n" if torn else b"")
        except OSError as error:
            raise self._not_written(error) from error

    def event(self, kind: str, **fields: Any) -> None:
        """Append ``{"time": ..., "event": kind, **fields}``; NaN and infinities as text, JSON has no word for them.

        Raises CheckpointError where the disk refuses.
        """
        line = {"time": _now(), "event": kind, **fields}
        try:
            self._append(json.dumps(_plain(line), allow_nan=False).encode() + b"\n")
        except OSError as error:
            raise self._not_written(error) from error

    def close(self) -> None:
        """Close the file; events after that are an error of ours."""
        self._file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _append(self, data: bytes) -> None:
        while data:
            # A full disk takes a part first and refuses at the next attempt.
            data = data[self._file.write(data) :]

    def _not_written(self, error: OSError) -> CheckpointError:
        reason = error.strerror or type(error).__name__
        fix = f"free some space or make it writable, then --resume {self.path.parent}"
        return CheckpointError(f"could not write {self.path}: {reason}", fix)


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a log, oldest first; lines that a kill tore are left out. A resumed run repeats what it lost."""
    events = []
    for line in Path(path).read_bytes().splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


class Progress:
    """Context manager: one progress bar on a terminal; elsewhere (a file, a pipe, CI) one plain line per epoch, and one
    every few minutes while an epoch goes on.

    Call ``stage`` first, then ``step`` for every batch and ``epoch`` with what was measured.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.live = _is_terminal(self.console)
        self._stage: _Stage | None = None
        columns = ("{task.description}", "{task.fields[measured]}", "{task.fields[pace]}")
        name, measured, pace = (rich.progress.TextColumn(column, markup=False) for column in columns)
        bar = rich.progress.BarColumn(bar_width=10)
        # Four times a second: the refreshing thread takes the interpreter from the training.
        self._bar = rich.progress.Progress(name, bar, measured, pace, console=self.console, refresh_per_second=4)
        self._task: rich.progress.TaskID | None = None
        self._told = time.monotonic()

    def __enter__(self) -> Progress:
        if self.live:
            self._bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self.live:
            self._bar.stop()

    def stage(self, name: str, epochs: int, steps_per_epoch: int, done: int = 0) -> None:
        """Begin a stage of ``epochs * steps_per_epoch`` steps, of which ``done`` were made before a resume."""
        self._stage = _Stage(name, epochs, steps_per_epoch, done)
        if self.live:
            total = epochs * steps_per_epoch
            self._task = self._bar.add_task(
                self._stage.title(), total=total, completed=done, measured="", pace=self._stage.pace()
            )

    def step(self, images: int) -> None:
        """One step with so many images was made. Costs a few microseconds and no device synchronisation."""
        assert self._stage is not None
        self._stage.step(images)
        if self._task is not None:
            self._bar.update(self._task, advance=1, description=self._stage.title(), pace=self._stage.pace())
        elif time.monotonic() - self._told > SILENCE and self._stage.share():
            self.note(f"{self._stage.title()}  {self._stage.share()} %  {self._stage.pace()}")

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """Show loss, clean and robust accuracy (fractions; None: not measured) of the epoch that just ended."""
        assert self._stage is not None
        if self._task is not None:
            self._bar.update(self._task, measured=_measured(metrics), pace=self._stage.pace())
        else:
            loss = metrics.get("loss")
            shown = [
                self._stage.title(),
                "" if loss is None else f"loss {loss:.3f}",
                _measured(metrics),
                self._stage.pace(),
            ]
            self.note("  ".join(part for part in shown if part))

    def note(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self.live:
            self.console.print(text, markup=False, highlight=False)
        else:
            print(_now(), text, file=self.console.file, flush=True)
        self._told = time.monotonic()


class _Stage:
    """Where a stage stands and how fast it goes, as text."""

    def __init__(self, name: str, epochs: int, steps_per_epoch: int, done: int) -> None:
        self.name, self.epochs, self.steps_per_epoch = name, epochs, steps_per_epoch
        self.before = self.done = done
        self.images = 0
        self.started = time.perf_counter()

    def step(self, images: int) -> None:
        self.done += 1
        self.images += images

    def title(self) -> str:
        """``finetune epoch  2/10``: the epoch that the last step belongs to."""
        current = max(1, -(-self.done // self.steps_per_epoch))
        width = len(str(self.epochs))
        return f"{self.name} epoch {current:{width}}/{self.epochs}" if self.epochs > 1 else self.name

    def share(self) -> int:
        """How much of the epoch is done, in per cent; 0 at its end."""
        return 100 * (self.done % self.steps_per_epoch) // self.steps_per_epoch

    def pace(self) -> str:
        """``212 img/s  0:21 left``, both over the whole stage since it began here, validation included."""
        made = self.done - self.before
        if not made:
            return ""
        seconds = time.perf_counter() - self.started
        left = self.epochs * self.steps_per_epoch - self.done
        rest = f"{_clock(seconds / made * left)} left" if left else f"took {_clock(seconds)}"
        return f"{self.images / max(seconds, 1e-9):.0f} img/s  {rest}"


def table(rows: Sequence[Mapping[str, str]], console: Console | None = None) -> None:
    """Print rows of text with the same keys as a table: drawn on a terminal, aligned columns elsewhere."""
    console = console or Console(highlight=False)
    names = list(rows[0])
    if _is_terminal(console):
        drawn = rich.table.Table()
        for index, name in enumerate(names):
            # A narrow terminal wraps a cell; it must not cut a number off.
            drawn.add_column(Text(name), justify="right" if index else "left", overflow="fold")
        for row in rows:
            drawn.add_row(*(Text(row[name]) for name in names))
        console.print(drawn)
        return
    lines = [names, *([row[name] for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    for first, *others in lines:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip(), file=console.file, flush=True)


def _is_terminal(console: Console) -> bool:
    # Not rich's own answer: FORCE_COLOR, which CI services set, would draw the bar into their log files.
    return console.file.isatty() and not console.is_dumb_terminal and not os.environ.get("CI")


def _measured(metrics: Mapping[str, Any]) -> str:
    values = {name: metrics.get(name) for name in ("clean", "robust")}
    return "  ".join(f"{name} {100 * value:4.1f}" for name, value in values.items() if value is not None)


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _plain(value: Any) -> Any:
    """The value in JSON's own types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value
