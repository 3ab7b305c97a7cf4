"""torchattacks' PGD and PGDL2 (3.5.1).

Shapes: images (B, C, H, W) float32; labels (B,) int64; logits (B, classes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastadv import pgd
from fastadv.passes import untouched
from fastadv.threat import Norm, ThreatModel

TargetFunction = Callable[[Tensor, Tensor], Tensor]


class PGD:
    """torchattacks' ``PGD``: linf, images in [0, 1]. Settings are attributes and may be changed between calls.

    Targets, normalised images and the device are set by the methods of the same names as there. The random start draws
    from the global stream, and the same seed gives the same start.
    """

    norm: ClassVar[Norm] = "linf"

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
    ) -> None:
        self.model, self.eps, self.alpha, self.steps, self.random_start = model, eps, alpha, steps, random_start
        self.device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
        self.targeted, self.attack_mode = False, "default"
        self.normalization_used: dict[str, Tensor] | None = None
        self._target: TargetFunction | None = None

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """The adversarial images, on the model's device, in the form of ``images`` (normalised or not)."""
        images, labels = images.detach().to(self.device), labels.detach().to(self.device)
        if self.normalization_used is None:
            return self._attack(self.model, images, labels)
        mean, std = (self.normalization_used[name].to(self.device) for name in ("mean", "std"))
        adv = self._attack(_Normalised(self.model, mean, std), images * std + mean, labels)
        return (adv - mean) / std

    def _attack(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if self._target is not None:
            with untouched(model), torch.no_grad():
                y = self._target(x, y) if self.attack_mode == "targeted(custom)" else self._target(model(x), y)
        settings = pgd.PGD(
            steps=self.steps, step_size=self.alpha, random_start=self.random_start, targeted=self.targeted
        )
        return settings(model, x, y, ThreatModel(self.norm, self.eps))

    def set_device(self, device: torch.device | str) -> None:
        """Move images and labels there; the model is the caller's to move."""
        self.device = torch.device(device)

    def set_normalization_used(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take and give images normalised by these, and attack the pixels behind them."""
        self.normalization_used = {
            "mean": torch.tensor(mean).view(1, -1, 1, 1),
            "std": torch.tensor(std).view(1, -1, 1, 1),
        }

    def get_mode(self) -> str:
        """default, targeted(label), targeted(random), targeted(least-likely) or targeted(custom)."""
        return self.attack_mode

    def set_mode_default(self) -> None:
        """Away from the labels."""
        self._set_mode("default", None)

    def set_mode_targeted_by_label(self, quiet: bool = False) -> None:
        """Towards the labels given."""
        self._set_mode("targeted(label)", None)

    def set_mode_targeted_random(self, quiet: bool = False) -> None:
        """Towards a class other than the label, drawn from the global stream."""
        self._set_mode("targeted(random)", _random_target)

    def set_mode_targeted_least_likely(self, kth_min: int = 1, quiet: bool = False) -> None:
        """Towards the class, other than the label, with the ``kth_min``-th smallest logit."""
        self._set_mode(
            "targeted(least-likely)",
            lambda logits, y: logits.scatter(1, y[:, None], torch.inf).argsort(1)[:, kth_min - 1],
        )

    def set_mode_targeted_by_function(self, target_map_function: TargetFunction, quiet: bool = False) -> None:
        """Towards what the function makes of (images, labels), int64 (B,)."""
        self._set_mode("targeted(custom)", target_map_function)

    def _set_mode(self, mode: str, target: TargetFunction | None) -> None:
        self.attack_mode, self.targeted, self._target = mode, mode != "default", target

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={getattr(self, name)}" for name in ("eps", "alpha", "steps", "random_start"))
        return f"{type(self).__name__}({settings}, attack_mode={self.attack_mode})"


class PGDL2(PGD):
    """torchattacks' ``PGDL2``: l2, images in [0, 1]; otherwise as :class:`PGD`.

    Different on purpose: the random start is uniform in the ball, where the original's radius is uniform, which in many
    dimensions is close to x; and ``eps_for_division`` is not used. The original adds it to the norm of a mean loss's
    gradient, which shortens the steps of images that the model is sure of, by more in larger batches (tried on 400
    images of a small network: 2 % of the pixels then differ by more than 1e-6).
    """

    norm = "l2"

    def __init__(
        self,
        model: nn.Module,
        eps: float = 1.0,
        alpha: float = 0.2,
        steps: int = 10,
        random_start: bool = True,
        eps_for_division: float = 1e-10,
    ) -> None:
        super().__init__(model, eps, alpha, steps, random_start)


class _Normalised(nn.Module):
    """A model of normalised images, as a model of pixels."""

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.model, self.mean, self.std = model, mean, std

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model((x - self.mean) / self.std)
        return logits


def _random_target(logits: Tensor, y: Tensor) -> Tensor:
    """A class other than y, each as likely, drawn as torchattacks draws it."""
    other = ((logits.shape[1] - 1) * torch.rand(len(y))).long().to(y.device)
    return other + (other >= y)
