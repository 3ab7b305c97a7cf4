"""Contrastive pre-training: the same questions where no label was seen (E6)."""

from __future__ import annotations

from statistics import mean
from typing import Any

from fastadv.page import Block
from fastadv.purification import plots
from fastadv.purification.lab import Experiment, Lab
from fastadv.purification.marks import Mark, spread
from fastadv.purification.measures import pair_losses, purification
from fastadv.purification.study import downstream
from fastadv.purification.training import Kind, contrastive

# Name, attack, and whether a projection of half as many outputs as units is learned too.
ARMS: tuple[tuple[str, Kind, bool], ...] = (
    ("clean", "none", False),
    ("FGM", "fgm", False),
    ("smoothed", "smoothed", False),
    ("projected, clean", "none", True),
    ("projected, FGM", "fgm", True),
)


def trained(lab: Lab) -> tuple[list[Mark], dict[str, Any]]:
    """Purification, losses of both kinds of pairs, and downstream accuracies after contrastive pre-training."""
    world, s, arms = lab.world(), lab.settings, dict[str, Any]()
    for name, attack, projected in ARMS:
        training = lab.training("soft", attack, projection=s.units // 2 if projected else 0)
        hidden, projection, _ = lab.learned(contrastive(world, training, [s.eps] * len(world.seeds)), s.eps)
        arms[name] = {
            "purification": purification(world, hidden),
            "losses": pair_losses(world, hidden, projection, s.eps, 4 * s.samples, s.temperature),
            "down": downstream(lab, world, hidden),
        }
    marks = [_purity(arms, prefix) for prefix in ("", "projected, ")]
    marks.append(_dissimilar(arms))
    increases = {
        name: mean(values["losses"]["adv_similar"]) - mean(values["losses"]["clean_similar"])
        for name, values in arms.items()
    }
    marks.append(
        Mark(
            claim="The attack hardly hurts similar pairs",
            predicted="their loss rises by at most 0.12 in every arm",
            measured=", ".join(f"{name} {rise:+.3f}" for name, rise in increases.items()),
            holds=max(increases.values()) <= 0.12,
        )
    )
    marks += [_inherits(arms, prefix) for prefix in ("", "projected, ")]
    return marks, {"arms": arms, "eps": s.eps}


def _purity(arms: dict[str, Any], prefix: str) -> Mark:
    adv, clean = (arms[f"{prefix}{name}"]["purification"] for name in ("FGM", "clean"))
    return Mark(
        claim=f"{prefix}FGM: contrastive adversarial training purifies, clean does not",
        predicted="median purity at least 0.90, clean at most 0.45",
        measured=f"{spread(adv['purity'])} against {spread(clean['purity'])}, coverage {mean(adv['coverage']):.2f} "
        f"against {mean(clean['coverage']):.2f}",
        holds=mean(adv["purity"]) >= 0.90 and mean(clean["purity"]) <= 0.45,
    )


def _dissimilar(arms: dict[str, Any]) -> Mark:
    losses = {name: mean(values["losses"]["adv_dissimilar"]) for name, values in arms.items()}
    return Mark(
        claim="Adversarial training repairs the dissimilar pairs",
        predicted="their attacked loss at least 1.3 after clean training, at most 0.85 after adversarial",
        measured=", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()),
        holds=all(loss >= 1.3 if "clean" in name else loss <= 0.85 for name, loss in losses.items()),
    )


def _inherits(arms: dict[str, Any], prefix: str) -> Mark:
    adv, clean = (arms[f"{prefix}{name}"]["down"] for name in ("FGM", "clean"))
    return Mark(
        claim=f"{prefix}FGM: a clean head inherits",
        predicted="PGD-20 accuracy on a new task at least 0.40 above clean pre-training",
        measured=f"{spread(adv['pgd'])} against {spread(clean['pgd'])}; worst case {mean(adv['ens']):.3f} against "
        f"{mean(clean['ens']):.3f}",
        holds=mean(adv["pgd"]) - mean(clean["pgd"]) >= 0.40,
    )


def show(numbers: dict[str, Any]) -> list[Block]:
    """Bars of the losses of both kinds of pairs, of purity, and of the accuracies downstream."""
    arms, eps = numbers["arms"], numbers["eps"]
    kinds = {
        "similar": "clean_similar",
        "dissimilar": "clean_dissimilar",
        "similar, attacked": "adv_similar",
        "dissimilar, attacked": "adv_dissimilar",
    }
    losses = {name: {kind: values["losses"][key] for kind, key in kinds.items()} for name, values in arms.items()}
    top = max(max(value) for row in losses.values() for value in row.values())
    pure = {name: {key: values["purification"][key] for key in ("purity", "coverage")} for name, values in arms.items()}
    names = {"clean": "clean", "FGM": "fgm", "PGD-20": "pgd", "worst case": "ens"}
    down = {arm: {name: values["down"][key] for name, key in names.items()} for arm, values in arms.items()}
    return [
        plots.bars(
            losses, "contrastive loss", f"Loss of pairs, clean and with FGM (eps {eps:g}) on one view.", top=top
        ),
        plots.bars(pure, "share", "Purity and coverage after contrastive pre-training."),
        plots.bars(down, "accuracy", f"A clean head on the frozen layer, on a task never seen, at eps {eps:g}."),
    ]


CONTRASTIVE = Experiment(
    key="E6",
    name="contrastive",
    title="Contrastive pre-training purifies too",
    question="No labels: pairs of views, half of them of the same features. The attack changes one view. With and "
    "without a learned projection behind the units. The losses shown are of each arm's own projection.",
    run=trained,
    show=show,
)
