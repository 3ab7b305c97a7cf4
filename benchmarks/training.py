"""One adversarial training step as each side makes it, on a model of its own."""

from __future__ import annotations

from typing import Any, cast

import torch
import transcriptions
from contestants import AUTO, CONTESTANTS, FAST, THREAT, Settings
from torch import Tensor, nn

from fastadv import tuning
from fastadv.losses import AttackLoss, Forward, adversarial_ce
from fastadv.models import Classifier
from fastadv.run import Run
from fastadv.strategies import Stage
from fastadv.trainer import adamw, low_precision
from fastadv.update import Guard, Update

SIDES = (FAST, AUTO, "RoLI's loop", "MadryLab's loop", "torchattacks")
STRATEGIES = tuple(name for name in ("full", "linear", "bias", "lora", "adapter", "prompt") if hasattr(tuning, name))
LR = 1e-5


class Ours:
    """fastadv's own step, as :func:`fastadv.trainer.fit` makes it: attack, loss, clipping, health flags, fused AdamW.

    training: the modules in train mode during the update, as the tuning gave them. options: those of ``PGD.on``.
    """

    def __init__(self, model: Classifier, training: list[nn.Module], steps: int, **options: str) -> None:
        self.model, self.training = model, training
        self.noise = torch.Generator(model.mean.device)
        learners = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = adamw(learners, Stage(name="", tuning=tuning.full, loss=self.loss, epochs=1, lr=LR))
        self.fast = Settings(steps=steps).ours().on(model, **options)
        # There is no run to name: the guard asks it for the place alone.
        guard = Guard(learners, 1.0, cast(Run, _Nowhere()))
        forward = low_precision(model, self.fast.precision)
        self.update = Update(self.loss, forward, self.fast, THREAT, self.optimizer, guard)
        self.adv: Tensor | None = None
        """The images of the last step."""

    def loss(self, forward: Forward, x: Tensor, y: Tensor, attack: AttackLoss) -> Tensor:
        """Adversarial cross-entropy, the images kept."""

        def kept(x: Tensor, y: Tensor) -> Tensor:
            self.adv = attack(x, y)
            return self.adv

        return adversarial_ce(forward, x, y, kept)

    def step(self, x: Tensor, y: Tensor, seed: int) -> Tensor:
        """One update from the noise of ``seed``; its loss."""
        for module in self.training:
            module.train()
        return self.update(x, y, self.noise.manual_seed(seed))


class Theirs:
    """The step of RoLI's trainer around any attack; ``autocast`` puts all of it into bf16."""

    def __init__(
        self, model: Classifier, training: list[nn.Module], steps: int, *, name: str, x: Tensor, autocast: bool = False
    ) -> None:
        self.model, self.training, self.autocast = model, training, autocast
        # torch's own default, as its users have it.
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
        self.bound = CONTESTANTS[name].bind(model, Settings(steps=steps), x)
        self.adv: Tensor | None = None

    def attack(self, x: Tensor, y: Tensor) -> Tensor:
        """The images of the attack, kept."""
        self.adv = self.bound(x, y)
        return self.adv

    def step(self, x: Tensor, y: Tensor, seed: int) -> Tensor:
        """One update from the noise of ``seed``; its loss."""
        torch.manual_seed(seed)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            return transcriptions.training_step(self.model, self.training, self.optimizer, x, y, self.attack)


def side(name: str, model: Classifier, training: list[nn.Module], x: Tensor, steps: int) -> Ours | Theirs:
    """The side of that name, one of SIDES."""
    if name in (FAST, AUTO):
        return Ours(model, training, steps, precision="fp32" if name == FAST else "auto")
    return Theirs(model, training, steps, name=name, x=x)


class _Nowhere:
    """What a guard asks when it finds bad numbers: where the run is."""

    def where(self) -> str:
        return "a benchmark"

    def last_good(self) -> Any:
        return "none"
