"""A classifier of one convolution, batch norm and a linear layer in float64, small enough to be written out by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.models import Classifier

WEIGHTS = {
    "w": "backbone.layer1.weight",
    "g": "backbone.norm.weight",
    "b": "backbone.norm.bias",
    "v": "head.weight",
    "c": "head.bias",
}


class Backbone(nn.Module):
    """Features (B, 6) of x (B, 3, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.layer1(x))).mean((2, 3))


def classifier() -> Classifier:
    """Three classes of 3x6x6 pixels; affine and statistics of the norm are not those of a fresh one."""
    torch.manual_seed(0)
    statistics = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    model = Classifier(Backbone(), 6, 3, name="two_layers", input_size=6, **statistics).double()
    norm = model.backbone.norm
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.add_(torch.randn(6, dtype=torch.float64) / 4)
        norm.running_var.mul_(torch.rand(6, dtype=torch.float64) + 0.5)
    return model


def leaves(model: Classifier) -> dict[str, Tensor]:
    """Copies of the weights, by one letter, to take gradients of."""
    named = dict(model.named_parameters())
    return {short: named[name].detach().clone().requires_grad_() for short, name in WEIGHTS.items()}


def answer(x: Tensor, p: dict[str, Tensor], mean: Tensor | None = None, var: Tensor | None = None) -> Tensor:
    """Logits (B, 3); the norm takes the batch's own statistics unless it is given some."""
    z = F.conv2d((x - 0.5) / 0.25, p["w"], padding=1)
    mean = z.mean((0, 2, 3)) if mean is None else mean
    var = (z - mean.view(1, -1, 1, 1)).square().mean((0, 2, 3)) if var is None else var
    z = (z - mean.view(1, -1, 1, 1)) / (var + 1e-5).sqrt().view(1, -1, 1, 1)
    z = z * p["g"].view(1, -1, 1, 1) + p["b"].view(1, -1, 1, 1)
    return z.clamp(min=0).mean((2, 3)) @ p["v"].T + p["c"]


def log_p(logits: Tensor) -> Tensor:
    """Log-probabilities, from the definition."""
    return logits - logits.exp().sum(1, keepdim=True).log()


def kl(logits: Tensor, others: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(others)) of each image."""
    return (log_p(logits).exp() * (log_p(logits) - log_p(others))).sum(1)


def descend(p: Tensor, gradient: Tensor, lr: float, decay: float) -> Tensor:
    """One first step of gradient descent with decay on matrices."""
    return p.detach() - lr * (gradient + (decay if p.ndim >= 2 else 0.0) * p.detach())
