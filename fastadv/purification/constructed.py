"""Experiments without training: gradients in closed form, and networks built with m* features in every unit."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv.page import Block
from fastadv.purification import attacks, plots
from fastadv.purification.lab import Experiment, Lab
from fastadv.purification.marks import Mark
from fastadv.purification.measures import inactive, pair_losses
from fastadv.purification.network import Activation, Hidden, constructed, partner, solving
from fastadv.purification.sparse import TEST, label
from fastadv.seeds import generator

# Of the lemma: little noise, and a radius that switches no unit.
SIGMA, SMALL_EPS = 0.002, 0.25
# How far thresholds are off where the closed form is made wrong on purpose.
FAULT = 0.01
# The projection of the constructed contrastive network is the root of this times the identity.
CONTRAST = 6.0


def closed_form(lab: Lab) -> tuple[list[Mark], dict[str, Any]]:
    """Gradients of both activations, both losses, in float64 against autograd: the largest difference anywhere."""
    found: dict[str, dict[str, list[float]]] = {}
    activations: tuple[Activation, ...] = ("soft", "hard")
    for activation in activations:
        for loss in ("supervised", "contrastive", "contrastive, projected"):
            found[f"{activation}, {loss}"] = {
                name: [_difference(activation, loss, seed, fault) for seed in lab.seeds]
                for name, fault in (("as it is", 0.0), ("planted fault", FAULT))
            }
    worst = max(max(each["as it is"]) for each in found.values())
    fault = min(min(each["planted fault"]) for each in found.values())
    return [
        Mark(
            claim="The attack's gradient in closed form is that of autograd",
            predicted="largest difference below 1e-10 (float64)",
            measured=f"{worst:.1e}",
            holds=worst < 1e-10,
        ),
        Mark(
            claim="A fault would have been seen",
            predicted=f"with thresholds {FAULT:g} off in the closed form, above 1e-3",
            measured=f"at least {fault:.1e}",
            holds=fault > 1e-3,
            control=True,
        ),
    ], {"differences": found}


def _difference(activation: Activation, loss: str, seed: int, fault: float) -> float:
    numbers = generator("cpu", seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=numbers, dtype=torch.float64)

    hidden = Hidden(0.3 * normal(1, 20, 30), 0.1 * normal(1, 1, 30).abs(), activation)
    q, z = normal(1, 1, 30), normal(1, 50, 20).requires_grad_()
    if loss != "supervised":
        q = partner(hidden, normal(1, 30, 8) if "projected" in loss else None, normal(1, 50, 20))
    (expected,) = torch.autograd.grad(hidden.output(q, z).sum(), z)
    found = Hidden(hidden.w, hidden.b + fault, activation).gradient(q, z.detach())
    return float((expected - found).abs().max())


def show_closed_form(numbers: dict[str, Any]) -> list[Block]:
    """How many digits agree, as bars."""
    digits = {
        name: {key: [-math.log10(max(value, 1e-17)) for value in values] for key, values in each.items()}
        for name, each in numbers["differences"].items()
    }
    said = (
        "Minus the logarithm of the largest difference from autograd, over all seeds: the digits that agree, 17 where "
        "every bit does. Planted fault: the closed form with other thresholds."
    )
    return [plots.bars(digits, "digits that agree", said, top=17, form="{:.1f}")]


def widths(lab: Lab) -> tuple[int, list[int]]:
    """The d of constructed networks, the next power of two, and the numbers of features per unit tried."""
    powers = math.ceil(math.log2(lab.settings.d))
    return 2**powers, [2**power for power in range(powers + 1)]


def lemma(lab: Lab) -> tuple[list[Mark], dict[str, Any]]:
    """Networks that read m* features per unit: length of the gradient, clean and attacked loss, inactive share."""
    d, sizes = widths(lab)
    world, eps = lab.world(d, sigma=SIGMA), SMALL_EPS * lab.settings.eps
    theta = world.theta(0)
    names = ("measured", "predicted", "clean loss", "gap", "inactive", "accuracy")
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    for width in sizes:
        hidden = constructed(world.dictionary, width, 0.25 / math.sqrt(lab.settings.k * width))
        x, z = world.stream(TEST).draw(4 * lab.settings.samples)
        y, q = label(x, theta), solving(hidden, world.dictionary, theta)
        delta, far = (attacks.fgm(hidden, q, z, y, radius) for radius in (eps, lab.settings.eps))
        clean, adv = (F.softplus(-y * hidden.output(q, seen)).mean((1, 2)) for seen in (z, z + delta))
        groups = (x.reshape(*x.shape[:2], d // width, width) != 0).any(3).sum(2) * width
        values = {
            "measured": hidden.gradient(q, z).norm(dim=2).mean(1),
            "predicted": groups.float().sqrt().mean(1),
            "clean loss": clean,
            "gap": adv - clean,
            "accuracy": (y * hidden.output(q, z + far) > 0).float().mean((1, 2)),
        }
        for name, value in values.items():
            found[name].append(value.tolist())
        found["inactive"].append(inactive(world, delta, x))
    ratios = [mean(m) / mean(p) - 1 for m, p in zip(found["measured"], found["predicted"], strict=True)]
    worst = max(ratios, key=abs)
    losses = [mean(values) for values in found["clean loss"]]
    first, last = (mean(found["inactive"][place]) for place in (0, -1))
    gaps = [mean(values) for values in found["gap"]]
    return [
        Mark(
            claim="The gradient is as long as sqrt(m* x active groups): what an attack can do grows with the mixing",
            predicted="measured within 6 % of predicted for every m*",
            measured=f"furthest {100 * worst:+.1f} %; the gap in loss at eps {eps:g} grows from {gaps[0]:.3f} to "
            f"{gaps[-1]:.3f}",
            holds=abs(worst) <= 0.06,
        ),
        Mark(
            claim="Without an attack the mixing does not show",
            predicted="clean losses within 0.005 of each other",
            measured=f"{min(losses):.4f} to {max(losses):.4f}",
            holds=max(losses) - min(losses) <= 0.005,
        ),
        Mark(
            claim="The attack stays on the active features where units are pure, and only there",
            predicted="inactive share 0 at m* = 1, above 0.9 at m* = d",
            measured=f"{first:.3f} and {last:.3f}",
            holds=first < 1e-6 and last > 0.9,
        ),
    ], {"sizes": sizes, "d": d, "eps": eps, "far": lab.settings.eps, **found}


def show_lemma(numbers: dict[str, Any]) -> list[Block]:
    """Length of the gradient, and gap in loss, over the features per unit."""
    sizes = numbers["sizes"]
    return [
        plots.lines(
            sizes,
            {"measured": numbers["measured"], "sqrt(m* x active groups)": numbers["predicted"]},
            "features per unit, m*",
            "length of the gradient",
            f"Length of the gradient of f over the features per unit, d = {numbers['d']}: measured, and as predicted.",
            doubling=True,
        ),
        plots.lines(
            sizes,
            {
                f"gap in loss, eps {numbers['eps']:g}": numbers["gap"],
                f"accuracy under FGM, eps {numbers['far']:g}": numbers["accuracy"],
                "clean loss": numbers["clean loss"],
            },
            "features per unit, m*",
            "loss, accuracy",
            "The more features a unit mixes, the more an attack costs; the clean loss stays the same.",
            doubling=True,
            form="{:.4f}",
        ),
    ]


def pairs(lab: Lab) -> tuple[list[Mark], dict[str, Any]]:
    """Contrastive losses of the constructed networks, of similar and dissimilar pairs, clean and attacked."""
    d, sizes = widths(lab)
    world, found = lab.world(d, sigma=SIGMA), dict[str, list[list[float]]]()
    projection = math.sqrt(CONTRAST) * torch.eye(d).expand(len(world.seeds), d, d)
    for width in sizes:
        hidden = constructed(world.dictionary, width, 0.25 / math.sqrt(lab.settings.k * width))
        losses = pair_losses(world, hidden, projection, lab.settings.eps, 4 * lab.settings.samples)
        for name, values in losses.items():
            found.setdefault(name, []).append(values)
    similar = [mean(values) for values in found["adv_similar"]]
    dissimilar = [mean(values) for values in found["adv_dissimilar"]]
    rising = all(low < high for low, high in pairwise(dissimilar))
    ratio = dissimilar[-1] / dissimilar[0]
    return [
        Mark(
            claim="An attack on similar pairs does not care how much the units mix",
            predicted="attacked loss within 0.005 over all m*",
            measured=f"{min(similar):.4f} to {max(similar):.4f}",
            holds=max(similar) - min(similar) <= 0.005,
        ),
        Mark(
            claim="An attack on dissimilar pairs hurts the more, the more the units mix",
            predicted="attacked loss rises with m*, at m* = d to at least 1.7 times that at m* = 1",
            measured=f"{'rises' if rising else 'does not rise throughout'}, {dissimilar[0]:.3f} to "
            f"{dissimilar[-1]:.3f}: {ratio:.2f} times",
            holds=rising and ratio >= 1.7,
        ),
    ], {"sizes": sizes, "eps": lab.settings.eps, **found}


def show_pairs(numbers: dict[str, Any]) -> list[Block]:
    """The four losses over the features per unit."""
    names = {
        "similar": "clean_similar",
        "similar, attacked": "adv_similar",
        "dissimilar, attacked": "adv_dissimilar",
        "dissimilar": "clean_dissimilar",
    }
    said = f"Contrastive loss over the features per unit, clean and with FGM (eps {numbers['eps']:g}) on one view."
    series = {name: numbers[key] for name, key in names.items()}
    return [plots.lines(numbers["sizes"], series, "features per unit, m*", "loss", said, doubling=True)]


CLOSED_FORM = Experiment(
    key="E0",
    name="closed-form",
    title="The closed form is the gradient",
    question="All attacks here use the gradient W D(z) q, with D(z) the units that are on. Autograd has to agree.",
    run=closed_form,
    show=show_closed_form,
)
LEMMA = Experiment(
    key="E1",
    name="lemma",
    title="Mixing makes fragile",
    question="Networks are built, not trained, so that every unit reads exactly m* features with equal weight and all "
    "say the same without an attack. Lemma 4.2 of arXiv:2401.15248: with pure units an attack of length eps costs "
    "eps times the length of theta on the active features.",
    run=lemma,
    show=show_lemma,
)
PAIRS = Experiment(
    key="E5",
    name="pairs",
    title="Contrastive: only dissimilar pairs are fragile",
    question="The same networks as in E1, now with the contrastive loss: log(1 + exp(-Y <g(z), g(z')>)), Y = 1 for two "
    "views of the same features and -1 otherwise. FGM changes one view.",
    run=pairs,
    show=show_pairs,
)
