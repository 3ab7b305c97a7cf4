"""What the attacker may do: a norm ball around the clean image, cut by the pixel box.

Shapes: adv, x, grad (B, C, H, W), float32; per-image values (B,).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from fastadv import ops, reference
from fastadv.errors import SettingsError
from fastadv.registry import did_you_mean

Norm = Literal["linf", "l2"]


@dataclass(frozen=True)
class ThreatModel:
    """A norm ball of radius ``eps`` around the clean image, intersected with the pixel box.

    Raises SettingsError for an unknown norm, an eps that is NaN, negative or wider than the box, and an empty box.
    """

    norm: Norm = "linf"
    """Norm of the perturbation: the largest pixel (linf), or the length of the whole image's change (l2)."""
    eps: float = 8 / 255
    """Radius, in the units of the box. The budget is the float32 nearest to it."""
    box: tuple[float, float] = (0.0, 1.0)
    """Smallest and largest pixel value."""

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise SettingsError(f"unknown norm {self.norm!r}", did_you_mean(str(self.norm), get_args(Norm)))
        if len(self.box) != 2 or not all(map(math.isfinite, self.box)) or not self.box[0] < self.box[1]:
            raise SettingsError(
                f"box is {self.box}", "give the smallest and the largest pixel value, as in box=(0.0, 1.0)"
            )
        # An l2 ball may be wider than the box's side; how wide depends on the image, see check_radius.
        self.check_radius(self.eps, self.eps, num_pixels=1 if self.norm == "linf" else None)

    def check_radius(self, least: float, most: float, *, num_pixels: int | None = None) -> None:
        """Raise SettingsError unless 0 <= least and ``most`` fits the box of images with ``num_pixels`` values."""
        for eps in (least, most):
            if not isinstance(eps, Real) or isinstance(eps, bool) or not math.isfinite(eps):
                raise SettingsError(f"eps is {eps}", "give the radius as a number in pixel units, as in eps=8/255")
        if least < 0:
            raise SettingsError(f"eps is {least:g}", "a radius is 0 or more")
        low, high = self.box
        widest = (high - low) * (math.sqrt(num_pixels or 1) if self.norm == "l2" else 1)
        # 1e-6: eps=1.0 that went through float32, or a box such as (0.1, 0.9), must not be refused for its last digit.
        if num_pixels is not None and most > widest * (1 + 1e-6):
            raise SettingsError(
                f"eps is {most:g}, but images in the box [{low:g}, {high:g}] differ by {widest:g} at most",
                f"did you mean {most:g}/255?",
            )

    def check_step(self, step_size: float) -> None:
        """Raise SettingsError for a linf step longer than the box is wide: a forgotten /255."""
        if self.norm == "linf" and step_size > self.box[1] - self.box[0]:
            raise SettingsError(f"step_size is {step_size:g}, wider than the box", f"did you mean {step_size:g}/255?")

    def project(self, adv: Tensor, x: Tensor, eps: Tensor | None = None) -> Tensor:
        """``adv`` brought into the ball around ``x`` and the box, as a new tensor; eps (B,) replaces the radius.

        Exact: the distance from ``x``, computed in float64, is at most float32(eps).
        """
        project = reference.project_linf if self.norm == "linf" else reference.project_l2
        return project(adv, x, self.eps if eps is None else eps, *self.box)

    def random_start(self, x: Tensor, eps: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """A point drawn uniformly from the ball around ``x``, then cut by the box, as a new tensor like ``x``.

        Drawn from ``generator`` (on the generator's device, so a seed means the same noise everywhere), or from the
        global stream of x's device.
        """
        source = x.device if generator is None else generator.device
        radius = (x.new_full((1,), self.eps) if eps is None else eps).view(-1, 1, 1, 1)
        if self.norm == "linf":
            noise = torch.rand(x.shape, generator=generator, device=source).mul_(2).sub_(1).to(x.device)
        else:
            noise = torch.randn(x.shape, generator=generator, device=source).to(x.device)
            # In d dimensions the share u of a ball's volume lies within radius u^(1/d).
            share = torch.rand(len(x), 1, 1, 1, generator=generator, device=source).to(x.device)
            length = torch.linalg.vector_norm(noise, dim=(1, 2, 3), keepdim=True)
            noise.mul_(share.pow_(1 / math.prod(x.shape[1:])) / length)
        # Into a tensor like x, so that the strides are x's: the fused step walks both in memory order.
        return torch.empty_like(x).copy_(self.project(noise.mul_(radius).add_(x), x, eps))

    def ascend(
        self,
        adv: Tensor,
        grad: Tensor,
        x: Tensor,
        step_size: float | Tensor,
        *,
        eps: Tensor | None = None,
        mask: Tensor | None = None,
        nonfinite: Tensor | None = None,
    ) -> None:
        """Move ``adv``, in place, one step of length ``step_size`` along ``grad`` and back into ball and box.

        A negative step descends. mask, bool like x: False keeps the pixel of ``x``. nonfinite, int32 (B,), is set to 1
        for images whose gradient is NaN or infinite somewhere.
        """
        step = ops.linf_step if self.norm == "linf" else ops.l2_step
        step(adv, grad, x, step_size, self.eps if eps is None else eps, *self.box, mask, nonfinite)
