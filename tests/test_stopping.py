"""Real signals to real processes: what is under way is saved, the exit code is right, no traceback is shown."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastadv import stopping

ROOT = Path(__file__).resolve().parent.parent
HEAD = """
import signal, sys, time
# A shell that starts this in the background has Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from fastadv import stopping
stopping.install()
"""


class Child:
    """A Python process that tells line by line where it is."""

    def __init__(self, script: str) -> None:
        pipe = subprocess.PIPE
        command = [sys.executable, "-W", "error", "-c", HEAD + script]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def expect(self, line: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == line

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> tuple[int, str, str]:
        out, errors = self.process.communicate("\n", timeout=120)
        return self.process.returncode, out, errors


def test_torch_is_not_imported() -> None:
    child = Child("print(sorted({'torch', 'numpy', 'rich'} & set(sys.modules)))")
    assert child.end() == (0, "[]\n", "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("delay", [0.05, 0.8])
def test_a_signal_during_the_imports_ends_quietly(number: int, code: int, delay: float) -> None:
    child = Child("print('importing', flush=True)\nimport torch, timm\ntime.sleep(300)")
    child.expect("importing")
    threading.Event().wait(delay)
    child.send(number)
    assert child.end() == (code, "", "")


LOOP = """
with stopping.guard():
    print("training", flush=True)
    while not stopping.requested():
        time.sleep(0.005)
    print("saving", flush=True)
    sys.stdin.readline()
    print("saved", flush=True)
sys.exit(stopping.exit_code())
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_in_the_loop_lets_it_save(number: int, code: int) -> None:
    child = Child(LOOP)
    child.expect("training")
    child.send(number)
    child.expect("saving")
    assert child.end() == (code, "saved\n", "")


def test_a_second_sigterm_while_saving_is_ignored() -> None:
    child = Child(LOOP)
    child.expect("training")
    for _ in range(3):
        child.send(signal.SIGTERM)
    child.expect("saving")
    child.send(signal.SIGTERM)
    assert child.end() == (75, "saved\n", "")


def test_two_interrupts_in_a_row_leave_at_once() -> None:
    assert stopping.AT_ONCE_SECONDS == 2.0
    # Longer, as a busy machine may need more than two seconds between the two.
    child = Child("stopping.AT_ONCE_SECONDS = 100\n" + LOOP)
    child.expect("training")
    child.send(signal.SIGINT)
    child.expect("saving")
    child.send(signal.SIGINT)
    child.process.wait(timeout=120)
    assert child.end() == (130, "", "")


def test_two_interrupts_far_apart_let_it_save() -> None:
    child = Child("stopping.AT_ONCE_SECONDS = 0\n" + LOOP)
    child.expect("training")
    child.send(signal.SIGINT)
    child.expect("saving")
    child.send(signal.SIGINT)
    assert child.end() == (130, "saved\n", "")


def test_the_first_signal_decides_the_exit_code() -> None:
    child = Child(LOOP)
    child.expect("training")
    child.send(signal.SIGTERM)
    child.expect("saving")
    child.send(signal.SIGINT)
    assert child.end() == (75, "saved\n", "")


def test_after_the_loop_a_signal_ends_the_process_again() -> None:
    child = Child("with stopping.guard(): pass\nprint('reporting', flush=True)\ntime.sleep(300)")
    child.expect("reporting")
    child.send(signal.SIGTERM)
    assert child.end() == (75, "", "")


def test_leaving_at_once_shows_the_cursor_again() -> None:
    script = HEAD + "print('\\x1b[?25l', flush=True)\ntime.sleep(300)"
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    while b"\x1b[?25l" not in seen:
        seen += os.read(ours, 1024)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    try:
        seen += os.read(ours, 1024)
    finally:
        os.close(ours)
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l")
    assert b"Traceback" not in seen


@pytest.fixture
def handlers() -> Iterator[dict[int, object]]:
    """The handlers before the test, which must be there after it."""
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    yield before
    assert {number: signal.getsignal(number) for number in stopping.SIGNALS} == before
    signal.signal(signal.SIGINT, interrupt)


def test_handlers_are_put_back(handlers: dict[int, object]) -> None:
    stopping.install()
    stopping.install()
    assert all(signal.getsignal(number) != handler for number, handler in handlers.items())
    with stopping.guard():
        signal.raise_signal(signal.SIGTERM)
    assert (stopping.requested(), stopping.exit_code()) == (signal.SIGTERM, 75)
    stopping.uninstall()
    assert (stopping.requested(), stopping.exit_code()) == (0, 0)
    stopping.uninstall()


def test_a_library_call_is_guarded_without_install(handlers: dict[int, object]) -> None:
    with stopping.guard():
        signal.raise_signal(signal.SIGINT)
        assert stopping.requested() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stopping.requested() == 0
    with pytest.raises(KeyError), stopping.guard():
        with stopping.guard():
            pass
        signal.raise_signal(signal.SIGTERM)
        assert stopping.requested() == signal.SIGTERM
        raise KeyError
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_another_thread_runs_unguarded(handlers: dict[int, object]) -> None:
    found = []

    def work() -> None:
        with stopping.guard():
            found.append({number: signal.getsignal(number) for number in stopping.SIGNALS})

    thread = threading.Thread(target=work)
    with stopping.guard():
        guarded = {number: signal.getsignal(number) for number in stopping.SIGNALS}
        thread.start()
        thread.join()
        signal.raise_signal(signal.SIGTERM)
        assert stopping.requested() == signal.SIGTERM
    assert found == [guarded]
