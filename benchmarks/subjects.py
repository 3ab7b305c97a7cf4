"""What is attacked: two ImageNet models with random weights, and two small models trained here, on digits.

Random weights are good for speed alone; accuracy is counted on the trained ones. Same seed, same model.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from contestants import STEP_SIZE, THREAT
from torch import Tensor, nn

from fastadv import models, tuning
from fastadv.data import ImageSet, in_order, load, shuffled
from fastadv.losses import adversarial_ce
from fastadv.models import Classifier
from fastadv.pgd import PGD

SWIN_TINY, RESNET50, RESNET20 = "swin_tiny_patch4_window7_224", "resnet50", "resnet20_32"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and the images it is attacked on."""

    name: str
    make: Callable[[], Classifier]
    """Made once and kept: take a :func:`twin` of it."""
    batch_size: int
    images: Callable[[], ImageSet] | None = None
    """Images of a task that the model has learned; None: random ones, for speed alone."""

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(x, y) without end; the images of a task in order, over and over."""
        if self.images is None:
            size, noise = models.input_size(self.name), torch.Generator().manual_seed(2)
            while True:
                x = torch.rand(batch_size, 3, size, size, generator=noise)
                yield x, torch.randint(0, 10, (batch_size,), generator=noise)
        images = self.images()
        while True:
            # A ragged batch would be another amount of work.
            yield from (batch for batch in in_order(images, batch_size, "cpu") if len(batch[0]) == batch_size)


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, and a way around them that is padded with zeros where it widens."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)])
        self.stride, self.widening = stride, outer - inner

    def forward(self, x: Tensor) -> Tensor:
        around = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.widening))
        inside = F.relu(self.norms[0](self.first(x)))
        return F.relu(around + self.norms[1](self.second(inside)))


def resnet20(num_classes: int = 10) -> Classifier:
    """The ResNet-20 of He et al. for 32x32 pixels, arXiv:1512.03385, section 4.2: 0.27 M parameters."""
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [Block(a, b, 1 if a == b else 2) for a, b in itertools.pairwise(widths)]
    backbone = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    statistics = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    return Classifier(backbone, 64, num_classes, name=RESNET20, input_size=32, **statistics)


def random_weights(name: str) -> Classifier:
    """A timm model with the random weights it comes with.

    timm starts the last norm of a ResNet's blocks at 0. With anything else there the random ResNet-50 is chaotic: from
    starts one ulp apart, ten steps of one and the same loop end on different signs in 40 % of the pixels.
    """
    torch.manual_seed(0)
    return models.create(name, 10).eval()


def trained(
    make: Callable[[], Classifier], images: ImageSet, learns: tuning.Tuning, *, epochs: int, lr: float
) -> Classifier:
    """A model after a short adversarial training on ``images``: PGD-3, AdamW, a linear decay to zero."""
    torch.manual_seed(0)
    model = make()
    training = learns(model)
    learners = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learners, lr=lr, weight_decay=1e-3, fused=True)
    fast = PGD(steps=3, step_size=1.5 * STEP_SIZE).on(model)
    total, done, size = epochs * (len(images) // 64), 0, 64
    for epoch in range(epochs):
        for x, y in shuffled(images, batch_size=size, seed=0, epoch=epoch, augment=True, device="cpu"):
            optimizer.param_groups[0]["lr"] = lr * (1 - done / total)
            for module in training:
                module.train()
            loss = adversarial_ce(model, x, y, partial(fast, threat=THREAT, wait=False))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            fast.refresh()
            done += 1
    # As its user has it afterwards: everything may learn.
    return model.requires_grad_(True).eval()


def robust_swin() -> Classifier:
    """The shipped small Swin with its robust weights and a fresh head."""
    model = models.create(models.MICRO, 10)
    models.load_backbone(model, "robust")
    return model


def digits(size: int, part: str) -> ImageSet:
    """A split of scikit-learn's digits."""
    images: ImageSet = getattr(load("digits", image_size=size), part)
    return images


def subjects(quick: bool) -> dict[str, Subject]:
    """The four, by name; quick: trained for two updates, which teaches them nothing."""

    def make(learner: Callable[[], Classifier], size: int, learns: tuning.Tuning, epochs: int, lr: float) -> Classifier:
        images = digits(size, "train")
        if quick:
            images, epochs = ImageSet(images.images[:128], images.labels[:128], images.classes, images.flip), 1
        return trained(learner, images, learns, epochs=epochs, lr=lr)

    micro = models.MICRO
    all_four = (
        Subject(name=SWIN_TINY, make=cache(partial(random_weights, SWIN_TINY)), batch_size=4),
        Subject(name=RESNET50, make=cache(partial(random_weights, RESNET50)), batch_size=2),
        # Three epochs and not more: at six 95 % were robust, too near the ceiling to tell attacks apart.
        Subject(
            name=RESNET20,
            make=cache(partial(make, resnet20, 32, tuning.full, 3, 4e-3)),
            images=partial(digits, 32, "test"),
            batch_size=128,
        ),
        Subject(
            name=micro,
            make=cache(partial(make, robust_swin, 64, tuning.linear, 3, 2e-2)),
            images=partial(digits, 64, "test"),
            batch_size=128,
        ),
    )
    return {subject.name: subject for subject in all_four}


def twin(parts: Any) -> Any:
    """A copy with weights of its own, for a side that trains them; of a model, or of a model and modules in it."""
    return copy.deepcopy(parts)
