"""From a recipe to its images and its model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from fastadv import checkpoint, data, models, weightfile
from fastadv.errors import SettingsError
from fastadv.models import Classifier
from fastadv.recipe import Recipe, read_recipe, read_settings
from fastadv.seeds import mix
from fastadv.sharing import own_gpu
from fastadv.strategies import load_all


def device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is the GPU where there is one. Raises SettingsError for one not there.

    Under torchrun ``auto`` and ``cuda`` are a GPU of the process's own.
    """
    own = own_gpu()
    if own is not None and name in ("auto", "cuda"):
        if own >= torch.cuda.device_count():
            raise SettingsError(
                f"process {own + 1} on this machine has no GPU: {torch.cuda.device_count()} here",
                f"torchrun --nproc-per-node {torch.cuda.device_count()}, or --device cpu",
            )
        return torch.device("cuda", own)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"device is {name!r}, which is not here", "--device cpu, or --device auto") from error
    if found.type not in ("cpu", "cuda"):
        raise SettingsError(f"device is {name!r}, which was not tried", "--device cpu, cuda or cuda:N")
    return found


def saved_recipe(folder: Path) -> Recipe:
    """The recipe of the run in ``folder``, of the kind that its strategy uses.

    Raises SettingsError where there is no run, CheckpointError for a damaged recipe.
    """
    path = folder / "recipe.json"
    if not path.exists():
        raise SettingsError(f"no run in {folder}", "give a folder that holds a recipe.json")
    strategy = load_all()[str(read_settings(path).get("strategy"))]
    return read_recipe(path, type(strategy.recipe))


def splits(recipe: Recipe) -> data.Splits:
    """The recipe's train, validation and test images, at the size that the attack is to see."""
    return data.load(
        recipe.data,
        image_size=_data_size(recipe),
        val_images=recipe.val_images,
        per_class=recipe.per_class,
        seed=recipe.seed,
        on_bad_image=recipe.on_bad_image,
    )


def test_images(recipe: Recipe) -> data.ImageSet:
    """The recipe's test images alone, as :func:`splits` gives them."""
    return data.load_test(recipe.data, image_size=_data_size(recipe), on_bad_image=recipe.on_bad_image)[0]


def _data_size(recipe: Recipe) -> int | None:
    return recipe.image_size or (None if recipe.resize else models.input_size(recipe.model))


def model(recipe: Recipe, num_classes: int) -> Classifier:
    """The recipe's classifier before training: backbone weights loaded, what they do not cover drawn by the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(recipe.seed))
        found = models.create(
            recipe.model,
            num_classes,
            resize=recipe.resize,
            drop_path=recipe.drop_path,
            image_size=None if recipe.resize else recipe.image_size,
        )
    models.load_backbone(found, recipe.weights)
    return found


def trained(folder: Path, recipe: Recipe) -> Classifier:
    """The best model of the run in ``folder``, on the CPU, in eval mode, without what only training needs.

    Raises CheckpointError for damaged files.
    """
    state = checkpoint.load(folder / "best")[0]["model.safetensors"]
    found = model(dataclasses.replace(recipe, weights="none"), state["head.weight"].shape[0])
    stages = list(load_all()[recipe.strategy].stages(recipe))
    for stage in stages:
        stage.tuning(found)
    weightfile.match(found.state_dict(), state)
    found.load_state_dict(state, strict=True)
    for stage in stages:
        if stage.scaffold:
            delattr(found, stage.scaffold)
    return found.eval()
