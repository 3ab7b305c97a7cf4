"""What an evaluation or a training run leaves behind for people: report.json, report.html, curves and pictures."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastadv import evaluation_page, examples, plots
from fastadv.data import ImageSet, in_order
from fastadv.environment import environment
from fastadv.evaluation_page import Evaluation
from fastadv.measure import EVALUATION, Report, Verdict, curve
from fastadv.models import Classifier
from fastadv.pgd import PGD
from fastadv.recipe import Recipe
from fastadv.runlog import table
from fastadv.seeds import generator
from fastadv.target import sample, sample_rows
from fastadv.threat import ThreatModel

if TYPE_CHECKING:
    from fastadv.evaluate import Settings
    from fastadv.findings import Finding
    from fastadv.target import Target

# The page's curve attacks so many images at six or more radii: a minute or two on two cores for the shipped Swin.
ON_THE_CURVE = 200


def of_training(
    folder: Path,
    recipe: Recipe,
    model: Classifier,
    images: ImageSet,
    found: tuple[Report, Verdict],
    history: list[dict[str, Any]],
    seconds: float,
    *,
    page: bool = True,
) -> dict[str, Any]:
    """Write a run's report.json, report.html (with ``page``) and pictures, print the table, and give report.json."""
    again = f"python -m fastadv.evaluate {shlex.quote(str(folder))}"
    report = {
        "folder": str(folder),
        "strategy": recipe.strategy,
        "recipe_sha256": recipe.sha256,
        "reports": [dataclasses.asdict(found[0])],
        "seconds": seconds,
        "environment": environment(),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    plots.curves(folder / "curves.png", history, chance=1 / len(images.classes))
    draw_examples(folder / "examples.png", model, images, recipe)
    table([found[0].row()])
    if page:
        write_page(
            folder / "report.html",
            f"{recipe.strategy} on {Path(recipe.data.partition(':')[0]).stem}",
            model,
            images,
            recipe.eval_attack,
            recipe.threat,
            [found],
            recipe=dataclasses.asdict(recipe),
            command=again,
            seed=recipe.seed,
            batch_size=4 * recipe.batch_size,
        )
    files = f"{'report.html, ' if page else ''}report.json, curves.png, examples.png, best/, log.jsonl"
    print(f"{seconds:.0f} s in all; files in {folder}: {files}")
    print(f"again: {again}")
    return report


def of_evaluation(
    about: Target,
    found: list[tuple[Report, Verdict]],
    out: Path,
    settings: Settings,
    command: Sequence[str],
    seconds: float,
) -> dict[str, Any]:
    """Make the checks asked for, write report.json and report.html into ``out``, and give what report.json holds."""
    threat = ThreatModel(norm=about.norm, eps=found[0][0].eps)
    findings = check_few(about, threat) if settings.check else []
    report = {
        "name": about.name,
        "reports": [dataclasses.asdict(each) for each, _ in found],
        "checks": [dataclasses.asdict(finding) for finding in findings],
        "seconds": seconds,
        "command": shlex.join(command),
        "environment": environment(),
    }
    if not settings.page and settings.out is None:
        return report
    done = "replaced" if (out / "report.json").exists() else "written"
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    if settings.page:
        write_page(
            out / "report.html",
            about.name,
            about.model,
            about.images,
            about.attack,
            threat,
            found,
            findings=findings,
            recipe=about.recipe,
            command=shlex.join(command),
            seed=about.seed,
            batch_size=about.batch_size,
        )
    print(f"{done} in {out}: {'report.html, ' * settings.page}report.json")
    return report


def check_few(about: Target, threat: ThreatModel, count: int = 100) -> list[Finding]:
    """What the checks find on ``count`` of the images, printed a line each."""
    from fastadv.checks import check

    device = next(about.model.parameters()).device
    x, y = next(iter(in_order(sample(about.images, count), count, device)))
    findings = check(about.model, x, y, threat, attack=about.attack, seed=about.seed)
    for finding in findings:
        word = evaluation_page.OUTCOMES[finding.passed]
        print(f"{word:<14}  {finding.name}: {finding.sentence}")
    return findings


def write_page(
    path: Path,
    title: str,
    model: nn.Module,
    images: ImageSet,
    attack: PGD,
    threat: ThreatModel,
    found: Sequence[tuple[Report, Verdict]],
    *,
    findings: Sequence[Finding] = (),
    recipe: dict[str, Any],
    command: str,
    seed: int,
    batch_size: int,
) -> None:
    """Write the page about ``found``; ``attack`` makes its curve and pictures, on some of the images."""
    _, verdict = min((pair for pair in found if pair[0].eps == found[0][0].eps), key=lambda pair: pair[0].robust)
    few, right = sample(images, ON_THE_CURVE), verdict.right[sample_rows(len(images), ON_THE_CURVE)]
    falling = curve(model, few, attack, threat, right=right, seed=seed, batch_size=batch_size)
    fragile, stable = examples.attacked(model, few, falling, attack, threat, seed=seed)
    evaluation_page.write(
        path,
        Evaluation(
            title=title,
            reports=[each for each, _ in found],
            classes=images.classes,
            command=command,
            environment=environment(),
            recipe=recipe,
            labels=images.labels,
            verdict=verdict,
            curve=falling,
            probe=f"PGD-{attack.steps}",
            findings=findings,
            fragile=fragile,
            stable=stable,
        ),
    )


def draw_examples(path: Path, model: Classifier, images: ImageSet, recipe: Recipe, count: int = 6) -> None:
    """A picture of ``count`` test images: clean, perturbation, adversarial, with predictions."""
    device = model.mean.device
    x, y = next(iter(in_order(sample(images, count), count, device)))
    attack = recipe.eval_attack.on(model, precision="fp32")
    adv = attack(x, y, recipe.threat, generator=generator(device, recipe.seed, EVALUATION, 0))
    with torch.no_grad():
        model.eval()
        clean_pred, adv_pred = model(x).argmax(1), model(adv).argmax(1)
    plots.examples(path, x, adv, y, clean_pred, adv_pred, images.classes, recipe.eps)
