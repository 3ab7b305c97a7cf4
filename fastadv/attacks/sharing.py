"""Batches dealt to the processes of a torchrun, and what each found told to all of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fastadv.errors import NumericalError, SettingsError


@dataclass(frozen=True)
class Share:
    """This process among those that attack together; alone without torchrun and without a process group."""

    rank: int = 0
    size: int = 1

    def owns(self, batch: int) -> bool:
        """Whether the batch of that number is for this process."""
        return batch % self.size == self.rank

    def agree(self, card: Mapping[str, str]) -> None:
        """Raises SettingsError, in every process, unless all pass the same ``card``."""
        if self.size == 1:
            return
        digest = hashlib.sha256("".join(card.values()).encode()).digest()
        mine = torch.tensor([int.from_bytes(digest[:7])], device=_device())
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine)
        if any(int(other) != int(mine) for other in found):
            raise SettingsError(
                "the processes were given different models, images or settings",
                "give each the same weights and the whole set: batches are dealt inside",
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leaves when all processes are through. Raises NumericalError if another failed: nobody waits for it."""
        try:
            yield
        except BaseException:
            self._num_failed(True)
            raise
        if self._num_failed(False):
            raise NumericalError("another process of this run failed", "its own message says how to cure it")

    def _num_failed(self, failed: bool) -> int:
        if self.size == 1:
            return 0
        flag = torch.tensor([int(failed)], device=_device())
        dist.all_reduce(flag)
        return int(flag)

    def tell(self, batch: int, tensor: Tensor) -> Tensor:
        """``tensor`` as the owner of ``batch`` has it; all processes pass one of the same shape and dtype."""
        if self.size == 1:
            return tensor
        told = tensor.to(_device()).contiguous()
        dist.broadcast(told, src=batch % self.size)
        return told.to(tensor.device)


@contextmanager
def shared() -> Iterator[Share]:
    """The share of this process. Under torchrun without a process group a gloo group lives inside."""
    if dist.is_available() and dist.is_initialized():
        yield Share(dist.get_rank(), dist.get_world_size())
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield Share()
        return
    dist.init_process_group("gloo")
    try:
        yield Share(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def _device() -> torch.device:
    """Where the process group's tensors live."""
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
