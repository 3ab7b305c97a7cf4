"""The folder of a run: made or refused before anything is computed, and worked in by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import tempfile
import warnings
from pathlib import Path
from typing import IO

from fastadv.errors import CheckpointError, SettingsError


class LockWarning(UserWarning):
    """A run folder lies on a file system without locks."""


def check_new(path: Path) -> None:
    """Raise SettingsError where a new run at ``path`` could overwrite a run, a file or a device. Makes nothing."""
    run = Path(path)
    if not run.is_dir() and (run.exists() or run.is_symlink()):
        raise SettingsError(f"--out is not a folder ({run})", "choose a new folder with --out OTHER")
    # Hidden names are ours (a lock, leftovers of a kill) or the system's: no run is lost with them.
    if run.is_dir() and any(not entry.name.startswith(".") for entry in run.iterdir()):
        raise SettingsError(f"the run folder exists already ({run})", f"--resume {run}, or --out OTHER")


def run_folder(path: Path, resume: bool = False) -> Path:
    """The folder of a run, writable: a new or empty one, or with ``resume`` one that exists. Parents are made.

    Raises SettingsError for anything that could overwrite something (a run, a file, a device) or cannot be written,
    CheckpointError where there is nothing to resume.
    """
    run = Path(path)
    try:
        if resume and not run.is_dir():
            raise CheckpointError(f"there is no run to resume at {run}", "give --resume the folder of a run")
        if not resume:
            check_new(run)
    except OSError as error:
        raise _unwritable(run, error) from error
    return writable(run)


def writable(folder: Path) -> Path:
    """``folder``, made with its parents where it is not there. Raises SettingsError if nothing can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> SettingsError:
    reason = error.strerror or type(error).__name__
    return SettingsError(f"the folder cannot be written ({folder}: {reason})", "--out OTHER")


class RunLock:
    """Context manager: this process alone works in the run folder; a second one is refused with a SettingsError.

    The kernel holds the lock (flock), so it ends with the process, also after SIGKILL. ``left_by`` then tells which
    process went without releasing it, and is empty otherwise.
    """

    def __init__(self, run: Path) -> None:
        self.path = Path(run) / ".lock"
        self.left_by = ""
        self._file: IO[bytes] | None = None

    def __enter__(self) -> RunLock:
        run = self.path.parent
        file = self.path.open("ab+", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _content(file) or "it just began"
            file.close()
            fix = "wait until it ends, or choose --out OTHER"
            raise SettingsError(f"another process works in {run} ({holder})", fix) from error
        except OSError as error:
            message = f"{run} is on a file system without locks ({error.strerror}): start only one run in it"
            warnings.warn(message, LockWarning, stacklevel=2)
        self.left_by, self._file = _content(file), file
        # On a full disk the name is missing, the lock holds all the same.
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
        return self

    def __exit__(self, *raised: object) -> None:
        assert self._file is not None
        with contextlib.suppress(OSError):
            # Emptied and kept: whoever deleted it could delete the file that a third process has just locked.
            self._file.truncate(0)
            # A forked child shares the lock, so that closing our copy alone would not release it.
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace").strip()


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all. Raises CheckpointError where the disk refuses."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"could not write {path}: {error.strerror}", "free some space, or --out OTHER") from error
