"""The settings of pre-training beyond those of every run, and the single step from wide noise."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastadv.contrastive import Pairs, adversarial_contrastive_loss, check_temperature
from fastadv.engine import Fast
from fastadv.errors import SettingsError
from fastadv.pgd import PGD
from fastadv.recipe import Recipe
from fastadv.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe(Recipe):
    """What every pre-training may set."""

    ema: float = 0.0
    """Decay of the running average of the weights that is validated, kept and exported in their place; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ema < 1:
            raise SettingsError(f"ema is {self.ema:g}", "--ema takes at least 0 and below 1, as in 0.999")


@dataclass(frozen=True, kw_only=True)
class AdversarialRecipe(PretrainRecipe):
    """What supervised adversarial pre-training may set."""

    single_step: Literal["rs-fgsm", "n-fgsm"] = "rs-fgsm"
    """With one step in training: rs-fgsm starts inside of the ball and stays there, n-fgsm steps by eps from noise of
    twice eps and is not brought back (arXiv:2202.01181)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.single_step == "n-fgsm" and (self.train_steps != 1 or self.loss != "at"):
            raise SettingsError(
                f"single_step is n-fgsm with {self.train_steps} steps and loss {self.loss}",
                "--train-steps 1 --loss at, or leave out --single-step",
            )


@dataclass(frozen=True, kw_only=True)
class ContrastiveRecipe(PretrainRecipe):
    """What contrastive pre-training may set; ``batch_size`` counts images, of which each gives two views."""

    temperature: float = 0.5
    """What NT-Xent divides cosines by."""
    pairs: Pairs = "a2s"
    """What is contrasted (adversarial-contrastive): a2s, a first view under attack with a clean second; a2a, both under
    attack; ds, the mean of a2a and a clean pair; rocl, both clean views and the first under attack."""
    projector_hidden: int = 512
    """Width of the projector, which is dropped after training."""
    projector_size: int = 128
    """Numbers that the projector makes of an image."""
    crop: float = 0.2
    """Least share of an image that a view shows."""
    jitter: float = 1.0
    """Strength of the colour jitter: 1 is brightness, contrast and saturation by 0.4 and hue by a tenth; 0 is none."""
    grey: float = 0.2
    """Probability that a view is made grey."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature(self.temperature)
        adversarial_contrastive_loss(self.pairs)
        if self.batch_size < 2:
            raise SettingsError(
                f"batch_size is {self.batch_size}: one image has nothing to contrast it with", "--batch-size 2 or more"
            )
        for name in ("projector_hidden", "projector_size"):
            # An attack asks for two outputs.
            if getattr(self, name) < 2:
                raise SettingsError(f"{name} is {getattr(self, name)}", f"--{name.replace('_', '-')} 2 or more")
        for name, least, most in (("crop", 1e-3, 1), ("jitter", 0, 2), ("grey", 0, 1)):
            if not least <= getattr(self, name) <= most:
                raise SettingsError(f"{name} is {getattr(self, name):g}", f"--{name} takes {least:g} to {most:g}")


def wide_noise(
    x: Tensor, y: Tensor, generator: torch.Generator, flip: bool, *, threat: ThreatModel
) -> tuple[Tensor, Tensor]:
    """The images with noise from a ball twice as wide as the threat's, inside the box, and their labels."""
    return dataclasses.replace(threat, eps=2 * threat.eps).random_start(x, generator=generator), y


def one_step(attack: PGD, model: nn.Module, *, length: float, precision: str, compile: str, capture: str) -> Fast:
    """A single step of ``length`` from the images as they are, on ``model``.

    After `wide_noise` that is N-FGSM: the ball of the step lies around the noisy images, so it brings nothing back.
    """
    single = dataclasses.replace(attack, steps=1, step_size=length, random_start=False)
    return single.on(model, precision=precision, compile=compile, capture=capture)
