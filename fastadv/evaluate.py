"""``python -m fastadv.evaluate RUN``: accuracy clean and attacked, checks, a page; also of models trained elsewhere."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastadv import report, target
from fastadv.attacks.autoattack import AutoAttack
from fastadv.attacks.stages import Version
from fastadv.cli import command, name_first, parse
from fastadv.errors import SettingsError
from fastadv.measure import evaluate
from fastadv.pgd import PGD
from fastadv.recipe import parse_number, show_pixels
from fastadv.runfolder import writable
from fastadv.runlog import table
from fastadv.target import Target
from fastadv.threat import ThreatModel

PROGRAM = "python -m fastadv.evaluate"
ABOUT = "Evaluate a finished run again, from its folder alone, or a model that was trained elsewhere."
AttackName = Literal["pgd", "autoattack", "autoattack-plus", "autoattack-rand"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Evaluate a run or a model."""

    eps: str | None = None
    """One radius or several: 4/255,8/255. Default: the run's own; 4/255 for a model trained elsewhere."""
    attack: AttackName = "pgd"
    """pgd, or AutoAttack: standard, plus (more attacks and restarts) or rand (for models that draw random numbers)."""
    mode: Literal["fast", "parity"] = "fast"
    """Of AutoAttack. parity repeats the published code step for step, random numbers and batches included."""
    verdict: Literal["worst", "last"] = "worst"
    """worst: every iterate must be classified right. last: the papers' number, only the last one, in rows beside it."""
    eval_steps: int | None = None
    """PGD steps. Default: the run's own."""
    eval_step_size: str | None = None
    """PGD's step. Default: the run's own under its own norm and radius, a quarter of the radius under another."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of model and attack; what breaks an image in bf16 is confirmed in fp32 before it counts."""
    check: bool = False
    """Ask whether the numbers can be believed: twelve checks, each passed or suspicious, with a sentence why."""
    page: bool = True
    """Write report.html: table, accuracy against the radius, classes, images, checks."""
    out: str | None = None
    """Folder of report.html, report.json and of an AutoAttack's findings so far. Default: evaluate-ATTACK in RUN."""
    images: int | None = None
    """Evaluate so many test images only: the same ones each time, drawn from all classes."""
    data: str | None = None
    """Images: as for training, or a folder with test/ or val/ or class folders alone. Default: the run's own."""
    model: str | None = None
    """Instead of a run: the name of a timm or torchvision model. Needs --weights and --data."""
    weights: str | None = None
    """The model's weights with its head: a .safetensors or .pth file."""
    image_size: int | None = None
    """Side in pixels to which images are brought before the attack sees them. Default: the model's."""
    norm: Literal["linf", "l2"] | None = None
    """Norm of the threat. Default: the run's own; linf for a model trained elsewhere."""
    batch_size: int | None = None
    """Images per batch. Default: four times that of training, as when the run ended; 64 for other models."""
    seed: int | None = None
    """Seed of the attack's noise. Default: the run's own, or 0."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """Stop at an image that cannot be decoded, or skip it; a run that skipped them skips them again."""


def main(argv: list[str]) -> dict[str, Any] | None:
    """Evaluate the run named first on the command line, or ``--model``; gives what report.json holds."""
    argv = name_first(argv, Settings)
    folder = Path(argv[0]) if argv and not argv[0].startswith("-") else None
    settings = parse(Settings, None, argv[1:] if folder else argv, f"{PROGRAM} RUN", ABOUT)
    for name, value in (("images", settings.images), ("batch-size", settings.batch_size)):
        if value is not None and value < 1:
            raise SettingsError(f"{name} is {value}", f"--{name} takes 1 or more")
    if settings.seed is not None and settings.seed < 0:
        raise SettingsError(f"seed is {settings.seed}", "--seed takes 0 or more")
    if folder is None and settings.model is None:
        raise SettingsError("no run given", f"{PROGRAM} runs/NAME, or --model NAME --weights FILE --data FOLDER")
    if folder is not None and settings.model is not None:
        raise SettingsError(f"both a run ({folder}) and --model {settings.model}", "give one of the two")
    began = time.monotonic()
    about = target.of_run(folder, settings) if folder else target.of_model(settings)
    out = Path(settings.out) if settings.out else about.folder / f"evaluate-{settings.attack}"
    kept = settings.page or settings.out is not None
    if kept or settings.attack != "pgd":
        writable(out)
    # Of several processes that share the images, the first one tells what all of them found.
    first = os.environ.get("RANK", "0") == "0"
    asked = radii(settings.eps, about.eps)
    start = f"{settings.attack}-{about.norm}"
    states = {eps: out / f"{start}-{show_pixels(eps, about.norm).replace('/', '_')}" for eps in asked}
    found = [
        evaluate(
            about.model,
            about.images,
            attack,
            ThreatModel(norm=about.norm, eps=eps),
            seed=about.seed,
            batch_size=about.batch_size,
            precision=settings.precision,
            state=states[eps],
            say=print if first else None,
        )
        for eps in asked
        for attack in attacks(about, settings, eps)
    ]
    if not first:
        return None
    table([each.row() for each, _ in found])
    for note in dict.fromkeys(note for each, _ in found for note in each.notes):
        print(f"note: {note}")
    about = dataclasses.replace(about, attack=pgd_at(about, settings, asked[0]))
    made = report.of_evaluation(about, found, out, settings, [PROGRAM, *argv], time.monotonic() - began)
    # What these AutoAttacks remembered for an interruption: all is found now, and the next evaluation starts anew.
    for state in states.values():
        if settings.attack != "pgd" and (state / "about").exists():
            shutil.rmtree(state)
    return made


def attacks(about: Target, settings: Settings, eps: float) -> list[PGD | AutoAttack]:
    """What ``--attack``, ``--verdict`` and the step flags ask for at the radius ``eps``."""
    if settings.attack != "pgd":
        if settings.verdict == "last" or settings.eval_steps is not None or settings.eval_step_size is not None:
            raise SettingsError(
                f"--attack {settings.attack} with --verdict last, --eval-steps or --eval-step-size", "--attack pgd"
            )
        versions: dict[str, Version] = {"autoattack": "standard", "autoattack-plus": "plus", "autoattack-rand": "rand"}
        return [
            AutoAttack(
                version=versions[settings.attack],
                mode=settings.mode,
                seed=about.seed,
                batch_size=about.batch_size,
                precision=settings.precision,
            )
        ]
    worst = pgd_at(about, settings, eps)
    return [worst] if settings.verdict == "worst" else [worst, dataclasses.replace(worst, keep="last")]


def pgd_at(about: Target, settings: Settings, eps: float) -> PGD:
    """The PGD at the radius ``eps``.

    The run's own step is kept at its own threat alone: ten steps of 2/255 go a tenth of the way to l2 0.75. Elsewhere
    a step is a quarter of the radius, as on the page's curve.
    """
    own = (about.norm, eps) == (about.own_norm, about.eps) or not eps
    step_size = about.attack.step_size if own else eps / 4
    if settings.eval_step_size is not None:
        step_size = number("eval-step-size", settings.eval_step_size)
    steps = about.attack.steps if settings.eval_steps is None else settings.eval_steps
    return dataclasses.replace(about.attack, steps=steps, step_size=step_size)


def radii(text: str | None, default: float) -> list[float]:
    """The radii that ``text`` lists (``4/255,8/255``), or the default alone. Raises SettingsError for anything else."""
    return [default] if text is None else [number("eps", part) for part in text.split(",")]


def number(name: str, text: str) -> float:
    """The pixel value that ``text`` names. Raises SettingsError for anything else."""
    try:
        return parse_number(text)
    except ValueError as error:
        raise SettingsError(
            f"{name} is {text!r}", f"--{name} 8/255{', or several: --eps 4/255,8/255' * (name == 'eps')}"
        ) from error


if __name__ == "__main__":
    sys.exit(command(main, program=PROGRAM))
