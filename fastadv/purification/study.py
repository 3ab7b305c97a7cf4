"""The study behind E2, E3, E4 and parts of E7 and E8: supervised pre-training, clean and attacked, and what follows.

It is done once and kept in the folder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadv.purification import attacks, plots
from fastadv.purification.lab import THRESHOLDS, Lab
from fastadv.purification.measures import accuracies, purification, units
from fastadv.purification.network import Activation, Hidden
from fastadv.purification.sparse import TEST, WEIGHTS, World, label
from fastadv.purification.training import Kind, head, supervised

STUDY = "supervised"
# Name, activation, attack of the arms. The hard activation has no smoothed arm: that one is E8's subject.
ARMS: tuple[tuple[str, Activation, Kind], ...] = (
    ("soft, clean", "soft", "none"),
    ("soft, FGM", "soft", "fgm"),
    ("soft, smoothed", "soft", "smoothed"),
    ("hard, clean", "hard", "none"),
    ("hard, FGM", "hard", "fgm"),
)
CLEAN, FGM, SMOOTHED = "soft, clean", "soft, FGM", "soft, smoothed"
ADV_HEAD, RANDOM, ORACLE = "soft, clean; head trained with FGM", "random hidden layer", "oracle, W = M"
# Rows of a picture: units of the hidden layer, or samples.
ROWS = 60
BINS = 20


def study(lab: Lab) -> dict[str, Any]:
    """Every arm: purification, accuracies on its own task and with a clean head on a new one, and pictures."""
    world, eps = lab.world(), lab.settings.eps
    theta, found = world.theta(0), dict[str, Any]()
    for name, activation, attack in ARMS:
        training = lab.training(activation, attack)
        hidden = lab.learned(supervised(world, training, [eps] * len(world.seeds), theta), eps).hidden
        found[name] = arm(lab, world, hidden)
        found[name]["pictures"] = _pictures(world, hidden, theta, eps)
        if name == CLEAN:
            found[ADV_HEAD] = {"down": downstream(lab, world, hidden, eps)}
    w = world.stream(WEIGHTS).normal(lab.settings.d, lab.settings.units) * 0.3 / lab.settings.d**0.5
    level = torch.full((len(w), 1, lab.settings.units), THRESHOLDS["soft"])
    found[RANDOM] = {"down": downstream(lab, world, Hidden(w, level, "soft"))}
    level = torch.full((len(w), 1, lab.settings.d), THRESHOLDS["hard"])
    found[ORACLE] = {"down": downstream(lab, world, Hidden(world.dictionary, level, "soft"))}
    return found


def arm(lab: Lab, world: World, hidden: Hidden) -> dict[str, Any]:
    """purification and accuracies of a pre-trained layer: own task (output layer of ones), and new task, clean head."""
    ones = torch.ones(1, 1, hidden.w.shape[2])
    own = accuracies(
        world, hidden, ones.expand(len(hidden.w), 1, -1), world.theta(0), lab.settings.eps, lab.settings.samples
    )
    return {"purification": purification(world, hidden), "own": own, "down": downstream(lab, world, hidden)}


def downstream(lab: Lab, world: World, hidden: Hidden, eps: float = 0.0) -> dict[str, list[float]]:
    """Accuracies on a new task of a head on the frozen layer, trained on clean samples or with FGM of radius eps."""
    s, theta = lab.settings, world.theta(1)
    q = head(world, hidden, theta, steps=s.head_steps, batch_size=s.batch_size, eps=eps)
    return accuracies(world, hidden, q, theta, s.eps, s.samples)


def _pictures(world: World, hidden: Hidden, theta: Tensor, eps: float) -> dict[str, Any]:
    """Histogram of purity over all seeds; weights and perturbations of the first, as levels of grey."""
    each = units(world, hidden)
    purity = torch.cat([run.purity for run in each])
    first = each[0]
    order = first.best.argsort()
    chosen = order[torch.linspace(0, len(order) - 1, min(ROWS, len(order))).long()]
    x, z = world.stream(TEST).draw(200)
    y = label(x, theta)
    delta = attacks.fgm(hidden, torch.ones(1, 1, hidden.w.shape[2]), z, y, eps)[0] @ world.dictionary[0]
    moved = delta.norm(dim=1) > 0
    delta, active = delta[moved][:ROWS], x[0][moved][:ROWS] != 0
    # Active features first, each group by size: what is left of the stripe is what matters.
    key = delta.abs() + active * 1e3
    return {
        "histogram": torch.histc(purity, BINS, 0, 1).int().tolist(),
        "weights": plots.shades(first.rows[chosen]),
        "attack": plots.shades(delta.gather(1, key.argsort(1, descending=True))),
    }
