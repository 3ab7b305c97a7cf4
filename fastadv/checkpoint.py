"""A checkpoint is a directory: safetensors files and a manifest with their sha256, visible only once it is whole.

Written to a temporary neighbour, flushed to the disk, renamed: a directory with a right name is a finished one,
whatever killed the process before. torch and safetensors both read a flipped bit without a word, therefore the hashes.

A run folder holds ``step-00000400`` directories and ``best``; the names ``.tmp-NAME`` (being written) and ``.old-NAME``
(being replaced) are ours. Write ``best`` before the step that mentions it: after a kill in between, the resumed run
comes by the same step again and writes the same bits.

For tests: ``FASTADV_FAULT=save:3`` kills this process (SIGKILL) in the third ``save``, before its manifest is written;
``FASTADV_FAULT=replace:2`` in the second replacement of an existing directory, between its two renames.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from fastadv.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
# No separators and no leading dot: a manifest cannot point outside of its directory.
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_STEP = re.compile(r"step-(\d{8,})")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over for the one before it."""


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` optimiser steps belongs: ``run/step-00000400``."""
    return Path(run) / f"step-{step:08d}"


def steps(run: Path) -> list[Path]:
    """The step checkpoints of a run, oldest first, valid or not. Empty: the run was stopped before its first."""
    found = ((_STEP.fullmatch(path.name), path) for path in Path(run).glob("step-*"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def save(target: Path, files: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]) -> None:
    """Write the directory ``target`` whole or not at all; an existing one is replaced.

    files: file name (``model.safetensors``) to named tensors, on any device; memory that tensors share is written once
    for each. meta: what JSON can hold; keys come back as strings, tuples as lists, floats exactly.
    Raises CheckpointError where the disk refuses; what was there before is then still there.
    """
    target = Path(target)
    temporary = target.with_name(f".tmp-{target.name}")
    needed = sum(t.numel() * t.element_size() for tensors in files.values() for t in tensors.values())
    try:
        _settle(target)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        listing = {}
        for name, tensors in files.items():
            assert _FILE_NAME.fullmatch(name), f"not a checkpoint file name: {name}"
            data = safetensors.torch.save(_own_memory(tensors))
            _write(temporary / name, data)
            listing[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        _fault("save")
        manifest = {"format": FORMAT, "meta": meta, "files": listing}
        _write(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
        _flush_folder(temporary)
        if target.exists():
            os.rename(target, _aside(target))
            _fault("replace")
        os.rename(temporary, target)
        _flush_folder(target.parent)
    except OSError as error:
        raise _not_saved(target, error, needed) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            _settle(target)


def load(directory: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors by file name (on the CPU) and the meta data of one checkpoint, every byte checked against its sha256.

    Raises CheckpointError naming the directory and what is wrong with it. Nothing outside of it is read.
    """
    directory = Path(directory)
    if not directory.exists() and _aside(directory).exists():
        # The process was killed between the two renames of a replacement.
        directory = _aside(directory)
    manifest = _read_manifest(directory)
    return {name: _read_file(directory / name, entry) for name, entry in manifest["files"].items()}, manifest["meta"]


def newest(run: Path) -> tuple[Path, dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The newest valid step checkpoint of a run: its directory, tensors and meta data.

    A damaged one is passed over with a CheckpointWarning that names it and the reason. CheckpointError if none is left.
    """
    last = ""
    for folder in reversed(steps(run)):
        try:
            return folder, *load(folder)
        except CheckpointError as error:
            last = f"; {error.what}"
            warnings.warn(f"{error.what}: using the checkpoint before it", CheckpointWarning, stacklevel=2)
    raise CheckpointError(f"no valid checkpoint is left in {run}{last}", "train again with --out OTHER")


def newest_meta(run: Path) -> dict[str, Any]:
    """What the newest checkpoint with a readable manifest knows, tensors unread; empty without one.

    The run may be going on: a checkpoint that is pruned meanwhile, or damaged, is passed over.
    """
    for path in reversed(steps(run)):
        with contextlib.suppress(CheckpointError):
            meta: dict[str, Any] = _read_manifest(path)["meta"]
            return meta
    return {}


def prune(run: Path, keep: int = 2) -> None:
    """Delete all but the newest ``keep`` step checkpoints. One that cannot be deleted does not stop the run."""
    assert keep > 0
    for folder in steps(run)[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)


def clean(run: Path) -> None:
    """Remove what killed saves left behind, and put a directory back whose replacement was cut short.

    Only for the process that holds the lock of the run.
    """
    for path in Path(run).glob(".old-*"):
        _settle(path.with_name(path.name.removeprefix(".old-")))
    for path in Path(run).glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def read_split(run: Path) -> dict[str, Any]:
    """What the run's split.json says of its images: their classes, the hash of every split, which ones validate.

    Raises CheckpointError where it is missing or damaged.
    """
    path = Path(run) / "split.json"
    try:
        found = json.loads(path.read_bytes())
        reason = "" if isinstance(found, dict) and isinstance(found.get("classes"), list) else "it has no classes"
    except OSError as error:
        reason = error.strerror or "it cannot be read"
    except ValueError:
        reason = "it is not JSON (cut off?)"
    if reason:
        raise CheckpointError(
            f"{path} cannot be used: {reason}", "bring it back as it was, or train again with --out OTHER"
        )
    return dict(found)


def _own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory: safetensors takes nothing else."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        kept = tensor.detach().cpu().contiguous()
        pointer = kept.untyped_storage().data_ptr()
        plain[name] = kept.clone() if pointer in seen else kept
        seen.add(pointer)
    return plain


def _write(path: Path, data: bytes) -> None:
    # Not by safetensors' own writer: that one makes mode 0600 whatever the umask says, and does not flush to the disk.
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _aside(target: Path) -> Path:
    """Where a directory waits while its replacement is renamed in."""
    return target.with_name(f".old-{target.name}")


def _settle(target: Path) -> None:
    """End a replacement: drop the old directory if the new one is there, else put it back."""
    if target.exists():
        shutil.rmtree(_aside(target), ignore_errors=True)
    elif _aside(target).exists():
        os.rename(_aside(target), target)


def _not_saved(target: Path, error: OSError, needed: int) -> CheckpointError:
    match = _STEP.fullmatch(target.name)
    what = f"could not save {f'step {int(match[1])}' if match else target.name}"
    if error.errno in _NO_SPACE:
        free = shutil.disk_usage(target.parent).free
        what += f": no space (needs {needed / 2**20:.1f} MiB, free {free / 2**20:.1f} MiB)"
        return CheckpointError(what, f"free some space, then --resume {target.parent}: what was saved before is intact")
    reason = error.strerror or type(error).__name__
    return CheckpointError(
        f"{what}: {reason} ({target})", f"make {target.parent} writable, then --resume {target.parent}"
    )


def _damaged(path: Path, reason: str) -> CheckpointError:
    fix = "use another checkpoint of the run, or train again with --out OTHER"
    return CheckpointError(f"the checkpoint file {path} cannot be used: {reason}", fix)


def _read_bytes(path: Path) -> bytes:
    try:
        # Not a fifo or a device either: reading from one could wait for ever.
        if path.is_file():
            return path.read_bytes()
    except OSError as error:
        raise _damaged(path, error.strerror or "it cannot be read") from error
    raise _damaged(path, "it is missing")


def _read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, with everything that ``load`` relies on checked."""
    path = directory / MANIFEST
    data = _read_bytes(path)
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "it is not JSON (cut off?)") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise _damaged(path, "it has no format number")
    if manifest["format"] > FORMAT:
        newer = f"the checkpoint {directory} has format {manifest['format']}, this version reads up to {FORMAT}"
        raise CheckpointError(newer, "pip install --upgrade fastadv")
    files = manifest.get("files")
    if not isinstance(files, dict) or not isinstance(manifest.get("meta"), dict):
        raise _damaged(path, "it lacks 'files' or 'meta'")
    for name, entry in files.items():
        if not _FILE_NAME.fullmatch(name):
            raise _damaged(path, f"it names a file outside of the checkpoint ({name!r})")
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            raise _damaged(path, f"it lacks the size or the sha256 of {name}")
    return manifest


def _read_file(path: Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    data = _read_bytes(path)
    if len(data) != entry["bytes"]:
        raise _damaged(path, f"it has {len(data)} bytes, not {entry['bytes']}")
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise _damaged(path, "its sha256 differs from the manifest's")
    try:
        return dict(safetensors.torch.load(data))
    # KeyError: a number format that this safetensors knows and this torch does not.
    except (safetensors.SafetensorError, KeyError) as error:
        raise _damaged(path, f"safetensors refuses it ({error})") from error


_reached: Counter[str] = Counter()


def _fault(point: str) -> None:
    """Die here if FASTADV_FAULT asks for it (see the top of this file)."""
    _reached[point] += 1
    if os.environ.get("FASTADV_FAULT") == f"{point}:{_reached[point]}":
        os.kill(os.getpid(), signal.SIGKILL)
