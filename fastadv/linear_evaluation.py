"""What a linear head makes of a frozen backbone, clean and attacked: the usual measure of a pre-training."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv.data import ImageSet
from fastadv.features import features
from fastadv.measure import Report, evaluate
from fastadv.models import Classifier
from fastadv.recipe import Recipe

# Of the summed squares of the weights, beside the mean cross-entropy: enough that the optimum is finite.
PENALTY = 1e-4


def linear_evaluation(model: Classifier, train: ImageSet, test: ImageSet, recipe: Recipe) -> tuple[Classifier, Report]:
    """``model`` with a head fitted to clean training images, and its test accuracies, clean and by the recipe's PGD.

    Images are as they are, without augmentation. The model given is left alone; the one that comes back shares its
    backbone. The same images give the same head.
    """
    size = 4 * recipe.batch_size
    known = torch.cat(list(features(model, train, size)))
    found = copy.copy(model)
    found._modules = {**model._modules, "head": fitted_head(known, train.labels.to(known.device), len(train.classes))}
    report, _ = evaluate(found, test, recipe.eval_attack, recipe.threat, seed=recipe.seed, batch_size=size)
    return found, report


def fitted_head(known: Tensor, y: Tensor, num_classes: int, *, rounds: int = 100) -> torch.nn.Linear:
    """The linear head with the least cross-entropy on features float32 (N, F) and labels int64 (N,), in eval mode.

    By L-BFGS, all images at once, on standardised features with a small penalty on the weights' squares.
    """
    mean, std = known.mean(0), known.std(0, correction=0).clamp(min=1e-6)
    even = (known - mean) / std
    weight = torch.zeros(num_classes, known.shape[1], device=known.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=known.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=rounds, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(even, weight, bias), y) + PENALTY * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    head = torch.nn.Linear(known.shape[1], num_classes, device=known.device).eval().requires_grad_(False)
    head.weight.copy_(weight.detach() / std)
    head.bias.copy_(bias.detach() - head.weight @ mean)
    return head
