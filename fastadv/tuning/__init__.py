"""Which parameters learn and which modules are added: one file per tuning.

A tuning takes a :class:`~fastadv.models.Classifier`, sets ``requires_grad`` on every parameter, adds its modules, and
gives the modules that run in train mode during an update; all others stay in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fastadv.models import Classifier
from fastadv.tuning.adapter import adapter
from fastadv.tuning.bias import bias
from fastadv.tuning.full import full
from fastadv.tuning.linear import linear
from fastadv.tuning.lora import lora
from fastadv.tuning.prompt import prompt

Tuning = Callable[[Classifier], list[nn.Module]]

__all__ = ["Tuning", "adapter", "bias", "full", "linear", "lora", "prompt"]
