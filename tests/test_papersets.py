"""The papers' data sets on miniature copies of their real folders, and the refusals of lists that do not fit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from fastadv import data, train
from fastadv.errors import DataError
from fastadv.images import Store
from fastadv.sources import Part, open_source

BIRDS = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")
DOGS = ("n02085620-Chihuahua", "n02085782-Japanese_spaniel")


def picture(path: Path, red: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 4), (red, 0, 0)).save(path, quality=100)


def reds(part: Part) -> list[int]:
    """The red values of a part's images, to 4 levels: JPEG rounds."""
    pixels, _, _ = part.read(np.arange(len(part.labels)), 4, Store(), False)
    return [int(value) // 4 for value in pixels[:, 0, 2, 2]]


def cub(root: Path) -> Path:
    """CUB_200_2011 with 4 images of 3 birds; the second and the third of each are for training."""
    root = root / "CUB_200_2011"
    lists: dict[str, list[str]] = {"images": [], "image_class_labels": [], "train_test_split": [], "classes": []}
    for row in range(12):
        bird, number = BIRDS[row // 4], row + 1
        name = f"{bird}/{bird[4:]}_{row:04d}_{row * 7}.jpg"
        picture(root / "images" / name, 8 * row)
        lists["images"].append(f"{number} {name}")
        lists["image_class_labels"].append(f"{number} {row // 4 + 1}")
        lists["train_test_split"].append(f"{number} {int(row % 4 in (1, 2))}")
    lists["classes"] = [f"{number} {bird}" for number, bird in enumerate(BIRDS, 1)]
    for name, lines in lists.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def dogs(root: Path) -> Path:
    """Images/ and the two Matlab lists of Stanford Dogs: 3 + 1 images of 2 dogs, labels from 1."""
    files: dict[str, list[str]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    for row in range(8):
        name = f"{DOGS[row // 4]}/{DOGS[row // 4].partition('-')[0]}_{row * 31}.jpg"
        picture(root / "Images" / name, 8 * row)
        split = "test" if row % 4 == 3 else "train"
        files[split].append(name)
        labels[split].append(row // 4 + 1)
    for split in files:
        cells = np.empty((len(files[split]), 1), object)
        cells[:, 0] = files[split]
        column = np.array(labels[split], np.uint8)[:, None]
        savemat(root / f"{split}_list.mat", {"file_list": cells, "annotation_list": cells, "labels": column})
    return root


def caltech(root: Path) -> Path:
    """256_ObjectCategories with 8 images of 3 classes, clutter the last; a stray folder as in the archive."""
    for number, name in enumerate(("001.ak47", "056.dog", "257.clutter")):
        for image in range(8):
            picture(root / "256_ObjectCategories" / name / f"{name[:3]}_{image + 1:04d}.jpg", 8 * (8 * number + image))
    picture(root / "256_ObjectCategories" / "056.dog" / "greg" / "001.jpg", 0)
    return root


SETS: dict[str, Callable[[Path], Path]] = {"cub": cub, "dogs": dogs, "caltech256": caltech}


def test_cub_as_published(tmp_path: Path) -> None:
    root = cub(tmp_path)
    for folder in (root, tmp_path):
        source = open_source(f"cub:{folder}")
        assert (source.name, source.val, source.flip) == ("cub", None, True)
        assert source.train.classes == source.test.classes == BIRDS
        assert source.train.labels.tolist() == source.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert reds(source.train) == [2, 4, 10, 12, 18, 20] and reds(source.test) == [0, 6, 8, 14, 16, 22]


def test_dogs_as_published(tmp_path: Path) -> None:
    source = open_source(f"dogs:{dogs(tmp_path)}")
    assert source.train.classes == DOGS and source.val is None
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1] and source.test.labels.tolist() == [0, 1]
    assert reds(source.train) == [0, 2, 4, 8, 10, 12] and reds(source.test) == [6, 14]


def test_caltech_as_published(tmp_path: Path) -> None:
    source = open_source(f"caltech256:{caltech(tmp_path)}")
    assert source.train.classes == ("001.ak47", "056.dog", "257.clutter")
    # Fewer than 60 in a class: three quarters of it.
    assert (
        np.bincount(source.train.labels).tolist() == [6, 6, 6] and np.bincount(source.test.labels).tolist() == [2] * 3
    )
    assert sorted(reds(source.train) + reds(source.test)) == list(range(0, 48, 2))
    again = open_source(f"caltech256:{tmp_path}")
    assert reds(again.test) == reds(source.test)


def test_caltech_trains_on_sixty_of_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastadv.papersets.PER_CLASS", 5)
    source = open_source(f"caltech256:{caltech(tmp_path)}")
    assert (
        np.bincount(source.train.labels).tolist() == [5, 5, 5] and np.bincount(source.test.labels).tolist() == [3] * 3
    )


def test_the_standard_folder_is_looked_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cub(tmp_path)
    monkeypatch.setenv("FASTADV_DATA", str(tmp_path))
    assert len(open_source("cub").train.labels) == 6


def images_of(root: Path, name: str) -> list[str]:
    inner = {"cub": "images", "dogs": "Images", "caltech256": "256_ObjectCategories"}[name]
    return sorted(str(path.relative_to(root / inner)) for path in (root / inner).glob("*/*.jpg"))


def split(root: Path, name: str, first: int = 0) -> dict[str, dict[str, int]]:
    """Lists of every third image each, classes numbered from ``first`` by their folder's order."""
    images = images_of(root, name)
    folders = sorted({image.partition("/")[0] for image in images})
    found: dict[str, dict[str, int]] = {"train": {}, "val": {}, "test": {}}
    for row, image in enumerate(images):
        found[("train", "val", "test")[row % 3]][image] = folders.index(image.partition("/")[0]) + first
    return found


def write(folder: Path, lists: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for part, content in lists.items():
        (folder / f"{part}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("beside", [True, False])
def test_split_files_decide_where_there_are_any(tmp_path: Path, name: str, first: int, beside: bool) -> None:
    root = SETS[name](tmp_path)
    lists = split(root, name, first)
    folder = write(root if beside else tmp_path / "splits", lists)
    source = open_source(f"{name}:{tmp_path}" + ("" if beside else f":{folder}"))
    assert source.val is not None
    for part, found in (("train", source.train), ("val", source.val), ("test", source.test)):
        assert found.labels.tolist() == [number - first for number in lists[part].values()]
        everything = images_of(root, name)
        assert reds(found) == [2 * everything.index(image) for image in lists[part]]
    assert source.train.classes == tuple(sorted({image.partition("/")[0] for image in images_of(root, name)}))
    loaded = data.load(f"{name}:{tmp_path}" + ("" if beside else f":{folder}"), image_size=4)
    assert (len(loaded.train), len(loaded.val), len(loaded.test)) == tuple(map(len, lists.values()))


def _first(lists: dict[str, dict[str, int]], part: str) -> str:
    return next(iter(lists[part]))


def _absent(lists: dict[str, dict[str, int]]) -> None:
    lists["test"]["001.Black_footed_Albatross/none.jpg"] = 0


def _twice(lists: dict[str, dict[str, int]]) -> None:
    lists["test"][_first(lists, "train")] = 0


def _one_class_less(lists: dict[str, dict[str, int]]) -> None:
    lists["test"] = {image: number for image, number in lists["test"].items() if number != 2}


def _one_class_more(lists: dict[str, dict[str, int]]) -> None:
    """Of which nothing is learned."""
    for part in ("train", "test"):
        lists[part] = {image: number for image, number in lists[part].items() if number != 2}


def _gap(lists: dict[str, dict[str, int]]) -> None:
    for part in lists:
        lists[part] = {image: 2 * number for image, number in lists[part].items()}


def _from_two(lists: dict[str, dict[str, int]]) -> None:
    for part in lists:
        lists[part] = {image: number + 2 for image, number in lists[part].items()}


def _mixed(lists: dict[str, dict[str, int]]) -> None:
    lists["train"][_first(lists, "train")] = 1


def _renumbered(lists: dict[str, dict[str, int]]) -> None:
    """The same numbers mean other classes in one split: the released code, which sorts per split, would not notice."""
    lists["test"] = {image: (number + 1) % 3 for image, number in lists["test"].items()}


def _outside(lists: dict[str, Any]) -> None:
    lists["train"]["../images.txt"] = 0


def _names(lists: dict[str, Any]) -> None:
    lists["train"][_first(lists, "train")] = "albatross"


def _list(lists: dict[str, Any]) -> None:
    lists["train"] = list(lists["train"])


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (_absent, r"1 of 5 images of test are not in .*images, first 001\.Black_footed_Albatross/none\.jpg"),
        (_twice, "1 images are in (train and in test|test and in train), first 001"),
        (_one_class_less, r"train has 3 classes, test 2; only in train: \[2\], only in test: none"),
        (_one_class_more, r"train has 2 classes, val 3; only in train: none, only in val: \[2\]"),
        (_gap, r"3 classes are numbered from 0 to 4, without \[1, 3\]"),
        (_from_two, r"3 classes are numbered from 2 to 4, without \[1\]"),
        (_mixed, r"class 1 has images in 00.* and in 00"),
        (_renumbered, r"class \d has images in 00.* and in 00"),
        (_outside, r"train\.json: '\.\./images\.txt': 0 is no image with a class number"),
        (_names, r"train\.json: .*'albatross' is no image with a class number"),
        (_list, r"train\.json lists no images"),
    ],
)
def test_split_files_that_do_not_fit_are_refused(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], None], what: str
) -> None:
    root = cub(tmp_path)
    lists = split(root, "cub")
    assert len(open_source(f"cub:{root}:{write(tmp_path / 'good', lists)}").train.labels) == 4
    spoil(lists)
    with pytest.raises(DataError, match=what) as caught:
        open_source(f"cub:{root}:{write(tmp_path / 'splits', lists)}")
    assert caught.value.exit_code == 3 and caught.value.fix


def test_validation_images_may_miss_a_class(tmp_path: Path) -> None:
    """600 of CUB's 5,994 training images, drawn at random, miss some of its 200 classes."""
    root = cub(tmp_path)
    lists = split(root, "cub")
    lists["val"] = {image: number for image, number in lists["val"].items() if number != 1}
    loaded = data.load(f"cub:{root}:{write(tmp_path / 'splits', lists)}", image_size=4)
    assert loaded.train.classes == loaded.val.classes == BIRDS
    assert sorted(loaded.val.labels.tolist()) == sorted(lists["val"].values())


def test_two_numbers_for_one_folder_are_refused(tmp_path: Path) -> None:
    root = cub(tmp_path)
    one, two, three, four, *_ = images_of(root, "cub")
    lists = {"train": {one: 0, two: 1}, "test": {three: 0, four: 1}}
    with pytest.raises(DataError, match=r"001\.Black_footed_Albatross is the folder of two classes"):
        open_source(f"cub:{root}:{write(tmp_path / 'splits', lists)}")


def test_missing_folders_and_lists_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no Images in") as caught:
        open_source(f"dogs:{tmp_path}")
    assert "dogs:FOLDER" in caught.value.fix
    root = cub(tmp_path)
    (root / "train.json").write_text("{")
    with pytest.raises(DataError, match=r"lacks test\.json"):
        open_source(f"cub:{root}")
    (root / "test.json").write_text("{}")
    with pytest.raises(DataError, match=r"train\.json is not JSON"):
        open_source(f"cub:{root}")


@pytest.mark.parametrize(
    ("file", "content", "what"),
    [
        ("images.txt", None, r"images\.txt cannot be read"),
        ("image_class_labels.txt", "1 1\n", r"12 images, image_class_labels\.txt 1"),
        ("train_test_split.txt", "1\n", r"train_test_split\.txt: '1' stands alone"),
        ("image_class_labels.txt", "\n".join(f"{n} one" for n in range(1, 13)), "image 1 has class 'one', split '0'"),
    ],
)
def test_damaged_lists_of_cub_are_named(tmp_path: Path, file: str, content: str | None, what: str) -> None:
    path = cub(tmp_path) / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(DataError, match=what):
        open_source(f"cub:{tmp_path}")


def test_damaged_lists_of_dogs_are_named_and_scipy_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = dogs(tmp_path) / "train_list.mat"
    path.write_bytes(path.read_bytes()[:150])
    with pytest.raises(DataError, match=r"train_list\.mat cannot be read"):
        open_source(f"dogs:{tmp_path}")
    path.unlink()
    with pytest.raises(DataError, match=r"train_list\.mat cannot be read"):
        open_source(f"dogs:{tmp_path}")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(DataError, match="scipy is not installed") as caught:
        open_source(f"dogs:{tmp_path}")
    assert "pip install scipy" in caught.value.fix


def test_paths_of_a_set_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("birds", "splits", "cub"):
        (tmp_path / name).mkdir()
    assert train.absolute("cub:birds:splits") == f"cub:{tmp_path / 'birds'}:{tmp_path / 'splits'}"
    assert train.absolute("cub") == "cub"
