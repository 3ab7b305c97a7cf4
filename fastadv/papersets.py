"""The papers' data sets in the folders they are published as: CUB-200-2011, Stanford Dogs, Caltech-256.

A set is split by the files train.json, test.json and (if there) val.json, {"CLASS FOLDER/IMAGE": class number}, as the
released code of arXiv:2312.05716 has them; without such files by its own lists. Caltech-256 has no lists: 60 images of
every class are for training, as in the paper, but not its 60.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from fastadv.errors import DataError
from fastadv.images import Rows

# What the folder of images is called, and the folder that the archive or torchvision puts around it.
FOLDERS = {
    "cub": ("images", "CUB_200_2011"),
    "dogs": ("Images", "stanford_dogs"),
    "caltech256": ("256_ObjectCategories", "caltech256"),
}
PER_CLASS = 60


class Listing(NamedTuple):
    """One split: N paths, labels (N,) counting ``classes``."""

    paths: list[str]
    labels: Rows
    classes: tuple[str, ...]


def listings(name: str, folder: Path, splits: Path | None = None) -> dict[str, Listing]:
    """The splits "train", "test" and, where there is one, "val" of a set; every image is there, none is in two splits.

    name: a key of `FOLDERS`; folder: what holds the images' folder, or one above; splits: what holds train.json and the
    others, by default what holds the images' folder.

    Raises: DataError naming the file and what is missing or does not fit.
    """
    inner, around = FOLDERS[name]
    root = next((place for place in (folder, folder / around) if (place / inner).is_dir()), None)
    if root is None:
        raise DataError(f"{name}: there is no {inner} in {folder}", f'name the folder that holds it as "{name}:FOLDER"')
    if splits is not None or (root / "train.json").exists():
        numbers = {part: _read_json(file) for part, file in _json_files(name, splits or root).items()}
    else:
        numbers = {"cub": _cub, "dogs": _dogs, "caltech256": _caltech}[name](root)
    _check_numbers(name, numbers)
    classes = _class_names(name, numbers)
    known = sorted(classes)
    for part, images in numbers.items():
        gone = [image for image in images if not (root / inner / image).is_file()]
        if gone:
            raise DataError(
                f"{name}: {len(gone)} of {len(images)} images of {part} are not in {root / inner}, first {gone[0]}",
                "unpack the whole set, or use the lists that belong to it",
            )
    return {
        part: Listing(
            [str(root / inner / image) for image in images],
            np.array([known.index(number) for number in images.values()], np.int64),
            tuple(classes[number] for number in known),
        )
        for part, images in numbers.items()
    }


def _json_files(name: str, folder: Path) -> dict[str, Path]:
    found = {part: folder / f"{part}.json" for part in ("train", "test", "val") if (folder / f"{part}.json").is_file()}
    if lacking := [f"{part}.json" for part in ("train", "test") if part not in found]:
        raise DataError(
            f"{name}: {folder} lacks {' and '.join(lacking)}",
            f'give the folder of train.json, test.json and val.json as "{name}:FOLDER:SPLITS"',
        )
    return found


def _read_json(path: Path) -> dict[str, int]:
    wanted = 'it holds {"CLASS FOLDER/IMAGE": class number, ...}'
    try:
        content: Any = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise DataError(f"{path} is not JSON ({error})", wanted) from error
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path} lists no images", wanted)
    for image, number in content.items():
        # bool is an int of Python's.
        if type(number) is not int or PurePosixPath(image).is_absolute() or ".." in PurePosixPath(image).parts:
            raise DataError(f"{path}: {image!r}: {number!r} is no image with a class number", wanted)
    return content


def _check_numbers(name: str, numbers: dict[str, dict[str, int]]) -> None:
    """Class numbers of train in every split, in the test all of them, without gaps, from 0 or 1; no image twice."""
    train = set(numbers["train"].values())
    for part, images in numbers.items():
        here = set(images.values())
        # Validation images drawn at random, three per class as in CUB, may miss a class.
        if here - train or (part == "test" and train - here):
            less, more = sorted(train - here), sorted(here - train)
            raise DataError(
                f"{name}: train has {len(train)} classes, {part} {len(here)}; "
                f"only in train: {less[:10] or 'none'}, only in {part}: {more[:10] or 'none'}",
                "use lists that were made together",
            )
        for other in numbers:
            if other < part and (shared := images.keys() & numbers[other].keys()):
                raise DataError(
                    f"{name}: {len(shared)} images are in {other} and in {part}, first {min(shared)}",
                    "use lists that were made together",
                )
    first, last = min(train), max(train)
    if first not in (0, 1) or last - first + 1 != len(train):
        missing = sorted(set(range(min(first, 1), last + 1)) - train)
        raise DataError(
            f"{name}: {len(train)} classes are numbered from {first} to {last}, without {missing[:10]}",
            "number the classes from 0 or 1 without gaps",
        )


def _class_names(name: str, numbers: dict[str, dict[str, int]]) -> dict[int, str]:
    """The folder of each class number: one for each, and no folder for two."""
    found: dict[int, str] = {}
    for image, number in (pair for images in numbers.values() for pair in images.items()):
        folder = PurePosixPath(image).parent.name
        if found.setdefault(number, folder) != folder:
            raise DataError(
                f"{name}: class {number} has images in {found[number]} and in {folder}",
                "a class is one folder: use lists that were made together",
            )
    if len(set(found.values())) != len(found):
        twice = next(folder for folder in found.values() if list(found.values()).count(folder) > 1)
        raise DataError(f"{name}: {twice} is the folder of two classes", "a folder is one class")
    return found


def _cub(root: Path) -> dict[str, dict[str, int]]:
    """images.txt, image_class_labels.txt and train_test_split.txt: "number value" in every line."""
    names, labels, learn = (
        _pairs(root / f"{what}.txt") for what in ("images", "image_class_labels", "train_test_split")
    )
    if not names.keys() == labels.keys() == learn.keys():
        raise DataError(
            f"{root}: images.txt has {len(names)} images, image_class_labels.txt {len(labels)}, "
            f"train_test_split.txt {len(learn)}, or others",
            "unpack CUB_200_2011.tgz again",
        )
    found: dict[str, dict[str, int]] = {"train": {}, "test": {}}
    for image, path in names.items():
        if not labels[image].isdecimal() or learn[image] not in ("0", "1"):
            raise DataError(
                f"{root}: image {image} has class {labels[image]!r}, split {learn[image]!r}", "numbers, and 0 or 1"
            )
        found["train" if learn[image] == "1" else "test"][path] = int(labels[image])
    return found


def _pairs(path: Path) -> dict[str, str]:
    try:
        lines = [line.split(maxsplit=1) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error})", "unpack CUB_200_2011.tgz again") from error
    if bad := [line for line in lines if len(line) != 2]:
        raise DataError(f"{path}: {bad[0][0]!r} stands alone in a line", 'a line is "number value"')
    return {number: value.strip() for number, value in lines}


def _dogs(root: Path) -> dict[str, dict[str, int]]:
    """train_list.mat and test_list.mat: file_list (N, 1) of names in Images/, labels (N, 1) from 1."""
    try:
        from scipy.io import loadmat  # type: ignore[import-untyped]  # scipy ships no annotations
    except ImportError as error:
        raise DataError(
            f"{root}: the lists of Stanford Dogs are Matlab files, and scipy is not installed",
            "pip install scipy (it comes with scikit-learn), or give train.json and test.json",
        ) from error
    found: dict[str, dict[str, int]] = {}
    for part in ("train", "test"):
        path = root / f"{part}_list.mat"
        try:
            content = loadmat(path)
            names = [str(entry.item()) for entry in content["file_list"].flatten()]
            labels = [int(label) for label in content["labels"].flatten()]
        # loadmat meets damage with ValueError, TypeError, zlib.error and others of its own.
        except Exception as error:
            raise DataError(f"{path} cannot be read ({error})", "unpack lists.tar beside Images") from error
        if len(names) != len(labels):
            raise DataError(f"{path} has {len(names)} names and {len(labels)} labels", "unpack lists.tar again")
        found[part] = dict(zip(names, labels, strict=True))
    return found


def _caltech(root: Path) -> dict[str, dict[str, int]]:
    """NNN.name/*.jpg: `PER_CLASS` of every class for training, the same for every seed, the others for the test."""
    found: dict[str, dict[str, int]] = {"train": {}, "test": {}}
    folders = sorted(path for path in (root / FOLDERS["caltech256"][0]).iterdir() if path.is_dir())
    for number, folder in enumerate(folders):
        # Not in folders below: the archive has strays there.
        names = sorted(f"{folder.name}/{path.name}" for path in folder.iterdir() if path.suffix == ".jpg")
        if len(names) < 2:
            raise DataError(f"{folder} has {len(names)} images", "unpack 256_ObjectCategories.tar again")
        # Of a class too small for the paper's 60 three quarters.
        num = min(PER_CLASS, max(1, 3 * len(names) // 4))
        order = np.random.RandomState([0, number]).permutation(len(names))
        found["train"] |= {names[row]: number for row in sorted(order[:num])}
        found["test"] |= {names[row]: number for row in sorted(order[num:])}
    if not folders:
        raise DataError(f"{root / FOLDERS['caltech256'][0]} holds no class folders", "unpack 256_ObjectCategories.tar")
    return found
