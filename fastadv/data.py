"""Image sets as uint8 tensors, split reproducibly, and batches of them on the device.

Shapes: N images of a set, B of a batch, H x W pixels. Nothing here keeps a random state: the validation split is a
function of the seed, the order of an epoch of (seed, epoch), the augmentation of an image of (seed, epoch, its index).
Where images come from is `fastadv.sources`, how files become pixels `fastadv.images`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv.errors import DataError, SettingsError
from fastadv.images import Rows, Store
from fastadv.sources import Part, carve, open_source, open_test, random_state

Device = str | torch.device


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images uint8 (N, 3, H, W), labels int64 (N,) counting ``classes``; ``flip``: a mirrored image keeps its class.

    Raises: DataError when the tensors are something else or a label is out of range.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    flip: bool = True

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
            raise DataError(f"images are {images.dtype} {tuple(images.shape)}", "give uint8 (N, 3, H, W), N > 0")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DataError(f"labels are {labels.dtype} {tuple(labels.shape)}", f"give int64 ({len(images)},)")
        if not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            raise DataError(
                f"labels run from {int(labels.min())} to {int(labels.max())} for {len(self.classes)} classes",
                "labels count from 0",
            )

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, eq=False)
class Splits:
    """A set ready to train on. ``val_indices`` are the rows that ``val`` consists of, counted in the listing of
    ``val_from`` ("val", or "train" where it was carved); ``skipped`` the files left out by on_bad_image="skip";
    ``num_shared`` how many test images have a pixel-equal twin in train or val."""

    name: str
    train: ImageSet
    val: ImageSet
    test: ImageSet
    val_indices: tuple[int, ...]
    val_from: Literal["train", "val"]
    skipped: tuple[str, ...]
    num_shared: int


def load(
    source: str | Path,
    *,
    image_size: int | None = None,
    val_images: int | None = None,
    per_class: int | None = None,
    seed: int = 0,
    on_bad_image: str = "fail",
    download: bool = False,
    memory_budget: int | None = None,
) -> Splits:
    """The training, validation and test images of a source.

    source: "digits"; "cifar10", "cifar100" (fetched only with ``download``), "cub", "dogs" or "caltech256", in
    ``data/``, $FASTADV_DATA or as "cub:FOLDER", the last three also as "cub:FOLDER:SPLITS" (`fastadv.papersets`); a
    folder with train/ and test/ or val/, each with a folder of image files per class; a folder with train.npz and
    test.npz or val.npz; one .npz file, of which a fixed fifth becomes the test split.
    image_size: side in pixels every image is brought to (the rule is in `fastadv.images`); None keeps the set's own
    size, which must be one, and makes digits 64x64.
    val_images: size of the validation split, fixed by ``seed``. Without a val split it is carved from train, every
    class by its share, and defaults to a tenth of it, 5000 at most. The test split never depends on the seed.
    per_class: only the first so many images of each class stay in train, counted after validation was taken.
    on_bad_image: "fail", or "skip" to leave out and list files that cannot be read (at most 5, or 1 % of a split).
    memory_budget: bytes of decoded images to keep in RAM, half of what is available by default; more goes to unnamed
    memory-mapped files in $FASTADV_CACHE or ~/.cache/fastadv.

    Raises: DataError naming what is missing or does not fit, SettingsError for a setting out of range.
    """
    for name, value in (("image_size", image_size), ("val_images", val_images), ("per_class", per_class)):
        if value is not None and value < 1:
            raise SettingsError(f"{name} is {value}", f"--{name.replace('_', '-')} 1 or more, or leave it out")
    _check_seed(seed)
    skip = _skips(on_bad_image)
    parts = open_source(source, download)
    if parts.val is None:
        num_val = val_images or parts.num_val or max(1, min(5000, len(parts.train.labels) // 10))
        val_rows, train_rows = carve(parts.train.labels, num_val, seed)
        val = parts.train.take(val_rows)
    else:
        num_val = len(parts.val.labels) if val_images is None else val_images
        if num_val > min(len(parts.val.labels), len(parts.train.labels)):
            raise DataError(
                f"{num_val} validation images asked for, val has {len(parts.val.labels)}, "
                f"and train, which must not be smaller, {len(parts.train.labels)}",
                f"--val-images {max(1, min(len(parts.val.labels), len(parts.train.labels) // 10))}",
            )
        val_rows = random_state(seed, 1).permutation(len(parts.val.labels))[:num_val]
        train_rows = np.arange(len(parts.train.labels))
        val = parts.val.take(val_rows)
    if per_class is not None:
        train_rows = _first_per_class(parts.train.labels, train_rows, per_class)
    store = Store(memory_budget)
    # The small splits first: a bad file there is reported before the long decoding of train.
    test_set, _, skipped_test = _decode(parts.test, parts.flip, image_size, store, skip)
    val_set, kept, skipped_val = _decode(val, parts.flip, image_size, store, skip)
    train_set, _, skipped_train = _decode(parts.train.take(train_rows), parts.flip, image_size, store, skip)
    for name, other in (("test", test_set), ("val", val_set)):
        if other.images.shape[1:] != train_set.images.shape[1:]:
            raise DataError(
                f"{parts.name}: train images are {tuple(train_set.images.shape[2:])} pixels, "
                f"{name} images {tuple(other.images.shape[2:])}",
                "--image-size 64 (or another size) makes them equal",
            )
    counts = torch.bincount(train_set.labels, minlength=len(train_set.classes))
    if gone := [name for name, count in zip(train_set.classes, counts.tolist(), strict=True) if count == 0]:
        raise DataError(f"{parts.name}: no readable training image is left of {', '.join(gone)}", "repair the set")
    return Splits(
        name=parts.name,
        train=train_set,
        val=val_set,
        test=test_set,
        val_indices=tuple(int(row) for row in val_rows[kept]),
        val_from="train" if parts.val is None else "val",
        skipped=skipped_train + skipped_val + skipped_test,
        num_shared=_num_shared(test_set, train_set, val_set),
    )


def load_test(
    source: str | Path, *, image_size: int | None = None, on_bad_image: str = "fail", memory_budget: int | None = None
) -> tuple[ImageSet, tuple[str, ...]]:
    """The test split of `load` and its skipped files, without decoding the rest of the set. Raises as `load`.

    A folder may hold the test split alone: test/, val/, test.npz or val.npz, or class folders right away.
    """
    skip = _skips(on_bad_image)
    part, flip = open_test(source)
    test, _, skipped = _decode(part, flip, image_size, Store(memory_budget), skip)
    return test, skipped


def fingerprint(images: ImageSet) -> str:
    """16 hex digits that change with any pixel, label, class name, shape or order (SHA-256)."""
    tensors = [tensor.contiguous().cpu() for tensor in (images.images, images.labels)]
    digest = hashlib.sha256(json.dumps([list(images.images.shape), list(images.classes)]).encode())
    for tensor in tensors:
        digest.update(tensor.numpy().data)
    return digest.hexdigest()[:16]


def steps_per_epoch(images: ImageSet, batch_size: int) -> int:
    """How many batches `shuffled` yields from the start of an epoch: the whole ones, or one if the set is smaller.

    Raises: SettingsError for a batch size below 1.
    """
    if batch_size < 1:
        raise SettingsError(f"batch_size is {batch_size}", "--batch-size 1 or more")
    return max(1, len(images) // batch_size)


def shuffled(
    images: ImageSet, *, batch_size: int, seed: int, epoch: int, augment: bool, device: Device, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order, from batch ``start``: x float32 (B, 3, H, W) in [0, 1] and y int64 (B,) on the device.

    The ragged last batch is dropped, unless it is the only one. ``augment`` shifts an image by up to
    ``padding(images)`` pixels each way, black where nothing is left, and mirrors half of them if ``images.flip``. What
    happens to image i depends on (seed, epoch, i) alone: not on batch size, start or device.

    Raises: SettingsError for a batch size, seed, epoch or start out of range.
    """
    total = steps_per_epoch(images, batch_size)
    _check_seed(seed)
    if not 0 <= epoch < 2**32 or not 0 <= start <= total:
        raise SettingsError(f"epoch {epoch}, start {start} of {total} batches", "count both from 0")
    order = torch.from_numpy(random_state(seed, 2, epoch).permutation(len(images)))
    moves = _moves(images, seed, epoch) if augment else None
    return _batches(images, order[start * batch_size : total * batch_size], batch_size, torch.device(device), moves)


def in_order(images: ImageSet, batch_size: int, device: Device) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once, in order, as it is: (x, y) as in `shuffled`, the last batch ragged.

    Raises: SettingsError for a batch size below 1.
    """
    steps_per_epoch(images, batch_size)
    return _batches(images, torch.arange(len(images)), batch_size, torch.device(device), None)


def padding(images: ImageSet) -> int:
    """How far augmentation shifts: 4 pixels up to 64x64 (the field's habit at 32x32), a 16th of larger sides."""
    return max(4, min(images.images.shape[2:]) // 16)


def _moves(images: ImageSet, seed: int, epoch: int) -> Tensor:
    """Row and column of the crop in the padded image, 0..2 * padding, and mirror, 0 or 1: int64 (N, 3)."""
    random = random_state(seed, 3, epoch)
    corner = random.randint(0, 2 * padding(images) + 1, (len(images), 2))
    mirror = random.randint(0, 2, (len(images), 1)) * images.flip
    return torch.from_numpy(np.concatenate([corner, mirror], 1))


def _moved(batch: Tensor, moves: Tensor, pad: int) -> Tensor:
    """Crops and mirrors uint8 (B, 3, H, W) in one gather: 2 ms for 128 images of 64x64 on one CPU core."""
    height, width = batch.shape[2:]
    top, left, mirror = moves.unbind(1)
    across = torch.arange(width, device=batch.device)
    rows = top[:, None] + torch.arange(height, device=batch.device)
    columns = left[:, None] + torch.where(mirror[:, None] == 1, width - 1 - across, across)
    index = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).flatten(1)
    padded = F.pad(batch, (pad, pad, pad, pad)).flatten(2)
    return padded.gather(2, index[:, None].expand(-1, 3, -1)).view_as(batch)


_on_device: WeakKeyDictionary[ImageSet, dict[torch.device, tuple[Tensor, Tensor]]] = WeakKeyDictionary()


def _placed(images: ImageSet, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images and labels on the device, copied once per set; the images stay where they are if they would take more than
    40 % of a CUDA device's free memory."""
    known = _on_device.setdefault(images, {})
    if device not in known:
        fits = device.type != "cuda" or images.images.nbytes < 0.4 * torch.cuda.mem_get_info(device)[0]
        known[device] = (images.images.to(device) if fits else images.images, images.labels.to(device))
    return known[device]


def _batches(
    images: ImageSet, order: Tensor, batch_size: int, device: torch.device, moves: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    if len(order) == 0:
        return
    pixels, labels = _placed(images, device)
    # All indices travel once per epoch: a copy per step from pageable memory could make the host wait.
    here, moves = order.to(device), None if moves is None else moves.to(device)
    # A tensor, because CUDA multiplies by the reciprocal of a Python number: one bit off, unlike the CPU.
    white = torch.tensor(255.0, device=device)
    for rows, rows_here in zip(torch.split(order, batch_size), torch.split(here, batch_size), strict=True):
        if pixels.device == here.device:
            # index_select: 20 times as fast as pixels[rows] for uint8 on a CPU (0.05 against 1 ms).
            batch = pixels.index_select(0, rows_here)
        else:
            pinned = torch.empty((len(rows), *pixels.shape[1:]), dtype=torch.uint8, pin_memory=device.type == "cuda")
            batch = torch.index_select(pixels, 0, rows, out=pinned).to(device, non_blocking=True)
        if moves is not None:
            batch = _moved(batch, moves.index_select(0, rows_here), padding(images))
        yield batch.float().div_(white), labels.index_select(0, rows_here)


def _decode(
    part: Part, flip: bool, image_size: int | None, store: Store, skip: bool
) -> tuple[ImageSet, Rows, tuple[str, ...]]:
    images, kept, skipped = part.read(np.arange(len(part.labels)), image_size, store, skip)
    return ImageSet(torch.from_numpy(images), torch.from_numpy(part.labels[kept]), part.classes, flip), kept, skipped


def _first_per_class(labels: Rows, rows: Rows, num: int) -> Rows:
    return np.sort(np.concatenate([rows[labels[rows] == c][:num] for c in np.unique(labels[rows])]))


def _num_shared(test: ImageSet, *others: ImageSet) -> int:
    def digests(images: ImageSet) -> Iterator[bytes]:
        return (hashlib.blake2b(image.data, digest_size=16).digest() for image in images.images.numpy())

    known = {digest for other in others for digest in digests(other)}
    return sum(digest in known for digest in digests(test))


def _skips(on_bad_image: str) -> bool:
    if on_bad_image not in ("fail", "skip"):
        raise SettingsError(f"on_bad_image is {on_bad_image!r}", "--on-bad-image fail or --on-bad-image skip")
    return on_bad_image == "skip"


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**64:
        raise SettingsError(f"seed is {seed}", "--seed 0 or another number below 2**64")
