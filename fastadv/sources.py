"""Where images come from: digits, CIFAR, folders of image files, .npz files. Listed and checked first, decoded later.

A source is opened to `Part`s: labels and class names are there, the pixels are read for chosen rows only. So a
validation split or ``per_class`` costs no second copy of the images and no decoding of images nobody asked for.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastadv import npz, papersets
from fastadv.errors import DataError
from fastadv.images import Pixels, Rows, Store, read_blocks, read_files

LAYOUT = """a folder of images looks like
    FOLDER/train/CLASS/*.png|jpg|...   and   FOLDER/test/CLASS/*   (or FOLDER/val/CLASS/*, or both)
and arrays like FOLDER/train.npz and FOLDER/test.npz (or val.npz, or both), or one FILE.npz"""
BUILT_IN = ("digits", "cifar10", "cifar100", *papersets.FOLDERS)

Reader = Callable[[Rows, int | None, Store, bool], tuple[Pixels, Rows, tuple[str, ...]]]


@dataclass(frozen=True)
class Part:
    """One split, not decoded yet. ``read(rows, image_size, store, skip)`` gives the images (K, 3, H, W) of those rows
    that could be read, their positions in ``rows`` (K,), and the names of what was skipped."""

    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    read: Reader

    def take(self, rows: Rows) -> Part:
        """The part that consists of ``rows`` of this one, in their order."""
        return Part(self.labels[rows], self.classes, lambda some, *rest: self.read(rows[some], *rest))


@dataclass(frozen=True)
class Source:
    """The parts of a set. ``val`` None: to be carved from train, ``num_val`` images unless told otherwise.
    ``flip``: whether a mirrored image still shows its class."""

    name: str
    train: Part
    test: Part
    val: Part | None = None
    flip: bool = True
    num_val: int | None = None


def random_state(seed: int, *key: int) -> np.random.RandomState:
    """The random stream of (seed, key). numpy promises the same bits in every version, torch does not."""
    return np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32, *key])


def carve(labels: npt.NDArray[np.int64], num: int, seed: int) -> tuple[Rows, Rows]:
    """``num`` rows in random order, every class by its share, and the remaining rows in ascending order.

    Shares are rounded by largest remainder, ties by lot; every class keeps at least one row in the remainder.

    Raises: DataError when ``num`` exceeds what remains.
    """
    counts = np.bincount(labels)
    if not 1 <= num <= min(len(labels) // 2, int(np.maximum(counts - 1, 0).sum())):
        raise DataError(
            f"{num} of {len(labels)} images cannot be set aside: at least half, and one per class, are for training",
            f"--val-images {max(1, len(labels) // 10)}, or more images",
        )
    random = random_state(seed, 1)
    lot = random.permutation(len(counts)) / len(counts)
    share = num * counts / len(labels)
    quota = np.minimum(np.floor(share).astype(np.int64), np.maximum(counts - 1, 0))
    while (missing := num - int(quota.sum())) > 0:
        # 1e-9: below any difference of two shares (1 / N), so the lot decides ties only.
        wish = np.where(quota < counts - 1, share - quota + 1e-9 * lot, -np.inf)
        best = np.argsort(-wish)[:missing]
        quota[best[np.isfinite(wish[best])]] += 1
    chosen = [random.permutation(np.flatnonzero(labels == c))[:n] for c, n in enumerate(quota)]
    rows = random.permutation(np.concatenate(chosen)).astype(np.int64)
    return rows, np.setdiff1d(np.arange(len(labels)), rows)


def open_source(source: str | Path, download: bool = False) -> Source:
    """Lists and checks a source: "digits", "cifar10[:FOLDER]", "cifar100[:FOLDER]", a folder or an .npz file, or
    "cub", "dogs" or "caltech256" with [:FOLDER[:SPLITS]], SPLITS holding train.json, test.json and val.json.

    Raises: DataError naming what is missing or does not fit, and the cure.
    """
    name, _, folder = str(source).partition(":")
    if str(source) == "digits":
        return _digits()
    standard = os.environ.get("FASTADV_DATA") or "data"
    if name in ("cifar10", "cifar100"):
        return _cifar(name, Path(folder or standard), download)
    if name in papersets.FOLDERS:
        return _paper_set(name, *(Path(path).expanduser() for path in (folder or standard).split(":", 1)))
    path = Path(source).expanduser()
    if path.is_file():
        return _npz_file(path)
    if not path.is_dir():
        near = difflib.get_close_matches(str(source), BUILT_IN, 1)
        guess = f"did you mean {near[0]}?" if near else f"--data takes {', '.join(BUILT_IN)}, a folder or an .npz file"
        raise DataError(f"there is no data set and no folder or file {str(source)!r}", guess)
    name = path.resolve().name
    if (path / "train.npz").is_file():
        return _checked(_split(name, path, ".npz", _npz_parts))
    if (path / "train").is_dir():
        return _checked(_split(name, path, "", _folder_parts))
    raise DataError(f"{path} holds neither train/ nor train.npz", LAYOUT)


def open_test(source: str | Path) -> tuple[Part, bool]:
    """The test part and the ``flip`` of a source. Nothing to train on has to be there: a folder with test/ or val/ (or
    the .npz of them) is enough, and so is a folder of class folders.

    Raises: as :func:`open_source`.
    """
    path = Path(source).expanduser()
    if path.is_dir() and not (path / "train").exists() and not (path / "train.npz").exists():
        splits = [path / f"{split}{ending}" for ending in (".npz", "") for split in ("test", "val")]
        found = next((split for split in splits if split.exists()), path)
        (part,) = _npz_parts([found]) if found.suffix == ".npz" else _folder_parts([found])
        return part, True
    opened = open_source(source)
    return opened.test, opened.flip


def _split(name: str, path: Path, ending: str, parts: Callable[[list[Path]], list[Part]]) -> Source:
    found = [path / (split + ending) for split in ("test", "val") if (path / (split + ending)).exists()]
    if not found:
        raise DataError(f"{path} holds train{ending} but neither test{ending} nor val{ending}", LAYOUT)
    # val alone is the last number's split then, and validation is carved from train.
    train, test, *val = parts([path / f"train{ending}", *found])
    return Source(name, train, test, val[0] if val else None)


def _checked(source: Source) -> Source:
    train = source.train
    if len(train.classes) < 2:
        raise DataError(
            f"{source.name} has one class only: {', '.join(train.classes)}", "a classifier needs two or more"
        )
    for split, part in (("test", source.test), ("val", source.val)):
        if part is not None and part.classes != train.classes:
            more, less = sorted(set(train.classes) - set(part.classes)), sorted(set(part.classes) - set(train.classes))
            raise DataError(
                f"{source.name}: classes of train and {split} differ; only in train: {_some(more)}; "
                f"only in {split}: {_some(less)}" + ("" if more or less else "; the same names in another order"),
                "give both splits the same classes: their place in the list is the label",
            )
    return source


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") if names else "none"


def _folder_parts(folders: list[Path]) -> list[Part]:
    return [_folder_part(folder) for folder in folders]


def _folder_part(folder: Path) -> Part:
    from torchvision.datasets import ImageFolder

    try:
        listing = ImageFolder(folder, allow_empty=True)
    except FileNotFoundError as error:
        raise DataError(f"{folder} holds no class folders", LAYOUT) from error
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error}", "make the folder readable") from error
    paths, labels = [path for path, _ in listing.samples], np.array(listing.targets, np.int64)
    empty = sorted(set(listing.classes) - {listing.classes[label] for label in labels})
    if empty:
        raise DataError(
            f"no images in {len(empty)} of {len(listing.classes)} class folders of {folder}: {_some(empty)}",
            "add images or remove the folders; endings that count: .jpg .jpeg .png .ppm .bmp .pgm .tif .tiff .webp",
        )
    # A link to a parent folder is walked until the system stops it: every image comes 40 times.
    seen: dict[str, str] = {}
    for inner in dict.fromkeys(os.path.dirname(path) for path in paths):
        if (first := seen.setdefault(os.path.realpath(inner), inner)) != inner:
            raise DataError(f"{inner} and {first} are the same folder, by a link", "remove the link")

    return _file_part(paths, labels, tuple(listing.classes))


def _file_part(paths: list[str], labels: npt.NDArray[np.int64], classes: tuple[str, ...]) -> Part:
    def read(rows: Rows, image_size: int | None, store: Store, skip: bool) -> tuple[Pixels, Rows, tuple[str, ...]]:
        return read_files([paths[row] for row in rows], image_size, store, skip)

    return Part(labels, classes, read)


def _paper_set(name: str, folder: Path, splits: Path | None = None) -> Source:
    parts = {split: _file_part(*listing) for split, listing in papersets.listings(name, folder, splits).items()}
    # The paper's shares of train: 3 of 60 images of a class in Caltech-256, a tenth in the others.
    num_val = len(parts["train"].labels) // 20 if name == "caltech256" else None
    return _checked(Source(name, parts["train"], parts["test"], parts.get("val"), num_val=num_val))


def _npz_parts(paths: list[Path]) -> list[Part]:
    files = [npz.inspect(path) for path in paths]
    named = [file.classes for file in files if file.classes is not None]
    # Without names anywhere the labels of train tell how many classes there are: no more than it has images.
    num = min(int(files[0].labels.max()) + 1, len(files[0].labels))
    classes = named[0] if named else tuple(str(c) for c in range(num))
    for file in files:
        if (top := int(file.labels.max())) >= len(classes):
            raise DataError(
                f"{file.path}: label {top} is out of range for {len(classes)} classes",
                "labels count from 0, and every label of test and val occurs in train or has a name in `classes`",
            )
    if missing := [classes[c] for c in np.setdiff1d(np.arange(len(classes)), files[0].labels)]:
        raise DataError(f"{paths[0]}: classes without images: {_some(missing)}", "number the labels without gaps")
    return [Part(file.labels, file.classes or classes, file.read) for file in files]


def _npz_file(path: Path) -> Source:
    (part,) = _npz_parts([path])
    # One file has no test split of its own: a fifth of it, the same fifth for every seed of every run.
    test, rest = carve(part.labels, max(1, len(part.labels) // 5), 0)
    return _checked(Source(path.stem, part.take(rest), part.take(test)))


def _digits() -> Source:
    """scikit-learn's 1797 handwritten digits: 400 for the test, the same for every seed, 200 for validation."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = digits.target.astype(np.int64)

    def read(rows: Rows, image_size: int | None, store: Store, skip: bool) -> tuple[Pixels, Rows, tuple[str, ...]]:
        size = image_size or 64
        grey = enlarge(digits.images[rows], size)
        images = store.empty((len(rows), 3, size, size))
        images[:] = grey[:, None]
        return images, np.arange(len(rows)), ()

    whole = Part(labels, tuple("0123456789"), read)
    test, rest = carve(labels, 400, 0)
    return Source("digits", whole.take(rest), whole.take(test), flip=False, num_val=200)


def enlarge(grey: npt.NDArray[np.float64], size: int) -> Pixels:
    """Grey squares (N, h, h) of 0..16 as (N, size, size) of 0..255: bilinear between pixel centres, edges repeated."""
    side = grey.shape[-1]
    centre = np.clip((np.arange(size) + 0.5) * side / size - 0.5, 0, side - 1)
    weight = np.maximum(0.0, 1.0 - np.abs(centre[:, None] - np.arange(side)))
    # The value 8 is 127.5 exactly: the 1e-6 keeps rounding errors of a matrix product from deciding which way it goes.
    large: Pixels = np.floor(weight @ grey @ weight.T * (255 / 16) + (0.5 + 1e-6)).astype(np.uint8)
    return large


def _cifar(name: str, root: Path, download: bool) -> Source:
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        parts = [kind(root, train=train, download=download) for train in (True, False)]
    # torchvision compares the files with its list of md5 sums before it opens them.
    except (RuntimeError, OSError) as error:
        state = "is damaged or not complete" if (root / kind.base_folder).is_dir() else "is not there"
        raise DataError(
            f"{name}: {root / kind.base_folder} {state}",
            f'name the folder that holds {kind.base_folder} as "{name}:FOLDER", or set FASTADV_DATA, '
            f'or download once: fastadv.data.load("{name}", download=True)',
        ) from error
    train, test = (_array_part(part.data, part.targets, part.classes) for part in parts)
    return Source(name, train, test)


def _array_part(images: Pixels, labels: list[int], classes: list[str]) -> Part:
    def read(rows: Rows, image_size: int | None, store: Store, skip: bool) -> tuple[Pixels, Rows, tuple[str, ...]]:
        blocks = (images[start : start + 1024] for start in range(0, len(images), 1024))
        return read_blocks(blocks, rows, image_size, store), np.arange(len(rows)), ()

    return Part(np.array(labels, np.int64), tuple(classes), read)
