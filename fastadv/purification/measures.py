"""What is measured of a hidden layer (purity, coverage) and of a network (accuracies, where an attack goes).

Shapes: z, x (R, B, d); y (R, B, 1); q (R, 1, m). Every measure is a list with one number for each run.
Source: "purity" and "inactive" put numbers on what arXiv:2401.15248 shows in its figures; their definitions are ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv.purification import attacks
from fastadv.purification.network import Hidden, partner
from fastadv.purification.sparse import TEST, World, label
from fastadv.seeds import mix

# A unit counts where it is on for so many samples and so long as a share of the longest.
LIVE_SAMPLES, LIVE_LENGTH = 0.005, 0.05
# A weight counts as a feature of its unit from this share of the unit's length on.
FEATURE_SHARE = 0.1
# Purity from which a unit is pure, and from which its feature is covered.
PURE, COVERS = 0.9, 0.8
# Steps of an attack in evaluation, and the widths of the smoothed ones.
STEPS, WIDTHS = 20, (0.02, 0.05, 0.1)


class Units(NamedTuple):
    """Of every live unit of one run: how much of its length is its largest feature, and how many features it reads."""

    purity: Tensor
    """Largest weight in feature space over the length of all: 1 for one feature, 1/sqrt(p) for p equal ones."""
    participation: Tensor
    """(sum u^2)^2 / sum u^4: the effective number of features."""
    features: Tensor
    """Weights above a tenth of the unit's length."""
    best: Tensor
    """The feature with the largest weight."""
    rows: Tensor
    """The weights in feature space, (live units, d)."""


def units(world: World, hidden: Hidden, n: int = 4000) -> list[Units]:
    """The live units of every run, in feature space."""
    on = hidden.gate(hidden.pre(world.stream(TEST).draw(n).z)).mean(1)
    mixed = torch.bmm(world.dictionary.mT, hidden.w).mT
    found = []
    for u, share in zip(mixed, on, strict=True):
        length = u.norm(dim=1)
        u = u[(share > LIVE_SAMPLES) & (length > LIVE_LENGTH * length.max())]
        length = u.norm(dim=1)
        largest, best = u.abs().max(1)
        squares = u.square()
        found.append(
            Units(
                largest / length,
                squares.sum(1).square() / squares.square().sum(1),
                (u.abs() > FEATURE_SHARE * length[:, None]).sum(1).float(),
                best,
                u,
            )
        )
    return found


def purification(world: World, hidden: Hidden) -> dict[str, list[float]]:
    """Medians over live units: purity, participation, features; the share of pure ones; coverage; how many live."""
    found: dict[str, list[float]] = {
        name: [] for name in ("purity", "participation", "features", "pure", "coverage", "live")
    }
    for each in units(world, hidden):
        alive = len(each.purity)
        for name, values in (
            ("purity", each.purity),
            ("participation", each.participation),
            ("features", each.features),
        ):
            found[name].append(float(values.median()) if alive else 0.0)
        found["pure"].append(float((each.purity > PURE).float().mean()) if alive else 0.0)
        found["coverage"].append(len(each.best[each.purity > COVERS].unique()) / world.coding.d)
        found["live"].append(alive)
    return found


def accuracies(
    world: World, hidden: Hidden, q: Tensor, theta: Tensor, eps: float, n: int, purpose: int = TEST
) -> dict[str, list[float]]:
    """clean, fgm, pgd (the package's PGD-20, any iterate), ens (right under everything), inactive (see `inactive`).

    ens: the worst of these for every sample, smoothed gates of three widths before and after exact steps, and the
    step against M theta, which owes nothing to the network. A sample of which f is 0 is wrong.
    """
    x, z = world.stream(purpose).draw(n)
    y = label(x, theta)

    def right(delta: Tensor | float) -> Tensor:
        return y * hidden.output(q, z + delta) > 0

    one_step = attacks.fgm(hidden, q, z, y, eps)
    clean, fgm = right(0.0), right(one_step)
    pgd = ~attacks.package_pgd(hidden, q, z, y, eps, steps=STEPS, seed=mix(*world.seeds))
    ens = clean & fgm & pgd & right(attacks.transfer((world.dictionary @ theta).mT, y, eps))
    for width in WIDTHS:
        delta = attacks.smoothed(hidden, q, z, y, eps, width=width, steps=STEPS, exact=0)
        ens &= right(delta)
        ens &= right(attacks.pgd(hidden, q, z, y, eps, steps=STEPS // 2, start=delta))
    found = {"clean": clean, "fgm": fgm, "pgd": clean & pgd, "ens": ens}
    shares = {name: value.float().mean((1, 2)).tolist() for name, value in found.items()}
    return {**shares, "inactive": inactive(world, one_step, x)}


def inactive(world: World, delta: Tensor, x: Tensor) -> list[float]:
    """The share of the attack's squared length, in feature space, that lies on features that are not active.

    Samples that the attack leaves alone (no unit is on) do not count; 0 where that is all of them.
    """
    squares = torch.bmm(delta, world.dictionary).square()
    total = squares.sum(2)
    share = (squares * (x == 0)).sum(2) / total.clamp_min(1e-30)
    moved = (total > 0).float()
    return ((share * moved).sum(1) / moved.sum(1).clamp_min(1)).tolist()


def pair_losses(
    world: World, hidden: Hidden, projection: Tensor | None, eps: float, n: int, temperature: float = 1.0
) -> dict[str, list[float]]:
    """The contrastive loss of similar and of dissimilar pairs, clean and with FGM on one view."""
    z, other, sign = world.stream(TEST).pairs(n)
    q = partner(hidden, projection, other)
    delta = attacks.fgm(hidden, q, z, sign, eps)
    found = {}
    for name, moved in (("clean", z), ("adv", z + delta)):
        loss = F.softplus(-sign * hidden.output(q, moved) / temperature)[:, :, 0]
        found[f"{name}_similar"] = loss[:, : n // 2].mean(1).tolist()
        found[f"{name}_dissimilar"] = loss[:, n // 2 :].mean(1).tolist()
    return found
