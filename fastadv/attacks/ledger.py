"""What an attack can show for each image of a batch so far; float32 is the judge, inside the ball.

Shapes: x, adv (B, C, H, W) float32; y, names, success, loss, places (B,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.attacks.adaptive import refuse_nonfinite
from fastadv.attacks.layout import fast_layout
from fastadv.errors import DataError, SettingsError
from fastadv.inputs import Inputs
from fastadv.losses import margin, misclassified
from fastadv.passes import Passes
from fastadv.pgd import AttackResult
from fastadv.threat import ThreatModel


class Ledger:
    """Opened with the images as they are, it takes what is better: fools the model, else has a larger margin.

    ``passes`` are open while it is used. ``names``, int64 (B,), are the images' numbers in errors and noise. With
    ``fast``, images are laid out as the model answers them fastest.
    """

    def __init__(self, passes: Passes, given: Inputs, threat: ThreatModel, names: Tensor, *, fast: bool) -> None:
        if names.shape != given.y.shape or names.dtype != torch.int64:
            raise DataError(
                f"index is {names.dtype} of shape {tuple(names.shape)} for {len(given.x)} images",
                "pass one whole number per image, int64 (B,), as from torch.arange",
            )
        self.passes, self.threat, self.names = passes, threat, names
        self.given, self.y, self.num_labels = given.x, given.y, given.num_labels
        self.x, self.clean = self._opened(fast_layout(passes.model, given.x) if fast else torch.preserve_format)
        self.adv = self.x.clone()
        refuse_nonfinite(self.clean.isfinite().all(1), names, "for images as they are")
        self.success, self.loss = misclassified(self.clean, self.y), margin(self.clean, self.y)

    def _opened(self, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
        """The images in that layout, and their logits."""
        if not len(self.given):
            # A model need not stand a batch without images.
            return self.given, self.given.new_zeros(0, 2)
        try:
            return self._scored(layout)
        except RuntimeError:
            # A view() in the model that needs the layout given.
            return self._scored(torch.preserve_format)

    def _scored(self, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
        x = torch.empty_like(self.given, memory_format=layout).copy_(self.given)
        before = x._version
        logits = self.passes.score(x)
        if x._version != before:
            # What counts as the image would become another one.
            raise SettingsError("the model writes into its input", "let its forward begin with x = x.clone()")
        return x, logits

    def left(self) -> Tensor:
        """The places of the images that nothing found fools the model on."""
        return (~self.success).nonzero().squeeze(1)

    def offer(self, places: Tensor, images: Tensor, *, only_fooling: bool = False) -> None:
        """Bring ``images``, found for those at ``places``, into the ball, and take what is better.

        Raises: NonFiniteGradientError for logits that are NaN or infinite.
        """
        if not len(places):
            return
        adv = self.threat.project(images, self.x[places])
        logits = self.passes.score(adv)
        refuse_nonfinite(logits.isfinite().all(1), self.names[places], "inside the ball")
        fooled, loss = misclassified(logits, self.y[places]), margin(logits, self.y[places])
        take = fooled if only_fooling else fooled | (loss > self.loss[places])
        places = places[take]
        self.adv[places], self.loss[places], self.success[places] = adv[take], loss[take], fooled[take]

    def refuse(self, bad: Tensor, places: Tensor) -> None:
        """Raise NonFiniteGradientError if an image at ``places`` met NaN or infinity on its way."""
        refuse_nonfinite(~bad, self.names[places], "on the way")

    def result(self) -> AttackResult:
        """What was found, laid out like the images given; the loss is the margin."""
        return AttackResult(torch.empty_like(self.given).copy_(self.adv), self.success, self.loss)
