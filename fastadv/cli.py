"""What every command shares: errors in two lines, exit codes, signals. Without torch, so that signals work at once."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import errno
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastadv import stopping
from fastadv.errors import CheckpointError, Elsewhere, FastadvError, SettingsError

OUT_OF_MEMORY = 6
# 128 and the number of SIGPIPE, as a shell shows other programs that end so.
PIPE_CLOSED = 141
# What every command takes.
EVERYWHERE = "--json prints the result as JSON in the last line, --debug the traceback of an error."
NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
T = TypeVar("T")


def command(
    main: Callable[[list[str]], dict[str, Any] | None], argv: Sequence[str] | None = None, *, program: str = ""
) -> int:
    """Run ``main(argv)`` as the command ``program`` and give its exit code.

    0 ok, 2 settings or input, 3 data, 4 checkpoint or weights, 5 numerical, 6 out of memory, 75 stopped and resumable,
    130 Ctrl-C, 141 closed pipe. ``--debug`` shows tracebacks; with ``--json`` the last line printed is what ``main``
    returns, as JSON.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    as_json = "--json" in args
    args = [arg for arg in args if arg not in ("--debug", "--json")]
    formatwarning = warnings.formatwarning
    # One line, as for errors; Python's own form shows a path of ours and a line of source.
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        stopping.install()
        try:
            result = main(args)
            if as_json and result is not None:
                print(json.dumps(result))
        finally:
            # At exit it would be too late to tell a closed pipe quietly.
            sys.stdout.flush()
    except (SystemExit, Elsewhere) as error:
        return exit_code(error)
    except FastadvError as error:
        if debug:
            raise
        return refuse(error.what, error.fix, exit_code(error))
    except stopping.Stopped as stop:
        print(f"stopped and saved; continue with: {program} --resume {stop.folder}", file=sys.stderr)
        return exit_code(stop)
    except KeyboardInterrupt as error:
        return refuse("interrupted before anything was saved", "run the command again", exit_code(error))
    except BrokenPipeError as error:
        # The reader of a pipe, such as head, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_code(error)
    except OSError as error:
        if debug or exit_code(error) == 1:
            raise
        if _out_of_memory(error):
            return refuse(f"out of memory ({error.strerror})", "--batch-size half as large", exit_code(error))
        what = f"could not write {error.filename or 'a file of the run'}: {error.strerror}"
        return refuse(what, "free some space or make it writable, then --resume the run", exit_code(error))
    except Exception as error:
        if debug or not _out_of_memory(error):
            raise
        # Python's own MemoryError says nothing.
        reason = str(error).partition("\n")[0] or type(error).__name__
        return refuse(f"out of memory ({reason})", "--batch-size half as large", exit_code(error))
    finally:
        warnings.formatwarning = formatwarning
        stopping.uninstall()
    return 0


def exit_code(error: BaseException) -> int:
    """What a command ends with after ``error``; 1 where that is a fault of ours."""
    if isinstance(error, FastadvError):
        return error.exit_code
    if isinstance(error, stopping.Stopped):
        return stopping.exit_code()
    if isinstance(error, SystemExit):
        return error.code or 0 if isinstance(error.code, int | None) else 2
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, BrokenPipeError):
        return PIPE_CLOSED
    if isinstance(error, OSError) and error.errno in NOT_WRITTEN:
        return CheckpointError.exit_code
    return OUT_OF_MEMORY if isinstance(error, Exception) and _out_of_memory(error) else 1


def pick(argv: Sequence[str], *names: str, switches: Sequence[str] = ()) -> tuple[argparse.Namespace, list[str]]:
    """The values of the flags ``names``, None where not given, and the other arguments. SettingsError for no value.

    ``switches`` are flags without a value: True where given.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in names:
        parser.add_argument(name)
    for name in switches:
        parser.add_argument(name, action="store_true")
    try:
        return parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise SettingsError(f"{error.argument_name} has no value", f"{error.argument_name} VALUE") from error


def parse(kind: type[T], default: T | None, args: Sequence[str], program: str, about: str) -> T:
    """The value of dataclass ``kind`` that flags ``args`` make of ``default``. Raises SettingsError for a bad flag."""
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            value = tyro.MISSING_NONPROP if default is None else default
            about = f"{about}\n\nBesides: {EVERYWHERE}"
            return tyro.cli(kind, args=list(args), prog=program, description=about, default=value)
    except SystemExit as exit:
        if not exit.code:
            raise
    # tyro draws a box, in lines or in ASCII: a title, the message, a rule, help. The message is what a refusal says.
    lines = [line.strip("\u2502 ") for line in said.getvalue().splitlines()[1:]]
    texts = "\n".join("" if not line.strip("\u2570\u2500\u256f-") else line for line in lines).strip().split("\n\n")
    message = texts[0].replace("\n", " ")
    # What our own refusal says, as FastadvError joins it: the cure may hold another semicolon.
    what, _, fix = message.partition(": ")[2].partition("; ") if message.startswith("Error parsing") else ("", "", "")
    near = [line for line in lines if line.startswith("--") and line.strip("-")]
    hint = f"did you mean {near[0]}?" if near and "Perhaps you meant:" in lines else f"see {program} --help"
    raise SettingsError(what, fix) if fix else SettingsError(message, hint)


def refuse_misspelt(words: Sequence[str], *flags: str) -> None:
    """Raise SettingsError where one of ``words`` is nearly one of the ``flags``."""
    for word in words:
        near = difflib.get_close_matches(word.partition("=")[0], flags, n=1, cutoff=0.8)
        if near and word.startswith("--"):
            raise SettingsError(f"unknown option {word}", f"did you mean {near[0]}?")


def name_first(argv: Sequence[str], kind: type) -> list[str]:
    """``argv`` with its first word that is neither a flag of dataclass ``kind`` nor the value of one in front."""
    switches = {field.name for field in dataclasses.fields(kind) if field.type in (bool, "bool")} | {"help"}
    before = ""
    for place, word in enumerate(argv):
        name = before.removeprefix("--").removeprefix("no-").replace("-", "_")
        takes = before.startswith("--") and "=" not in before and name not in switches
        if not takes and not word.startswith("-"):
            return [word, *argv[:place], *argv[place + 1 :]]
        before = word
    return list(argv)


def refuse(what: str, fix: str, code: int) -> int:
    """Print the two lines of a refusal and give its exit code."""
    print(f"error: {what}\nfix: {fix}", file=sys.stderr)
    return code


def _out_of_memory(error: Exception) -> bool:
    # On the CPU torch raises a plain RuntimeError.
    text = str(error).lower()
    unable = ("out of memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, MemoryError) or any(words in text for words in unable)
