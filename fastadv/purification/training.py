"""Training of the two-layer network: clean or adversarial, supervised or contrastive, and heads on a frozen layer.

All gradients are closed forms, all samples are fresh (the risk is that of the population), all runs are independent.
Shapes: eps (R, 1, 1); theta (R, d, 1); y (R, B, 1).
Source: the two kinds of loss and the attacks are those of arXiv:2401.15248; sizes, ramp and learning rates are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastadv.errors import NumericalError, SettingsError
from fastadv.purification import attacks
from fastadv.purification.network import Activation, Hidden, partner
from fastadv.purification.sparse import HEAD, TEST, TRAINING, WEIGHTS, Stream, World, label

Kind = Literal["none", "fgm", "pgd", "smoothed"]
# A network that learned nothing says 0 to everything: its loss is log 2.
LEARNED_NOTHING = 0.98 * math.log(2)
# Of the smoothed attack in training: steps with each kind of gate, and between which widths of the noise.
SMOOTHED_STEPS, WIDTHS = 3, (0.02, 0.08)


class CollapseError(NumericalError):
    """Training ended with a network that tells nothing apart."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a hidden layer is trained."""

    attack: Kind = "none"
    """What attacks every batch."""
    attack_steps: int = 4
    """Of pgd."""
    units: int = 200
    """Hidden units."""
    activation: Activation = "soft"
    threshold: float = 0.03
    """Of all units at the start; a hard activation keeps it."""
    steps: int = 1500
    batch_size: int = 256
    lr: float = 1e-2
    """Adam's; a tenth of it from 70 % of the steps on."""
    ramp: float = 0.4
    """The share of the steps during which eps grows from 0. Without it every unit is switched off for good."""
    temperature: float = 1.0
    """Of the contrastive loss: similarities are divided by it."""
    projection: int = 0
    """Outputs of the learned projection behind the units in contrastive training; 0 for none."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("units", self.units, 1),
            ("steps", self.steps, 0),
            ("batch_size", self.batch_size, 1),
        ):
            if value < least:
                raise SettingsError(f"{name} is {value}", f"--{name.replace('_', '-')} takes {least} or more")
        if not 0 < self.temperature < math.inf:
            raise SettingsError(f"temperature is {self.temperature:g}", "--temperature takes a number above 0")


class Trained(NamedTuple):
    """What a training left: the hidden layer, its projection if it has one, and for every run whether it collapsed."""

    hidden: Hidden
    projection: Tensor | None
    collapsed: list[bool]


def supervised(
    world: World, training: Training, eps: Sequence[float], theta: Tensor, start: Hidden | None = None
) -> Trained:
    """A hidden layer trained on the logistic loss of task ``theta``, with an output layer of ones that stays.

    eps: one radius for every run, not used by attack "none". start: weights to go on from.
    """
    hidden = _beginning(world, training) if start is None else _copy(start)
    stream, ones = world.stream(TRAINING), torch.ones(1, 1, training.units)
    descend, radius = _Descent(training, hidden.w, hidden.b), _radii(eps)
    for step in range(training.steps):
        x, z = stream.draw(training.batch_size)
        y = label(x, theta)
        z = z + _attack(training, hidden, ones, z, y, radius * _ramp(training, step), stream)
        descend(step, *supervised_gradients(hidden, z, y))
    x, z = world.stream(TEST).draw(1000)
    return Trained(hidden, None, _learned_nothing(hidden.output(ones, z), label(x, theta)))


def contrastive(world: World, training: Training, eps: Sequence[float]) -> Trained:
    """A hidden layer trained on log(1 + exp(-Y <g(z), g(z')> / temperature)); the attack changes the first view.

    Raises: SettingsError for a batch of one: half of a batch is similar pairs, half is not.
    """
    if training.batch_size < 2:
        raise SettingsError(
            f"batch_size is {training.batch_size} for contrastive pairs",
            "--batch-size 2 or more: one pair of each kind",
        )
    hidden, stream, radius = _beginning(world, training), world.stream(TRAINING), _radii(eps)
    projection = _projection(world, training)
    descend = _Descent(training, hidden.w, hidden.b, *([] if projection is None else [projection]))
    for step in range(training.steps):
        z, other, sign = stream.pairs(training.batch_size)
        q = partner(hidden, projection, other)
        z = z + _attack(training, hidden, q, z, sign, radius * _ramp(training, step), stream)
        descend(step, *contrastive_gradients(hidden, projection, z, other, sign, training.temperature))
    z, other, sign = world.stream(TEST).pairs(1000)
    similarity = hidden.output(partner(hidden, projection, other), z) / training.temperature
    return Trained(hidden, projection, _learned_nothing(similarity, sign))


def supervised_gradients(hidden: Hidden, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the mean loss with an output layer of ones, with respect to weights and thresholds."""
    v = hidden.pre(z)
    return _towards(hidden, z, v, _pull(hidden.units(v).sum(2, keepdim=True), y))


def contrastive_gradients(
    hidden: Hidden, projection: Tensor | None, z: Tensor, other: Tensor, sign: Tensor, temperature: float
) -> list[Tensor]:
    """Gradients of the mean loss, with respect to weights, thresholds and the projection if there is one."""
    v, w = hidden.pre(z), hidden.pre(other)
    h, k = hidden.units(v), hidden.units(w)
    g, g_other = (h, k) if projection is None else (torch.bmm(h, projection), torch.bmm(k, projection))
    slope = _pull((g * g_other).sum(2, keepdim=True) / temperature, sign) / temperature
    to_z, to_other = slope * g_other, slope * g
    if projection is None:
        back_z, back_other = to_z, to_other
    else:
        back_z, back_other = torch.bmm(to_z, projection.mT), torch.bmm(to_other, projection.mT)
    both = zip(_towards(hidden, z, v, back_z), _towards(hidden, other, w, back_other), strict=True)
    grads = [one + two for one, two in both]
    if projection is not None:
        grads.append(torch.bmm(h.mT, to_z) + torch.bmm(k.mT, to_other))
    return grads


def head(
    world: World, hidden: Hidden, theta: Tensor, *, steps: int, batch_size: int, eps: float = 0.0, lr: float = 2e-2
) -> Tensor:
    """An output layer q (R, 1, m) for task ``theta`` on the frozen hidden layer; eps > 0 trains it against FGM."""
    stream = world.stream(HEAD)
    said = hidden.units(hidden.pre(stream.draw(2000).z))
    spread = said.std(1, keepdim=True)
    # Units learn at the same speed whatever their size; one that never says anything stays out.
    scale = torch.where(spread > 1e-3 * spread.amax(2, keepdim=True), 1 / spread.clamp_min(1e-9), 0.0)
    a = torch.zeros_like(scale)
    descend = _Descent(Training(steps=steps, lr=lr, units=a.shape[2], activation="hard"), a)
    for step in range(steps):
        x, z = stream.draw(batch_size)
        y = label(x, theta)
        if eps > 0:
            z = z + attacks.fgm(hidden, a * scale, z, y, eps)
        h = hidden.units(hidden.pre(z)).mul_(scale)
        slope = _pull((h * a).sum(2, keepdim=True), y)
        descend(step, (slope.mT @ h))
    return a * scale


def check_learned(trained: Trained, seeds: Sequence[int], eps: float, k: float) -> None:
    """Raise CollapseError where a run learned nothing."""
    dead = [str(seed) for seed, collapsed in zip(seeds, trained.collapsed, strict=True) if collapsed]
    if dead:
        raise CollapseError(
            f"training collapsed at eps = {eps:g}, seed {', '.join(dead)}: no better than saying nothing",
            f"--eps below {0.7 / math.sqrt(k):.2g} (0.7 / sqrt(k)), or more --steps",
        )


class _Descent:
    """Adam on these tensors, in place; thresholds stay at 0 or above."""

    def __init__(self, training: Training, *learned: Tensor) -> None:
        # A hard activation keeps its thresholds, the second of the tensors.
        self.frozen = training.activation == "hard" and len(learned) > 1
        self.learned, self.training = learned, training
        kept = [each for place, each in enumerate(learned) if not (self.frozen and place == 1)]
        self.optimizer = torch.optim.Adam(kept, lr=training.lr)

    def __call__(self, step: int, *grads: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.lr * (0.1 if step >= int(0.7 * self.training.steps) else 1)
        for each, grad in zip(self.learned, grads, strict=True):
            each.grad = grad
        self.optimizer.step()
        if len(self.learned) > 1:
            self.learned[1].clamp_(min=0)


def _beginning(world: World, training: Training) -> Hidden:
    d, m = world.coding.d, training.units
    w = world.stream(WEIGHTS).normal(d, m) * (0.3 / math.sqrt(d))
    return Hidden(w, torch.full((len(w), 1, m), training.threshold), training.activation)


def _projection(world: World, training: Training) -> Tensor | None:
    if not training.projection:
        return None
    stream = world.stream(WEIGHTS)
    # The first numbers of this stream are the hidden weights.
    stream.normal(world.coding.d, training.units)
    return stream.normal(training.units, training.projection) / math.sqrt(training.units)


def _copy(hidden: Hidden) -> Hidden:
    return Hidden(hidden.w.clone(), hidden.b.clone(), hidden.activation)


def _radii(eps: Sequence[float]) -> Tensor:
    return torch.tensor(eps).reshape(-1, 1, 1)


def _ramp(training: Training, step: int) -> float:
    return min(1.0, step / (training.ramp * training.steps)) if training.ramp > 0 else 1.0


def _attack(
    training: Training, hidden: Hidden, q: Tensor, z: Tensor, y: Tensor, eps: Tensor, stream: Stream
) -> Tensor | float:
    if training.attack == "none" or not eps.any():
        return 0.0
    if training.attack == "fgm":
        return attacks.fgm(hidden, q, z, y, eps)
    if training.attack == "pgd":
        start = attacks.unit(stream.normal(*z.shape[1:])) * eps * stream.uniform(z.shape[1], 1)
        return attacks.pgd(hidden, q, z, y, eps, steps=training.attack_steps, start=start)
    low, high = WIDTHS
    width = low + (high - low) * stream.uniform(1, 1)
    return attacks.smoothed(hidden, q, z, y, eps, width=width, steps=SMOOTHED_STEPS, exact=SMOOTHED_STEPS)


def _pull(f: Tensor, y: Tensor) -> Tensor:
    """The slope of the mean logistic loss with respect to f, (R, B, 1)."""
    return -y * torch.sigmoid(-y * f) / f.shape[1]


def _towards(hidden: Hidden, z: Tensor, v: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients with respect to weights and thresholds, of what has ``slopes`` with respect to the units."""
    gated = hidden.gate(v).mul_(slopes)
    grad = torch.bmm(z.mT, gated)
    return grad, gated.mul_(v.sign()).sum(1, keepdim=True).neg_()


def _learned_nothing(f: Tensor, y: Tensor) -> list[bool]:
    loss = torch.nn.functional.softplus(-y * f).mean((1, 2))
    return [not value < LEARNED_NOTHING for value in loss.tolist()]
