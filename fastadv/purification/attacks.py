"""Attacks on the two-layer network in closed form: FGM, PGD, smoothed gates and transfer, in the l2 ball.

A unit that is off has no gradient, so FGM and PGD do not see what switching it on would do, and say that a network
with thresholds is more robust than it is. Smoothed gates show it: the gate becomes the probability that the unit were
on under noise. Nothing but the worst of all attacks should be believed.

Each gives the perturbation (R, B, d). y (R, B, 1) is 1 where f shall fall and -1 where it shall rise; eps is a number
or (R, 1, 1). For contrastive pairs q is `network.partner` of the other view and y the sign of the pair.
Source: FGM and PGD as in arXiv:2401.15248; smoothed gates are ours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastadv.pgd import PGD
from fastadv.purification.network import Hidden
from fastadv.seeds import generator
from fastadv.threat import ThreatModel

# A step is so many times eps divided by the number of steps.
REACH = 2.5
# Pixels of the package's attacks live in a box. Nothing in z comes near the walls of this one.
BOX = (-100.0, 100.0)
Radius = float | Tensor


def unit(direction: Tensor) -> Tensor:
    """The direction with length one; nothing stays nothing."""
    return torch.nn.functional.normalize(direction, dim=2)


def project(delta: Tensor, eps: Radius) -> Tensor:
    """The nearest perturbation that is no longer than eps."""
    length: Tensor = delta.norm(dim=2, keepdim=True)
    return delta * (eps / length.clamp_min(1e-12)).clamp_max(1.0)


def fgm(hidden: Hidden, q: Tensor, z: Tensor, y: Tensor, eps: Radius) -> Tensor:
    """One step of length eps against the gradient. Zero where every unit is off."""
    return -eps * y * unit(hidden.gradient(q, z))


def pgd(hidden: Hidden, q: Tensor, z: Tensor, y: Tensor, eps: Radius, *, steps: int, start: Tensor) -> Tensor:
    """So many steps from ``start`` (R, B, d), which is projected first."""
    return _walk(project(start, eps), y, eps, steps, lambda delta: hidden.gradient(q, z + delta))


def smoothed(
    hidden: Hidden, q: Tensor, z: Tensor, y: Tensor, eps: Radius, *, width: Radius, steps: int, exact: int
) -> Tensor:
    """So many steps with smoothed gates from z itself, then ``exact`` ones with the true gates.

    width: of the noise that a unit is imagined to see, as a share of the length of its weights. The noise is logistic
    and as wide as a normal one; its distribution is a tanh, which costs half of an erf.
    """
    # tanh(x / 2 s) is 2 F(x) - 1 for the logistic F; s = 0.55 sd gives it the standard deviation sd.
    scale = 1 / (1.1 * width * hidden.w.norm(dim=1, keepdim=True)).clamp_min(1e-9)

    def slope(delta: Tensor) -> Tensor:
        v = hidden.pre(z + delta)
        gate = (v + hidden.b).mul_(scale).tanh_().sub_(v.sub_(hidden.b).mul_(scale).tanh_()).mul_(-0.5).add_(1)
        return hidden.back(gate.mul_(q))

    delta = _walk(torch.zeros_like(z), y, eps, steps, slope)
    return _walk(delta, y, eps, exact, lambda delta: hidden.gradient(q, z + delta))


def transfer(direction: Tensor, y: Tensor, eps: Radius) -> Tensor:
    """A step of length eps against a direction (R, 1, d) that was not taken from the network."""
    return -eps * y * unit(direction)


def _walk(delta: Tensor, y: Tensor, eps: Radius, steps: int, slope: Callable[[Tensor], Tensor]) -> Tensor:
    for _ in range(steps):
        delta = project(delta - (REACH / steps) * eps * y * unit(slope(delta)), eps)
    return delta


class AsClassifier(nn.Module):
    """One run of the network as a classifier of images (B, 1, 1, d) with two classes, for the package's attacks."""

    def __init__(self, hidden: Hidden, q: Tensor) -> None:
        super().__init__()
        assert len(hidden.w) == 1, "one run at a time"
        self.hidden, self.q = hidden, q

    def forward(self, x: Tensor) -> Tensor:
        half = self.hidden.output(self.q, x.reshape(1, len(x), -1))[0] / 2
        return torch.cat([-half, half], 1)


def package_pgd(hidden: Hidden, q: Tensor, z: Tensor, y: Tensor, eps: float, *, steps: int, seed: int) -> Tensor:
    """Whether ``fastadv.pgd.PGD`` fools the network at any of its iterates, bool (R, B, 1)."""
    attack = PGD(steps=steps, step_size=REACH * eps / max(1, steps), keep="success")
    threat, fooled = ThreatModel("l2", eps, box=BOX), []
    for run in range(len(z)):
        model = AsClassifier(hidden.run(run), q[run : run + 1])
        images = z[run].reshape(len(z[run]), 1, 1, -1)
        noise = generator("cpu", seed, run)
        fooled.append(attack.run(model, images, (y[run, :, 0] > 0).long(), threat, generator=noise).success)
    return torch.stack(fooled)[:, :, None]
