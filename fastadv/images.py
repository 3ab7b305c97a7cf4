"""From image files to uint8 pixels, by one stated rule, within a stated amount of memory.

The rule:

- Formats: JPEG, PNG, PPM and PGM, BMP, TIFF, WebP and GIF, told by the content and not by the name; the first frame.
- At most 64 million pixels, checked from the header before anything is decoded.
- The EXIF orientation is applied; colour profiles are not.
- RGB. Grey, palette, CMYK and black-and-white images are converted. 16-bit grey is scaled by 255/65535, never clipped.
  Transparency is composited over white. Floating-point pixels and 32-bit integers have no fixed white: refused.
- With ``image_size`` the central square (its side is the short side of the image) is resized to that many pixels each
  way, bilinear with antialiasing. Without it every image of a set must have the same size, which is kept.
"""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from fastadv.errors import DataError

MAX_PIXELS = 64_000_000
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
# Files handed to the pool at once: bounds the decoded images that wait for their turn and what Ctrl-C waits for.
BLOCK = 256

Pixels = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64]


class Store:
    """Space for decoded images: RAM while ``budget`` bytes last, beyond that unnamed files in the cache folder.

    The default budget is half of the RAM that is available now. The cache folder is ``$FASTADV_CACHE``, else
    ``~/.cache/fastadv``. A file is reserved in full before it is mapped (a disk that fills up under a mapping kills the
    process) and has no name, so it disappears with the process, however that ends.
    """

    def __init__(self, budget: int | None = None) -> None:
        self.left = available_memory() // 2 if budget is None else budget

    def empty(self, shape: tuple[int, ...]) -> Pixels:
        """An uninitialised uint8 array in RAM, or an ``np.memmap`` where the budget is spent.

        Raises: DataError when the cache folder cannot be written or has too little space.
        """
        size = math.prod(shape)
        if size <= self.left:
            self.left -= size
            return np.empty(shape, np.uint8)
        folder = Path(os.environ.get("FASTADV_CACHE") or Path.home() / ".cache" / "fastadv")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)
                return np.memmap(file, np.uint8, "r+", shape=shape)
        except OSError as error:
            raise DataError(
                f"{size / 2**20:.0f} MiB of images exceed the memory budget and do not fit into {folder} ({error})",
                "set FASTADV_CACHE to a folder with space, or use a smaller --image-size or --per-class",
            ) from error


def available_memory() -> int:
    """Bytes of RAM that can be had now: the kernel's estimate, or the control group's limit where that is less."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if meminfo.exists():
        found += [int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if "MemAvailable:" in line]
    if group.exists() and (limit := group.read_text().strip()).isdigit():
        found.append(int(limit))
    return min(found)


def to_square(image: Image.Image, size: int) -> Image.Image:
    """The central square of an RGB image as ``size`` x ``size`` pixels; the very pixels where it has that size already.

    The crop comes first, so that no aspect ratio, however extreme, makes a large intermediate image.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square if side == size else square.resize((size, size), Image.Resampling.BILINEAR)


def _rgb(image: Image.Image) -> Image.Image:
    # Asked before the rotation: its result no longer knows the format.
    sixteen_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    image = ImageOps.exif_transpose(image)
    if sixteen_bit:
        grey = np.asarray(image).astype(np.int64)
        # 65535 = 257 * 255: this is v * 255 / 65535, rounded.
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} (32 bit) have no fixed white")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def decode(path: str, image_size: int | None) -> Pixels:
    """The pixels (3, H, W) of one image file, by the rule of this module.

    Raises: DataError naming the file, for whatever keeps it from being read.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than the limit of {MAX_PIXELS:,}")
            rgb = _rgb(image)
        return np.asarray(rgb if image_size is None else to_square(rgb, image_size)).transpose(2, 0, 1)
    except MemoryError:
        raise
    # Pillow's readers meet damage with OSError, SyntaxError, ValueError, struct.error, IndexError and more.
    except Exception as error:
        raise DataError(
            f"{path} cannot be read as an image: {error}",
            "replace or remove the file, or --on-bad-image skip to go on without it",
        ) from error


def read_files(
    paths: Sequence[str], image_size: int | None, store: Store, skip: bool
) -> tuple[Pixels, Rows, tuple[str, ...]]:
    """Decodes files on a few threads: images (K, 3, H, W), which of ``paths`` they are (K,), and the skipped paths.

    A bad file stops everything, unless ``skip``: then it is left out and no other image takes its place. More than
    1 % (and more than 5) bad files stop everything even so.

    Raises: DataError naming the first bad file in the order of ``paths``, or two files of different size.
    """

    def attempt(path: str) -> Pixels | DataError:
        try:
            return decode(path, image_size)
        except DataError as error:
            return error

    images: Pixels | None = None
    kept: list[int] = []
    skipped: list[str] = []
    with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # Pillow only warns between 89 and 179 million pixels.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for start in range(0, len(paths), BLOCK):
            for row, found in enumerate(pool.map(attempt, paths[start : start + BLOCK]), start):
                if isinstance(found, DataError):
                    if not skip:
                        raise found
                    skipped.append(paths[row])
                    if len(skipped) > 5 and len(skipped) * 100 > len(paths):
                        raise DataError(
                            f"{len(skipped)} of {len(paths)} images cannot be read, the last of them: {found.what}",
                            "repair the set: at most 5 files or 1 % are skipped",
                        )
                    continue
                if images is None:
                    images = store.empty((len(paths), *found.shape))
                if found.shape != images.shape[1:]:
                    raise DataError(
                        f"images differ in size: {paths[kept[0]]} is {_size(images.shape)}, "
                        f"{paths[row]} is {_size(found.shape)}",
                        "--image-size 64 (or another size) makes them equal",
                    )
                images[len(kept)] = found
                kept.append(row)
    if images is None:
        raise DataError(f"none of {len(paths)} images can be read, {paths[0]} to begin with", "repair the set")
    return images[: len(kept)], np.array(kept, np.int64), tuple(skipped)


def read_blocks(blocks: Iterable[Pixels], rows: Rows, image_size: int | None, store: Store) -> Pixels:
    """Picks ``rows``, in any order, from consecutive blocks (n, H, W, 3) of a longer array: (len(rows), 3, H, W)."""
    order = np.argsort(rows)
    ascending = rows[order]
    images: Pixels | None = None
    start = 0
    for block in blocks:
        low, high = np.searchsorted(ascending, (start, start + len(block)))
        some = block[ascending[low:high] - start]
        if image_size is not None and some.shape[1:3] != (image_size, image_size):
            squares = [np.asarray(to_square(Image.fromarray(one), image_size)) for one in some]
            some = np.array(squares, np.uint8).reshape(-1, image_size, image_size, 3)
        if images is None:
            images = store.empty((len(rows), 3, *some.shape[1:3]))
        images[order[low:high]] = some.transpose(0, 3, 1, 2)
        start += len(block)
    assert images is not None and start > ascending[-1]
    return images


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[-1]}x{shape[-2]}"
