"""How a fresh linear head starts. A head start takes the head and a generator and overwrites the head in place."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

HeadStart = Callable[[nn.Linear, torch.Generator], None]


@torch.no_grad()
def ranli(head: nn.Linear, generator: torch.Generator) -> None:
    """The papers' random head: weights N(0, 2 / classes), biases -log 99, so logits are large from the first step.

    Source: arXiv:2312.05716, released code, ``mlp.py`` (kaiming_normal with fan_out; sigmoid(-log 99) = 1 %).
    """
    std = math.sqrt(2 / head.out_features)
    # Drawn on the CPU whatever the device, so that a seed means the same head everywhere.
    head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * std)
    head.bias.fill_(-math.log(99))


@torch.no_grad()
def small(head: nn.Linear, generator: torch.Generator) -> None:
    """A head for pre-training: weights N(0, 0.02^2), biases 0."""
    head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.02)
    head.bias.zero_()


@torch.no_grad()
def zero(head: nn.Linear, generator: torch.Generator) -> None:
    """A head that says the same of every image: weights and biases 0. A control: how much of a gain is a tame start."""
    head.weight.zero_()
    head.bias.zero_()
