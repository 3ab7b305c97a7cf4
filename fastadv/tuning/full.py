"""Full fine-tuning: everything learns."""

from __future__ import annotations

from torch import nn

from fastadv.models import Classifier


def full(model: Classifier) -> list[nn.Module]:
    """Let every parameter learn; the whole model runs in train mode."""
    model.requires_grad_(True)
    return [model]
