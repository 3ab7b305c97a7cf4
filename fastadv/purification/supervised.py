"""Supervised pre-training: does the attack purify, where does it go, and does a clean head inherit? (E2, E3, E4)"""

from __future__ import annotations

from statistics import mean
from typing import Any

from fastadv.page import Block, Gallery
from fastadv.purification import plots, risks
from fastadv.purification.lab import Experiment, Lab
from fastadv.purification.marks import Mark, spread
from fastadv.purification.study import ADV_HEAD, ARMS, BINS, CLEAN, FGM, ORACLE, ROWS, SMOOTHED, STUDY, study


def purifies(lab: Lab) -> tuple[list[Mark], dict[str, Any]]:
    """E2: purity, participation ratio, coverage and clean accuracy of clean and adversarial pre-training."""
    arms = {name: lab.study(STUDY, study)[name] for name, *_ in ARMS}
    marks = []
    for name, activation, attack in ARMS:
        clean, here = arms[f"{activation}, clean"], arms[name]
        own, his = here["purification"], clean["purification"]
        if attack == "none":
            marks += [
                Mark(
                    claim=f"{name}: clean training does not purify",
                    predicted="median purity at most 0.70, participation ratio at least 3",
                    measured=f"purity {spread(own['purity'])}, participation {spread(own['participation'], '{:.1f}')}, "
                    f"coverage {spread(own['coverage'], '{:.2f}')}",
                    holds=mean(own["purity"]) <= 0.70 and mean(own["participation"]) >= 3,
                )
            ]
            continue
        marks += [
            Mark(
                claim=f"{name}: adversarial training purifies",
                predicted="median purity at least 0.95, participation ratio at most 1.2, coverage at least 0.9",
                measured=f"purity {spread(own['purity'])} (clean {mean(his['purity']):.3f}), participation "
                f"{spread(own['participation'], '{:.2f}')}, coverage {spread(own['coverage'], '{:.2f}')}",
                holds=mean(own["purity"]) >= 0.95
                and mean(own["participation"]) <= 1.2
                and mean(own["coverage"]) >= 0.9,
            ),
            Mark(
                claim=f"{name}: purifying costs no clean accuracy",
                predicted="at most 0.02 below clean training",
                measured=f"{spread(here['own']['clean'])} against {spread(clean['own']['clean'])}",
                holds=mean(here["own"]["clean"]) >= mean(clean["own"]["clean"]) - 0.02,
            ),
        ]
    return marks, {"arms": arms}


def attacked(lab: Lab) -> tuple[list[Mark], dict[str, Any]]:
    """E3: the share of the FGM perturbation that lies on inactive features."""
    found = lab.study(STUDY, study)
    shares = {name: found[name]["own"]["inactive"] for name, *_ in ARMS}
    bounds = (
        (CLEAN, "at least 0.8", 0.8, 1.0),
        (FGM, "at most 0.35", 0.0, 0.35),
        (SMOOTHED, "at most 0.10", 0.0, 0.10),
    )
    marks = [
        Mark(
            claim=f"{name}: the attack {'goes to inactive features' if name == CLEAN else 'stays on active features'}",
            predicted=f"inactive share {said}",
            measured=spread(shares[name]),
            holds=low <= mean(shares[name]) <= high,
        )
        for name, said, low, high in bounds
    ]
    settings = lab.settings
    pictures = {name: found[name]["pictures"]["attack"] for name, *_ in ARMS}
    return marks, {"shares": shares, "pictures": pictures, "linear": (settings.d - settings.k) / settings.d}


def inherits(lab: Lab) -> tuple[list[Mark], dict[str, Any]]:
    """E4: robustness of a clean head on the frozen layer, on a task that the layer has not seen."""
    down = {name: values["down"] for name, values in lab.study(STUDY, study).items()}
    ens = {name: mean(values["ens"]) for name, values in down.items()}
    marks = [
        *(
            Mark(
                claim=f"{name}: a clean head on the frozen layer inherits robustness, on a new task",
                predicted=f"worst-case accuracy at least {gain:.2f} above clean pre-training",
                measured=f"{spread(down[name]['ens'])} against {spread(down[base]['ens'])}: "
                f"{ens[name] - ens[base]:+.3f}; clean {mean(down[name]['clean']):.3f} against "
                f"{mean(down[base]['clean']):.3f}",
                holds=ens[name] - ens[base] >= gain,
            )
            for name, base, gain in ((FGM, CLEAN, 0.30), (SMOOTHED, CLEAN, 0.40), ("hard, FGM", "hard, clean", 0.30))
        ),
        Mark(
            claim="What is inherited comes near to what the true dictionary gives",
            predicted="smoothed arm: at least 0.80 of the oracle's worst-case accuracy",
            measured=f"{ens[SMOOTHED]:.3f} of {ens[ORACLE]:.3f}: {ens[SMOOTHED] / max(ens[ORACLE], 1e-9):.2f}",
            holds=ens[SMOOTHED] >= 0.80 * ens["oracle, W = M"],
        ),
        Mark(
            claim="It is the layer, not the head: one trained against FGM on an unpurified layer is no substitute",
            predicted="PGD-20 accuracy at least 0.10 below that of a clean head on the purified layer (FGM arm)",
            measured=f"{spread(down[ADV_HEAD]['pgd'])} against {spread(down[FGM]['pgd'])}; worst case "
            f"{ens[ADV_HEAD]:.3f} against {ens[FGM]:.3f}",
            holds=mean(down[FGM]["pgd"]) - mean(down[ADV_HEAD]["pgd"]) >= 0.10,
            control=True,
        ),
    ]
    coding, eps = lab.coding(), lab.settings.eps
    theory = {
        "clean": risks.clean_accuracy(coding),
        "purified": risks.robust_accuracy(coding, eps, "active"),
        "linear": risks.robust_accuracy(coding, eps, "all"),
    }
    return marks, {"down": down, "theory": theory, "eps": eps}


def show_purifies(numbers: dict[str, Any]) -> list[Block]:
    """Bars, histograms of purity, and the hidden weights in feature space."""
    arms = numbers["arms"]
    shown = {"median purity": "purity", "features covered": "coverage", "units above 0.9": "pure"}
    rows = {name: {said: values["purification"][key] for said, key in shown.items()} for name, values in arms.items()}
    counts = {name: arms[name]["pictures"]["histogram"] for name in (CLEAN, FGM, SMOOTHED)}
    edges = [place / BINS for place in range(BINS + 1)]
    cards = [
        (
            name,
            [
                plots.picture(
                    arms[name]["pictures"]["weights"],
                    f"Weights of {ROWS} hidden units over the features, {name}.",
                    "a row per unit, a column per feature; black is the unit's largest weight",
                )
            ],
        )
        for name in (CLEAN, FGM, SMOOTHED)
    ]
    return [
        plots.bars(
            rows,
            "share",
            "Purity is the largest weight of a unit in feature space over the length of all. A feature is covered "
            "where it leads a unit with purity above 0.8. The median does not see a minority that stays mixed: the "
            "third bar does.",
        ),
        plots.histogram(edges, counts, "purity of a unit", "Live hidden units of all seeds by their purity."),
        Gallery(
            cards=cards, caption="Hidden weights M'W of one seed, units sorted by the feature that they read most."
        ),
    ]


def show_attacked(numbers: dict[str, Any]) -> list[Block]:
    """Bars of the inactive share, and perturbations with the active features in front."""
    rows = {name: {"share on inactive features": values} for name, values in numbers["shares"].items()}
    cards = [
        (
            name,
            [
                plots.picture(
                    rows_,
                    f"FGM perturbations in feature space of {len(rows_)} samples, {name}.",
                    "a row per sample, its active features in front; black is the largest entry",
                )
            ],
        )
        for name, rows_ in numbers["pictures"].items()
        if name in (CLEAN, FGM, SMOOTHED)
    ]
    said = (
        "The share of the squared FGM perturbation, mapped back to features, that lies where nothing is active. A "
        f"linear model gives {numbers['linear']:.2f}."
    )
    return [
        plots.bars(rows, "share on inactive features", said),
        Gallery(cards=cards, caption="The perturbations themselves, of one seed."),
    ]


def show_inherits(numbers: dict[str, Any]) -> list[Block]:
    """Bars of clean, FGM, PGD and worst-case accuracy on the new task."""
    names = {"clean": "clean", "FGM": "fgm", "PGD-20": "pgd", "worst case": "ens"}
    rows = {arm: {name: values[key] for name, key in names.items()} for arm, values in numbers["down"].items()}
    theory = numbers["theory"]
    said = (
        f"Accuracy on a new task at eps {numbers['eps']:g}, head trained on clean samples except where said. Theory "
        f"for this model: clean {theory['clean']:.3f} at most, purified {theory['purified']:.3f}, linear "
        f"{theory['linear']:.3f}."
    )
    return [plots.bars(rows, "accuracy", said)]


PURIFIES = Experiment(
    key="E2",
    name="purify",
    title="Adversarial training purifies, clean training does not",
    question="The same network and steps, trained clean, against FGM, and against smoothed gates (three steps "
    "smoothed, three exact), with eps growing from 0 over the first 40 % of the steps.",
    run=purifies,
    show=show_purifies,
)
ATTACKED = Experiment(
    key="E3",
    name="attacked",
    title="What gets attacked",
    question="The FGM perturbation is mapped back to the features. In a purified network only active features are "
    "worth an attack; figure 2 of arXiv:2401.15248 as a number.",
    run=attacked,
    show=show_attacked,
)
INHERITS = Experiment(
    key="E4",
    name="inherit",
    title="A clean head inherits",
    question="The hidden layer is frozen, a new task is drawn, and a new head is trained on clean samples. Worst case: "
    "right under FGM, PGD-20, smoothed gates of three widths, and transfer from the true direction.",
    run=inherits,
    show=show_inherits,
)
