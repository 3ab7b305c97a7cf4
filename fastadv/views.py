"""Views of images for contrastive learning: crop, mirror, colour, grey, drawn and made on the device.

Shapes: x (B, 3, H, W) float32 in [0, 1].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# The share of red, green and blue in the brightness of a pixel (ITU-R BT.601), and two axes of colour beside it.
_TO_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


def two_views(
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
    flip: bool,
    *,
    least_area: float = 0.2,
    jitter: float = 1.0,
    grey: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """Two views of every image, (2 B, 3, H, W) with all first ones before the second, and their labels (2 B,).

    Drawn from ``generator`` alone, which is on x's device. The settings: see `view`.
    """
    twice = torch.cat([x, x])
    return view(twice, generator, flip, least_area=least_area, jitter=jitter, grey=grey), torch.cat([y, y])


def view(
    x: Tensor,
    generator: torch.Generator,
    flip: bool,
    *,
    least_area: float = 0.2,
    jitter: float = 1.0,
    grey: float = 0.2,
) -> Tensor:
    """One view of every image: like ``x``, a new tensor.

    A crop of ``least_area`` to all of the image, its sides 3:4 to 4:3, resized to the whole (bilinear); mirrored in
    half of the cases if ``flip``; with probability 0.8 brightness, contrast and saturation times 1 +- 0.4 ``jitter``
    and hue turned by up to a tenth of the circle times ``jitter``; made grey with probability ``grey``.
    Source: arXiv:2002.05709, appendix A, in a fixed order, hue turned in the YIQ plane, and without blur.
    """
    draws = torch.rand(len(x), 12, generator=generator, device=generator.device).to(x.device)
    return _coloured(_cropped(x, draws[:, :5], flip, least_area), draws[:, 5:], jitter, grey)


def _cropped(x: Tensor, draws: Tensor, flip: bool, least_area: float) -> Tensor:
    area, shape, across, down, mirror = draws.unbind(1)
    side = (least_area + (1 - least_area) * area).sqrt()
    # No further than the image reaches: the area is the one drawn.
    stretch = ((shape * 2 - 1) * math.log(4 / 3) / 2).exp().clamp(side, 1 / side)
    width, height = side * stretch, side / stretch
    # In coordinates from -1 to 1, where a box of that size has its middle.
    middle_x, middle_y = (across * 2 - 1) * (1 - width), (down * 2 - 1) * (1 - height)
    sign = torch.where(mirror < 0.5, -1.0, 1.0) if flip else torch.ones_like(mirror)
    none = torch.zeros_like(width)
    rows = [torch.stack(row, 1) for row in ((width * sign, none, middle_x), (none, height, middle_y))]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _coloured(x: Tensor, draws: Tensor, jitter: float, grey: float) -> Tensor:
    applies, brightness, contrast, saturation, hue, no_colour, _ = draws.unbind(1)
    strength = jitter * (applies < 0.8)
    bright, contrast, saturation = (1 + 0.4 * strength * (draw * 2 - 1) for draw in (brightness, contrast, saturation))
    turn = 0.2 * math.pi * strength * (hue * 2 - 1)
    saturation = saturation * (no_colour >= grey)
    to_yiq = torch.tensor(_TO_YIQ, dtype=torch.float64)
    back = torch.linalg.inv(to_yiq).to(x)
    cos, sin, none, one = (
        saturation * turn.cos(),
        saturation * turn.sin(),
        torch.zeros_like(turn),
        torch.ones_like(turn),
    )
    rows = ((one, none, none), (none, cos, -sin), (none, sin, cos))
    inner = torch.stack([torch.stack(row, 1) for row in rows], 1)
    # Brightness, saturation and hue are one matrix for every image: a single pass over the pixels.
    matrix = bright[:, None, None] * (back @ inner @ to_yiq.to(x))
    pixels = (matrix @ x.flatten(2)).clamp_(0, 1)
    level = (to_yiq[0].to(x) @ pixels).mean(1)[:, None, None]
    return torch.lerp(level, pixels, contrast[:, None, None]).clamp_(0, 1).view_as(x)
