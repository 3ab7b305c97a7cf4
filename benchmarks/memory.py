"""Peak memory of one attack, in a process of its own: ``python benchmarks/memory.py MODEL CONTESTANT --batch 8``.

Two numbers. ``peak``: how far memory rises above what it is before the attack: the device's allocator on CUDA, resident
memory on the CPU. ``saved``: the bytes the graph holds for the backward pass at the worst moment, each storage once and
parameters left out; exact and the same in every run, but not everything an attack needs.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contestants import CONTESTANTS, Attack, Settings
from subjects import RESNET20, random_weights, resnet20, robust_swin
from torch import Tensor

from fastadv import models
from fastadv.models import Classifier

# Memory does not depend on what was learned.
UNTRAINED = {RESNET20: resnet20, models.MICRO: robust_swin}


class Saved:
    """The bytes held for backward passes, now and at most. A context manager around what is watched."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        self.held: Counter[int] = Counter()
        self.now = self.most = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(partial(_Hold, self), lambda hold: hold.tensor)

    def __enter__(self) -> Saved:
        self._hooks.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._hooks.__exit__(*raised)


class _Hold:
    """What the graph keeps instead of a tensor; it goes when the graph goes."""

    def __init__(self, saved: Saved, tensor: Tensor) -> None:
        self.saved, self.tensor, storage = saved, tensor, tensor.untyped_storage()
        self.key, self.bytes = storage.data_ptr(), storage.nbytes()
        if self.key in saved.weights:
            self.bytes = 0
        if saved.held[self.key] == 0:
            saved.now += self.bytes
            saved.most = max(saved.most, saved.now)
        saved.held[self.key] += 1

    def __del__(self) -> None:
        self.saved.held[self.key] -= 1
        if self.saved.held[self.key] == 0:
            self.saved.now -= self.bytes


def saved_bytes(model: Classifier, attack: Attack, x: Tensor, y: Tensor) -> int:
    """What the graph holds at most during ``attack(x, y)``."""
    with Saved(model) as saved:
        attack(x, y)
    return saved.most


def peak_bytes(attack: Attack, x: Tensor, y: Tensor) -> int:
    """How far memory rises during ``attack(x, y)``. Once per process: an allocator keeps what it got."""
    gc.collect()
    if x.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attack(x, y)
        return torch.cuda.max_memory_allocated() - before
    # What was freed goes back to the system, and the kernel forgets the highest mark so far.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    attack(x, y)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measured(name: str, contestant: str, batch_size: int, device: str) -> dict[str, Any]:
    """Both numbers for PGD-2: the second step meets what the first one left."""
    model = (UNTRAINED[name]() if name in UNTRAINED else random_weights(name)).to(device).eval()
    x = torch.rand(batch_size, 3, model.input_size, model.input_size, device=device)
    y = torch.zeros(batch_size, dtype=torch.int64, device=device)
    attack = CONTESTANTS[contestant].bind(model, Settings(steps=2), x)
    # Libraries, threads and workspaces are there before the measurement, on both sides.
    attack(x[:1], y[:1])
    model.zero_grad()
    return {
        "batch_size": batch_size,
        "peak_bytes": peak_bytes(attack, x, y),
        "saved_bytes": saved_bytes(model, attack, x, y),
    }


def in_a_process(name: str, contestant: str, batch_size: int, device: str) -> dict[str, Any]:
    """:func:`measured`, in a fresh Python."""
    command = [sys.executable, __file__, name, contestant, "--batch", str(batch_size), "--device", device]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{ran.stderr}")
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("contestant", choices=list(CONTESTANTS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    print(json.dumps(measured(args.model, args.contestant, args.batch, args.device)))
