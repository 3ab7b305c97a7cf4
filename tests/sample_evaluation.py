"""Evaluations with invented numbers, for tests of their page only."""

from __future__ import annotations

from typing import Any

import torch

from fastadv.evaluation_page import Evaluation
from fastadv.examples import Example
from fastadv.findings import Finding
from fastadv.measure import Curve, Report, Stage, Verdict, wilson

PER_CLASS = 5
# Markup, mathematics, nothing, letters that matplotlib's font lacks, what is no text, no place to break.
DIFFICULT = ("<script>alert(1)</script>", "$x_{", "", "\u4e2d\u6587", "a\x07\udcff", "W" * 70, 'x" id="y', "{{ 7 }}")
FINDINGS = (
    Finding("eps 0", True, "Radius 0 gives back every image."),
    Finding("gradient-free", False, "Square broke 31 images that PGD-10 left right."),
    Finding("transfer", None, "No second model was given."),
)


def invented(num_classes: int = 10, *, stages: bool = True, findings: tuple[Finding, ...] = FINDINGS) -> Evaluation:
    """An evaluation of ``PER_CLASS`` images a class, with every section; 0.8 right when clean, 0.4 under attack."""
    n = PER_CLASS * num_classes
    names = [*DIFFICULT, *(f"class number {index}" for index in range(num_classes))][:num_classes]
    place = torch.arange(n) // num_classes
    labels, right, survived = torch.arange(n) % num_classes, place > 0, place > 2
    levels = [right, place > 1, place > 1, survived, place > 3, place > 4]
    curve = Curve((0.0, 2 / 255, 4 / 255, 8 / 255, 16 / 255, 32 / 255), torch.stack(levels))
    broken = (
        Stage("apgd-ce", int(right.sum() - survived.sum()) - 1, 31.0),
        Stage("apgd-t", 1, 120.5),
        Stage("square", 0, 240.25),
    )
    weaker = report(n, int(right.sum()), int(survived.sum()) + 1, attack="PGD-10")
    strongest = report(
        n,
        int(right.sum()),
        int(survived.sum()),
        attack="AutoAttack standard",
        stages=broken if stages else (),
        notes=("3 images have zero gradients",),
    )
    return Evaluation(
        title="made up <for> tests & nothing else",
        reports=[weaker, strongest],
        classes=names,
        command="python -m fastadv.evaluate runs/'made up' --attack autoattack",
        environment={"torch": "2.15.0", "gpus": [], "modified": True, "cuda": None, "command": "another one"},
        recipe={"strategy": "roli-full", "eps": 8 / 255, "quote": "</pre><script>alert(1)</script>"},
        labels=labels,
        verdict=Verdict(right, survived),
        curve=curve,
        probe="PGD-10",
        findings=findings,
        fragile=[example(0, 1, 0.0, 2 / 255), example(1, 2, 2 / 255, 4 / 255)],
        stable=[example(2, 2, 32 / 255, None)],
        notes=("A further note.",),
    )


def report(n: int, clean: int, robust: int, **changes: Any) -> Report:
    """A report on ``n`` images at linf 8/255."""
    settings: dict[str, Any] = {"attack": "PGD-10", "verdict": "worst", "precision": "fp32", "device": "cpu", "seed": 0}
    return Report(
        n=n,
        clean=clean / n,
        clean_interval=wilson(clean, n),
        robust=robust / n,
        robust_interval=wilson(robust, n),
        norm=changes.pop("norm", "linf"),
        eps=changes.pop("eps", 8 / 255),
        seconds=12.345,
        **{**settings, **changes},
    )


def example(label: int, adv_pred: int, held: float, broke: float | None) -> Example:
    """A grey image of 16x16 whose left half the attack raises and whose right half it lowers by 8/255."""
    x = torch.full((3, 16, 16), 0.5)
    sign = torch.where(torch.arange(16) < 8, 1.0, -1.0)
    clean, attacked = torch.zeros(10), torch.zeros(10)
    clean[label], attacked[adv_pred] = 3.0, 40.0
    return Example(
        x=x,
        adv=x + 8 / 255 * sign,
        label=label,
        clean_logits=clean,
        adv_logits=attacked,
        held=held,
        broke=broke,
    )
