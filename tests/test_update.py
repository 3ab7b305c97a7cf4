"""A recorded training step leaves the weights that an unrecorded one leaves, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from fastadv import assemble, stopping, trainer
from fastadv.capture import CaptureError, Recorder
from fastadv.errors import NumericalError
from fastadv.losses import adversarial_ce, clean_ce
from fastadv.models import Classifier
from fastadv.recipe import Recipe, read_recipe
from fastadv.run import Run
from fastadv.runlog import Progress
from fastadv.strategies import Stage, load_all
from fastadv.trainer import fit
from fastadv.tuning import full, linear
from fastadv.update import Update

RECIPE = Recipe(
    weights="none",
    per_class=4,
    val_images=10,
    train_steps=2,
    eval_steps=1,
    batch_size=4,
    precision="fp32",
    compile="off",
    checkpoint_minutes=60,
)
STAGE = Stage(name="s", tuning=full, loss=partial(adversarial_ce, label_smoothing=0.1), epochs=1, lr=1e-2)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[Update]:
    """Every Update that fit makes."""
    made: list[Update] = []

    def make(*args: Any) -> Update:
        made.append(Update(*args))
        return made[-1]

    monkeypatch.setattr(trainer, "Update", make)
    return made


def small_swin() -> Classifier:
    """A Swin with drop-path and shifted windows that trains in milliseconds."""
    torch.manual_seed(0)
    options = {"window_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2), "num_classes": 0}
    backbone = SwinTransformer(img_size=64, patch_size=8, drop_path_rate=0.3, **options)
    statistics = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    return Classifier(backbone, 32, 10, name="small_swin", input_size=64, **statistics)


def weights_of(folder: Path, device: str = "cpu", *, resume: bool = False, **changes: Any) -> dict[str, Tensor]:
    """The weights after one stage; ``changes`` to recipe and stage by name."""
    stage = dataclasses.replace(STAGE, **{name: changes.pop(name) for name in ("tuning", "loss") if name in changes})
    recipe = dataclasses.replace(RECIPE, **changes)
    splits = assemble.splits(recipe)
    model = small_swin().to(device)
    with Progress() as progress, Run(folder, recipe, progress, resume=resume) as run:
        run.begin(splits)
        fit(model, stage, splits, recipe, run)
    return model.state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tuning": linear, "precision": "bf16"},
        {"loss": clean_ce},
    ],
    ids=["full", "probe", "clean"],
)
def test_a_recorded_step_is_the_step(
    tmp_path: Path, updates: list[Update], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], device: str
) -> None:
    # A convolution's weight gradient may otherwise be summed in any order.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    off, on = (weights_of(tmp_path / value, device, capture=value, **changes) for value in ("off", "on"))
    assert [update.recorded for update in updates] == [False, True]
    assert updates[1].recorder is not None
    assert updates[1].recorder.graphs == (device == "cuda")
    assert updates[1].attack.captured == (changes.get("loss") is not clean_ce)
    assert same(off, on)
    assert not torch.equal(small_swin().head.weight, on["head.weight"].cpu())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["twins", "autolora", "ranli-full"])
def test_a_step_with_branches_or_a_divergence_is_recorded_too(
    tmp_path: Path, updates: list[Update], monkeypatch: pytest.MonkeyPatch, name: str, device: str
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    chosen, found = load_all()[name], []
    small = {"model": "resnet_micro_64", "image_size": 32, "per_class": 3, "batch_size": 3, "epochs": 1, "lr": 1e-3}
    changes = {**small, "weights": "none", "val_images": 10, "train_steps": 1, "eval_steps": 1, "precision": "fp32"}
    if name == "ranli-full":
        changes["loss"] = "trades"
    for capture in ("off", "on"):
        recipe = dataclasses.replace(chosen.recipe, strategy=name, capture=capture, compile="off", **changes)
        splits, (stage,) = assemble.splits(recipe), chosen.stages(recipe)
        model = assemble.model(recipe, 10).to(device)
        with Progress() as progress, Run(tmp_path / capture, recipe, progress) as run:
            run.begin(splits)
            fit(model, stage, splits, recipe, run)
        found.append(model.state_dict())
    assert [update.recorded for update in updates] == [False, True]
    assert same(*found)


def test_a_recorded_run_is_resumed_in_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weights_of(tmp_path / "whole", capture="on")
    monkeypatch.setattr(stopping, "requested", lambda: True)
    for _ in range(2):
        # Stops after its first step each time, long before anything is recorded.
        with pytest.raises(stopping.Stopped):
            weights_of(tmp_path / "run", capture="on", resume=(tmp_path / "run").exists())
    monkeypatch.undo()
    assert same(weights_of(tmp_path / "run", capture="on", resume=True), whole)


def twice(forward: Any, x: Tensor, y: Tensor, attack: Any) -> Tensor:
    """Averages the loss over two attacks, the second on the images in reverse."""
    return adversarial_ce(forward, x, y, attack) + adversarial_ce(forward, x.flip(0), y.flip(0), attack)


def test_a_loss_with_its_own_way_to_call_the_attack_is_not_recorded_and_says_so(
    tmp_path: Path, updates: list[Update]
) -> None:
    off = weights_of(tmp_path / "off", capture="off", loss=twice, tuning=linear)
    with pytest.warns(UserWarning, match="training steps run without capture: the loss does not call") as caught:
        on = weights_of(tmp_path / "on", capture="on", loss=twice, tuning=linear)
    assert len(caught) == 1
    assert not updates[1].recorded
    assert same(off, on)


def test_a_recording_that_fails_is_one_line_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = weights_of(tmp_path / "off", capture="off", loss=clean_ce, tuning=linear)

    def refuse(recorder: Recorder, work: Any) -> None:
        raise CaptureError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Recorder, "record", refuse)
    with pytest.warns(UserWarning, match="training steps run without capture: operation not permitted") as caught:
        on = weights_of(tmp_path / "on", capture="on", loss=clean_ce, tuning=linear)
    assert len(caught) == 1
    assert same(off, on)


@pytest.mark.parametrize("capture", ["off", "on"])
def test_bad_numbers_of_the_attack_void_the_update_also_in_a_replay(
    tmp_path: Path, updates: list[Update], monkeypatch: pytest.MonkeyPatch, capture: str
) -> None:
    """From the sixth step on the attack reports NaN: that step's update must not happen, and the seventh says so."""
    seen: list[Tensor] = []
    call = Update.__call__

    def counted(update: Update, x: Tensor, y: Tensor, noise: torch.Generator) -> Tensor:
        seen.append(update.guard.parameters[0].detach().clone())
        return call(update, x, y, noise)

    def attacked(update: Update, x: Tensor, y: Tensor, noise: torch.Generator) -> Tensor:
        adv = honest(update, x, y, noise)
        if len(seen) >= 6:
            update.broken.fill_(True)
        return adv

    honest = Update._attacked
    monkeypatch.setattr(Update, "__call__", counted)
    monkeypatch.setattr(Update, "_attacked", attacked)
    with pytest.raises(NumericalError, match=r"not finite .* at stage s, step 6; the update was skipped"):
        weights_of(tmp_path / "run", capture=capture, tuning=linear)
    assert updates[0].recorded == (capture == "on")
    assert not torch.equal(seen[4], seen[5])
    assert torch.equal(seen[5], seen[6])


def test_on_a_cpu_nothing_is_recorded_unless_asked_for(tmp_path: Path, updates: list[Update]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights_of(tmp_path / "run", capture="auto", loss=clean_ce, tuning=linear)
    assert not updates[0].recorded


def test_a_recipe_saved_before_there_was_capture_loads(tmp_path: Path) -> None:
    saved = json.loads(RECIPE.to_json())
    assert (saved.pop("compile"), saved.pop("capture")) == ("off", "auto")
    (tmp_path / "recipe.json").write_text(json.dumps(saved))
    recipe = read_recipe(tmp_path / "recipe.json")
    assert (recipe.compile, recipe.capture) == ("auto", "auto")
