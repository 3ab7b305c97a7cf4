"""Bias tuning: the backbone's biases and the head learn."""

from __future__ import annotations

from torch import nn

from fastadv.models import Classifier


def bias(model: Classifier, *, tables: bool = True) -> list[nn.Module]:
    """Let every bias learn, with ``tables`` also the relative position bias tables of Swin (the paper's includes them).

    The backbone stays in eval mode. Source: TinyTL, arXiv:2007.11622; arXiv:2312.05716 for the tables.
    """
    model.requires_grad_(False)
    for name, parameter in model.backbone.named_parameters():
        parameter.requires_grad_(name.endswith("bias") or (tables and name.endswith("relative_position_bias_table")))
    model.head.requires_grad_(True)
    return [model.head]
