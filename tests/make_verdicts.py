"""Verdicts of the published AutoAttack (pyautoattack) and of ours in parity mode, per image, in data/verdicts.json.

``python tests/make_verdicts.py [NET NORM ...]`` with pyautoattack importable: ten minutes for each net and norm on one
core. Every stage of both sides is recorded, for 500 held-out digits and for a batch of 16 of them that the tests run.
``swin linf FILE`` takes the shipped robust Swin and the first 64 images of an .npz file that it gives their class.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nets
import numpy as np
import torch
from torch import Tensor, nn

from fastadv import __version__, foreign
from fastadv.attacks.autoattack import AutoAttack
from fastadv.attacks.verdicts import CLEAN_WRONG, SURVIVED
from fastadv.threat import ThreatModel

FILE = Path(__file__).parent / "data" / "verdicts.json"
# Radii at which a good part of the images survives and the later stages still break some.
RUNS = {("plain", "linf"): 0.07, ("plain", "l2"): 1.5, ("residual", "linf"): 0.13, ("residual", "l2"): 3.0}
SWIN_EPS, SWIN_IMAGES = 4 / 255, 64
BATCH = 250
SMALL = 16
STAGES = ("apgd-ce", "apgd-t", "fab-t", "square")


def published(model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float, batch_size: int) -> list[int]:
    """``broken_by`` as pyautoattack decides it, seed 0."""
    import pyautoattack
    from pyautoattack.state import EvaluationState

    flags: list[Tensor] = []
    finish = EvaluationState.add_run_attack

    def finished(self: EvaluationState, attack: str) -> None:
        """Called after each stage: which images are left."""
        assert attack == STAGES[len(flags)]
        flags.append(self.robust_flags.clone())
        finish(self, attack)

    EvaluationState.add_run_attack = finished
    try:
        attack = pyautoattack.AutoAttack(model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=0)
        attack.run_standard_evaluation(x, y, batch_size=batch_size)
    finally:
        EvaluationState.add_run_attack = finish
    with torch.no_grad():
        left = torch.cat([model(part).argmax(1) for part in x.split(batch_size)]) == y
    broken_by = torch.where(left, SURVIVED, CLEAN_WRONG)
    for stage, robust in enumerate(flags):
        broken_by[left & ~robust] = stage
        left = robust
    return [int(stage) for stage in broken_by]


def ours(model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float, batch_size: int) -> list[int]:
    """``broken_by`` of AutoAttack in parity mode."""
    attack = AutoAttack(mode="parity", batch_size=batch_size)
    return [int(stage) for stage in attack.run(model, x, y, ThreatModel(norm, eps)).broken_by]


def sample(broken_by: Sequence[int]) -> list[int]:
    """16 images with every verdict among them that there is; one survivor, as survivors cost most."""
    places = {stage: [i for i, found in enumerate(broken_by) if found == stage] for stage in (2, 3, 1, 0, SURVIVED)}
    chosen = places[SURVIVED][:1] + places[CLEAN_WRONG][:1] if CLEAN_WRONG in places else places[SURVIVED][:1]
    for stage, share in ((2, 4), (3, 3), (1, 3)):
        chosen += places[stage][:share]
    return sorted((chosen + places[0])[:SMALL])


def compare(
    model: nn.Module, x: Tensor, y: Tensor, rows: Sequence[int], norm: str, eps: float, batch_size: int
) -> dict[str, Any]:
    """Both sides on the images ``rows``, with their CPU seconds."""
    x, y = x[list(rows)], y[list(rows)]
    found: dict[str, Any] = {}
    for side, attack in (("ours", ours), ("published", published)):
        began = time.process_time()
        found[side] = attack(model, x, y, norm, eps, batch_size)
        found[f"{side}_cpu_seconds"] = round(time.process_time() - began, 1)
    found["differ"] = [row for row, a, b in zip(rows, found["published"], found["ours"], strict=True) if a != b]
    return found


def swin(file: Path) -> dict[str, Any]:
    """Verdicts on the shipped robust Swin: 64 images of ``file`` in one batch, 20 minutes for each side."""
    model = foreign.load("swin_micro_64", "robust").eval()
    with np.load(file) as arrays:
        x = torch.from_numpy(arrays["images"][:1000]).permute(0, 3, 1, 2).contiguous() / 255
        y = torch.from_numpy(arrays["labels"][:1000])
    with torch.no_grad():
        right = torch.cat([model(part).argmax(1) for part in x.split(BATCH)]) == y
    rows = right.nonzero().flatten()[:SWIN_IMAGES].tolist()
    found = compare(model, x, y, rows, "linf", SWIN_EPS, SWIN_IMAGES)
    return {"file": file.name, "rows": rows, "eps": SWIN_EPS, "batch_size": SWIN_IMAGES, "stages": STAGES, **found}


def main(words: list[str]) -> None:
    """Make the verdicts of the nets and norms named, of all without any; the others stay in the file."""
    torch.set_num_threads(1)
    table = json.loads(FILE.read_text()) if FILE.exists() else {}
    table["command"] = "python tests/make_verdicts.py"
    table["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "pyautoattack", "scikit-learn")}
    table["versions"] |= {"fastadv": __version__}
    runs = table.setdefault("runs", {})
    if words[:1] == ["swin"]:
        runs["swin linf"] = swin(Path(words[2]))
        return write(table)
    for (net, norm), eps in RUNS.items():
        if words and (net, norm) not in zip(words[::2], words[1::2], strict=True):
            continue
        model, (x, y) = nets.load(net), nets.held_out()
        whole = compare(model, x, y, range(nets.HELD_OUT), norm, eps, BATCH)
        rows = sample(whole["published"])
        small = {"rows": rows, **compare(model, x, y, rows, norm, eps, SMALL)}
        runs[f"{net} {norm}"] = {"eps": eps, "batch_size": BATCH, "stages": STAGES, **whole, "small": small}
        write(table)


def write(table: dict[str, Any]) -> None:
    """Write the file, and print how many images each stage broke in the runs that are in it."""
    FILE.write_text(json.dumps(table, indent=1).replace(",\n   ", ",") + "\n")
    for name, run in table["runs"].items():
        counts = {stage: run["published"].count(stage) for stage in (CLEAN_WRONG, 0, 1, 2, 3, SURVIVED)}
        differ = run["differ"] + run.get("small", {}).get("differ", [])
        print(name, round(run["eps"], 4), counts, "differ:", differ, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
