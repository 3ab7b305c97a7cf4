"""Contrastive learning: NT-Xent between views of the same images, and the attack that raises it.

Shapes: a batch of two views is x (2 B, C, H, W) in [0, 1], first views before second ones; projections (views, B, D).
The loss of an image depends on its whole batch: an attack on it keeps every image to its end, whatever it has reached.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.climb import AttackResult
from fastadv.engine import Fast
from fastadv.errors import SettingsError
from fastadv.features import with_head
from fastadv.losses import AttackLoss, Forward, TrainingLoss
from fastadv.models import Classifier
from fastadv.pgd import PGD
from fastadv.registry import did_you_mean
from fastadv.shadow import ShadowPasses

PROJECTOR = "projector"
Pairs = Literal["a2s", "a2a", "ds", "rocl"]
# Those whose attack moves the first view alone.
ONE_VIEW = ("a2s", "rocl")


def check_temperature(temperature: float) -> None:
    """Raise SettingsError for a temperature that similarities cannot be divided by."""
    if not 0 < temperature < math.inf:
        raise SettingsError(f"temperature is {temperature:g}", "--temperature takes a positive number, as in 0.5")


def nt_xent(projections: Tensor, temperature: float = 0.5) -> Tensor:
    """The normalised, temperature-scaled cross-entropy of every view as an anchor, (views, B), from (views, B, D).

    -log exp(s_ij) / sum_k exp(s_ik) over all views k but i itself, s the cosine over the temperature, averaged over the
    other views j of the same image: one of two views (SimCLR), two of three (RoCL).
    Raises: SettingsError for a batch of one image, a single view, or a temperature of 0 or less.
    Source: Chen et al., arXiv:2002.05709, equation 1; several positives as in RoCL, arXiv:2006.07589.
    """
    check_temperature(temperature)
    views, images, _ = projections.shape
    if images < 2:
        raise SettingsError("a batch of 1 image has nothing to contrast it with", "--batch-size 2 or more")
    if views < 2:
        raise SettingsError("1 view has no other to be near to", "give two views of every image, (2, B, D)")
    flat = F.normalize(projections, dim=2).flatten(0, 1)
    near = flat @ flat.T / temperature
    itself = torch.eye(len(near), dtype=torch.bool, device=near.device)
    everything = near.masked_fill(itself, -torch.inf).logsumexp(1).view(views, images)
    # The similarities of views v and w of the same image, (v, image, w).
    same = near.view(views, images, views, images).diagonal(dim1=1, dim2=3).permute(0, 2, 1)
    positive = (same.sum(2) - same.diagonal(dim1=0, dim2=2).T) / (views - 1)
    return everything - positive


class Projector(nn.Sequential):
    """Two linear layers with a ReLU between them: what NT-Xent sees of the features, and no one after training."""

    def __init__(self, num_features: int, hidden: int, size: int) -> None:
        super().__init__(nn.Linear(num_features, hidden), nn.ReLU(), nn.Linear(hidden, size))


def projected(model: Classifier, hidden: int = 512, size: int = 128) -> list[nn.Module]:
    """A tuning: the backbone learns, and behind it a projector that takes the head's place; the head itself rests."""
    model.requires_grad_(True)
    model.head.requires_grad_(False)
    projector = Projector(model.head.in_features, hidden, size).to(model.mean.device)
    setattr(model, PROJECTOR, projector)
    return [model.backbone, projector]


def embedder(model: Classifier) -> nn.Module:
    """``model`` with its projector as its head: (B, C, H, W) -> (B, D). All parameters are the model's own."""
    return with_head(model, model.get_submodule(PROJECTOR))


def contrastive_loss(temperature: float = 0.5) -> TrainingLoss:
    """The mean NT-Xent of two views, a scalar; the attack is not called. ``forward`` gives projections."""
    return partial(_clean, temperature=temperature)


def adversarial_contrastive_loss(pairs: Pairs, temperature: float = 0.5) -> TrainingLoss:
    """The mean NT-Xent of adversarial views, a scalar.

    a2s: the first view attacked, the second as it is. a2a: both attacked. ds: the mean of a2a and the clean pair, in
    one set of batch norms (the source has two). rocl: three views, both clean ones and the first attacked.
    Source: ACL, arXiv:2010.13337 (a2s, a2a, ds); RoCL, arXiv:2006.07589, without its small extra term.
    """
    losses = {"a2s": _adversarial, "a2a": _adversarial, "ds": _dual, "rocl": _three}
    if pairs not in losses:
        raise SettingsError(f"unknown pairs {pairs!r}", did_you_mean(str(pairs), get_args(Pairs)))
    return partial(losses[pairs], temperature=temperature)


def _clean(forward: Forward, x: Tensor, y: Tensor, attack: AttackLoss, temperature: float) -> Tensor:
    return nt_xent(forward(x).unflatten(0, (2, -1)), temperature).mean()


def _adversarial(forward: Forward, x: Tensor, y: Tensor, attack: AttackLoss, temperature: float) -> Tensor:
    return _clean(forward, attack(x, y), y, attack, temperature)


def _dual(forward: Forward, x: Tensor, y: Tensor, attack: AttackLoss, temperature: float) -> Tensor:
    adv = attack(x, y)
    # Two passes: in train mode each pair has the batch norm statistics of its own.
    both = [_clean(forward, pair, y, attack, temperature) for pair in (x, adv)]
    return (both[0] + both[1]) / 2


def _three(forward: Forward, x: Tensor, y: Tensor, attack: AttackLoss, temperature: float) -> Tensor:
    first = attack(x, y)[: len(x) // 2]
    return nt_xent(forward(torch.cat([x, first])).unflatten(0, (3, -1)), temperature).mean()


class BothViews:
    """The attack's loss on both views at once: (projections (2 B, D), y) -> NT-Xent of every anchor, (2 B,)."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, projections: Tensor, y: Tensor) -> Tensor:
        return nt_xent(projections.unflatten(0, (2, -1)), self.temperature).flatten()


class AgainstOther:
    """The attack's loss on one view: (projections (B, D), y) -> NT-Xent of both anchors of every image, (B,).

    ``other``, (B, D), holds the projections of the views that are not attacked.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.other = torch.empty(0)

    def hold(self, other: Tensor) -> None:
        """Take other views; where there is room for them, in place, for recorded work holds the address."""
        if self.other.shape == other.shape and self.other.device == other.device:
            self.other.copy_(other)
        else:
            self.other = other.detach().float().clone()

    def __call__(self, projections: Tensor, y: Tensor) -> Tensor:
        return nt_xent(torch.stack([projections, self.other]), self.temperature).sum(0)


class OnViews(Fast):
    """An attack on both views of a batch of two. Labels are not looked at.

    Where the attack is recorded all batches must be of one size: padding would join in.
    """

    def _attack(self, x: Tensor, y: Tensor, *rest: Any, **how: Any) -> AttackResult:
        # A projection has fewer numbers than there may be classes.
        return super()._attack(x, torch.zeros_like(y), *rest, **how)


class FirstView(OnViews):
    """An attack on the first views of a batch of two; the second ones come back as they are, and stay as they are."""

    def _attack(self, x: Tensor, y: Tensor, *rest: Any, **how: Any) -> AttackResult:
        against, half = cast(AgainstOther, self.attack.loss), len(x) // 2
        passes = ShadowPasses(self.shadow, against, self.attack.mode, 0)
        with passes.opened(x.device), torch.no_grad():
            against.hold(passes.forward(x[half:]).float())
        found = super()._attack(x[:half], y[:half], *rest, **how)
        return found._replace(adv=torch.cat([found.adv, x[half:]]))


def attack_on_views(
    attack: PGD,
    model: nn.Module,
    *,
    pairs: Pairs = "a2a",
    temperature: float = 0.5,
    precision: str = "auto",
    compile: str = "auto",
    capture: str = "auto",
) -> Fast:
    """``attack`` bound to an `embedder`, raising NT-Xent: ``(x, y, threat, generator) -> adv`` on a batch of two views.

    y, (2 B,), is not looked at. What is attacked: see `adversarial_contrastive_loss`.
    """
    loss = AgainstOther(temperature) if pairs in ONE_VIEW else BothViews(temperature)
    settings = dataclasses.replace(attack, loss=loss, keep="last", restarts=1)
    found = settings.on(model, precision=precision, compile=compile, capture=capture)
    kind = FirstView if pairs in ONE_VIEW else OnViews
    return kind(settings, found.shadow, capture=found.recordings.on)
