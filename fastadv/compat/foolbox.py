"""foolbox's LinfPGD and L2PGD (3.3.4), without foolbox.

Shapes: inputs (B, C, H, W) float32; labels (B,) int64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn

from fastadv import pgd
from fastadv.errors import SettingsError
from fastadv.threat import Norm, ThreatModel


@dataclass(frozen=True, kw_only=True)
class LinfPGD:
    """foolbox's ``LinfPGD``. ``model`` is a PyTorchModel, or a module that takes pixels in [0, 1].

    Different on purpose: raw and clipped images are the same tensors, as the ball is never left; a model in train mode
    is attacked in eval mode; an eps wider than the bounds is refused, and so is None.
    """

    norm: ClassVar[Norm] = "linf"

    rel_stepsize: float = 0.01 / 0.3
    """Length of a step as a share of epsilon."""
    abs_stepsize: float | None = None
    """Length of a step in the units of the bounds; goes before ``rel_stepsize``."""
    steps: int = 40
    """Gradient steps."""
    random_start: bool = True
    """Start from a random point of the ball instead of x."""
    times: int = 1
    """Runs from new random starts; an image keeps the first that fools."""

    def repeat(self, times: int) -> LinfPGD:
        """The same attack, run so many times as often."""
        return dataclasses.replace(self, times=self.times * times)

    @overload
    def __call__(
        self, model: Any, inputs: Tensor, criterion: Any, *, epsilons: float
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    @overload
    def __call__(
        self, model: Any, inputs: Tensor, criterion: Any, *, epsilons: Iterable[float]
    ) -> tuple[list[Tensor], list[Tensor], Tensor]: ...
    def __call__(
        self, model: Any, inputs: Tensor, criterion: Any, *, epsilons: float | Iterable[float]
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[list[Tensor], list[Tensor], Tensor]:
        """Raw images, clipped images, and success, bool (B,); for several epsilons two lists, and bool (K, B).

        criterion: labels int64 (B,), or an object with ``labels`` or ``target_classes``, as foolbox's criteria.
        """
        network = model if isinstance(model, nn.Module) else _Called(model)
        box = (float(model.bounds[0]), float(model.bounds[1])) if hasattr(model, "bounds") else (0.0, 1.0)
        targets = getattr(criterion, "target_classes", None)
        y = getattr(criterion, "labels", criterion) if targets is None else targets
        # foolbox's criteria hold eagerpy tensors.
        y = getattr(y, "raw", y)
        radii = list(epsilons) if isinstance(epsilons, Iterable) else [epsilons]
        if any(eps is None for eps in radii):
            raise SettingsError(
                "epsilons holds None", "give a radius, as in epsilons=8/255; FAB looks for the smallest"
            )
        found = []
        for eps in map(float, radii):
            settings = pgd.PGD(
                steps=self.steps,
                step_size=self.rel_stepsize * eps if self.abs_stepsize is None else self.abs_stepsize,
                random_start=self.random_start,
                restarts=self.times,
                targeted=targets is not None,
            )
            found.append(settings.run(network, inputs, y, ThreatModel(self.norm, eps, box)))
        if not isinstance(epsilons, Iterable):
            return found[0].adv, found[0].adv, found[0].success
        images = [result.adv for result in found]
        return images, list(images), torch.stack([result.success for result in found])


@dataclass(frozen=True, kw_only=True)
class L2PGD(LinfPGD):
    """foolbox's ``L2PGD``; otherwise as :class:`LinfPGD`."""

    norm = "l2"

    rel_stepsize: float = 0.025
    steps: int = 50


class _Called(nn.Module):
    """A foolbox model as a module. The network in it is found and held, so that its modes and buffers are guarded."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call, self.networks = model, nn.ModuleList(_networks(model))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def _networks(model: object) -> list[nn.Module]:
    """The networks that a foolbox model keeps in ``_model``: itself, in a function's closure, or in a model inside."""
    inner = getattr(model, "_model", None)
    if inner is None or isinstance(inner, nn.Module):
        return [] if inner is None else [inner]
    cells = [cell.cell_contents for cell in getattr(inner, "__closure__", None) or ()]
    return [cell for cell in cells if isinstance(cell, nn.Module)] or _networks(inner)
