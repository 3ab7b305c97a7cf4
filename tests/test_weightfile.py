"""Weight files of others: every layout in the wild is read, everything else is refused by name, no code is ever run."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from fastadv import weightfile
from fastadv.errors import CheckpointError

ROOT = Path(__file__).resolve().parent.parent
STATE = {"layers.0.weight": torch.arange(6.0).reshape(2, 3), "head.bias": torch.tensor([1.0, -2.0])}


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in STATE.items()}


LAYOUTS: dict[str, Any] = {
    "flat": STATE,
    "ordered": OrderedDict(STATE),
    "parameters": {name: torch.nn.Parameter(tensor) for name, tensor in STATE.items()},
    "model": {"model": STATE, "epoch": 3, "optimizer": {"lr": 0.1}},
    "beside a Namespace": {"model": STATE, "args": argparse.Namespace(lr=0.1, sizes=[1, 2])},
    "state_dict": {"state_dict": STATE, "arch": "swin"},
    "module.": {"state_dict": prefixed("module.")},
    "module.model.": {"model": prefixed("module.model.")},
    "compiled": prefixed("_orig_mod."),
    "averaged first": {"state_dict": {name: tensor + 1 for name, tensor in STATE.items()}, "state_dict_ema": STATE},
    "model_ema": {"model": {"x": torch.zeros(1)}, "model_ema": STATE},
    "twice wrapped": {"model": {"state_dict": STATE, "epoch": 1}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zipped", [True, False])
def test_layouts_in_the_wild_are_read(tmp_path: Path, layout: str, zipped: bool) -> None:
    path = tmp_path / "weights.pth"
    torch.save(LAYOUTS[layout], path, _use_new_zipfile_serialization=zipped)
    found = weightfile.read(path)
    assert found.keys() == STATE.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, STATE[name])
        assert type(tensor) is torch.Tensor
        assert not tensor.requires_grad


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_safetensors_are_recognised_by_content(tmp_path: Path, name: str) -> None:
    half = {name: tensor.bfloat16() for name, tensor in prefixed("module.").items()}
    safetensors.torch.save_file(half, tmp_path / name)
    found = weightfile.read(tmp_path / name)
    assert found.keys() == STATE.keys()
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


class RunsCode:
    """A pickle that makes a file when it is opened without care."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def test_malicious_pickles_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    canary = tmp_path / "canary"
    bad = RunsCode(canary)
    torch.save({"model": STATE, "extra": bad}, tmp_path / "zipped.pth")
    torch.save(bad, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(bad))
    (tmp_path / "old.pt").write_bytes(pickle.dumps(bad, protocol=2))
    (tmp_path / "text.pt").write_bytes(pickle.dumps(bad, protocol=0))
    calls = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *given, **named: calls.append(named) or load(*given, **named))
    for name in ("zipped.pth", "legacy.pth", "plain.pt", "old.pt", "text.pt"):
        with pytest.raises(CheckpointError, match=name) as caught:
            weightfile.read(tmp_path / name)
        assert caught.value.exit_code == 4
    assert [call["weights_only"] for call in calls] == [True] * 4, "text.pt is refused by its first bytes"
    assert not canary.exists()
    pickle.loads((tmp_path / "plain.pt").read_bytes())
    assert canary.exists(), "the pickle would have done nothing anyway"


def careless(source: str) -> list[str]:
    """What in a source text could open a pickle without care."""
    loads = re.findall(r"(?<!safetensors\.)torch\.load\((?:[^()]|\([^()]*\))*\)", source)
    found = [call for call in loads if not re.search(r"weights_only\s*=\s*True", call)]
    return found + re.findall(
        r"weights_only\s*=\s*(?!True\b)\w+|\bimport pickle\b|\bpickle\.loads?\b|allow_pickle=True", source
    )


def test_no_file_of_the_package_opens_a_pickle_without_care() -> None:
    sources = [path for folder in ("fastadv", "kernels", "csrc") for path in (ROOT / folder).rglob("*.py")]
    assert ROOT / "fastadv" / "weightfile.py" in sources
    assert {str(path): found for path in sources if (found := careless(path.read_text()))} == {}


@pytest.mark.parametrize(
    "planted",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(open(path), map_location='cpu')",
        "torch.load(path, weights_only = flag)",
        "import pickle",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_search_above_finds_what_it_looks_for(planted: str) -> None:
    assert careless(f"x = 1\ny = {planted}\n")
    assert not careless("torch.load(Path(path), map_location='cpu', weights_only=True)")


def torch_file(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def script_file() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), buffer)
    return buffer.getvalue()


def zip_file() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return buffer.getvalue()


def safetensors_file(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


GOOD = safetensors.torch.save(STATE)
SPARSE = torch.eye(3).to_sparse()
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty"),
    "HTML": (lambda: b"\n<!DOCTYPE html><html><title>Google Drive - Virus scan warning", "is an HTML page"),
    "HTML without doctype": (lambda: b"<HTML><body>", "is an HTML page"),
    "Git LFS pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "text": (lambda: b"hello", "neither a safetensors nor a torch file"),
    "random bytes": (lambda: bytes(range(200, 256)) * 9, "neither a safetensors nor a torch file"),
    "safetensors cut": (lambda: GOOD[:-4], "cut off or damaged"),
    "safetensors with trailing bytes": (lambda: GOOD + b"x", "cut off or damaged"),
    "safetensors of 2**62 bytes": (lambda: struct.pack("<Q", 1 << 62) + b"{}", "cut off or damaged"),
    "safetensors of a false shape": (
        lambda: safetensors_file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
        "cut off or damaged",
    ),
    "safetensors of 4-bit numbers": (
        lambda: safetensors_file({"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}, b"1234"),
        "numbers of a kind unknown here",
    ),
    "torch file cut": (lambda: torch_file({"a": torch.zeros(1000)})[:2000], "is cut off, damaged or not weights"),
    "old torch file cut": (
        lambda: torch_file({"a": torch.zeros(1000)}, _use_new_zipfile_serialization=False)[:2000],
        "is cut off, damaged or not weights",
    ),
    "zip of something else": (zip_file, "is cut off, damaged or not weights"),
    "TorchScript": (script_file, "is cut off, damaged or not weights"),
    "argparse.Namespace": (lambda: torch_file(argparse.Namespace(lr=0.1)), "holds a Namespace, not tensors by name"),
    "Namespace among the weights": (
        lambda: torch_file({**STATE, "args": argparse.Namespace(lr=0.1)}),
        r"holds more than tensors: args \(Namespace\)",
    ),
    "numpy number": (
        lambda: torch_file({"acc": np.float64(0.5)}),
        r"a Python object \(numpy\.\w+\.multiarray\.scalar\)",
    ),
    "whole module": (lambda: torch_file(torch.nn.Linear(2, 2)), r"a Python object \(torch.nn.modules.linear.Linear\)"),
    "plain pickle": (lambda: pickle.dumps({"a": 1}), "is cut off, damaged or not weights"),
    "number": (lambda: torch_file(3), "holds a int, not tensors by name"),
    "bare tensor": (lambda: torch_file(torch.zeros(3)), "holds a Tensor, not tensors by name"),
    "no tensors": (lambda: torch_file({}), "holds no tensors"),
    "empty model": (lambda: torch_file({"model": {}}), "holds no tensors"),
    "leftovers": (
        lambda: torch_file({**STATE, "epoch": 3, "net": {"a": torch.zeros(1)}}),
        r"holds more than tensors: epoch \(int\), net \(dict\)",
    ),
    "numbers as names": (lambda: torch_file({0: torch.zeros(1)}), r"holds more than tensors: 0 \(Tensor\)"),
    "sparse": (lambda: torch_file({"a": SPARSE}), r"holds more than tensors: a \(Tensor\)"),
    "no data": (lambda: torch_file({"a": torch.zeros(3, device="meta")}), "holds more than tensors"),
    "one number posing as many": (
        lambda: torch_file({"a": torch.zeros(1).expand(1 << 40)}),
        r"holds more than tensors: a \(Tensor\)",
    ),
    "names that meet": (
        lambda: torch_file({"module.a": torch.zeros(1), "a": torch.zeros(1)}),
        "holds a twice, with different prefixes",
    ),
    "NaN": (lambda: torch_file({**STATE, "b": torch.tensor([float("nan")])}), "NaN or infinite values: b"),
    "infinity in 16 bit": (
        lambda: safetensors.torch.save({"b": torch.tensor([float("inf")]).bfloat16()}),
        "NaN or infinite values: b",
    ),
    "NaN in 8 bit": (
        lambda: safetensors.torch.save({"b": torch.tensor([float("nan")]).to(torch.float8_e4m3fn)}),
        "NaN or infinite values: b",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_everything_else_is_refused_with_file_reason_and_cure(tmp_path: Path, name: str) -> None:
    make, reason = REFUSED[name]
    path = tmp_path / "weights.pth"
    path.write_bytes(make())
    with pytest.raises(CheckpointError, match=reason) as caught:
        weightfile.read(path)
    assert caught.value.exit_code == 4
    assert str(path) in caught.value.what
    assert caught.value.fix
    assert "\n" not in caught.value.what
    assert "\x1b" not in caught.value.what


def test_a_pickle_that_holds_itself_does_not_hang(tmp_path: Path) -> None:
    loop: dict[str, Any] = {}
    loop["model"] = loop
    torch.save(loop, tmp_path / "loop.pth")
    with pytest.raises(CheckpointError, match=r"holds more than tensors: model \(dict\)"):
        weightfile.read(tmp_path / "loop.pth")


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "device"])
def test_only_ordinary_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = Path("/dev/zero") if kind == "device" else tmp_path / "weights.pth"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    with pytest.raises(CheckpointError, match="does not exist" if kind == "missing" else "is not a file"):
        weightfile.read(path)


def test_a_path_that_cannot_be_looked_at_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read \(File name too long\)"):
        weightfile.read(tmp_path / ("x" * 300))


def test_weights_that_fit_are_accepted_whatever_their_precision() -> None:
    weightfile.match(STATE, {name: tensor.half() for name, tensor in reversed(STATE.items())})


def test_weights_that_do_not_fit_are_listed() -> None:
    model = {f"a{i}": torch.zeros(1) for i in range(7)} | {"shape": torch.zeros(2, 3), "kind": torch.zeros(1)}
    given = {"b": torch.zeros(1), "shape": torch.zeros(3, 2), "kind": torch.zeros(1, dtype=torch.int64)}
    with pytest.raises(CheckpointError) as caught:
        weightfile.match(model, given)
    assert caught.value.what == (
        "the weights do not fit the model: 7 missing (a0, a1, a2, a3, a4, ...), 1 unexpected (b), "
        "2 of another shape (shape float32[3, 2] for float32[2, 3], kind int64[1] for float32[1])"
    )
    with pytest.raises(CheckpointError, match="1 missing"):
        weightfile.match(STATE, {"head.bias": STATE["head.bias"]})
