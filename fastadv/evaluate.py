"""Clean and robust accuracy with intervals. ``python -m fastadv.evaluate RUN`` repeats a run's table."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fastadv import assemble, plots
from fastadv.cli import command, parse
from fastadv.data import ImageSet, in_order
from fastadv.errors import DataError, SettingsError
from fastadv.models import Classifier
from fastadv.pgd import PGD
from fastadv.recipe import Recipe, parse_number, show_pixels
from fastadv.runlog import environment, table
from fastadv.seeds import generator
from fastadv.threat import ThreatModel

PROGRAM = "python -m fastadv.evaluate"
# Keeps the noise of an evaluation apart from that of training, which is seeded by step.
EVALUATION = -1


@dataclass(frozen=True)
class Counts:
    """How many of ``n`` images the model gets right: as they are, and whatever the attack does to them."""

    n: int
    clean: int
    robust: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an evaluation found, and under which conditions."""

    n: int
    clean: float
    clean_interval: tuple[float, float]
    robust: float
    robust_interval: tuple[float, float]
    norm: str
    eps: float
    attack: str
    verdict: str
    precision: str
    device: str
    seed: int
    seconds: float

    def row(self) -> dict[str, str]:
        """The report as a row of the table on the terminal."""

        def percent(value: float, interval: tuple[float, float]) -> str:
            return f"{100 * value:.1f} % ({100 * interval[0]:.1f}-{100 * interval[1]:.1f})"

        return {
            "threat": f"{self.norm} {show_pixels(self.eps)}",
            "clean": percent(self.clean, self.clean_interval),
            "robust": percent(self.robust, self.robust_interval),
            "attack": f"{self.attack} {self.verdict}, {self.precision}",
            "images": str(self.n),
            "seconds": f"{self.seconds:.1f}",
        }


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share ``hits / n``. Source: Wilson 1927, doi:10.2307/2276774."""
    if n == 0:
        return 0.0, 1.0
    z, share = 1.959964, hits / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def measure(
    model: nn.Module,
    images: ImageSet,
    attack: PGD | None,
    threat: ThreatModel,
    *,
    seed: int = 0,
    batch_size: int = 256,
    precision: str = "fp32",
) -> Counts:
    """Count clean and robust images. Robust: the model is right on the clean image and on every iterate it is shown.

    Only images that are right when clean are attacked: the others cannot become robust. NaN logits count as wrong.
    ``attack`` None skips the attack; robust is then 0.
    """
    device = next(model.parameters()).device
    fast = attack.on(model, precision=precision) if attack else None
    n = clean = robust = 0
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for x, y in in_order(images, batch_size, device):
            with torch.no_grad():
                logits = model(x)
            right = (logits.argmax(1) == y) & logits.isfinite().all(1)
            clean += int(right.sum())
            if fast and right.any():
                noise = generator(device, seed, EVALUATION, n)
                broken = fast.run(x[right], y[right], threat, generator=noise).success
                robust += int((~broken).sum())
            n += len(x)
    finally:
        for module, mode in modes:
            module.training = mode
    return Counts(n, clean, robust)


def evaluate(
    model: nn.Module,
    images: ImageSet,
    attack: PGD,
    threat: ThreatModel,
    *,
    seed: int = 0,
    batch_size: int = 256,
    precision: str = "fp32",
) -> Report:
    """Clean and robust accuracy with 95 % Wilson intervals; ``attack.keep`` decides the verdict.

    keep="success" is the strict verdict (every iterate counts), keep="last" the papers' (only the last one does).
    """
    began = time.perf_counter()
    found = measure(model, images, attack, threat, seed=seed, batch_size=batch_size, precision=precision)
    return Report(
        n=found.n,
        clean=found.clean / max(1, found.n),
        clean_interval=wilson(found.clean, found.n),
        robust=found.robust / max(1, found.n),
        robust_interval=wilson(found.robust, found.n),
        norm=threat.norm,
        eps=threat.eps,
        attack=f"PGD-{attack.steps}",
        verdict="last" if attack.keep == "last" else "worst",
        precision=precision,
        device=next(model.parameters()).device.type,
        seed=seed,
        seconds=time.perf_counter() - began,
    )


def write_report(
    folder: Path,
    recipe: Recipe,
    model: Classifier,
    images: ImageSet,
    reports: list[Report],
    history: list[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """Write report.json, curves.png and examples.png, print the table, and give what report.json holds."""
    report = {
        "folder": str(folder),
        "strategy": recipe.strategy,
        "recipe_sha256": recipe.sha256,
        "reports": [dataclasses.asdict(report) for report in reports],
        "seconds": seconds,
        "environment": environment(),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    plots.curves(folder / "curves.png", history, chance=1 / len(images.classes))
    draw_examples(folder / "examples.png", model, images, recipe)
    table([report.row() for report in reports])
    print(f"{seconds:.0f} s in all; files in {folder}: report.json, curves.png, examples.png, best/, log.jsonl")
    print(f"again: python -m fastadv.evaluate {folder}")
    return report


def draw_examples(path: Path, model: Classifier, images: ImageSet, recipe: Recipe, count: int = 6) -> None:
    """A picture of the first ``count`` test images: clean, perturbation, adversarial, with predictions."""
    device = model.mean.device
    x, y = next(iter(in_order(images, count, device)))
    attack = recipe.eval_attack.on(model, precision="fp32")
    adv = attack(x, y, recipe.threat, generator=generator(device, recipe.seed, EVALUATION, 0))
    with torch.no_grad():
        model.eval()
        clean_pred, adv_pred = model(x).argmax(1), model(adv).argmax(1)
    plots.examples(path, x, adv, y, clean_pred, adv_pred, images.classes, recipe.eps)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Evaluate a finished run again, from its folder alone."""

    eps: str | None = None
    """One radius or several: 4/255,8/255. Default: the run's own."""
    data: str | None = None
    """Another place of the same data. Default: the run's own."""
    verdict: Literal["worst", "last"] = "worst"
    """worst: every iterate must be classified right. last: the papers' number, only the last one, in rows beside it."""
    eval_steps: int | None = None
    """PGD steps. Default: the run's own."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of model and attack."""
    images: int | None = None
    """Evaluate the first so many test images only."""
    batch_size: int | None = None
    """Images per batch. Default: four times that of training, as when the run ended."""
    seed: int | None = None
    """Seed of the attack's noise. Default: the run's own."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """Stop at an image that cannot be decoded, or skip it; a run that skipped them skips them again."""


def main(argv: list[str]) -> dict[str, Any] | None:
    """Evaluate the run named first on the command line; gives its reports."""
    if not argv or argv[0].startswith("-"):
        if {"-h", "--help"} & set(argv):
            parse(Settings, None, ["--help"], f"{PROGRAM} RUN", "Evaluate a finished run again, from its folder alone.")
        raise SettingsError("no run given", f"{PROGRAM} runs/NAME [--eps 4/255,8/255]")
    folder = Path(argv[0])
    settings = parse(
        Settings, None, argv[1:], f"{PROGRAM} RUN", "Evaluate a finished run again, from its folder alone."
    )
    for name, value in (("images", settings.images), ("batch-size", settings.batch_size)):
        if value is not None and value < 1:
            raise SettingsError(f"{name} is {value}", f"--{name} takes 1 or more")
    recipe = assemble.saved_recipe(folder)
    if not (folder / "best").exists():
        raise SettingsError(f"the run in {folder} is not finished", f"finish it with --resume {folder}")
    skips = "skip" in (recipe.on_bad_image, settings.on_bad_image)
    recipe = dataclasses.replace(recipe, data=settings.data or recipe.data, on_bad_image="skip" if skips else "fail")
    model = assemble.trained(folder, recipe).to(assemble.device(settings.device))
    images = assemble.test_images(recipe)
    trained_on = json.loads((folder / "split.json").read_text())["classes"]
    if list(images.classes) != trained_on:
        other = sorted(set(images.classes) ^ set(trained_on))
        raise DataError(
            f"{recipe.data} does not have the run's {len(trained_on)} classes: {', '.join(other[:5])} differ",
            "--data with the classes that the run was trained on",
        )
    if settings.images is not None:
        images = dataclasses.replace(
            images, images=images.images[: settings.images], labels=images.labels[: settings.images]
        )
    steps = recipe.eval_steps if settings.eval_steps is None else settings.eval_steps
    worst = dataclasses.replace(recipe.eval_attack, steps=steps)
    attacks = [worst] if settings.verdict == "worst" else [worst, dataclasses.replace(worst, keep="last")]
    reports = [
        evaluate(
            model,
            images,
            attack,
            ThreatModel(norm=recipe.norm, eps=eps),
            seed=recipe.seed if settings.seed is None else settings.seed,
            batch_size=settings.batch_size or 4 * recipe.batch_size,
            precision=settings.precision,
        )
        for eps in radii(settings.eps, recipe.eps)
        for attack in attacks
    ]
    table([report.row() for report in reports])
    return {"run": str(folder), "reports": [dataclasses.asdict(report) for report in reports]}


def radii(text: str | None, default: float) -> list[float]:
    """The radii that ``text`` lists (``4/255,8/255``), or the default alone. Raises SettingsError for anything else."""
    try:
        return [default] if text is None else [parse_number(part) for part in text.split(",")]
    except ValueError as error:
        raise SettingsError(f"eps is {text!r}", "--eps 8/255, or several: --eps 4/255,8/255") from error


if __name__ == "__main__":
    sys.exit(command(main, program=PROGRAM))
