"""Nothing is overwritten by a new run, and one process works in a run folder at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastadv.errors import CheckpointError, SettingsError
from fastadv.runfolder import RunLock, run_folder

ROOT = Path(__file__).resolve().parent.parent


def test_a_new_or_empty_folder_is_taken(tmp_path: Path) -> None:
    assert run_folder(tmp_path / "runs" / "a") == tmp_path / "runs" / "a"
    assert run_folder(tmp_path / "runs" / "a").is_dir()
    assert list((tmp_path / "runs" / "a").iterdir()) == []


def test_what_a_killed_start_left_does_not_count(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".tmp-step-00000001").mkdir()
    assert run_folder(tmp_path) == tmp_path


def test_a_folder_behind_a_link_is_taken(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    assert run_folder(tmp_path / "runs").is_dir()


def test_an_existing_run_is_refused_unless_resumed(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").touch()
    with pytest.raises(SettingsError, match="exists already") as caught:
        run_folder(tmp_path)
    assert caught.value.fix == f"--resume {tmp_path}, or --out OTHER"
    assert caught.value.exit_code == 2
    assert run_folder(tmp_path, resume=True) == tmp_path


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run to resume") as caught:
        run_folder(tmp_path / "missing", resume=True)
    assert caught.value.exit_code == 4
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("kind", ["file", "fifo", "device", "dangling link", "link to a device"])
def test_other_things_than_folders_are_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    path = Path("/dev/null") if kind == "device" else tmp_path / "out"
    if kind == "file":
        path.write_text("precious")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "link to a device":
        path.symlink_to("/dev/null")
    before = os.lstat(path)
    with pytest.raises(SettingsError, match="not a folder"):
        run_folder(path)
    with pytest.raises(CheckpointError, match="no run to resume"):
        run_folder(path, resume=True)
    after = os.lstat(path)
    assert (before.st_mode, before.st_ino, before.st_size) == (after.st_mode, after.st_ino, after.st_size)


@pytest.mark.parametrize("name", ["file/run", "x" * 300])
def test_a_path_that_cannot_be_made_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"cannot be written .*(Not a directory|File name too long)"):
        run_folder(tmp_path / name)


AS_NOBODY = """
import os, sys
from pathlib import Path
from fastadv.errors import SettingsError
from fastadv.runfolder import run_folder

os.chdir(sys.argv[1])
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for path, resume in (("new", False), ("run", False), ("run", True)):
    try:
        run_folder(Path(path), resume)
    except SettingsError as error:
        print(error.what)
"""


def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o555)
    tmp_path.chmod(0o555)
    command = [sys.executable, "-W", "error", "-c", AS_NOBODY, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    tmp_path.chmod(0o755)
    assert done.returncode == 0, done.stderr
    told = [f"the folder cannot be written ({name}: Permission denied)" for name in ("new", "run", "run")]
    assert done.stdout.splitlines() == told


HOLD = """
import sys
from pathlib import Path
from fastadv.runfolder import RunLock

with RunLock(Path(sys.argv[1])) as lock:
    print("held", lock.left_by, flush=True)
    sys.stdin.read()
"""


def holder(run: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", HOLD, str(run)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("held")
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=30)


def test_a_second_process_is_refused_and_told_who_works_there(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        with pytest.raises(SettingsError, match=rf"another process works in .*\(pid {process.pid} on ") as caught:
            RunLock(tmp_path).__enter__()
        assert caught.value.exit_code == 2
    finally:
        end(process)
    with RunLock(tmp_path) as lock:
        assert lock.left_by == ""


def test_a_killed_process_leaves_its_name_but_no_lock(tmp_path: Path) -> None:
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    end(process)
    with RunLock(tmp_path) as lock:
        assert lock.left_by.startswith(f"pid {process.pid} on ")
    with RunLock(tmp_path) as lock:
        assert lock.left_by == ""


def test_the_same_process_is_refused_too_and_the_lock_ends_with_the_block(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(SettingsError, match=f"pid {os.getpid()} "):
        RunLock(tmp_path).__enter__()
    with pytest.raises(KeyError), RunLock(tmp_path):
        raise KeyError
    with RunLock(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"pid {os.getpid()} on ")
    assert (tmp_path / ".lock").read_text() == ""
