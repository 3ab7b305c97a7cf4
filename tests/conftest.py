"""Shared fixtures: seeds, tolerances, small networks, and the skip of tests that need a GPU."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Relative and absolute: how far results may lie apart that the same arithmetic, in another order, gives.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2e-2, "atol": 1e-2},
}


class Task(NamedTuple):
    """A trained network and images it has not seen."""

    model: nn.Module
    x: Tensor
    y: Tensor


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The global stream starts from the same point in every test."""
    torch.manual_seed(0)


@pytest.fixture
def tolerance() -> dict[torch.dtype, dict[str, float]]:
    return TOLERANCE


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and there is none")


def tiny_net(classes: int = 10) -> nn.Sequential:
    """A convolutional network for 3x8x8 pixels, with batch norm and dropout: both behave differently in train mode."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.GELU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(256, classes),
    )


@pytest.fixture
def net() -> nn.Sequential:
    """An untrained :func:`tiny_net` in train mode."""
    return tiny_net()


@pytest.fixture(scope="session")
def task() -> Task:
    """A :func:`tiny_net` trained on ten noisy prototypes, near 100 % right on the 400 test images beside it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prototypes = 0.5 + 0.12 * torch.randn(10, 3, 8, 8)

        def draw(n: int) -> tuple[Tensor, Tensor]:
            y = torch.randint(10, (n,))
            return (prototypes[y] + 0.2 * torch.randn(n, 3, 8, 8)).clamp(0, 1), y

        x, y = draw(1000)
        model = tiny_net()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for batch in torch.arange(1000).split(100) * 6:
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        model.zero_grad()
        return Task(model.eval(), *draw(400))
