"""fastadv against its peers, taking turns in one run: PGD-10, one adversarial training step, peak memory.

``python benchmarks/peers.py`` needs the ``bench`` extra, in an environment of its own, and about half an hour on two
cores; ``--quick`` goes through everything in two; ``--resume`` goes on where an interrupted run stopped. ``--equal
--data FOLDER`` counts robust images with the accelerated and the plain attack instead. Results:
benchmarks/results/peers_<device>.json; ``python benchmarks/table.py`` makes the README's tables and the plot of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import equal
import memory
import targets
import torch
import training
from clock import summary, taking_turns
from contestants import AUTO, CONTESTANTS, FAST, NOISE, THREAT, Agreement, Contestant, environment, installed
from subjects import RESNET50, SWIN_TINY, Subject, subjects, twin
from torch import Tensor

from fastadv import models, ops, tuning
from fastadv.engine import native_bf16
from fastadv.environment import environment as of_machine
from fastadv.losses import misclassified
from fastadv.models import Classifier

RESULTS = Path(__file__).parent / "results"
EQUAL_SHARE = 0.999
MEMORY_BATCH = {SWIN_TINY: 8, RESNET50: 8, models.MICRO: 64}
MEMORY_SIDES = (FAST, AUTO, "RoLI's loop", "MadryLab's loop", "torchattacks")
# At 224 a training step takes seconds: all strategies on the small model, the two ends on the large one.
TRAINED = {SWIN_TINY: (4, ("full", "linear")), models.MICRO: (32, training.STRATEGIES)}


def attack_cell(subject: Subject, *, steps: int, rounds: int, batch_size: int) -> dict[str, Any]:
    """Seconds of one attack per contestant; on a trained model, beside them, what each leaves robust."""
    model = twin(subject.make()).requires_grad_(True)
    batches = subject.batches(batch_size)
    x, y = next(batches)
    agreement = Agreement(model, x, y, steps)
    rows: dict[str, dict[str, Any]] = {}
    attacks = {}
    for name, contestant in running().items():
        share, attack = agreement.check(contestant)
        rows[name] = {"equal_pixels": share, "same_noise": contestant.same_noise, "keep": contestant.keep}
        # In bf16 the pixels differ by design; robust accuracy tells whether that matters.
        if share > EQUAL_SHARE or (name == AUTO and native_bf16("cpu")):
            attacks[name] = attack
    turn: list[tuple[Tensor, Tensor]] = []
    made: dict[str, list[Tensor]] = {name: [] for name in attacks}

    def call(name: str) -> None:
        made[name].append(attacks[name](*turn[-1]))

    calls = {name: (lambda name=name: call(name)) for name in attacks}
    turns = taking_turns(calls, rounds, before=lambda number: turn.append(next(batches)))
    for name, row in summary(turns, FAST).items():
        rows[name] |= row
        if subject.images is not None:
            rows[name]["robust"] = robust(model, turn, made[name])
    cell: dict[str, Any] = {"batch_size": batch_size, "steps": steps, "trained": subject.images is not None}
    if subject.images is not None:
        cell["clean"] = robust(model, turn, [x for x, _ in turn])
    return {**cell, "rows": rows}


def robust(model: Classifier, batches: list[tuple[Tensor, Tensor]], images: list[Tensor]) -> dict[str, Any]:
    """How many of ``images`` the model gives the labels of ``batches``, in fp32, with the Wilson interval."""
    with torch.no_grad():
        wrong = [misclassified(model(adv), y) for adv, (_, y) in zip(images, batches, strict=True)]
    right = torch.cat(wrong).logical_not_()
    return equal.counted(right)


def training_cell(subject: Subject, strategy: str, *, steps: int, rounds: int, batch_size: int) -> dict[str, Any]:
    """Seconds of one adversarial training step per side, each with a copy of the model of its own."""
    batches = subject.batches(batch_size)
    x, y = next(batches)
    model = twin(subject.make())
    torch.manual_seed(0)
    learning = getattr(tuning, strategy)(model)
    agreement = Agreement(twin(model).eval(), x, y, steps)
    rows: dict[str, dict[str, Any]] = {}
    sides = {}
    for name in (name for name in training.SIDES if name in running()):
        trained = training.side(name, *twin((model, learning)), x, steps)
        loss = trained.step(x, y, NOISE).item()
        rows[name] = {"equal_pixels": agreement.share(CONTESTANTS[name].keep, trained.adv), "first_loss": loss}
        if rows[name]["equal_pixels"] > EQUAL_SHARE or (name == AUTO and native_bf16("cpu")):
            sides[name] = trained
    turn: list[tuple[Tensor, Tensor]] = []
    calls = {name: (lambda each=each: each.step(*turn[-1], seed=len(turn))) for name, each in sides.items()}
    turns = taking_turns(calls, rounds, before=lambda number: turn.append(next(batches)))
    for name, row in summary(turns, FAST).items():
        rows[name] |= row
    return {"batch_size": batch_size, "steps": steps, "rows": rows}


def memory_cell(name: str, batch_size: int) -> dict[str, Any]:
    """Peak memory of one attack per side, each in a process of its own."""
    sides = [side for side in MEMORY_SIDES if side in running()]
    return {"rows": {side: memory.in_a_process(name, side, batch_size, "cpu") for side in sides}}


def running() -> dict[str, Contestant]:
    """The contestants of this machine: without native bf16, auto is the fp32 attack once more and is left out."""
    return {name: c for name, c in installed().items() if name != AUTO or native_bf16("cpu")}


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """Name of a cell -> the function that measures it."""
    cells: dict[str, Any] = {}
    subject_named = subjects(args.quick)
    for name, subject in subject_named.items():
        size = min(subject.batch_size, args.max_batch)
        cells[f"attack/{name}"] = lambda subject=subject, size=size: attack_cell(
            subject, steps=args.steps, rounds=args.rounds, batch_size=size
        )
    for name, (size, strategies) in TRAINED.items():
        size = min(size, args.max_batch)
        for strategy in strategies:
            cells[f"training/{name}/{strategy}"] = lambda s=subject_named[name], strategy=strategy, size=size: (
                training_cell(s, strategy, steps=min(7, args.steps), rounds=args.rounds, batch_size=size)
            )
    for name, size in MEMORY_BATCH.items():
        cells[f"memory/{name}"] = lambda name=name, size=size: memory_cell(name, min(size, args.max_batch))
    return {name: cell for name, cell in cells.items() if any(part in name for part in args.only)}


def opened(path: Path, conditions: dict[str, Any], resume: bool) -> dict[str, Any]:
    """What is known already: with ``resume``, the cells of a file that was measured under the same conditions."""
    fresh: dict[str, Any] = {"conditions": conditions, "cells": {}}
    if not path.exists():
        return fresh
    known: dict[str, Any] = json.loads(path.read_text())
    if "equal_robustness" in known:
        # Of a run of its own, with its own conditions beside it.
        fresh["equal_robustness"] = known["equal_robustness"]
    if not resume:
        return fresh
    if known.get("conditions") != conditions:
        print(f"{path} was measured under other conditions; starting afresh")
        return fresh
    return known


def save(path: Path, document: dict[str, Any]) -> None:
    """Write the JSON so that a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(document, indent=1) + "\n")
    draft.replace(path)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of every contestant")
    parser.add_argument("--steps", type=int, default=10, help="PGD steps; a training step takes 7 of them at most")
    parser.add_argument("--max-batch", type=int, default=10**6, help="no batch is larger")
    parser.add_argument("--only", nargs="+", default=[""], help="cells whose name holds one of these")
    parser.add_argument("--quick", action="store_true", help="one round of small batches: does everything run?")
    parser.add_argument("--resume", action="store_true", help="keep the cells that --out has, measured alike")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/peers_cpu.json; --quick: none")
    equal.add_arguments(parser)
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.steps, args.max_batch = 1, 2, 1
    out = args.out or (None if args.quick else RESULTS / "peers_cpu.json")
    if args.equal:
        return equal.main(args, out or RESULTS / "peers_cpu.json")
    machine = of_machine()
    del machine["command"]
    conditions = {
        "environment": machine,
        "peers": environment(),
        "settings": {"rounds": args.rounds, "eps": THREAT.eps, "steps": args.steps, "max_batch": args.max_batch},
        "native_bf16": native_bf16("cpu"),
        "bodies": {name: ops.body(name) for name in ops.SCHEMAS},
    }
    assert conditions["bodies"]["linf_step"] == "cpp", "the fused ops were not built"
    for package, version in conditions["peers"].items():
        if version is None:
            print(f"{package} is not installed: left out (pip install '.[bench]', in an environment of its own)")
    document = opened(out, conditions, args.resume) if out else {"conditions": conditions, "cells": {}}
    for name, measure in plan(args).items():
        if name in document["cells"]:
            continue
        began = time.perf_counter()
        cell = document["cells"][name] = measure()
        cell["took_s"] = round(time.perf_counter() - began, 1)
        show(name, cell)
        if out:
            save(out, document)
    document["targets"] = targets.judged(document)
    print("\n".join(targets.lines(document["targets"])))
    if out:
        save(out, document)
        print(f"wrote {out}")
    return 0


def show(name: str, cell: dict[str, Any]) -> None:
    """One cell as lines on the terminal."""
    print(f"{name}  ({cell['took_s']} s)")
    for side, row in cell["rows"].items():
        if "peak_bytes" in row:
            text = f"peak {row['peak_bytes'] / 2**20:.0f} MiB, saved {row['saved_bytes'] / 2**20:.0f} MiB"
        elif "wall_s" not in row:
            text = f"not timed: only {100 * row['equal_pixels']:.2f} % of its pixels are ours"
        else:
            seconds = f"{row['wall_s']:7.2f} s wall {row['cpu_s']:7.2f} s CPU"
            text = f"{seconds}  {row['wall_ratio']:.2f}x {row['cpu_ratio']:.2f}x as long as {FAST}"
        robust = f"  robust {100 * row['robust']['share']:.1f} %" if "robust" in row else ""
        print(f"  {side:20} {text}{robust}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
