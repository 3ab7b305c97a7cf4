"""Sources of images on miniature copies of their real layouts, and the refusals that name what is wrong with a set."""

from __future__ import annotations

import hashlib
import pickle
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from fastadv.errors import DataError
from fastadv.images import Store
from fastadv.sources import Part, carve, enlarge, open_source


def tree(root: Path, layout: dict[str, dict[str, int]]) -> Path:
    """A folder per split and class with so many 4x4 images; the red value counts the images of a split."""
    for split, classes in layout.items():
        count = 0
        for name, num in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(num):
                Image.new("RGB", (4, 4), (count, 0, 0)).save(root / split / name / f"{i:03d}.png")
                count += 1
    return root


def reds(part: Part) -> list[int]:
    """The red values of a part's images, all read."""
    pixels, kept, skipped = part.read(np.arange(len(part.labels)), None, Store(), False)
    assert kept.tolist() == list(range(len(part.labels))) and skipped == ()
    values: list[int] = pixels[:, 0, 0, 0].tolist()
    return values


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.data())
def test_carve_takes_every_class_by_its_share(counts: list[int], data: st.DataObject) -> None:
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(len(counts)), counts))
    most = min(len(labels) // 2, sum(counts) - len(counts))
    if most < 1:
        return
    num, seed = data.draw(st.integers(1, most)), data.draw(st.integers(0, 2**63))
    rows, rest = carve(labels, num, seed)
    assert len(rows) == num and sorted([*rows, *rest]) == list(range(len(labels))) and (np.diff(rest) > 0).all()
    quota = np.bincount(labels[rows], minlength=len(counts))
    assert (quota < counts).all()
    share = num * np.array(counts) / len(labels)
    if (share + 1 <= np.array(counts) - 1).all():
        assert (np.abs(quota - share) < 1).all()
    assert all(np.array_equal(a, b) for a, b in zip(carve(labels, num, seed), (rows, rest), strict=True))


def test_carve_depends_on_the_seed_and_shuffles() -> None:
    labels = np.repeat(np.arange(20), 10)
    first, second = carve(labels, 10, 0)[0], carve(labels, 10, 1)[0]
    assert set(first) != set(second) and set(labels[first]) != set(labels[second])
    assert (np.diff(labels[carve(labels, 100, 0)[0]]) < 0).any()


@pytest.mark.parametrize("num", [0, 6, 100])
def test_carve_refuses_what_leaves_too_little(num: int) -> None:
    with pytest.raises(DataError, match=f"{num} of 10 images") as caught:
        carve(np.arange(10) % 2, num, 0)
    assert "--val-images 1" in caught.value.fix


def test_enlarging_is_exact_bilinear_interpolation() -> None:
    grey = np.random.RandomState(0).randint(0, 17, (2, 8, 8))
    found = enlarge(grey.astype(float), 64)
    for row, column in [(0, 0), (3, 3), (4, 5), (31, 60), (63, 63), (20, 7), (36, 36)]:
        total = Fraction(0)
        for i in range(8):
            for j in range(8):
                weight = Fraction(1)
                for place, at in ((row, i), (column, j)):
                    centre = min(max(Fraction(2 * place + 1, 16) - Fraction(1, 2), Fraction(0)), Fraction(7))
                    weight *= max(Fraction(0), 1 - abs(centre - at))
                total += weight * int(grey[1, i, j])
        assert found[1, row, column] == int(total * 255 / 16 + Fraction(1, 2))
    assert np.array_equal(enlarge(grey.astype(float), 8), np.floor(grey * 255 / 16 + 0.5))
    # 8 of 16 lies between 127 and 128: whatever the size, it goes up.
    assert all((enlarge(np.full((1, 8, 8), 8.0), size) == 128).all() for size in (8, 28, 33, 64))


def test_digits_keep_their_test_split() -> None:
    digits = open_source("digits")
    assert (len(digits.train.labels), len(digits.test.labels), digits.val, digits.num_val) == (1397, 400, None, 200)
    assert digits.train.classes == tuple("0123456789") and digits.flip is False
    assert np.bincount(digits.test.labels).tolist() == [40, 40, 39, 41, 40, 41, 40, 40, 39, 40]
    pixels, _, _ = digits.test.read(np.arange(3), None, Store(), False)
    assert pixels.shape == (3, 3, 64, 64) and (pixels == pixels[:, :1]).all()
    assert digits.test.read(np.arange(3), 32, Store(), False)[0].shape == (3, 3, 32, 32)


@pytest.mark.parametrize("second", ["test", "val"])
def test_a_folder_with_two_splits_is_train_and_test(tmp_path: Path, second: str) -> None:
    source = open_source(tree(tmp_path, {"train": {"b": 2, "a": 3}, second: {"a": 1, "b": 1}}))
    assert (source.name, source.val, source.flip) == (tmp_path.name, None, True)
    assert source.train.classes == ("a", "b") and source.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert reds(source.train) == [2, 3, 4, 0, 1] and reds(source.test) == [0, 1]
    assert reds(source.train.take(np.array([4, 0]))) == [1, 2]
    assert reds(source.train.take(np.array([4, 0, 3])).take(np.array([2, 0]))) == [0, 1]


def test_a_folder_with_three_splits_has_a_val_split(tmp_path: Path) -> None:
    source = open_source(
        str(tree(tmp_path, {"train": {"a": 2, "b": 2}, "val": {"a": 1, "b": 2}, "test": {"a": 3, "b": 1}}))
    )
    assert source.val is not None and len(source.val.labels) == 3 and len(source.test.labels) == 4


@pytest.mark.parametrize(
    ("layout", "what", "fix"),
    [
        ({"cats": {"x": 1}, "dogs": {"x": 1}}, "neither train/ nor", "FOLDER/train/CLASS"),
        ({"train": {"a": 1, "b": 1}}, "neither test nor val", "FOLDER/test/CLASS"),
        ({"train": {"a": 1, "b": 0, "c": 0}, "test": {"a": 1}}, "2 of 3 class folders of .*train: b, c", r"\.jpg"),
        ({"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 0}}, "1 of 2 class folders of .*test: b", "remove"),
        ({"train": {"a": 3}, "test": {"a": 1}}, "one class only: a", "two"),
        (
            {"train": {"a": 1, "b": 1}, "test": {"a": 1, "c": 1}},
            "train and test differ; only in train: b; only in test: c",
            "the same classes",
        ),
        (
            {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}, "val": {"a": 1}},
            "train and val differ; only in train: b; only in val: none",
            "the same classes",
        ),
    ],
)
def test_folders_that_do_not_fit_are_refused_with_a_cure(
    tmp_path: Path, layout: dict[str, dict[str, int]], what: str, fix: str
) -> None:
    with pytest.raises(DataError, match=what) as caught:
        open_source(tree(tmp_path, layout))
    assert caught.value.exit_code == 3
    with pytest.raises(ValueError, match=fix):
        raise ValueError(caught.value.fix)


def test_long_lists_of_classes_are_cut(tmp_path: Path) -> None:
    source = tree(tmp_path, {"train": {f"c{i:02d}": 1 for i in range(15)}, "test": {"c00": 1, "x": 1}})
    with pytest.raises(DataError, match=r"only in train: c01, .*, c10 and 4 more; only in test: x"):
        open_source(source)


def test_files_without_class_folders_and_links_that_loop_are_refused(tmp_path: Path) -> None:
    root = tree(tmp_path, {"train": {"a": 1, "b": 1}, "test": {}})
    (root / "test").mkdir()
    Image.new("RGB", (4, 4)).save(root / "test" / "image.png")
    with pytest.raises(DataError, match="test holds no class folders"):
        open_source(root)
    (root / "train" / "a" / "again").symlink_to(root / "train" / "a")
    with pytest.raises(DataError, match=r"again and .*a are the same folder"):
        open_source(root)


@pytest.mark.parametrize(
    ("source", "fix"),
    [("digit", "did you mean digits"), ("cifar-10", "did you mean cifar10"), ("/no/such/folder", "digits, cifar10")],
)
def test_an_unknown_source_is_refused_with_a_guess(source: str, fix: str) -> None:
    with pytest.raises(DataError, match=source) as caught:
        open_source(source)
    assert fix in caught.value.fix


def arrays(path: Path, labels: list[int], names: list[str] | None = None, red: int = 0) -> None:
    images = np.zeros((len(labels), 4, 4, 3), np.uint8)
    images[..., 0] = np.arange(red, red + len(labels))[:, None, None]
    np.savez(path, images=images, labels=np.array(labels), **({} if names is None else {"classes": np.array(names)}))


def test_a_folder_of_npz_files(tmp_path: Path) -> None:
    arrays(tmp_path / "train.npz", [0, 1, 1, 0])
    arrays(tmp_path / "test.npz", [1])
    source = open_source(tmp_path)
    assert source.train.classes == source.test.classes == ("0", "1") and source.val is None
    arrays(tmp_path / "val.npz", [1], ["no", "yes"])
    source = open_source(tmp_path)
    assert source.val is not None and source.train.classes == source.val.classes == ("no", "yes")
    assert reds(source.train) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("train", "test", "what"),
    [
        (([0, 1], None), ([0, 2], None), r"test\.npz: label 2 is out of range for 2 classes"),
        (([0, 10**9], None), ([0], None), r"train\.npz: label 1000000000 is out of range for 2 classes"),
        (([0, 2, 2], None), ([0], None), r"train\.npz: classes without images: 1"),
        (([0, 0], ["a", "b"]), ([1], ["a", "b"]), r"train\.npz: classes without images: b"),
        (([0, 1], ["a", "b"]), ([0], ["a", "c"]), "only in train: b; only in test: c"),
        (([0, 1], ["a", "b"]), ([0], ["b", "a"]), "only in train: none; only in test: none; the same names in another"),
        (([0, 0], None), ([0], None), "one class only: 0"),
    ],
)
def test_npz_files_that_do_not_fit_together(
    tmp_path: Path, train: tuple[list[int], list[str]], test: tuple[list[int], list[str]], what: str
) -> None:
    arrays(tmp_path / "train.npz", *train)
    arrays(tmp_path / "test.npz", *test)
    with pytest.raises(DataError, match=what):
        open_source(tmp_path)


def test_one_npz_file_lends_a_fifth_to_the_test_split(tmp_path: Path) -> None:
    arrays(tmp_path / "birds.npz", [0, 1] * 25)
    source = open_source(tmp_path / "birds.npz")
    assert source.name == "birds" and np.bincount(source.test.labels).tolist() == [5, 5]
    assert sorted(reds(source.train) + reds(source.test)) == list(range(50))
    assert source.val is None
    arrays(tmp_path / "few.npz", [0, 1])
    with pytest.raises(DataError, match="1 of 2 images cannot be set aside"):
        open_source(tmp_path / "few.npz")


def cifar(root: Path, kind: type[CIFAR10], monkeypatch: pytest.MonkeyPatch) -> None:
    """The real layout with 3 images a file. torchvision's md5 sums are replaced by ours, its code is not."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)

    def dump(name: str, content: dict[str, object]) -> str:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    key = "labels" if kind is CIFAR10 else "fine_labels"
    count = 0
    for listing in ("train_list", "test_list"):
        sums = []
        for name, _ in getattr(kind, listing):
            # A file keeps an image as its 1024 red, then its green, then its blue values.
            data = np.arange(3 * 3072).reshape(3, 3072).astype(np.uint8)
            data[:, 0] = [count, count + 1, count + 2]
            sums.append([name, dump(name, {"data": data, key: [0, 1, (count // 3) % 2]})])
            count += 3
        monkeypatch.setattr(kind, listing, sums)
    meta = dict(kind.meta)
    meta["md5"] = dump(meta["filename"], {meta["key"]: ["plane", "car"]})
    monkeypatch.setattr(kind, "meta", meta)


@pytest.mark.parametrize(("name", "kind", "num"), [("cifar10", CIFAR10, 15), ("cifar100", CIFAR100, 3)])
def test_cifar_comes_through_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: type[CIFAR10], num: int
) -> None:
    cifar(tmp_path, kind, monkeypatch)
    source = open_source(f"{name}:{tmp_path}")
    assert (source.name, source.val, source.flip) == (name, None, True) and source.train.classes == ("plane", "car")
    assert reds(source.train) == list(range(num)) and reds(source.test) == [num, num + 1, num + 2]
    pixels, _, _ = source.train.read(np.array([1]), None, Store(), False)
    expected = np.arange(3072, 2 * 3072).astype(np.uint8)
    expected[0] = 1
    assert np.array_equal(pixels[0].reshape(-1), expected)
    monkeypatch.setenv("FASTADV_DATA", str(tmp_path))
    assert reds(open_source(name).train) == list(range(num))


def test_cifar_that_is_missing_or_damaged_is_never_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CIFAR10, "download", lambda self: pytest.fail("downloads"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTADV_DATA", raising=False)
    with pytest.raises(DataError, match="data/cifar-10-batches-py is not there") as caught:
        open_source("cifar10")
    assert "download=True" in caught.value.fix and "cifar10:FOLDER" in caught.value.fix
    cifar(tmp_path / "data", CIFAR10, monkeypatch)
    assert len(open_source("cifar10").train.labels) == 15
    file = tmp_path / "data" / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="is damaged or not complete"):
        open_source("cifar10")


def test_cifar_is_downloaded_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(CIFAR10, "download", lambda self: asked.append(self.root))
    with pytest.raises(DataError):
        open_source(f"cifar10:{tmp_path}", download=True)
    assert asked == [tmp_path]
