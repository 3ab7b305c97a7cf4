"""Plain .npz files: ``images`` uint8 (N, H, W, 3), ``labels`` integers (N,), optionally ``classes``, the names (C,).

Read as a stream, never unpickled: headers, labels and sizes are checked before any pixel is read, memory holds the
chosen rows only, and the zip's own checksum, compared with the last byte, covers what was read.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from fastadv.errors import DataError
from fastadv.images import Pixels, Rows, Store, read_blocks

HOW = "np.savez(path, images=images, labels=labels, classes=names): images uint8 (N, H, W, 3), labels integers (N,)"
# About 16 MiB at 64x64: large enough for the disk, small beside the images.
BLOCK = 1024


@dataclass(frozen=True)
class NpzFile:
    """A checked file: labels int64 (N,), class names if it has them, and the shape (N, H, W, 3) of its images."""

    path: Path
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...] | None
    shape: tuple[int, ...]

    def read(
        self, rows: Rows, image_size: int | None, store: Store, skip: bool
    ) -> tuple[Pixels, Rows, tuple[str, ...]]:
        """The images of ``rows`` as (K, 3, H, W); nothing is ever skipped. Raises: DataError for a damaged file."""
        with _refusals(self.path), zipfile.ZipFile(self.path) as archive, archive.open("images.npy") as stream:
            _header(stream)
            return read_blocks(self._blocks(stream), rows, image_size, store), np.arange(len(rows)), ()

    def _blocks(self, stream: IO[bytes]) -> Iterator[Pixels]:
        num, *image = self.shape
        for start in range(0, num, BLOCK):
            shape = (min(BLOCK, num - start), *image)
            yield np.frombuffer(stream.read(math.prod(shape)), np.uint8).reshape(shape)


def inspect(path: Path) -> NpzFile:
    """Reads everything but the pixels and checks it.

    Raises: DataError naming the file, what does not fit, and the cure.
    """
    with _refusals(path), zipfile.ZipFile(path) as archive:
        members = {name.removesuffix(".npy") for name in archive.namelist()}
        if missing := {"images", "labels"} - members:
            raise DataError(
                f"{path} has no array {', '.join(sorted(missing))}; it has {', '.join(sorted(members))}", HOW
            )
        with archive.open("images.npy") as stream:
            shape, in_order, dtype = _header(stream)
            held = archive.getinfo("images.npy").file_size - stream.tell()
        labels = _array(archive, "labels")
        classes = _array(archive, "classes") if "classes" in members else None
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not in_order or 0 in shape:
        raise DataError(f"{path}: images are {dtype} {shape}, not uint8 (N, H, W, 3)", _cure(shape, dtype))
    if held != math.prod(shape):
        raise DataError(f"{path}: images of shape {shape} need {math.prod(shape)} bytes, the file has {held}", HOW)
    if labels.dtype.kind not in "iu" or labels.shape != shape[:1]:
        raise DataError(
            f"{path}: labels are {labels.dtype} {labels.shape}, not integers ({shape[0]},)",
            "labels.astype(np.int64), one per image",
        )
    if int(labels.min()) < 0 or int(labels.max()) >= (2**31 if classes is None else len(classes)):
        known = "" if classes is None else f" for {len(classes)} classes"
        raise DataError(
            f"{path}: labels run from {labels.min()} to {labels.max()}, out of range{known}",
            "labels count from 0 without gaps",
        )
    if classes is not None and (classes.dtype.kind != "U" or classes.ndim != 1):
        raise DataError(
            f"{path}: classes are {classes.dtype} {classes.shape}, not text (C,)", "np.array(names, dtype=str)"
        )
    names = None if classes is None else tuple(str(name) for name in classes)
    return NpzFile(path, labels.astype(np.int64), names, shape)


def _cure(shape: tuple[int, ...], dtype: np.dtype[Any]) -> str:
    if len(shape) == 4 and shape[1] == 3 and shape[3] != 3:
        return "np.ascontiguousarray(images.transpose(0, 2, 3, 1))"
    if len(shape) == 3 or (len(shape) == 4 and shape[3] == 1):
        return "np.repeat(images.reshape(N, H, W, 1), 3, axis=3)"
    if dtype.kind == "f":
        return "(images * 255).round().astype(np.uint8), if they are 0..1"
    return HOW


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran_order, dtype = read(stream)
    return shape, not fortran_order, dtype


def _array(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    with archive.open(f"{name}.npy") as stream:
        array: npt.NDArray[Any] = npy.read_array(stream, allow_pickle=False)
    return array


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Turns what zipfile, zlib and numpy raise for damaged and foreign files into a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is not an .npz file, or damaged: {error}", HOW) from error
    except (ValueError, OSError, EOFError, zlib.error, RuntimeError) as error:
        raise DataError(f"{path} cannot be read: {error}", HOW) from error
