"""Sweeps: the radius of training, and the dimension (E7)."""

from __future__ import annotations

from itertools import pairwise
from statistics import mean
from typing import Any

from fastadv.page import Block
from fastadv.purification import plots, risks
from fastadv.purification.lab import Experiment, Lab
from fastadv.purification.marks import Mark
from fastadv.purification.sparse import World
from fastadv.purification.study import CLEAN, SMOOTHED, STUDY, arm, study
from fastadv.purification.training import Kind, supervised

# Radii of training as multiples of the settings' eps; 0 and 1 are arms of the supervised study. At the last one
# training is expected to collapse; it is tried with one seed.
RADII = (0.0, 0.25, 0.5, 1.0)
TOO_FAR = 2.0
# Dimensions as multiples of the settings' d; 1 is that study again.
SIZES = (0.5, 1, 2)


def sweep(lab: Lab) -> tuple[list[Mark], dict[str, Any]]:
    """Purity and downstream accuracy over eps; worst-case accuracies over d beside what a linear model reaches."""
    dimensions = [int(size * lab.settings.d) for size in SIZES]
    # First, because it refuses a k that the smallest d has no room for.
    theory = [risks.robust_accuracy(lab.coding(d), lab.settings.eps, "all") for d in dimensions]
    known = lab.study(STUDY, study)
    by_eps, died = _over_eps(lab, {0.0: known[CLEAN], 1.0: known[SMOOTHED]})
    by_d: dict[int, dict[str, Any]] = {d: {} for d in dimensions}
    for d, arms in by_d.items():
        arms |= _at_size(lab, d) if d != lab.settings.d else {"clean": known[CLEAN], "adv": known[SMOOTHED]}
    purity = [mean(each["purification"]["purity"]) for each in by_eps.values()]
    adv = [mean(arms["adv"]["down"]["ens"]) for arms in by_d.values()]
    clean = [mean(arms["clean"]["own"]["ens"]) for arms in by_d.values()]
    off = max(abs(one - other) for one, other in zip(clean, theory, strict=True))
    marks = [
        Mark(
            claim="The larger the radius of training, the purer the units",
            predicted=f"median purity does not fall over eps = {_list(lab, RADII)}",
            measured=", ".join(f"{value:.3f}" for value in purity),
            holds=all(low <= high for low, high in pairwise(purity)),
        ),
        Mark(
            claim="Purified, what is inherited does not depend on the dimension",
            predicted="worst-case accuracy downstream within 0.08 over d",
            measured=_pairs(by_d, adv),
            holds=max(adv) - min(adv) <= 0.08,
        ),
        Mark(
            claim="Not purified, robustness falls with the dimension as that of a linear model",
            predicted=f"on its own task falling, within 0.05 of the linear model's {_pairs(by_d, theory)}",
            measured=f"{_pairs(by_d, clean)}; furthest {off:.3f}",
            holds=all(low > high for low, high in pairwise(clean)) and off <= 0.05,
        ),
        Mark(
            claim="Too large a radius switches every unit off",
            predicted=f"training at eps = {TOO_FAR * lab.settings.eps:g} is found to have collapsed",
            measured="collapsed: no better than saying nothing" if died else "did not collapse",
            holds=died,
            control=True,
        ),
    ]
    kept = ("purification", "own", "down")
    return marks, {
        "by_eps": {f"{eps:g}": {key: each[key] for key in kept} for eps, each in by_eps.items()},
        "by_d": {str(d): {name: {key: each[key] for key in kept} for name, each in a.items()} for d, a in by_d.items()},
        "theory": theory,
        "eps": lab.settings.eps,
    }


def _over_eps(lab: Lab, known: dict[float, dict[str, Any]]) -> tuple[dict[float, dict[str, Any]], bool]:
    """An arm for every radius, all trained side by side; and whether the one too far collapsed."""
    radii = [radius for radius in RADII if radius not in known]
    world, base, number = lab.world(copies=len(radii)), lab.settings.eps, len(lab.seeds)
    eps = [base * radius for radius in radii for _ in lab.seeds]
    trained = supervised(world, lab.training("soft", "smoothed"), eps, world.theta(0))
    both = arm(lab, world, trained.hidden)
    found = {base * radius: each for radius, each in known.items()}
    for place, radius in enumerate(radii):
        part = slice(place * number, (place + 1) * number)
        found[base * radius] = {group: {name: values[part] for name, values in both[group].items()} for group in both}
    alone = World(lab.coding(), [lab.settings.seed])
    far = supervised(alone, lab.training("soft", "smoothed"), [TOO_FAR * base], alone.theta(0))
    return dict(sorted(found.items())), all(far.collapsed)


def _at_size(lab: Lab, d: int) -> dict[str, Any]:
    """Both arms at dimension d, with as many units per dimension."""
    world, s = lab.world(d), lab.settings
    eps = [s.eps] * len(world.seeds)
    found = {}
    kinds: tuple[tuple[str, Kind], ...] = (("clean", "none"), ("adv", "smoothed"))
    for name, attack in kinds:
        training = lab.training("soft", attack, units=s.units * d // s.d)
        found[name] = arm(lab, world, lab.learned(supervised(world, training, eps, world.theta(0)), s.eps).hidden)
    return found


def show(numbers: dict[str, Any]) -> list[Block]:
    """Lines over eps and over d."""
    by_eps, by_d = numbers["by_eps"], numbers["by_d"]
    radii, sizes = [float(eps) for eps in by_eps], [int(d) for d in by_d]
    over_eps = {
        "purity": [each["purification"]["purity"] for each in by_eps.values()],
        "coverage": [each["purification"]["coverage"] for each in by_eps.values()],
        "worst case, new task": [each["down"]["ens"] for each in by_eps.values()],
        "clean, new task": [each["down"]["clean"] for each in by_eps.values()],
    }
    over_d = {
        "clean training, own task": [arms["clean"]["own"]["ens"] for arms in by_d.values()],
        "linear model, theory": [[value] for value in numbers["theory"]],
        "smoothed, new task": [arms["adv"]["down"]["ens"] for arms in by_d.values()],
        "clean training, new task": [arms["clean"]["down"]["ens"] for arms in by_d.values()],
    }
    return [
        plots.lines(
            radii,
            over_eps,
            "eps of training",
            "share, accuracy",
            f"Over the radius of training (smoothed gates; 0 is clean), evaluated at eps {numbers['eps']:g}.",
        ),
        plots.lines(
            sizes, over_d, "d", "worst-case accuracy", f"Over the dimension at eps {numbers['eps']:g}.", doubling=True
        ),
    ]


def _list(lab: Lab, radii: tuple[float, ...]) -> str:
    return ", ".join(f"{radius * lab.settings.eps:g}" for radius in radii)


def _pairs(by_d: dict[int, Any], values: list[float]) -> str:
    return ", ".join(f"{value:.3f} (d = {d})" for d, value in zip(by_d, values, strict=True))


SWEEPS = Experiment(
    key="E7",
    name="sweeps",
    title="Over the radius and over the dimension",
    question="Smoothed-gate training at several radii; clean and smoothed training at half and twice the dimension, "
    "with the same number of active features. The linear model's accuracy is the formula, not a measurement.",
    run=sweep,
    show=show,
)
