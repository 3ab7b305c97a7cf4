"""What an evaluation is about: the model and images of a run, or a model that was trained elsewhere and its images."""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastadv import assemble, checkpoint
from fastadv.data import ImageSet, load_test
from fastadv.errors import DataError, SettingsError
from fastadv.pgd import PGD
from fastadv.seeds import generator
from fastadv.strategies import load_all
from fastadv.threat import Norm

if TYPE_CHECKING:
    from fastadv.evaluate import Settings


@dataclass(frozen=True, eq=False, kw_only=True)
class Target:
    """A model, the images it is asked about, and how it is attacked where the command line says nothing else."""

    name: str
    model: nn.Module
    images: ImageSet
    norm: Norm
    own_norm: Norm
    """The norm that ``eps`` and ``attack`` are of: the run's, where ``norm`` is another one."""
    eps: float
    attack: PGD
    seed: int
    batch_size: int
    folder: Path
    """Where results go."""
    recipe: dict[str, Any]
    """The settings behind the model, as far as they are known."""


def of_run(folder: Path, settings: Settings) -> Target:
    """The best model of the run in ``folder`` and its test images.

    Warns of a run that is not finished. Raises SettingsError where it has no best model yet, DataError where the data
    does not have the run's classes.
    """
    recipe = assemble.saved_recipe(folder)
    if not (folder / "best").exists():
        raise SettingsError(f"the run in {folder} is not finished", f"finish it with --resume {folder}")
    if checkpoint.newest_meta(folder).get("stage", math.inf) < len(list(load_all()[recipe.strategy].stages(recipe))):
        warnings.warn(f"the run in {folder} is not finished: its best epoch so far is evaluated", stacklevel=2)
    for name in ("weights", "image_size"):
        if getattr(settings, name) is not None:
            raise SettingsError(f"--{name.replace('_', '-')} for a run", "it belongs to --model; a run has its own")
    skips = "skip" in (recipe.on_bad_image, settings.on_bad_image)
    recipe = dataclasses.replace(recipe, data=settings.data or recipe.data, on_bad_image="skip" if skips else "fail")
    check_radius(settings, recipe.norm)
    model = assemble.trained(folder, recipe).to(assemble.device(settings.device))
    images = assemble.test_images(recipe)
    trained_on = checkpoint.read_split(folder)["classes"]
    if list(images.classes) != trained_on:
        other = sorted(set(images.classes) ^ set(trained_on))
        raise DataError(
            f"{recipe.data} does not have the run's {len(trained_on)} classes: {', '.join(other[:5])} differ",
            "--data with the classes that the run was trained on",
        )
    return Target(
        name=folder.resolve().name,
        model=model,
        images=sample(images, settings.images),
        norm=settings.norm or recipe.norm,
        own_norm=recipe.norm,
        eps=recipe.eps,
        attack=recipe.eval_attack,
        seed=recipe.seed if settings.seed is None else settings.seed,
        batch_size=settings.batch_size or 4 * recipe.batch_size,
        folder=folder,
        recipe=dataclasses.asdict(recipe),
    )


def of_model(settings: Settings) -> Target:
    """A timm or torchvision model with its weights and its images. Raises SettingsError where one is not named."""
    name, weights, data = settings.model or "", settings.weights, settings.data
    check_radius(settings, "linf")
    for flag, value in (("--weights", weights), ("--data", data)):
        if value is None:
            raise SettingsError(f"--model {name} without {flag}", "give --weights FILE and --data FOLDER with it")
    assert weights is not None and data is not None
    from fastadv import foreign

    model = foreign.load(name, weights, image_size=settings.image_size)
    images, _ = load_test(data, image_size=settings.image_size or model.input_size, on_bad_image=settings.on_bad_image)
    return Target(
        name=name,
        model=model.to(assemble.device(settings.device)).eval(),
        images=sample(as_classes_of(images, model.num_classes), settings.images),
        norm=settings.norm or "linf",
        own_norm="linf",
        eps=4 / 255,
        attack=PGD(steps=10, step_size=1 / 255, keep="success"),
        seed=settings.seed or 0,
        batch_size=settings.batch_size or 64,
        folder=Path("runs") / f"{name}-{Path(data).name}",
        recipe={"model": name, "weights": weights, "data": data},
    )


def check_radius(settings: Settings, own: Norm) -> None:
    """Raise SettingsError for another norm than the model's ``own`` without a radius: its own says nothing there."""
    if settings.norm not in (None, own) and settings.eps is None:
        common = "0.5" if settings.norm == "l2" else "4/255"
        raise SettingsError(f"norm is {settings.norm} without a radius", f"--eps {common}, or another radius")


def as_classes_of(images: ImageSet, num_classes: int) -> ImageSet:
    """``images`` with the labels of a model with ``num_classes`` outputs.

    Folders in alphabetical order are the classes from 0 on; of ImageNet's 1,000 some are enough where the folders bear
    their WordNet ids. Raises DataError for any other number of classes.
    """
    if len(images.classes) == num_classes:
        return images
    if num_classes == 1000:
        from timm.data.imagenet_info import ImageNetInfo

        names: Any = ImageNetInfo()
        places = {name: place for place, name in enumerate(names.label_names())}
        if all(name in places for name in images.classes):
            return dataclasses.replace(
                images,
                labels=images.labels.new_tensor([places[name] for name in images.classes])[images.labels],
                classes=tuple(places),
            )
    raise DataError(
        f"the data has {len(images.classes)} classes, the model {num_classes}",
        "--data with a folder for every class of the model, in the order of its outputs, or ImageNet's ids as names",
    )


def sample(images: ImageSet, count: int | None) -> ImageSet:
    """``count`` images, drawn once and for all and in the set's order; all for None or if there are fewer.

    The first ones would be those of the first classes where a set lists its images class by class.
    """
    if count is None or count >= len(images):
        # No copy: a set may fill half of the memory.
        return images
    rows = sample_rows(len(images), count)
    return dataclasses.replace(images, images=images.images[rows], labels=images.labels[rows])


def sample_rows(n: int, count: int) -> Tensor:
    """The places of the images that :func:`sample` takes of ``n``, int64, ascending."""
    return torch.randperm(n, generator=generator("cpu", 0))[:count].sort().values
