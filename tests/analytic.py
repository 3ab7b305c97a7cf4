"""Models whose worst case is known in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

DIMS = (3, 8, 8)
# A radius per norm that moves these models' logits by about as much.
EPS = {"linf": 0.05, "l2": 0.5}


class HalfSpace(nn.Module):
    """Two classes, logits (0, w.x + b): an attack on class 1 moves against w."""

    def __init__(self, seed: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        w = torch.randn(math.prod(DIMS), generator=torch.Generator().manual_seed(seed))
        self.w = nn.Parameter(scale * w / w.norm())
        self.b = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1) @ self.w + self.b
        return torch.stack([torch.zeros_like(z), z], dim=1)

    def worst(self, x: Tensor, norm: str, eps: float) -> Tensor:
        """The image in the ball with the smallest logit of class 1, where the box is far away."""
        w = self.w.detach().view(DIMS)
        return x - eps * (w.sign() if norm == "linf" else w / w.norm())


class Affine(nn.Module):
    """``classes`` affine logits: the margin to each other class has a worst case of its own."""

    def __init__(self, classes: int = 5, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, math.prod(DIMS), generator=g) / 8)
        self.bias = nn.Parameter(torch.randn(classes, generator=g))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias

    def worst_margins(self, x: Tensor, y: Tensor, norm: str, eps: float) -> Tensor:
        """The largest logit[j] - logit[y] in the ball, for every class j, (B, classes); 0 at y."""
        logits, w = self(x).detach(), self.weight.detach()
        reach = (w[None] - w[y][:, None]).norm(p=1 if norm == "linf" else 2, dim=2)
        return logits - logits.gather(1, y[:, None]) + eps * reach


class Wavy(Affine):
    """Logits that rise and fall, and so does the loss from step to step; class 0 wins most of the time."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(20 * super().forward(x)) + 1.5 * torch.eye(5)[0]


class Quadratic(nn.Module):
    """Two classes, logits (-|x - c|^2, 0): an attack on class 0 moves away from c."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.c = nn.Parameter(0.4 + 0.2 * torch.rand(DIMS, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x: Tensor) -> Tensor:
        z = -(x - self.c).flatten(1).square().sum(1)
        return torch.stack([z, torch.zeros_like(z)], dim=1)

    def worst(self, x: Tensor, norm: str, eps: float) -> Tensor:
        """The image in the ball furthest from c, where the box is far away."""
        away = (x - self.c).detach()
        length = away.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return x + eps * (away.sign() if norm == "linf" else away / length)


def images(n: int, seed: int = 1, low: float = 0.3, high: float = 0.7) -> Tensor:
    """``n`` images with pixels between low and high, far from the box."""
    return low + (high - low) * torch.rand(n, *DIMS, generator=torch.Generator().manual_seed(seed))


def seed(value: int = 0) -> torch.Generator:
    """A generator that starts from ``value``."""
    return torch.Generator().manual_seed(value)
