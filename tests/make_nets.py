"""Trains the networks of nets.py and writes their weights: ``python tests/make_nets.py``, about a minute each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import nets
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from fastadv.losses import misclassified
from fastadv.pgd import PGD
from fastadv.threat import ThreatModel

# Moderate on purpose: this leaves images for every stage of AutoAttack to break.
EPOCHS, BATCH, RATE = 10, 64, 3e-3
THREAT = ThreatModel("linf", 0.1)
ATTACK = PGD(steps=2, step_size=0.06)


def trained(
    make: Callable[[], nn.Module],
    seed: int = 0,
    epochs: int = EPOCHS,
    threat: ThreatModel = THREAT,
    attack: PGD = ATTACK,
) -> nn.Module:
    """A network trained adversarially on the digits that are not held out."""
    torch.manual_seed(seed)
    model = make()
    x, y = (part[: -nets.HELD_OUT] for part in nets.digits())
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=1e-3)
    steps = epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH)[: len(x) // BATCH]:
            adv = attack(model, x[rows], y[rows], threat)
            optimizer.zero_grad()
            F.cross_entropy(model.train()(adv), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main(names: list[str]) -> None:
    """Train ``names``, all without any, and write their weights."""
    for name in names or nets.NETS:
        model = trained(nets.NETS[name]).half()
        path = nets.weights(name)
        path.parent.mkdir(exist_ok=True)
        safetensors.torch.save_file(model.state_dict(), path)
        model, (x, y) = nets.load(name), nets.held_out()
        with torch.no_grad():
            clean = 1 - misclassified(model(x), y).float().mean()
        print(f"{name}: {Path(path).name}, {path.stat().st_size} bytes, {clean:.1%} right on held-out digits")


if __name__ == "__main__":
    main(sys.argv[1:])
