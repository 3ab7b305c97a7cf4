"""Linear probing: only the head learns."""

from __future__ import annotations

from torch import nn

from fastadv.models import Classifier


def linear(model: Classifier) -> list[nn.Module]:
    """Let only the head learn; the backbone stays in eval mode, so its BatchNorm statistics and drop-path rest."""
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    return [model.head]
