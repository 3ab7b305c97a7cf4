"""What AutoAttack found so far, in a folder: one checkpoint per batch, and a card that says whose it is.

``about`` holds the card; ``apgd-ce-00003`` what the fourth batch of that stage broke. Each is whole or not there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastadv import checkpoint
from fastadv.errors import CheckpointError, SettingsError

_FILE = "found.safetensors"
# What it means when a part of the card is another one.
_OTHER = {
    "weights": "made with other weights",
    "data": "made on other images or labels",
    "settings": "made with other settings",
}


class Batch(NamedTuple):
    """What one stage did to one batch."""

    broken: Tensor
    """Which of the batch's images it broke, bool (B,)."""
    adv: Tensor
    """How, for those, (broken, C, H, W)."""
    seconds: float


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """64 hex digits that change with any value, dtype, shape or order of ``tensors`` (SHA-256)."""
    found = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        found.update(f"{plain.dtype} {tuple(plain.shape)} ".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def card(model: nn.Module, x: Tensor, y: Tensor, settings: Mapping[str, Any]) -> dict[str, str]:
    """Whose results these are: the weights and buffers, the images and labels, the settings."""
    state = model.state_dict()
    return {
        "weights": fingerprint(state[name] for name in sorted(state)),
        "data": fingerprint([x, y]),
        "settings": json.dumps(settings, sort_keys=True),
    }


def _difference(before: str, now: str) -> str:
    """What differs between two cards' settings, in words: ``seed 0, now 1; eps 0.1, now 0.2``."""
    old, new = (
        {name: value for part in json.loads(text).values() for name, value in part.items()} for text in (before, now)
    )
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return "; ".join(f"{name} {old.get(name)}, now {new.get(name)}" for name in names)


class Store:
    """The folder, or without one nothing: every read finds nothing and every write is dropped."""

    def __init__(self, folder: Path | None, card: Mapping[str, str]) -> None:
        self.folder = folder
        self.notes: list[str] = []
        """Batches that ran again because their checkpoint was damaged."""
        if folder is None:
            return
        about = folder / "about"
        if about.exists():
            self._compare(checkpoint.load(about)[1], card)
        else:
            if folder.exists() and any(folder.iterdir()):
                raise SettingsError(
                    f"state={folder} is a folder with other things in it", "give an empty folder, or a new name"
                )
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(
                    f"state={folder} cannot be made ({error.strerror})", "give a folder that can be written"
                ) from error
            checkpoint.save(about, {}, dict(card))

    def _compare(self, found: Mapping[str, Any], card: Mapping[str, str]) -> None:
        for name, words in _OTHER.items():
            if found.get(name) != card[name]:
                kind = SettingsError if name == "settings" else CheckpointError
                detail = f": {_difference(str(found.get(name)), card[name])}" if name == "settings" else ""
                raise kind(
                    f"{self.folder} holds results {words}{detail}",
                    f"give what it was made with, or another folder (state=, or --out), or remove {self.folder}",
                )

    def read(self, stage: str, batch: int, rows: Tensor) -> Batch | None:
        """What the stage did to its batch of that number, if that is known; ``rows`` are the images in it."""
        if self.folder is None or not (place := self._place(stage, batch)).exists():
            return None
        try:
            files, meta = checkpoint.load(place)
            tensors = files[_FILE]
            broken, adv = tensors["broken"].bool(), tensors["adv"]
            fits = torch.equal(tensors["rows"], rows.cpu()) and len(adv) == int(broken.sum())
        except (CheckpointError, KeyError) as error:
            self.notes.append(f"batch {batch} of {stage} ran again: {error}")
            return None
        return Batch(broken, adv, float(meta["seconds"])) if fits else None

    def write(self, stage: str, batch: int, rows: Tensor, found: Batch) -> None:
        """Keep what the stage did to its batch."""
        if self.folder is not None:
            tensors = {"rows": rows.cpu(), "broken": found.broken.cpu(), "adv": found.adv.cpu()}
            checkpoint.save(self._place(stage, batch), {_FILE: tensors}, {"seconds": found.seconds})

    def _place(self, stage: str, batch: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{stage}-{batch:05d}"
