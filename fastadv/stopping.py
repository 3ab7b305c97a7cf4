"""Ctrl-C and SIGTERM end a run in order: what is under way is saved, and the exit code says that it can be resumed.

Nothing heavy is imported here, so that a command line calls ``install()`` before it imports torch: from then on a
signal ends it without a traceback. Inside ``with guard():`` a signal is only noted; the loop asks ``requested()``
between two steps, saves and returns. Two Ctrl-C within two seconds always leave at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_CODES = {0: 0, int(signal.SIGTERM): 75, int(signal.SIGINT): 130}
# Two Ctrl-C within this many seconds mean "now".
AT_ONCE_SECONDS = 2.0


class Stopped(Exception):
    """A signal asked a run to stop; it was saved first. ``folder`` is the run to resume."""

    def __init__(self, folder: object) -> None:
        super().__init__(str(folder))
        self.folder = folder


class _State:
    """What the handlers of this process know; one per process, like the handlers."""

    def __init__(self) -> None:
        self.received = 0
        self.last_interrupt = float("-inf")
        self.guarded = False
        # install() was called: the process is a command of ours and may be ended, a notebook may not.
        self.owns_process = False
        self.previous: dict[int, Any] = {}


_state = _State()


def install() -> None:
    """Take over SIGTERM and SIGINT for a command line: outside of ``guard()`` they end the process with 75 and 130."""
    _state.owns_process = True
    _set_handlers()


def uninstall() -> None:
    """Put the handlers back that were there before, and forget what was received."""
    global _state
    for number, handler in _state.previous.items():
        # None stands for a handler that C code had set: Python cannot put that one back.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
    _state = _State()


def requested() -> int:
    """The first signal received since ``install()`` or ``guard()``, 0 if none. Costs nothing: ask before every step."""
    return _state.received


def take_over(number: int) -> None:
    """Note a signal that another process of the same run received."""
    _state.received = number


def exit_code() -> int:
    """What the process should end with: 0 if nothing was asked, 75 after SIGTERM (resumable), 130 after Ctrl-C."""
    return EXIT_CODES[_state.received]


@contextmanager
def guard() -> Iterator[None]:
    """Note signals instead of ending, so that the loop inside can save and return.

    Works without ``install()`` too, for callers of the library: the handlers are put back at the end, and a second
    Ctrl-C within two seconds raises KeyboardInterrupt. Outside of the main thread Python forbids handlers: nothing is
    noted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own, before = not _state.previous, _state.guarded
    _state.guarded = True
    try:
        if own:
            _set_handlers()
        yield
    finally:
        _state.guarded = before
        if own:
            uninstall()


def _set_handlers() -> None:
    for number in SIGNALS:
        if number not in _state.previous:
            _state.previous[number] = signal.signal(number, _on_signal)


def _on_signal(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    at_once = number == signal.SIGINT and now - _state.last_interrupt < AT_ONCE_SECONDS
    if number == signal.SIGINT:
        _state.last_interrupt = now
    _state.received = _state.received or number
    if _state.guarded and not at_once:
        return
    if not _state.owns_process:
        raise KeyboardInterrupt
    _leave(EXIT_CODES[number])


def _leave(code: int) -> None:
    """End now. An exception would not do: half-imported extension modules swallow it or turn it into an ImportError."""
    for stream in filter(None, (sys.__stdout__, sys.__stderr__)):
        try:
            if stream.isatty():
                # A progress bar hides the cursor.
                stream.write("\x1b[?25h\n")
            stream.flush()
        except (OSError, ValueError, RuntimeError):
            # Closed, or interrupted in the middle of a write of its own: nothing more can be said there.
            continue
    os._exit(code)
