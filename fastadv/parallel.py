"""An update that several processes make together: each takes its rows of the batch, and the gradients are added up.

Every process draws the whole batch, its augmentation and the attack's noise, and keeps its own rows of them: the update
is that of a single process, up to the rounding of sums. What is not:
- BatchNorm in train mode sees the process's own rows; the running statistics are the mean over the processes.
- Dropout and drop-path draw for each process anew.
- A loss between images, as NT-Xent, compares those of the process's own rows; TWINS halves them.

Shapes: x (B, C, H, W) float32; y (B,) int64; a batch of views has their number times B rows, all of a view together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastadv.errors import SettingsError
from fastadv.pretraining import ContrastiveRecipe
from fastadv.recipe import Recipe
from fastadv.seeds import mix
from fastadv.sharing import Share
from fastadv.threat import ThreatModel


@dataclass(frozen=True)
class Rows:
    """This process's rows of a batch of ``total`` images: from ``begin`` to before ``end``."""

    begin: int
    end: int
    total: int

    def of(self, batch: Tensor) -> Tensor:
        """Its rows of every view in the whole ``batch``."""
        views: Tensor = batch.unflatten(0, (-1, self.total))
        return views[:, self.begin : self.end].flatten(0, 1)

    def padded(self, rows: Tensor) -> Tensor:
        """A whole batch with ``rows`` in their places and zeros in those of the others."""
        views: Tensor = rows.unflatten(0, (-1, self.end - self.begin))
        whole = views.new_zeros(len(views), self.total, *rows.shape[1:])
        whole[:, self.begin : self.end] = views
        return whole.flatten(0, 1)


@dataclass(frozen=True)
class RowsThreat(ThreatModel):
    """A threat whose random start is that of the whole batch, of which it gives this process's rows."""

    rows: Rows = Rows(0, 1, 1)

    def random_start(self, x: Tensor, eps: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """As in the base class, for the ``x`` of this process's rows: (views times rows, C, H, W)."""
        if eps is not None and len(eps) > 1:
            eps = self.rows.padded(eps)
        started = super().random_start(self.rows.padded(x), eps, generator)
        return torch.empty_like(x).copy_(self.rows.of(started))


class Parallel:
    """What an update does differently where several processes make it; alone it changes nothing."""

    def __init__(self, share: Share, model: nn.Module, learners: dict[str, nn.Parameter]) -> None:
        self.share, self.model, self.parameters = share, model, list(learners.values())
        self.rows = Rows(0, 1, 1)
        self._statistics: list[Tensor] | None = None

    def seed(self, *parts: int) -> int:
        """A seed for what the model draws in this process; that of a run in one process for the first."""
        return mix(*parts, 3, self.share.rank) if self.share.rank else mix(*parts)

    def cut(self, x: Tensor, y: Tensor, images: int) -> tuple[Tensor, Tensor]:
        """This process's rows of a batch of so many images, or of their views; the next update is about them."""
        if self.share.size == 1:
            return x, y
        rank, size = self.share.rank, self.share.size
        self.rows = Rows(images * rank // size, images * (rank + 1) // size, images)
        return self.rows.of(x), self.rows.of(y)

    def threat(self, threat: ThreatModel) -> ThreatModel:
        """``threat`` with the random start of the whole batch."""
        return threat if self.share.size == 1 else RowsThreat(threat.norm, threat.eps, threat.box, self.rows)

    @torch.no_grad()
    def add_up(self, loss: Tensor, broken: Tensor) -> Tensor:
        """The loss of the whole batch; its gradient is then in the parameters, and ``broken`` is set if it is anywhere.

        One exchange, in which every process counts by its rows, so that unequal ones give the mean over all images.
        Raises Elsewhere if another process failed.
        """
        if self.share.size == 1:
            return loss
        if self._statistics is None:
            # Not before the first update: only then are the modules in the mode they train in.
            self._statistics = _running_statistics(self.model)
        tensors = [*(p.grad for p in self.parameters if p.grad is not None), *self._statistics, loss, broken]
        flat = torch.cat([tensor.float().flatten() for tensor in tensors])
        flat.mul_((self.rows.end - self.rows.begin) / self.rows.total)
        # Only now: after it nothing can fail that would leave the others waiting.
        self.share.meet()
        self.share.add_up(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        *changed, whole, worst = [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
        torch._foreach_copy_(tensors[:-2], changed)
        broken.copy_(worst > 0)
        return whole


def check_shares(recipe: Recipe, images: int, size: int) -> None:
    """Raise SettingsError where a batch of the ``images`` to train on leaves one of ``size`` processes without work."""
    least = 2 if isinstance(recipe, ContrastiveRecipe) else 1
    batch = min(recipe.batch_size, images)
    if size > 1 and batch < least * size:
        each = "two images for each" if least == 2 else "an image for each"
        raise SettingsError(
            f"batch_size is {recipe.batch_size}, of {images} training images, for {size} processes",
            f"--batch-size {least * size} or more: {each}; or fewer processes",
        )
    if size > 1 and recipe.device.startswith("cuda:"):
        raise SettingsError(f"device is {recipe.device!r} for {size} processes", "--device auto: a GPU for each")


def _running_statistics(model: nn.Module) -> list[Tensor]:
    """The means and variances that the model's batch norms keep up in its present mode."""
    norms = [part for part in model.modules() if isinstance(part, _BatchNorm) and part.training]
    return [found for norm in norms for found in (norm.running_mean, norm.running_var) if found is not None]
