"""Who runs against whom: fastadv, two published training loops, and four attack libraries, under one signature.

Libraries are imported when they are bound; one that is not installed is left out, and the program says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch
import transcriptions
from torch import Tensor

from fastadv.models import Classifier
from fastadv.pgd import PGD, Keep
from fastadv.threat import ThreatModel

THREAT = ThreatModel("linf", 8 / 255)
STEP_SIZE = 2 / 255
# Seeds the noise from which results are compared.
NOISE = 1
Attack = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every contestant is asked for."""

    steps: int = 10
    random_start: bool = True

    def ours(self, keep: Keep = "last") -> PGD:
        """The same attack as a value of fastadv."""
        return PGD(steps=self.steps, step_size=STEP_SIZE, random_start=self.random_start, keep=keep)


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One implementation of linf PGD, 8/255, steps of 2/255, from a random start."""

    name: str
    bind: Callable[[Classifier, Settings, Tensor], Attack]
    """(model, settings, an example batch) -> (x, y) -> adv. Which parameters learn is as the caller left it."""
    source: str
    """Where the code comes from, or which lines it transcribes."""
    keep: Keep = "last"
    """What it returns, in fastadv's words. RoLI's best is one of whole batches: in practice the last."""
    package: str | None = None
    """The distribution it needs."""
    same_noise: bool = True
    """Whether its random start takes the same numbers from the global stream as fastadv's."""

    @property
    def version(self) -> str | None:
        """The installed version; None where it is not installed, "" where nothing is needed."""
        if self.package is None:
            return ""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None


def _fast(model: Classifier, settings: Settings, x: Tensor, *, precision: str, keep: Keep = "last") -> Attack:
    fast = settings.ours(keep).on(model, precision=precision)
    return lambda x, y: fast(x, y, THREAT)


def _plain(model: Classifier, settings: Settings, x: Tensor) -> Attack:
    return lambda x, y: settings.ours()(model, x, y, THREAT)


def _loop(model: Classifier, settings: Settings, x: Tensor, *, loop: transcriptions.Loop) -> Attack:
    def attack(x: Tensor, y: Tensor) -> Tensor:
        start = transcriptions.uniform_start(x, THREAT.eps) if settings.random_start else x
        return loop(model, x, y, start, steps=settings.steps, step_size=STEP_SIZE, eps=THREAT.eps)

    return attack


def _torchattacks(model: Classifier, settings: Settings, x: Tensor) -> Attack:
    import torchattacks

    attack: Attack = torchattacks.PGD(
        model, eps=THREAT.eps, alpha=STEP_SIZE, steps=settings.steps, random_start=settings.random_start
    )
    return attack


def _foolbox(model: Classifier, settings: Settings, x: Tensor) -> Attack:
    import foolbox

    # It warns about a model in train mode and attacks it as it is.
    model.eval()
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP_SIZE, steps=settings.steps, random_start=settings.random_start)
    return lambda x, y: attack(wrapped, x, y, epsilons=THREAT.eps)[1]


def _art(model: Classifier, settings: Settings, x: Tensor) -> Attack:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    estimator = PyTorchClassifier(
        model,
        torch.nn.CrossEntropyLoss(),
        tuple(x.shape[1:]),
        model.head.out_features,
        clip_values=(0.0, 1.0),
        device_type="gpu" if x.is_cuda else "cpu",
    )
    attack = ProjectedGradientDescentPyTorch(
        estimator,
        norm="inf",
        eps=THREAT.eps,
        eps_step=STEP_SIZE,
        max_iter=settings.steps,
        num_random_init=int(settings.random_start),
        batch_size=len(x),
        verbose=False,
    )
    # Its arrays are numpy's in and out; what the copies take is part of using it.
    return lambda x, y: torch.from_numpy(attack.generate(x.cpu().numpy(), y.cpu().numpy())).to(x.device)


def _cleverhans(model: Classifier, settings: Settings, x: Tensor) -> Attack:
    from cleverhans.torch.attacks.projected_gradient_descent import projected_gradient_descent

    def attack(x: Tensor, y: Tensor) -> Tensor:
        # It leaves the mode to the caller.
        model.eval()
        adv: Tensor = projected_gradient_descent(
            model,
            x,
            THREAT.eps,
            STEP_SIZE,
            settings.steps,
            float("inf"),
            clip_min=0.0,
            clip_max=1.0,
            y=y,
            rand_init=settings.random_start,
            sanity_checks=False,
        )
        return adv.detach()

    return attack


FAST, AUTO, BEST, PLAIN = "fastadv fp32", "fastadv auto", "fastadv fp32, best", "fastadv pgd()"
OWN = "PGD(...).on(model)"
CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant(name=FAST, bind=partial(_fast, precision="fp32"), source=f"{OWN[:-1]}, precision='fp32')"),
        Contestant(name=AUTO, bind=partial(_fast, precision="auto"), source=OWN),
        Contestant(
            name=BEST,
            bind=partial(_fast, precision="fp32", keep="best"),
            source="the same with keep='best': the counterpart of MadryLab's loop",
            keep="best",
        ),
        Contestant(name=PLAIN, bind=_plain, source="fastadv.pgd.pgd, nothing bound or prepared"),
        Contestant(
            name="RoLI's loop",
            bind=partial(_loop, loop=transcriptions.roli),
            source="transcribed: DongXzz/RoLI at 5f34b8f, src/adv_func.py",
        ),
        Contestant(
            name="MadryLab's loop",
            bind=partial(_loop, loop=transcriptions.madry),
            source="transcribed: MadryLab/robustness 1.2.1, attacker.py",
            keep="best",
        ),
        Contestant(name="torchattacks", bind=_torchattacks, source="torchattacks.PGD", package="torchattacks"),
        Contestant(name="foolbox", bind=_foolbox, source="foolbox.attacks.LinfPGD", package="foolbox"),
        Contestant(
            name="ART",
            bind=_art,
            source="ProjectedGradientDescentPyTorch",
            package="adversarial-robustness-toolbox",
            same_noise=False,
        ),
        Contestant(name="cleverhans", bind=_cleverhans, source="projected_gradient_descent", package="cleverhans"),
    )
}


class Agreement:
    """Attacks on one model compared with fastadv in fp32, pixel by pixel, on one batch.

    From the same noise where it can be had, else without a random start: on CUDA two calls need not draw alike. Equal
    means up to 1e-6: the peers leave the ball by an ulp of eps, fastadv does not.
    """

    def __init__(self, model: Classifier, x: Tensor, y: Tensor, steps: int) -> None:
        self.model, self.x, self.y, self.steps = model, x, y, steps
        self._ours: dict[tuple[str, bool], Tensor] = {}

    def check(self, contestant: Contestant) -> tuple[float, Attack]:
        """The share of pixels on which it agrees, and its attack with a random start, warmed up."""
        noisy = contestant.same_noise and not self.x.is_cuda
        attack = contestant.bind(self.model, Settings(steps=self.steps, random_start=noisy), self.x)
        share = self.share(contestant.keep, seeded(attack, self.x, self.y), random_start=noisy)
        return share, attack if noisy else contestant.bind(self.model, Settings(steps=self.steps), self.x)

    def share(self, keep: str, theirs: Tensor, *, random_start: bool = True) -> float:
        """The share of pixels of ``theirs``, made from the noise of :func:`seeded`, that fastadv makes as well."""
        key = keep, random_start
        if key not in self._ours:
            fast = Settings(steps=self.steps, random_start=random_start).ours(keep)
            # Compiled and recorded on CUDA otherwise, for one batch.
            bound = fast.on(self.model, precision="fp32", compile="off", capture="off")
            self._ours[key] = seeded(lambda x, y: bound(x, y, THREAT), self.x, self.y)
        return ((self._ours[key] - theirs).abs() < 1e-6).float().mean().item()


def seeded(attack: Attack, x: Tensor, y: Tensor) -> Tensor:
    """The attack's images, its noise drawn from the same point of the global stream every time."""
    torch.manual_seed(NOISE)
    return attack(x, y)


def installed() -> dict[str, Contestant]:
    """Those that can run here."""
    return {name: contestant for name, contestant in CONTESTANTS.items() if contestant.version is not None}


def environment() -> dict[str, Any]:
    """Versions of the libraries, None where one is missing."""
    return {c.package: c.version for c in CONTESTANTS.values() if c.package} | {
        "eagerpy": metadata.version("eagerpy") if importlib.util.find_spec("eagerpy") else None
    }
