"""A running average of the weights, kept beside the optimiser's state, which every checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

PART = "average"


class Average:
    """The exponential moving average of what learns. Buffers, as batch norm's statistics, are not part of it.

    ``decay`` 0 keeps none. It is less in the first steps, (1 + n) / (10 + n) after n of them, so that the random start
    is soon forgotten.
    """

    def __init__(self, learners: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, decay: float) -> None:
        self.learners: list[Tensor] = list(learners.values())
        self.optimizer, self.decay = optimizer, decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after the stage's update number ``step``, counted from 1. No host sync."""
        if not self.decay:
            return
        for parameter in self.learners:
            state = self.optimizer.state[parameter]
            if PART not in state:
                # Not before the first update: an optimizer makes its state where there is none at all.
                state[PART] = parameter.detach().clone()
        torch._foreach_lerp_(self._kept(), self.learners, 1 - min(self.decay, (1 + step) / (10 + step)))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the average is in the parameters; afterwards what they held before, bit for bit."""
        if not self.decay:
            yield
            return
        before = [parameter.detach().clone() for parameter in self.learners]
        self._put(self._kept())
        try:
            yield
        finally:
            self._put(before)

    def _kept(self) -> list[Tensor]:
        return [self.optimizer.state[parameter][PART] for parameter in self.learners]

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        # In place: stand-ins and recordings hold the addresses.
        torch._foreach_copy_(self.learners, values)
