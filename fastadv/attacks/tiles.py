"""What Square paints in l2: bumps of opposite sign side by side, and how it moves their mass from window to window.

Shapes: adv, x (N, C, H, W) float32. Source: Andriushchenko et al., arXiv:1912.00049, algorithm 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.attacks.momentum import unit

Window = tuple[slice, slice]
"""Rows and columns."""


def pattern(side: int) -> Tensor:
    """Two bumps, the upper one positive and the lower one negative, (side, side), of length 1."""
    upper = side // 2
    both = torch.cat([_bump(upper, side), -_bump(side - upper, side)])
    return both / both.square().sum().sqrt()


def _bump(height: int, width: int) -> Tensor:
    """A peak in the middle: d pixels away, the sum of 1 / k^2 over k > d, up to the edge; of length 1."""
    down, right = (torch.arange(length) - length // 2 for length in (height, width))
    distance = torch.maximum(down.abs().unsqueeze(1), right.abs())
    peak = torch.zeros(height, width)
    for ring in range(max(height, width) // 2 + 1):
        peak += (distance <= ring) / (ring + 1) ** 2
    return peak / peak.square().sum().sqrt()


def window(top: int, left: int, side: int) -> Window:
    """The square with that corner."""
    return slice(top, top + side), slice(left, left + side)


def tiling(height: int, width: int) -> tuple[int, list[Window]]:
    """The side of the tiles a run starts from, five of them along the height, and the tiles."""
    side = height // 5
    first = (height - 5 * side) // 2
    grid = [(row, column) for row in range(height // side) for column in range(width // side)]
    return side, [window(first + row * side, first + column * side, side) for row, column in grid]


def moved(
    adv: Tensor, x: Tensor, to: Window, source: Window, paint: Tensor, eps: float, box: tuple[float, float]
) -> Tensor:
    """``adv`` with the change in window ``source`` moved to window ``to``, over ``paint``, (N or 1, C, side, side).

    What the ball leaves unused goes there too: the whole change has length ``eps`` before the box cuts it.
    """
    change = adv - x
    here, there = change[..., *to], change[..., *source]
    covered = torch.zeros(x.shape[2:], device=x.device)
    covered[to] = covered[source] = 1.0
    radius = torch.full((), eps, device=x.device)
    # One sum along the image, not over three axes: parity wants the published code's roundings.
    whole = change.flatten(1).square().sum(1).sqrt().view(-1, 1, 1, 1)
    spare = (radius.square() - whole.square()).clamp(min=0)
    mass = (spare / x.shape[1] + _length(change * covered).square()).sqrt()
    paint = paint + here / (1e-12 + _length(here))
    paint = paint / (1e-12 + _length(paint)) * mass
    there.zero_()
    here.copy_(paint)
    return (x + unit(change, "l2") * eps).clamp_(*box)


def _length(images: Tensor) -> Tensor:
    """Of each channel, (N, C, 1, 1)."""
    return images.square().sum((2, 3), keepdim=True).sqrt()
