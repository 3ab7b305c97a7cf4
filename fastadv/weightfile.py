"""Weights from files that others made: tensors by name, or a refusal that says what the file is instead.

A file is recognised by its first bytes, not by its name. A torch file is opened with ``weights_only=True`` and never
in another way: its author decides whether that fails, so a second, trusting attempt would hand over the machine.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fastadv.errors import CheckpointError
from fastadv.layouts import without_prefixes

# Where training scripts put the weights among other things; averaged weights first, as they are the ones published.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# How many names of each kind a message lists.
LISTED = 5
_DOWNLOAD = "download the file itself again"


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth or .pt file by name, on the CPU, detached, all numbers finite.

    Wrappers (``{"state_dict": ...}``) and prefixes (``module.``) that training scripts add are taken off.
    Raises CheckpointError naming the file, what is wrong with it and the cure. No code from the file is run.
    """
    path = Path(path)
    try:
        # Not a fifo or a device either: reading from one could wait for ever.
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            raise _refused(path, what, "give a .safetensors or .pth file, such as RUN/best/model.safetensors")
        with path.open("rb") as file:
            first = file.read(512)
        tensors = _read_safetensors(path) if _recognised(path, first) == "safetensors" else _read_torch(path)
    except OSError as error:
        raise _refused(path, f"cannot be read ({error.strerror})", "make it readable") from error
    _check_finite(path, tensors)
    return tensors


def match(model_state: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Nothing, if ``given`` has exactly the names and shapes of ``model_state``; else a CheckpointError with the list.

    Precisions may differ, floating-point and integer may not. Other libraries' names are changed before, in
    `fastadv.layouts`.
    """
    if not model_state.keys() & given.keys():
        what = f"the weights are in no known layout: the file holds {_first(given)}, missing are {_first(model_state)}"
        known = "timm, official Swin, torchvision ViT, RobustBench, RoLI, robustness (MadryLab), a run of this package"
        raise CheckpointError(what, f"give the weights of this --model in one of: {known}")
    missing = [name for name in model_state if name not in given]
    unexpected = [name for name in given if name not in model_state]
    different = [
        f"{name} {_described(given[name])} for {_described(tensor)}"
        for name, tensor in model_state.items()
        if name in given and not _fits(given[name], tensor)
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", different))
    found = [f"{len(names)} {kind} ({_first(names)})" for kind, names in kinds if names]
    if found:
        fix = "give --weights made for this --model, or the --model these --weights were made for"
        raise CheckpointError(f"the weights do not fit the model: {', '.join(found)}", fix)


def _refused(path: Path, reason: str, cure: str) -> CheckpointError:
    return CheckpointError(f"the weights file {path} {reason}", cure)


def _first(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:LISTED]) + (", ..." if len(listed) > LISTED else "")


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _fits(tensor: Tensor, wanted: Tensor) -> bool:
    return tensor.shape == wanted.shape and tensor.is_floating_point() == wanted.is_floating_point()


def _recognised(path: Path, first: bytes) -> str:
    """ "safetensors" or "torch", or a CheckpointError for what people save under such a name by mistake."""
    text = first.lstrip().lower()
    if not first:
        raise _refused(path, "is empty", _DOWNLOAD)
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--")):
        raise _refused(path, "is an HTML page, not weights", f"{_DOWNLOAD}: the link led to a web page")
    if text.startswith(b"version https://git-lfs"):
        raise _refused(path, "is a Git LFS pointer, not weights", "git lfs pull")
    # The length of the header in eight bytes, then the header, which is JSON.
    if first[8:9] == b"{":
        return "safetensors"
    # A zip archive, or a pickle of protocol 2 to 5.
    if first.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "torch"
    raise _refused(path, "is neither a safetensors nor a torch file", "give a .safetensors or .pth file")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return _stripped(path, safetensors.torch.load(path.read_bytes()))
    except KeyError as error:
        raise _refused(path, f"holds numbers of a kind unknown here ({error})", "save it as float32") from error
    except safetensors.SafetensorError as error:
        raise _refused(path, f"is cut off or damaged ({error})", _DOWNLOAD) from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        # Its warnings speak to whoever wrote the file (pickle protocol, TorchScript, sparse); we judge what comes out.
        # A Namespace, the "args" of many training scripts, is filled like a dict: its class runs no code on the way,
        # and what it holds passes the same checks as the rest of the file.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    # A damaged file shows as RuntimeError, EOFError, UnpicklingError, KeyError, UnicodeDecodeError and others.
    except Exception as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named:
            cure = "where you trust its source, save the tensors alone: torch.save(checkpoint['model'], 'weights.pth')"
            raise _refused(path, f"holds a Python object ({named[1]}), which may run code", cure) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
        raise _refused(path, f"is cut off, damaged or not weights ({reason})", _DOWNLOAD) from error
    # Bounded: a pickle can hold itself.
    for _ in range(len(WRAPPERS)):
        if isinstance(content, Mapping):
            content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping):
        raise _refused(path, f"holds a {type(content).__name__}, not tensors by name", "save model.state_dict()")
    return _stripped(path, content)


def _stripped(path: Path, content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Plain tensors under names without prefixes."""
    other = [f"{name} ({type(value).__name__})" for name, value in content.items() if not _is_plain(name, value)]
    if other or not content:
        cure = f"save the state dict alone, or under {' or '.join(repr(key) for key in WRAPPERS[2:])}"
        raise _refused(path, f"holds more than tensors: {_first(other)}" if other else "holds no tensors", cure)
    tensors: dict[str, Tensor] = {}
    for name, tensor in content.items():
        short = without_prefixes(name)
        if short in tensors:
            raise _refused(path, f"holds {short} twice, with different prefixes", "save one model alone")
        tensors[short] = tensor.detach()
    return tensors


def _is_plain(name: Any, value: Any) -> bool:
    """Whether it is a dense CPU tensor under a text name, no larger than its memory (one number can pose as 2**60)."""
    return (
        isinstance(name, str)
        and type(value) in (Tensor, nn.Parameter)
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and not value.is_quantized
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not _is_finite(tensor)]
    if bad:
        raise _refused(
            path, f"holds NaN or infinite values: {_first(bad)}", "use an earlier checkpoint of that training"
        )


def _is_finite(tensor: Tensor) -> bool:
    # isfinite does not know the 8-bit floats.
    return bool(torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all())
