"""Accuracy of a backbone without a head: the classes of the nearest training images vote."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastadv.data import ImageSet, Splits
from fastadv.features import features
from fastadv.models import Classifier
from fastadv.recipe import Recipe
from fastadv.seeds import generator

# Training images that may vote, and how many of them do.
MOST, VOTES = 5000, 20
# Their votes count by exp(similarity / 0.07): the setting of arXiv:1805.01978, section 3.4.
SHARPNESS = 0.07


def neighbours_accuracy(model: Classifier, splits: Splits, recipe: Recipe) -> dict[str, float]:
    """``{"clean": share}``: how many validation images their 20 nearest training images name right.

    Near by the cosine of the backbone's features, among 5,000 training images at most, the same in every epoch.
    """
    train, val = splits.train, splits.val
    chosen = torch.randperm(len(train), generator=generator("cpu", recipe.seed, len(train)))[:MOST]
    few = ImageSet(train.images[chosen], train.labels[chosen], train.classes)
    size, device = 4 * recipe.batch_size, model.mean.device
    known = torch.cat([F.normalize(found, dim=1) for found in features(model, few, size)])
    labels, asked, start = few.labels.to(device), val.labels.to(device), 0
    right = torch.zeros((), dtype=torch.int64, device=device)
    for found in features(model, val, size):
        near, index = (F.normalize(found, dim=1) @ known.T).topk(min(VOTES, len(known)), dim=1)
        votes = torch.zeros(len(found), len(train.classes), device=device)
        votes.scatter_add_(1, labels[index], (near / SHARPNESS).exp())
        right += (votes.argmax(1) == asked[start : start + len(found)]).sum()
        start += len(found)
    return {"clean": int(right) / len(val)}
