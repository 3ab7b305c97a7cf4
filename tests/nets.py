"""Two small networks for 32x32 images and scikit-learn's digits to attack: made by make_nets.py, verdicts beside them.

Shapes: x (n, 3, 32, 32) float32 in [0, 1]; y (n,) int64.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fastadv.sources import enlarge

DATA = Path(__file__).parent / "data"
HELD_OUT = 500


class Steep(nn.Module):
    """Cut to [-1, 1] after a factor: where a unit is cut its gradient is zero, so gradient attacks miss images."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return F.hardtanh(self.factor * x)


class Residual(nn.Module):
    """Two convolutions with batch norm, and the input added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


def plain() -> nn.Sequential:
    """Two strided convolutions and two linear layers, 22,000 weights; so steep that every stage finds work."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, stride=4),
        Steep(8),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        Steep(8),
        nn.Flatten(),
        nn.Linear(512, 32),
        Steep(8),
        nn.Linear(32, 10),
    )


def residual() -> nn.Sequential:
    """A strided stem with steep units, a residual block, a strided convolution and a linear head; 11,000 weights."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, stride=4, bias=False),
        nn.BatchNorm2d(16),
        Steep(3),
        Residual(16),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def ordinary() -> nn.Sequential:
    """:func:`residual` with ReLU in place of the steep units, so that gradients tell the truth. No weights are kept."""
    model = residual()
    model[2] = nn.ReLU()
    return model


NETS = {"plain": plain, "residual": residual}


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 digits at 32x32, in an order of our own; the last ``HELD_OUT`` are not trained on."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    grey = torch.from_numpy(enlarge(found.images, 32).astype(np.float32) / 255)[order]
    return grey[:, None].repeat(1, 3, 1, 1), torch.from_numpy(found.target.astype(np.int64))[order]


def held_out() -> tuple[Tensor, Tensor]:
    """The digits the networks have not seen."""
    x, y = digits()
    return x[-HELD_OUT:], y[-HELD_OUT:]


def load(name: str) -> nn.Sequential:
    """The trained network of that name, in eval mode."""
    model = NETS[name]()
    model.load_state_dict({key: value.float() for key, value in safetensors.torch.load_file(weights(name)).items()})
    return model.eval()


def weights(name: str) -> Path:
    """Where the weights of a network are kept, float16."""
    return DATA / f"{name}.safetensors"
