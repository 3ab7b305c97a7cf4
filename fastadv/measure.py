"""How accurate a model is, clean and attacked: verdicts per image, accuracies with intervals, accuracy against eps.

Shapes: n images of a set; right, survived bool (n,) on the CPU.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastadv.data import ImageSet, in_order
from fastadv.losses import misclassified
from fastadv.passes import untouched
from fastadv.pgd import PGD
from fastadv.recipe import show_pixels
from fastadv.seeds import generator
from fastadv.sharing import ALONE, Share
from fastadv.threat import ThreatModel

if TYPE_CHECKING:
    from fastadv.attacks.autoattack import AutoAttack

# Keeps the noise of an evaluation apart from that of training, which is seeded by step.
EVALUATION = -1


@dataclass(frozen=True, eq=False)
class Verdict:
    """What became of every image of a set."""

    right: Tensor
    """Whether the model is right about the image as it is, bool (n,)."""
    survived: Tensor
    """Whether it stays right whatever the attack does, bool (n,); nothing survives where there was no attack."""
    stages: tuple[Stage, ...] = ()
    """What each stage of an ensemble of attacks broke, and its seconds."""
    notes: tuple[str, ...] = ()
    """What an ensemble of attacks noticed about the model."""

    @property
    def n(self) -> int:
        """Number of images."""
        return len(self.right)

    @property
    def clean(self) -> int:
        """Number of images that are classified right."""
        return int(self.right.sum())

    @property
    def robust(self) -> int:
        """Number of images that survived."""
        return int(self.survived.sum())


@dataclass(frozen=True)
class Stage:
    """One attack of an ensemble: how many images it broke that were whole before, in how many seconds."""

    name: str
    broken: int
    seconds: float


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
    stages: tuple[Stage, ...] = ()
    notes: tuple[str, ...] = ()

    def row(self) -> dict[str, str]:
        """The report as a row of the table on the terminal."""

        def percent(value: float, interval: tuple[float, float]) -> str:
            return f"{100 * value:.1f} % ({100 * interval[0]:.1f}-{100 * interval[1]:.1f})"

        return {
            "threat": f"{self.norm} {show_pixels(self.eps, self.norm)}",
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
    attack: PGD | AutoAttack | None,
    threat: ThreatModel,
    *,
    seed: int = 0,
    batch_size: int = 256,
    precision: str = "fp32",
    state: Path | None = None,
    say: Callable[[str], None] | None = None,
    share: Share = ALONE,
) -> Verdict:
    """Which images the model is right about, and which of them it stays right about on every iterate it is shown.

    Only images that are right when clean are attacked: the others cannot become robust. NaN logits count as wrong.
    ``attack`` None skips the attack. ``state`` is the folder in which an AutoAttack keeps what it found so far; its
    verdicts are beside it in the end, as ``state``.json. ``say`` is called with each line of its log. The processes of
    a ``share`` attack every so-many-th batch each, and all get the whole verdict, which is that of one process.
    """
    if attack is not None and not isinstance(attack, PGD):
        return _ensemble(model, images, attack, threat, batch_size, state, say)
    device = next(model.parameters()).device
    fast = attack.on(model, precision=precision) if attack else None
    # With keep="last" the verdict is about the final iterate: nobody is finished before it.
    drop = attack is not None and attack.keep == "success"
    found, n = [], 0
    with untouched(model):
        for batch, (x, y) in enumerate(in_order(images, batch_size, device)):
            right, survived = torch.zeros(2, len(x), dtype=torch.bool, device=device)
            if share.owns(batch):
                with torch.no_grad():
                    right = ~misclassified(model(x), y)
                if fast and right.any():
                    noise = generator(device, seed, EVALUATION, n)
                    survived[right] = ~fast.run(x[right], y[right], threat, generator=noise, drop=drop).success
            found.append(torch.stack([right, survived]).byte().cpu())
            n += len(x)
    share.meet()
    right, survived = torch.cat([share.tell(*each) for each in enumerate(found)], 1).bool()
    return Verdict(right, survived)


def _ensemble(
    model: nn.Module,
    images: ImageSet,
    attack: AutoAttack,
    threat: ThreatModel,
    batch_size: int,
    state: Path | None,
    say: Callable[[str], None] | None,
) -> Verdict:
    """The verdict of an AutoAttack, which takes all images at once and batches them itself."""
    from fastadv.attacks.verdicts import export_state

    device = next(model.parameters()).device
    batches = list(in_order(images, batch_size, device))
    x, y = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    found = attack.run(model, x, y, threat, state=state, progress=say)
    if state is not None:
        export_state(found, state.with_suffix(".json"))
    broken = [int((found.broken_by == index).sum()) for index in range(len(found.stages))]
    stages = tuple(map(Stage, found.stages, broken, found.seconds))
    return Verdict((found.broken_by >= 0).cpu(), found.robust.cpu(), stages, tuple(found.notes))


def evaluate(
    model: nn.Module,
    images: ImageSet,
    attack: PGD | AutoAttack,
    threat: ThreatModel,
    *,
    seed: int = 0,
    batch_size: int = 256,
    precision: str = "fp32",
    state: Path | None = None,
    say: Callable[[str], None] | None = None,
    share: Share = ALONE,
) -> tuple[Report, Verdict]:
    """Clean and robust accuracy with 95 % Wilson intervals, and the verdict of every image behind them.

    With a PGD ``keep`` decides: "success" is the strict verdict (every iterate counts), "last" the papers' (only the
    last one does).
    """
    began = time.perf_counter()
    how: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "precision": precision}
    found = measure(model, images, attack, threat, **how, state=state, say=say, share=share)
    report = Report(
        n=found.n,
        clean=found.clean / max(1, found.n),
        clean_interval=wilson(found.clean, found.n),
        robust=found.robust / max(1, found.n),
        robust_interval=wilson(found.robust, found.n),
        norm=threat.norm,
        eps=threat.eps,
        attack=f"PGD-{attack.steps}" if isinstance(attack, PGD) else str(attack),
        verdict="last" if isinstance(attack, PGD) and attack.keep == "last" else "worst",
        precision=precision,
        device=next(model.parameters()).device.type,
        seed=seed,
        seconds=time.perf_counter() - began,
        stages=found.stages,
        notes=found.notes,
    )
    return report, found


@dataclass(frozen=True, eq=False)
class Curve:
    """Accuracy against the radius: an image that a smaller ball broke is broken in a larger one, which contains it."""

    eps: tuple[float, ...]
    """Radii, rising from 0."""
    survived: Tensor
    """Whether each image was right up to and at each radius, bool (radii, n)."""


def curve(
    model: nn.Module,
    images: ImageSet,
    attack: PGD,
    threat: ThreatModel,
    *,
    right: Tensor,
    seed: int = 0,
    batch_size: int = 256,
    precision: str = "fp32",
) -> Curve:
    """Which images survive at eps = 0, then at growing multiples of the threat's radius until none does.

    right: the images that are right when clean, bool (n,). Radii: 1/4, 1/2, 1, 2, 4, ... times the threat's; steps are
    a quarter of the radius each. Only the survivors of one radius are attacked at the next.
    """
    radii, survived = [0.0], [right]
    width = threat.box[1] - threat.box[0]
    widest = width if threat.norm == "linf" else width * math.sqrt(images.images[0].numel())
    eps = threat.eps / 4 if threat.eps else width / 64
    while survived[-1].any() and radii[-1] < widest:
        eps = min(eps, widest)
        alive = survived[-1].nonzero().squeeze(1)
        level = measure(
            model,
            dataclasses.replace(images, images=images.images[alive], labels=images.labels[alive]),
            dataclasses.replace(attack, step_size=eps / 4, keep="success"),
            dataclasses.replace(threat, eps=eps),
            seed=seed,
            batch_size=batch_size,
            precision=precision,
        )
        radii.append(eps)
        survived.append(torch.zeros_like(right).index_put((alive,), level.survived))
        eps *= 2
    return Curve(tuple(radii), torch.stack(survived))
