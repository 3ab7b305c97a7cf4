"""Plain .npz sets: what is read, and what is refused before a pixel is."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fastadv import npz
from fastadv.errors import DataError
from fastadv.images import Store

PIXELS = np.random.RandomState(0).randint(0, 256, (10, 4, 6, 3)).astype(np.uint8)
LABELS = np.arange(10) % 3


def write(path: Path, **arrays: object) -> Path:
    np.savez(path, **{"images": PIXELS, "labels": LABELS, **arrays})
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_a_file_comes_back_as_it_was(
    tmp_path: Path, save: object, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npz, "BLOCK", 4)
    names = np.array(["a", "b", "c"])
    save(tmp_path / "set.npz", images=PIXELS, labels=LABELS.astype(dtype), classes=names)
    file = npz.inspect(tmp_path / "set.npz")
    assert file.classes == ("a", "b", "c") and file.labels.dtype == np.int64 and (file.labels == LABELS).all()
    rows = np.array([7, 0, 9])
    images, kept, skipped = file.read(rows, None, Store(), False)
    assert np.array_equal(images, PIXELS[rows].transpose(0, 3, 1, 2)) and kept.tolist() == [0, 1, 2] and skipped == ()
    assert file.read(rows, 8, Store(), False)[0].shape == (3, 3, 8, 8)


def test_names_are_optional(tmp_path: Path) -> None:
    assert npz.inspect(write(tmp_path / "set.npz")).classes is None


@pytest.mark.parametrize(
    ("arrays", "what", "fix"),
    [
        ({"images": PIXELS / 255}, r"float64 \(10, 4, 6, 3\)", r"\* 255"),
        ({"images": PIXELS.astype(np.int32)}, "int32", "uint8"),
        ({"images": PIXELS.transpose(0, 3, 1, 2)}, r"uint8 \(10, 3, 4, 6\)", "transpose"),
        ({"images": PIXELS[..., 0]}, r"uint8 \(10, 4, 6\)", "repeat"),
        ({"images": PIXELS[..., :1]}, r"\(10, 4, 6, 1\)", "repeat"),
        ({"images": PIXELS[:0], "labels": LABELS[:0]}, r"\(0, 4, 6, 3\)", "savez"),
        ({"images": np.asfortranarray(PIXELS)}, "not uint8", "savez"),
        ({"images": np.array([PIXELS], object)}, "object", "savez"),
        ({"labels": LABELS.astype(float)}, "labels are float64", "astype"),
        ({"labels": LABELS == 1}, "labels are bool", "astype"),
        ({"labels": LABELS[:9]}, r"labels are int64 \(9,\), not integers \(10,\)", "one per image"),
        ({"labels": LABELS[:, None]}, r"labels are int64 \(10, 1\)", "one per image"),
        ({"labels": LABELS - 1}, "from -1 to 1, out of range", "count from 0"),
        ({"labels": LABELS + 2**31}, "out of range", "count from 0"),
        ({"labels": LABELS.astype(np.uint64) + np.uint64(2**63)}, "out of range", "count from 0"),
        ({"labels": LABELS, "classes": np.array(["a", "b"])}, "from 0 to 2, out of range for 2 classes", "count"),
        ({"labels": LABELS.astype(object)}, "cannot be read", "savez"),
        ({"classes": np.array(["a", "b", None], object)}, "cannot be read", "savez"),
        ({"classes": np.arange(3)}, "classes are int64", "dtype=str"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_with_a_cure(
    tmp_path: Path, arrays: dict[str, object], what: str, fix: str
) -> None:
    with pytest.raises(DataError, match=what) as caught:
        npz.inspect(write(tmp_path / "set.npz", **arrays))
    assert "set.npz" in caught.value.what
    assert re.search(fix, caught.value.fix), caught.value.fix


def test_a_missing_array_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", images=PIXELS, y=LABELS)
    with pytest.raises(DataError, match="no array labels; it has images, y"):
        npz.inspect(tmp_path / "set.npz")


def test_what_is_not_an_npz_file_is_refused_and_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    path = tmp_path / "set.npz"
    trap = np.empty(10, object)
    trap[:] = [Trap()] * 10
    for content in (pickle.dumps(Trap()), b"<html>not found</html>", b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"set\.npz is not an \.npz file"):
            npz.inspect(path)
    for arrays in ({"labels": trap}, {"images": trap}, {"classes": trap}):
        with pytest.raises(DataError, match=r"set\.npz"):
            npz.inspect(write(path, **arrays))
    assert not (tmp_path / "sprung").exists()
    np.load(write(path, labels=trap), allow_pickle=True)["labels"]
    assert (tmp_path / "sprung").exists(), "the trap must work, or this test shows nothing"


def test_a_file_cut_in_half_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "set.npz")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"set\.npz is not an \.npz file, or damaged"):
        npz.inspect(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_bit_in_the_pixels_is_noticed(tmp_path: Path, save: object) -> None:
    path = tmp_path / "set.npz"
    save(path, images=np.tile(PIXELS, (100, 1, 1, 1)), labels=np.tile(LABELS, 100))
    file = npz.inspect(path)
    assert file.read(np.arange(10), None, Store(), False)[0].shape == (10, 3, 4, 6)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"set\.npz"):
        file.read(np.arange(10), None, Store(), False)


def test_a_header_that_promises_more_than_the_file_has_is_refused(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10, 40000, 60000, 3)}
    )
    path = write(tmp_path / "set.npz")
    labels = io.BytesIO()
    np.save(labels, LABELS)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", header.getvalue() + PIXELS.tobytes())
        archive.writestr("labels.npy", labels.getvalue())
    with pytest.raises(DataError, match="need 72000000000 bytes, the file has 720"):
        npz.inspect(path)
