"""AutoAttack against the published code, and PGD-10 with and without the images it has broken: seconds, verdicts.

All take turns batch by batch: CPU seconds, and the robust accuracy of both sides.

``python benchmarks/autoattack.py`` with pyautoattack importable: ``pip install fastadv[bench]`` in an environment of
its own. One thread, about fifteen minutes. Writes results/autoattack.json. ``--parity`` also compares fast with parity
mode, and that with itself from another seed, on 1,000 images: an hour more.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastadv.attacks.autoattack import AutoAttack
from fastadv.environment import environment
from fastadv.losses import misclassified
from fastadv.measure import wilson
from fastadv.pgd import PGD
from fastadv.threat import ThreatModel

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
RESULTS = HERE / "results" / "autoattack.json"
Attack = Callable[[nn.Module, Tensor, Tensor, ThreatModel], Tensor]


class Case(NamedTuple):
    """A network of tests/nets.py, a ball, and how many digits are attacked in batches of which size."""

    net: str
    threat: ThreatModel
    n: int
    batch_size: int


# Radii at which about half, a tenth and a hundredth of the images survive.
CASES = {
    "robust": Case("residual", ThreatModel("linf", 0.13), 96, 32),
    "robust l2": Case("residual", ThreatModel("l2", 1.8), 96, 32),
    "a tenth robust": Case("residual", ThreatModel("linf", 0.2), 300, 100),
    "a hundredth robust": Case("residual", ThreatModel("linf", 0.34), 500, 250),
}
# PGD-10 alone; the weak network is the robust one's architecture, trained on clean images.
PGD_CASES = {
    "robust": Case("residual", ThreatModel("linf", 0.13), 1500, 250),
    "a hundredth robust": Case("residual", ThreatModel("linf", 0.34), 1500, 250),
    "weak": Case("standard", ThreatModel("linf", 0.13), 1500, 250),
}
# Held-out digits first, then some of those the network was trained on. Where gradients are cut off, verdicts hang on
# chance: how much, another seed of parity mode shows.
PARITY_CASES = {
    "steep units": Case("residual", ThreatModel("linf", 0.18), 1000, 250),
    "ordinary": Case("ordinary", ThreatModel("linf", 0.16), 1000, 250),
}
SEED_CASES = {"steep units, two seeds": PARITY_CASES["steep units"]}


def published(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    """The images that pyautoattack's standard version comes back with."""
    import pyautoattack

    norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
    attack = pyautoattack.AutoAttack(model, norm=norm, eps=threat.eps, seed=0)
    adv: Tensor = attack.run_standard_evaluation(x, y, batch_size=len(x))[0]
    return adv


def fast(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    """The images of AutoAttack in fast mode."""
    return AutoAttack(batch_size=len(x)).run(model, x, y, threat).adv


def parity(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    """The images of AutoAttack in parity mode."""
    return AutoAttack(mode="parity", batch_size=len(x)).run(model, x, y, threat).adv


def other_seed(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    """The images of AutoAttack in parity mode, from other random numbers."""
    return AutoAttack(mode="parity", batch_size=len(x), seed=1).run(model, x, y, threat).adv


def pgd(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, *, drop: bool) -> Tensor:
    """The images of an evaluation's PGD-10; ``drop``: those already broken are not attacked on."""
    attack = PGD(steps=10, step_size=threat.eps / 4, keep="success").on(model, precision="fp32")
    return attack.run(x, y, threat, torch.Generator().manual_seed(0), drop=drop).adv


# What is compared: the cases, and the two sides.
COMPARISONS: dict[str, tuple[dict[str, Case], dict[str, Attack]]] = {
    "cases": (CASES, {"pyautoattack": published, "fastadv": fast}),
    "pgd": (PGD_CASES, {"everything": partial(pgd, drop=False), "survivors": partial(pgd, drop=True)}),
    "parity": (PARITY_CASES, {"parity": parity, "fast": fast}),
    "seeds": (SEED_CASES, {"parity": parity, "another seed": other_seed}),
}


def network(name: str) -> nn.Module:
    """A network of tests/nets.py; or one trained here in seconds: ``standard``, its residual one on clean images, or
    ``ordinary``, the same with ReLU in place of the steep units, on adversarial images.
    """
    import make_nets
    import nets

    if name == "standard":
        return make_nets.trained(nets.residual, threat=ThreatModel("linf", 0.0))
    return make_nets.trained(nets.ordinary) if name == "ordinary" else nets.load(name)


def take_turns(case: Case, sides: dict[str, Attack], x: Tensor, y: Tensor) -> dict[str, Any]:
    """Seconds and verdicts of both sides; who goes first changes from batch to batch."""
    model = network(case.net)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    broken: dict[str, list[Tensor]] = {side: [] for side in sides}
    for attack in sides.values():
        # Whoever goes first would pay for what is set up once.
        attack(model, x[:1], y[:1], case.threat)
    for number, (xs, ys) in enumerate(zip(x.split(case.batch_size), y.split(case.batch_size), strict=True)):
        for side in list(sides)[:: 1 if number % 2 else -1]:
            began = time.process_time()
            adv = sides[side](model, xs, ys, case.threat)
            seconds[side].append(time.process_time() - began)
            with torch.no_grad():
                broken[side].append(misclassified(model(adv), ys))
    one, other = sides
    ratios = [slow / quick for slow, quick in zip(seconds[one], seconds[other], strict=True)]
    verdicts = {side: torch.cat(found) for side, found in broken.items()}
    report: dict[str, Any] = {"net": case.net, "norm": case.threat.norm, "eps": case.threat.eps, "n": len(x)}
    for side in sides:
        left = int((~verdicts[side]).sum())
        report[side] = {
            "cpu_seconds": round(sum(seconds[side]), 2),
            "robust": left / len(x),
            "robust_interval": [round(bound, 4) for bound in wilson(left, len(x))],
        }
    report["speed_up"] = round(sum(seconds[one]) / sum(seconds[other]), 2)
    report["speed_up_of_batches"] = [round(ratio, 2) for ratio in sorted(ratios)]
    report["verdicts_differ"] = int((verdicts[one] != verdicts[other]).sum())
    return report


def main() -> None:
    """Measure, print a line for each case, and write the results."""
    import nets

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parity", action="store_true", help="also compare fast with parity mode on 1,000 images")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these cases alone; the others stay as they are")
    words = parser.parse_args()
    torch.set_num_threads(1)
    machine = environment() | {"pyautoattack": importlib.metadata.version("pyautoattack")}
    # Of the case, as cases may be measured one by one.
    del machine["command"]
    commit = str(machine.pop("commit")) + (" (modified)" if machine.pop("modified") else "")
    table: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    table["environment"] = machine
    x, y = (part.flip(0) for part in nets.digits())
    for kind, (cases, sides) in COMPARISONS.items():
        if kind in ("parity", "seeds") and not words.parity:
            continue
        for name, case in cases.items():
            if words.only and name not in words.only:
                continue
            found = take_turns(case, sides, x[: case.n], y[: case.n]) | {"commit": commit}
            table.setdefault(kind, {})[name] = found
            print(kind, name, json.dumps(found), flush=True)
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
