"""The processes of a torchrun: what each does, what one tells the others, and how all end when one fails."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastadv.cli import exit_code
from fastadv.errors import Elsewhere, NumericalError, SettingsError

# The others wait while the first writes files and draws pictures; a process that died ends the wait at once.
PATIENCE = timedelta(hours=6)


class Share:
    """This process among those that work together; alone without torchrun and without a process group.

    Whatever they exchange, they first meet: who fails meets the others once more, with an exit code, so that nobody
    waits for it in vain.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.speaker: int | None = None
        """Once a process has failed: the first of those that did. Nothing is exchanged any more."""

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return self.rank == 0

    def owns(self, batch: int) -> bool:
        """Whether the batch of that number is for this process."""
        return batch % self.size == self.rank

    def meet(self, asks: int = 0) -> int:
        """Wait for the others; the largest number that any of them ``asks``. Raises Elsewhere if one failed."""
        return self._meet(asks, 0)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leaves when all processes are through. Raises Elsewhere if another failed: nobody waits for it."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise
        self.meet()

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process ends with ``error``. Raises Elsewhere if one before it failed as well."""
        if self.size > 1 and self.speaker is None:
            self._meet(0, exit_code(error))

    def _meet(self, asks: int, code: int) -> int:
        if self.size == 1:
            return asks
        flags = torch.tensor([asks, code, self.size - self.rank if code else 0], device=_device())
        with self._talking():
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        asked, worst, place = flags.tolist()
        if worst:
            self.speaker = self.size - place
            if self.speaker != self.rank:
                raise Elsewhere(worst)
        return int(asked)

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Turns what a broken connection raises into what it means."""
        try:
            yield
        except RuntimeError as error:
            # It cannot be agreed on any more who says so.
            self.speaker = 0
            lost = NumericalError("another process of this run has ended", "see its last words, then --resume the run")
            raise (lost if self.first else Elsewhere(lost.exit_code)) from error

    def add_up(self, tensor: Tensor) -> None:
        """Put the sum over all processes into ``tensor``, in the same bits everywhere."""
        if self.size > 1:
            with self._talking():
                dist.all_reduce(tensor)

    def agree(self, card: Mapping[str, str]) -> None:
        """Raises SettingsError, in every process, unless all pass the same ``card``."""
        if self.size == 1:
            return
        self.meet()
        digest = hashlib.sha256("".join(card.values()).encode()).digest()
        mine = torch.tensor([int.from_bytes(digest[:7])], device=_device())
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with self._talking():
            dist.all_gather(found, mine)
        if any(int(other) != int(mine) for other in found):
            raise SettingsError(
                "the processes were given different models, images or settings",
                "give each the same weights and the whole set: batches are dealt inside",
            )

    def tell(self, batch: int, tensor: Tensor) -> Tensor:
        """``tensor`` as the owner of ``batch`` has it; all processes pass one of the same shape and dtype."""
        if self.size == 1:
            return tensor
        told = tensor.detach().to(_device()).contiguous()
        with self._talking():
            dist.broadcast(told, src=batch % self.size)
        return told.to(tensor.device)

    def tell_bytes(self, data: bytes) -> bytes:
        """``data``, one byte at least, as the first process has them; what the others pass does not matter."""
        if self.size == 1:
            return data
        self.meet()
        length = int(self.tell(0, torch.tensor(len(data))))
        mine = torch.frombuffer(bytearray(data) if self.first else bytearray(length), dtype=torch.uint8)
        return self.tell(0, mine).numpy().tobytes()

    def tell_json(self, value: Any) -> Any:
        """``value``, of JSON's own types, as the first process has it; what the others pass does not matter."""
        return value if self.size == 1 else json.loads(self.tell_bytes(json.dumps(value).encode()))

    @torch.no_grad()
    def spread(self, model: nn.Module) -> None:
        """Give the model the parameters and buffers that it has in the first process."""
        if self.size == 1:
            return
        self.meet()
        for tensor in model.state_dict().values():
            tensor.copy_(self.tell(0, tensor))


ALONE = Share()


@contextmanager
def shared(backend: str = "gloo") -> Iterator[Share]:
    """The share of this process. Under torchrun without a process group one of ``backend`` lives inside.

    Raises SettingsError where the processes do not find each other.
    """
    if dist.is_available() and dist.is_initialized():
        yield Share(dist.get_rank(), dist.get_world_size())
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield Share()
        return
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise SettingsError(f"the processes do not find each other: {reason}", "start them with torchrun") from error
    try:
        yield Share(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@contextmanager
def joined() -> Iterator[Share]:
    """The share of this process for a whole command: only the first one prints, and all end with the same exit code.

    Where some fail, the first of them raises what it met and the others Elsewhere. Nobody leaves before all are done.
    Gradients go through NCCL where every process of this machine has a GPU, which then is its current one; all else
    goes through gloo, for which no host waits for its device.
    """
    own, beside = own_gpu(), int(os.environ.get("LOCAL_WORLD_SIZE", sys.maxsize))
    enough = own is not None and beside <= torch.cuda.device_count()
    if enough:
        torch.cuda.set_device(own)
    with shared("cpu:gloo,cuda:nccl" if enough else "gloo") as share, _quiet(unless=share.first):
        try:
            yield share
            share.meet()
        except BaseException as error:
            share.fail(error)
            raise


def own_gpu() -> int | None:
    """The number of the GPU that torchrun means for this process, there or not; None without torchrun or any GPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not torch.cuda.is_available():
        return None
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None


@contextmanager
def _quiet(*, unless: bool) -> Iterator[None]:
    """Inside, nothing is printed and nobody is warned."""
    if unless:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _device() -> torch.device:
    """Where the process group's tensors live: on the CPU, unless it carries only those of a GPU."""
    on_cpu = "cpu:" in dist.get_backend_config()
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
