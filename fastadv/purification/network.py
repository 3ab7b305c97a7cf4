"""The two-layer network with thresholds, and its gradients in closed form.

f(z) = sum_h q_h act(w_h . z, b_h). For classification q is the output layer. For contrastive learning the similarity of
two embeddings, <A' act(W'z), A' act(W'z')>, is the same with q = A A' act(W'z'): one set of attacks serves both.
Shapes: z (R, B, d); w (R, d, m); b (R, 1, m); q (R, 1, m) or (R, B, m); projection A (R, m, r).
Source: arXiv:2401.15248, section 4; "soft" is the symmetric ReLU of Allen-Zhu and Li, arXiv:2005.10190.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastadv.errors import SettingsError

Activation = Literal["soft", "hard"]


@dataclass(frozen=True)
class Hidden:
    """The hidden layer. soft: relu(v - b) - relu(-v - b), b learns. hard: v where |v| > b, else 0; b is fixed."""

    w: Tensor
    b: Tensor
    activation: Activation

    def pre(self, z: Tensor) -> Tensor:
        """v = W'z, (R, B, m)."""
        return torch.bmm(z, self.w)

    def gate(self, v: Tensor) -> Tensor:
        """1.0 where a unit is on, else 0.0: the slope of either activation wherever it has one."""
        # In floats: comparing, selecting and converting bools costs three times as much.
        return v.abs().sub_(self.b).sign_().clamp_(min=0)

    def units(self, v: Tensor) -> Tensor:
        """What the units say at v, (R, B, m)."""
        if self.activation == "soft":
            return v - torch.clamp(v, -self.b, self.b)
        return v * self.gate(v)

    def back(self, slopes: Tensor) -> Tensor:
        """The gradient with respect to z of what has these slopes (R, B, m) with respect to v."""
        return torch.bmm(slopes, self.w.mT)

    def output(self, q: Tensor, z: Tensor) -> Tensor:
        """f(z), (R, B, 1)."""
        return (self.units(self.pre(z)) * q).sum(2, keepdim=True)

    def gradient(self, q: Tensor, z: Tensor) -> Tensor:
        """The gradient of f with respect to z, (R, B, d); exact wherever no unit stands on its threshold."""
        return self.back(self.gate(self.pre(z)) * q)

    def run(self, place: int) -> Hidden:
        """One run alone, with R = 1."""
        return Hidden(self.w[place : place + 1], self.b[place : place + 1], self.activation)


def partner(hidden: Hidden, projection: Tensor | None, other: Tensor) -> Tensor:
    """The q (R, B, m) that makes f(z) the similarity of z with ``other``; without a projection the units compare."""
    said = hidden.units(hidden.pre(other))
    return said if projection is None else torch.bmm(torch.bmm(said, projection), projection.mT)


def constructed(dictionary: Tensor, width: int, threshold: float) -> Hidden:
    """A hard hidden layer (m = d) in which every unit reads exactly ``width`` features with equal weight.

    Its weights in feature space are blocks of Hadamard matrices, so that they stay orthogonal: whatever the width, an
    output layer M'W a = theta exists, and the network says the same without an attack.
    Raises: SettingsError where d is no multiple of ``width`` or ``width`` no power of two.
    """
    d = dictionary.shape[1]
    if width < 1 or width & (width - 1) or d % width:
        raise SettingsError(f"width is {width} with d = {d}", "a power of two that divides d")
    block = torch.ones(1, 1, dtype=dictionary.dtype)
    while len(block) < width:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    mixed = torch.block_diag(*[block / math.sqrt(width)] * (d // width))
    w = dictionary @ mixed
    return Hidden(w, torch.full((len(dictionary), 1, d), threshold, dtype=w.dtype), "hard")


def solving(hidden: Hidden, dictionary: Tensor, theta: Tensor) -> Tensor:
    """The output layer q (R, 1, m) with M'W a = theta, for orthogonal hidden weights."""
    return torch.bmm(torch.bmm(dictionary.mT, hidden.w).mT, theta).mT
