"""load(): reproducible splits of every source. shuffled(): one epoch as a function of (seed, epoch, image)."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastadv import data
from fastadv.data import ImageSet, fingerprint, in_order, load, load_test, padding, shuffled, steps_per_epoch
from fastadv.errors import DataError, SettingsError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def random_set(num: int = 10, height: int = 32, width: int = 32, flip: bool = True) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num, 3, height, width), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(num) % 7, tuple("abcdefg"), flip)


def numbered(num: int) -> ImageSet:
    """Image i is constant and carries i in its label."""
    pixels = torch.arange(num, dtype=torch.uint8).reshape(num, 1, 1, 1).expand(num, 3, 4, 4).contiguous()
    return ImageSet(pixels, torch.arange(num), tuple(map(str, range(num))))


def epoch(images: ImageSet, batch_size: int, **changes: object) -> list[tuple[Tensor, Tensor]]:
    settings: dict[str, object] = {"seed": 0, "epoch": 0, "augment": True, "device": "cpu", **changes}
    return list(shuffled(images, batch_size=batch_size, **settings))


def all_equal(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(first, second, strict=True)
    )


def npz_set(folder: Path, **counts: int) -> Path:
    """Two classes; the pixel values of image i of a split are i."""
    for split, num in counts.items():
        images = np.arange(num, dtype=np.uint8).reshape(-1, 1, 1, 1) * np.ones((1, 4, 4, 3), np.uint8)
        np.savez(folder / f"{split}.npz", images=images, labels=np.arange(num) % 2)
    return folder


def values(images: ImageSet) -> list[int]:
    found: list[int] = images.images[:, 0, 0, 0].tolist()
    return found


# The test split and its pixels are promised not to change between versions, machines and seeds.
DIGITS_TEST = "5f695c5ad2fb8c65"


def test_digits_split_by_seed_but_keep_their_test_images() -> None:
    first, again, other = load("digits"), load("digits"), load("digits", seed=1)
    assert (len(first.train), len(first.val), len(first.test)) == (1197, 200, 400)
    assert first.train.images.shape[1:] == (3, 64, 64) and first.train.classes == tuple("0123456789")
    assert not first.train.flip and first.val_from == "train" and first.skipped == () and first.num_shared == 0
    assert all(fingerprint(getattr(first, s)) == fingerprint(getattr(again, s)) for s in ("train", "val", "test"))
    assert first.val_indices == again.val_indices != other.val_indices
    assert fingerprint(first.test) == fingerprint(other.test) == DIGITS_TEST
    assert fingerprint(first.val) != fingerprint(other.val)
    assert json.loads(json.dumps(first.val_indices)) == list(first.val_indices)


def test_val_is_carved_from_train_and_per_class_leaves_it_alone(tmp_path: Path) -> None:
    source = npz_set(tmp_path, train=100, test=10)
    splits, few = load(source, val_images=8), load(source, val_images=8, per_class=3)
    assert splits.val_from == "train" and list(splits.val_indices) == values(splits.val) == values(few.val)
    assert torch.bincount(splits.val.labels).tolist() == [4, 4]
    assert sorted(values(splits.train) + values(splits.val)) == list(range(100))
    left = values(splits.train)
    assert values(few.train) == sorted([i for i in left if i % 2 == 0][:3] + [i for i in left if i % 2 == 1][:3])
    assert len(load(source).val) == 10 and values(load(source).test) == list(range(10))
    assert load(source, val_images=8, seed=1).val_indices != splits.val_indices


def test_a_val_split_is_used_whole_or_in_part(tmp_path: Path) -> None:
    source = npz_set(tmp_path, train=100, test=10, val=50)
    whole, part, other = load(source), load(source, val_images=5), load(source, val_images=5, seed=1)
    assert whole.val_from == "val" and sorted(whole.val_indices) == list(range(50)) and len(whole.train) == 100
    assert list(whole.val_indices) == values(whole.val) and whole.val_indices[:5] == part.val_indices
    assert set(part.val_indices) != set(other.val_indices)


@pytest.mark.parametrize(
    ("counts", "val_images", "fix"),
    [
        ({"train": 100, "test": 10}, 51, "10"),
        ({"train": 30, "test": 10, "val": 50}, None, "3"),
        ({"train": 100, "test": 10, "val": 50}, 51, "10"),
    ],
)
def test_more_validation_than_training_images_are_refused(
    tmp_path: Path, counts: dict[str, int], val_images: int | None, fix: str
) -> None:
    source = npz_set(tmp_path, **counts)
    with pytest.raises(DataError) as caught:
        load(source, val_images=val_images)
    assert f"--val-images {fix}" in caught.value.fix
    assert len(load(source, val_images=int(fix)).val) == int(fix)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("image_size", 0),
        ("val_images", 0),
        ("per_class", -1),
        ("seed", -1),
        ("seed", 2**64),
        ("on_bad_image", "ignore"),
    ],
)
def test_settings_out_of_range_are_refused(setting: str, value: object) -> None:
    with pytest.raises(SettingsError, match=f"{setting} is {value!r}") as caught:
        load("digits", **{setting: value})
    assert f"--{setting.replace('_', '-')}" in caught.value.fix


def test_image_size_brings_any_source_to_one_size(tmp_path: Path) -> None:
    assert load("digits", image_size=16, per_class=2).train.images.shape == (20, 3, 16, 16)
    source = npz_set(tmp_path, train=20, test=4)
    assert load(source, image_size=6).test.images.shape == (4, 3, 6, 6)
    large = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "test.npz", images=large, labels=np.arange(4) % 2)
    with pytest.raises(DataError, match=r"train images are \(4, 4\) pixels, test images \(8, 8\)") as caught:
        load(source)
    assert "--image-size" in caught.value.fix


def folder_set(root: Path) -> Path:
    for split, num in (("train", 20), ("test", 4)):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for i in range(num):
                Image.new("RGB", (4, 4), (i, 0, 0)).save(root / split / name / f"{i:02d}.png")
    return root


def test_bad_images_fail_or_are_skipped_without_moving_any_other(tmp_path: Path) -> None:
    source = folder_set(tmp_path)
    whole = load(source, val_images=6)
    in_val = whole.val_indices[2]
    in_train = next(row for row in range(40) if row not in whole.val_indices)
    bad = [tmp_path / "train" / "ab"[row // 20] / f"{row % 20:02d}.png" for row in (in_val, in_train)]
    for path in bad:
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match="png cannot be read as an image"):
        load(source, val_images=6)
    splits = load(source, val_images=6, on_bad_image="skip")
    assert set(splits.skipped) == set(map(str, bad))
    assert splits.val_indices == tuple(row for row in whole.val_indices if row != in_val)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (33, 5, 8)
    assert torch.equal(splits.val.images, whole.val.images[[0, 1, 3, 4, 5]])


def test_skipping_must_leave_an_image_of_every_class(tmp_path: Path) -> None:
    source = folder_set(tmp_path)
    for path in (tmp_path / "train" / "a").iterdir():
        if path.name > "02.png":
            path.unlink()
        else:
            path.write_bytes(b"broken")
    with pytest.raises(DataError, match="no readable training image is left of a"):
        load(source, val_images=1, on_bad_image="skip")


def test_beyond_the_memory_budget_the_same_images_come_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTADV_CACHE", str(tmp_path / "cache"))
    kinds = []
    empty = data.Store.empty
    monkeypatch.setattr(data.Store, "empty", lambda *args: kinds.append(empty(*args)) or kinds[-1])
    (tmp_path / "set").mkdir()
    for source in (folder_set(tmp_path / "set"), npz_set(tmp_path, train=40, test=8)):
        kinds.clear()
        in_ram, mapped = load(source), load(source, memory_budget=1000)
        assert [isinstance(kind, np.memmap) for kind in kinds] == [
            False,
            False,
            False,
            *(k.nbytes > 1000 for k in kinds[3:]),
        ]
        assert isinstance(kinds[-1], np.memmap)
        assert all(fingerprint(getattr(in_ram, s)) == fingerprint(getattr(mapped, s)) for s in ("train", "val", "test"))
        assert all_equal(epoch(in_ram.train, 8), epoch(mapped.train, 8))
    assert list((tmp_path / "cache").iterdir()) == []


def test_load_test_gives_the_test_split_alone(tmp_path: Path) -> None:
    source = folder_set(tmp_path)
    (tmp_path / "train" / "a" / "00.png").write_bytes(b"broken")
    test, skipped = load_test(source)
    assert fingerprint(test) == fingerprint(load(source, on_bad_image="skip").test) and skipped == ()
    (tmp_path / "test" / "a" / "00.png").write_bytes(b"broken")
    with pytest.raises(DataError):
        load_test(source)
    assert load_test(source, on_bad_image="skip")[1] == (str(tmp_path / "test" / "a" / "00.png"),)
    assert fingerprint(load_test("digits")[0]) == DIGITS_TEST


def test_test_images_that_are_in_train_are_counted(tmp_path: Path) -> None:
    assert load(npz_set(tmp_path, train=20, test=30)).num_shared == 20


@pytest.mark.parametrize(
    ("images", "labels", "what"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), r"torch.float32 \(2, 3, 4, 4\)"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), r"\(2, 4, 4, 3\)"),
        (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), r"\(0, 3, 4, 4\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2), "labels are torch.float32"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), r"\(3,\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 2]), "from 0 to 2 for 2 classes"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([-1, 1]), "from -1 to 1"),
    ],
)
def test_an_image_set_is_checked(images: Tensor, labels: Tensor, what: str) -> None:
    with pytest.raises(DataError, match=what):
        ImageSet(images, labels, ("a", "b"))


def test_a_fingerprint_changes_with_everything_in_a_set() -> None:
    images = random_set()
    same = dataclasses.replace(images, images=images.images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))
    assert fingerprint(images) == fingerprint(same) and len(fingerprint(images)) == 16
    pixels, labels = images.images.clone(), images.labels.clone()
    pixels[3, 1, 5, 5] ^= 1
    labels[0] = 6
    turned = images.images.reshape(10, 3, 16, 64)
    others = [
        dataclasses.replace(images, images=pixels),
        dataclasses.replace(images, labels=labels),
        dataclasses.replace(images, images=turned),
        dataclasses.replace(images, classes=tuple("abcdefG")),
        dataclasses.replace(images, images=images.images.flip(0), labels=images.labels.flip(0)),
    ]
    assert len({fingerprint(images), *map(fingerprint, others)}) == 6


def test_in_order_gives_every_image_once_and_exactly() -> None:
    values256 = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(5, 3, 16, 16)
    images = ImageSet(values256.contiguous(), torch.arange(5), tuple("abcde"))
    batches = list(in_order(images, 2, "cpu"))
    assert [len(x) for x, _ in batches] == [2, 2, 1] and torch.cat([y for _, y in batches]).tolist() == [0, 1, 2, 3, 4]
    exact = torch.tensor([np.float32(v / 255) for v in range(256)]).reshape(1, 1, 16, 16)
    for x, y in batches:
        assert x.dtype == torch.float32 and y.dtype == torch.int64 and x.is_contiguous()
        assert torch.equal(x, exact.expand_as(x)) and torch.equal(x, values256[: len(x)].float() / 255)
    batches[0][0].zero_()
    assert images.images.sum() == 5 * 3 * 255 * 128


def test_an_epoch_is_a_permutation_without_the_ragged_batch() -> None:
    images = numbered(23)
    batches = epoch(images, 5, augment=False)
    labels = torch.cat([y for _, y in batches])
    assert [len(x) for x, _ in batches] == [5] * 4 and len(set(labels.tolist())) == 20
    assert torch.equal(torch.cat([x for x, _ in batches])[:, 0, 0, 0], labels / 255)
    assert steps_per_epoch(images, 5) == 4 and steps_per_epoch(images, 23) == steps_per_epoch(images, 24) == 1
    (small,) = epoch(images, 24, augment=False)
    assert sorted(small[1].tolist()) == list(range(23)) and small[1].tolist()[:20] == labels.tolist()


def test_the_same_epoch_is_equal_and_others_differ() -> None:
    images = random_set()
    assert all_equal(epoch(images, 5), epoch(images, 5))
    assert all_equal(epoch(images, 5), epoch(dataclasses.replace(images), 5))
    for change in ({"seed": 1}, {"epoch": 1}, {"augment": False}, {"seed": 2**32}):
        assert not all_equal(epoch(images, 5), epoch(images, 5, **change))


def test_no_global_random_state_is_read_or_moved() -> None:
    images = random_set()
    first, torch_state, numpy_state = epoch(images, 5), torch.get_rng_state(), np.random.get_state()[1].copy()
    epoch(images, 5)
    assert torch.equal(torch.get_rng_state(), torch_state) and (np.random.get_state()[1] == numpy_state).all()
    torch.manual_seed(99)
    assert all_equal(epoch(images, 5), first)


def test_starting_at_a_batch_is_skipping_those_before() -> None:
    images = random_set(22)
    whole = epoch(images, 4)
    assert len(whole) == 5
    for start in range(6):
        assert all_equal(epoch(images, 4, start=start), whole[start:])


def moved_by_hand(images: ImageSet, seed: int, number: int) -> np.ndarray:
    """Every image of the set as epoch ``number`` shows it: padded, cropped and mirrored one by one."""
    pad = padding(images)
    height, width = images.images.shape[2:]
    shown = []
    for image, (top, left, mirror) in zip(
        images.images.numpy(), data._moves(images, seed, number).tolist(), strict=True
    ):
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
        crop = padded[:, top : top + height, left : left + width]
        shown.append(crop[:, :, ::-1] if mirror else crop)
    return np.stack(shown)


def shown(images: ImageSet, batch_size: int, seed: int, number: int) -> np.ndarray:
    """What `shuffled` makes of every image of the set, whose labels number them, in the order of the set."""
    batches = epoch(images, batch_size, seed=seed, epoch=number)
    found = torch.empty_like(images.images)
    found[torch.cat([y for _, y in batches])] = (torch.cat([x for x, _ in batches]) * 255).round().to(torch.uint8)
    return found.numpy()


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (9, 17), (128, 96)])
def test_augmentation_is_that_of_single_images_at_any_batch_size(height: int, width: int, flip: bool) -> None:
    images = random_set(14, height, width, flip)
    images = dataclasses.replace(images, labels=torch.arange(14), classes=tuple(map(str, range(14))))
    expected = moved_by_hand(images, 3, 2)
    for batch_size in (1, 7, 14):
        assert np.array_equal(shown(images, batch_size, 3, 2), expected)


def test_the_laws_go_red_on_planted_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    images = numbered(20)
    images = dataclasses.replace(images, images=random_set(20).images)
    moved = data._moved
    monkeypatch.setattr(data, "_moved", lambda batch, moves, pad: moved(batch, moves * torch.tensor([1, 1, 0]), pad))
    assert not np.array_equal(shown(images, 5, 0, 0), moved_by_hand(images, 0, 0))
    monkeypatch.undo()
    stream = np.random.RandomState(0)
    monkeypatch.setattr(data, "random_state", lambda *key: stream)
    assert not all_equal(epoch(images, 5), epoch(images, 5))
    assert not all_equal(epoch(images, 5, start=1), epoch(images, 5)[1:])


def test_moves_cover_their_range_evenly() -> None:
    images = random_set(6000, 4, 4)
    assert [padding(random_set(1, side, side)) for side in (8, 32, 64, 128, 224)] == [4, 4, 4, 8, 14]
    top, left, mirror = data._moves(images, 0, 0).unbind(1)
    assert all(not torch.equal(data._moves(images, *key)[:, 0], top) for key in ((0, 1), (1, 0)))
    for shift in (top, left):
        counts = torch.bincount(shift, minlength=9)
        assert len(counts) == 9 and (counts - 6000 / 9).abs().max() < 5 * (6000 / 9) ** 0.5
    assert abs(mirror.float().mean() - 0.5) < 5 * 0.5 / 6000**0.5 and set(mirror.tolist()) == {0, 1}
    assert not data._moves(dataclasses.replace(images, flip=False), 0, 0)[:, 2].any()
    assert torch.equal(data._moves(dataclasses.replace(images, flip=False), 0, 0)[:, 0], top)


@pytest.mark.parametrize(
    "change", [{"start": -1}, {"start": 3}, {"epoch": -1}, {"seed": -1}, {"seed": 2**64}], ids=lambda c: str(c)
)
def test_a_wrong_place_in_the_data_is_refused_at_the_call(change: dict[str, int]) -> None:
    settings = {"seed": 0, "epoch": 0, "start": 0, **change}
    with pytest.raises(SettingsError):
        shuffled(random_set(), batch_size=5, augment=False, device="cpu", **settings)


def test_a_batch_size_below_one_is_refused_at_the_call() -> None:
    with pytest.raises(SettingsError, match="batch_size is 0"):
        in_order(random_set(), 0, "cpu")
    with pytest.raises(SettingsError, match="batch_size is -1"):
        shuffled(random_set(), batch_size=-1, seed=0, epoch=0, augment=False, device="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("free", [None, 0], ids=["resident", "pinned"])
def test_cuda_batches_equal_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch, free: int | None) -> None:
    images = random_set(40, 64, 64)
    if free is not None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    expected = epoch(images, 8)
    found = epoch(images, 8, device="cuda")
    assert data._on_device[images][torch.device("cuda")][0].is_cuda == (free is None)
    assert all(x.is_cuda and y.is_cuda for x, y in found)
    assert all_equal([(x.cpu(), y.cpu()) for x, y in found], expected)
    plain = [(x.cpu(), y.cpu()) for x, y in in_order(images, 7, "cuda")]
    assert all_equal(plain, list(in_order(images, 7, "cpu")))


def unpacked(out: Path, kind: str) -> Path:
    command = [sys.executable, str(SHARED / "unpack.py"), "flowers102", str(out), "--format", kind, "--per-class", "2"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return out


@pytest.mark.data
@pytest.mark.skipif(not (SHARED / "unpack.py").exists(), reason=f"needs the image sets of {SHARED}")
def test_flowers_are_the_same_from_files_and_arrays(tmp_path: Path) -> None:
    from_files = load(unpacked(tmp_path / "folder", "folder"), val_images=50)
    from_arrays = load(unpacked(tmp_path / "arrays", "npz"), val_images=50)
    assert from_files.train.images.shape == (204, 3, 64, 64) and len(from_files.train.classes) == 102
    assert len(from_files.test) > 150 and from_files.val_from == "val"
    for split in ("train", "test"):
        # The folder lists class by class, the arrays keep the order of the set.
        files, arrays = getattr(from_files, split), getattr(from_arrays, split)
        order = torch.sort(arrays.labels, stable=True).indices
        assert torch.equal(files.labels, arrays.labels[order]) and torch.equal(files.images, arrays.images[order])
    x, y = next(islice(shuffled(from_files.train, batch_size=32, seed=0, epoch=0, augment=True, device="cpu"), 1))
    assert x.shape == (32, 3, 64, 64) and len(y) == 32 and 0 <= x.min() < x.max() <= 1
