"""The log survives kills and full disks; the terminal gets a bar, everything else plain lines."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastadv import runlog
from fastadv.errors import CheckpointError

ROOT = Path(__file__).resolve().parent.parent


def test_events_come_back_in_order(tmp_path: Path) -> None:
    with runlog.RunLog(tmp_path / "log.jsonl") as log:
        log.event("start", out=tmp_path, names=("a", "b"), settings={"eps": 8 / 255, 1: None})
        log.event("epoch", loss=float("nan"), clean=float("inf"), robust=0.25)
    with runlog.RunLog(tmp_path / "log.jsonl") as log:
        log.event("resume")
    start, epoch, resume = runlog.read(tmp_path / "log.jsonl")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", start.pop("time"))
    settings = {"eps": 8 / 255, "1": None}
    assert start == {"event": "start", "out": str(tmp_path), "names": ["a", "b"], "settings": settings}
    assert (float(epoch["loss"]) != float(epoch["loss"]), epoch["clean"], epoch["robust"]) == (True, "inf", 0.25)
    assert resume["event"] == "resume"


def test_every_line_is_strict_json_and_there_at_once(tmp_path: Path) -> None:
    log = runlog.RunLog(tmp_path / "log.jsonl")
    log.event("epoch", loss=float("nan"), text="line\nbreak")
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    log.close()


def test_a_value_without_a_meaning_in_json_is_our_error(tmp_path: Path) -> None:
    with runlog.RunLog(tmp_path / "log.jsonl") as log, pytest.raises(TypeError, match="Tensor"):
        log.event("epoch", loss=torch.zeros(1))
    assert (tmp_path / "log.jsonl").read_text() == ""


@pytest.mark.parametrize("torn", [b'{"event": "epo', b'{"event": "torn"}\n{"ev\xff', b"[1]\n7\n\x00\x00"])
def test_a_torn_line_costs_only_itself(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "log.jsonl"
    with runlog.RunLog(path) as log:
        log.event("first")
    path.write_bytes(path.read_bytes() + torn)
    assert [event["event"] for event in runlog.read(path)][:1] == ["first"]
    with runlog.RunLog(path) as log:
        log.event("second")
    events = [event["event"] for event in runlog.read(path)]
    assert (events[0], events[-1]) == ("first", "second")
    assert torn in path.read_bytes()


def test_a_long_epoch_is_heard_of_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    text = io.StringIO()
    with runlog.Progress(Console(file=text)) as progress:
        progress.stage("contrastive", epochs=2, steps_per_epoch=4)
        for _ in range(3):
            now[0] += 100
            progress.step(8)
        # The epoch's own line follows.
        now[0] += 100
        progress.step(8)
        progress.epoch({"loss": 1.0})
        now[0] += 100
        progress.step(8)
    lines = [re.sub(r"  \d+ img/s.*", "", line.partition(" ")[2]) for line in text.getvalue().splitlines()]
    assert lines == ["contrastive epoch 1/2  50 %", "contrastive epoch 1/2  loss 1.000"]


FULL = """
import resource, sys
from fastadv.errors import CheckpointError
from fastadv.runlog import RunLog

log = RunLog(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
try:
    for i in range(100):
        log.event("epoch", number=i)
except CheckpointError as error:
    print(error.exit_code, error.what)
"""


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    command = [sys.executable, "-W", "error", "-c", FULL, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == f"4 could not write {path}: File too large\n", done.stderr
    assert [event["number"] for event in runlog.read(path)] == [0, 1]


def test_a_log_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"could not write .*: Is a directory"):
        runlog.RunLog(tmp_path)


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return [re.sub(r"^\d{4}-\S+ ", "@ ", line) for line in console.file.getvalue().splitlines()]


def test_without_a_terminal_there_is_one_plain_line_per_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    console = Console(file=io.StringIO(), width=20)
    with runlog.Progress(console) as progress:
        progress.note("backbone [bold]swin[/bold], a line longer than the console is wide")
        progress.stage("finetune", epochs=10, steps_per_epoch=4, done=28)
        for epoch, metrics in enumerate(
            ({"loss": 2.0304, "clean": 1.0, "robust": None}, {"clean": 0.5, "robust": 0.139})
        ):
            for _ in range(4):
                clock[0] += 2.0
                progress.step(64)
            progress.epoch({"stage": "finetune", "epoch": epoch, "lr": 0.1, **metrics})
        progress.stage("test", epochs=1, steps_per_epoch=1)
        clock[0] += 3600.0
        progress.step(64)
        progress.epoch({})
    assert lines(console) == [
        "@ backbone [bold]swin[/bold], a line longer than the console is wide",
        "@ finetune epoch  8/10  loss 2.030  clean 100.0  32 img/s  0:16 left",
        "@ finetune epoch  9/10  clean 50.0  robust 13.9  32 img/s  0:08 left",
        "@ test  0 img/s  took 1:00:00",
    ]


def test_a_step_costs_microseconds() -> None:
    with runlog.Progress(Console(file=io.StringIO())) as progress:
        progress.stage("finetune", epochs=10, steps_per_epoch=1000)
        began = time.process_time()
        for _ in range(1000):
            progress.step(64)
        assert time.process_time() - began < 0.05


ROWS = [
    {"weights": "best", "eps": "4/255", "robust": "51.0 (49.0-53.0)"},
    {"weights": "[red]", "eps": "8/255", "robust": "9.0 (8.0-10.1)"},
]


def test_a_table_without_a_terminal_is_aligned_text() -> None:
    console = Console(file=io.StringIO(), width=10)
    runlog.table(ROWS, console)
    assert lines(console) == [
        "weights    eps            robust",
        "best     4/255  51.0 (49.0-53.0)",
        "[red]    8/255    9.0 (8.0-10.1)",
    ]


ON_A_TERMINAL = """
import sys, time
from fastadv.runlog import Progress, table

try:
    with Progress() as progress:
        progress.note("[bold]plain text")
        progress.stage("finetune", 10, 5)
        for epoch in range(10):
            for _ in range(5):
                progress.step(64)
            progress.epoch({"clean": 0.33, "robust": 0.139})
        if sys.argv[1:] == ["fail"]:
            raise KeyError
except KeyError:
    pass
table([{"weights": "[red]", "eps": "8/255"}])
"""


def on_a_terminal(*arguments: str, **environment: str) -> str:
    """What the script above writes to a terminal of 80 columns."""
    unwanted = {"CI", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"}
    env = {name: value for name, value in os.environ.items() if name not in unwanted}
    env |= {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **environment}
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-W", "error", "-c", ON_A_TERMINAL, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 65536)
        # Linux answers so when the other side is closed.
        except OSError:
            break
        if not part:
            break
        seen += part
    os.close(ours)
    assert process.wait(timeout=300) == 0, seen.decode()
    return seen.decode()


COLOR = re.compile(r"\x1b\[[0-9;]*\b[349]\d")


def test_a_terminal_gets_one_bar_and_a_drawn_table() -> None:
    seen = on_a_terminal()
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h") == 1
    assert COLOR.search(seen)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    assert "[bold]plain text" in text
    assert re.search(r"finetune epoch 10/10 \S{10} clean 33.0  robust 13.9 \d+ img/s  took 0:\d\d", text)
    assert "[red]" in text
    assert "\u2502" in text


def test_the_cursor_comes_back_after_an_error() -> None:
    seen = on_a_terminal("fail")
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")


def test_no_color_is_respected() -> None:
    seen = on_a_terminal(NO_COLOR="1")
    assert not COLOR.search(seen)
    assert "\x1b[?25l" in seen


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"CI": "true"}])
def test_a_dumb_terminal_or_ci_gets_plain_lines(environment: dict[str, str]) -> None:
    seen = on_a_terminal(**environment)
    assert "\x1b" not in seen
    assert len(re.findall(r"finetune epoch", seen)) == 10
