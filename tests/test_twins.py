"""TWINS: one step against a transcription by hand; two norms in training, one for attack, validation and use."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from two_layers import answer, classifier, descend, leaves, log_p

from fastadv import assemble, strategies
from fastadv.errors import SettingsError
from fastadv.models import Classifier, create
from fastadv.pgd import PGD
from fastadv.recipe import Recipe
from fastadv.run import Run
from fastadv.runlog import Progress
from fastadv.strategies.twins import TwinsRecipe, twins_loss
from fastadv.threat import ThreatModel
from fastadv.trainer import fit, optimizer_of, set_train_mode
from fastadv.tuning.twins import mixed, twins

LR, DECAY = 0.25, 0.125


def learners(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def one_step(model: Classifier, x: Tensor, y: Tensor, weight: float) -> dict[str, Tensor]:
    """The model's state after one step of the strategy on images that no attack has changed."""
    (stage,) = strategies.load_all()["twins"].stages(TwinsRecipe(lr=LR, weight_decay=DECAY, frozen_weight=weight))
    training = stage.tuning(model)
    optimizer = optimizer_of(learners(model), stage, 1e-8)
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"] == 0.9
    assert stage.loss_on is not None
    set_train_mode(model, training)
    stage.loss_on(model)(model, x, y, lambda images, labels: images).backward()
    optimizer.step()
    return model.state_dict()


def by_hand(model: Classifier, x: Tensor, y: Tensor, weight: float) -> dict[str, Tensor]:
    """The same in formulas: two sets of affine weights, statistics of pre-training for the first half of the batch."""
    half, p, norm = len(x) // 2, leaves(model), model.backbone.norm
    before = norm.running_mean.clone(), norm.running_var.clone()
    frozen = {**p, "g": p["g"].detach().clone().requires_grad_(), "b": p["b"].detach().clone().requires_grad_()}
    first = -log_p(answer(x[:half], frozen, *before)).gather(1, y[:half, None]).mean()
    second = -log_p(answer(x[half:], p)).gather(1, y[half:, None]).mean()
    every = [*p.values(), frozen["g"], frozen["b"]]
    new = [
        descend(one, g, LR, DECAY)
        for one, g in zip(every, torch.autograd.grad(weight * first + second, every), strict=True)
    ]
    z = F.conv2d((x[half:] - 0.5) / 0.25, p["w"].detach(), padding=1)
    return {
        "backbone.layer1.weight": new[0],
        "backbone.norm.weight": new[1],
        "backbone.norm.bias": new[2],
        "head.weight": new[3],
        "head.bias": new[4],
        "frozen.0.weight": new[5],
        "frozen.0.bias": new[6],
        "frozen.0.running_mean": before[0],
        "frozen.0.running_var": before[1],
        "frozen.0.num_batches_tracked": torch.tensor(0),
        "backbone.norm.running_mean": 0.9 * before[0] + 0.1 * z.mean((0, 2, 3)),
        "backbone.norm.running_var": 0.9 * before[1] + 0.1 * z.var((0, 2, 3)),
        "backbone.norm.num_batches_tracked": torch.tensor(1),
    }


@pytest.mark.parametrize(("count", "weight"), [(8, 1.0), (7, 0.4)])
def test_a_step_is_the_transcribed_one(count: int, weight: float) -> None:
    model = classifier()
    x, y = torch.rand(count, 3, 6, 6, dtype=torch.float64), torch.arange(count) % 3
    expected = by_hand(model, x, y, weight)
    got = one_step(copy.deepcopy(model), x, y, weight)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        # The learning rate is kept in float32.
        assert (got[name] - value).abs().max() < 1e-7, name
    # The weight is of the frozen half, and the halves are not the other way round.
    for wrong in (
        one_step(copy.deepcopy(model), x, y, weight / 2),
        one_step(copy.deepcopy(model), x.flip(0), y, weight),
    ):
        assert (wrong["frozen.0.bias"] - expected["frozen.0.bias"]).abs().max() > 1e-4


def test_a_single_image_goes_through_the_norms_that_adapt() -> None:
    model = classifier()
    set_train_mode(model, twins(model))
    x, y = torch.rand(1, 3, 6, 6, dtype=torch.float64), torch.tensor([1])
    loss = twins_loss(model)(model, x, y, lambda images, labels: images)
    torch.testing.assert_close(loss, -log_p(answer(x, leaves(model)))[0, 1])
    loss.backward()
    assert all(p.grad is not None for p in learners(model).values())


def test_the_twins_are_in_the_forward_pass_inside_of_mixed_alone() -> None:
    torch.manual_seed(0)
    model = create("resnet_micro_64", 3).eval()
    x = torch.rand(4, 3, 64, 64)
    plain, keys = model(x), set(model.state_dict())
    twins(model)
    with mixed(model, 2):
        # Alike as long as nothing has learned.
        assert torch.equal(model(x), plain)
    for p in model.frozen.parameters():
        p.data.fill_(float("nan"))
    assert torch.equal(model(x), plain)
    with mixed(model, 2):
        out = model(x)
    assert out[:2].isnan().all()
    assert torch.equal(out[2:], plain[2:])
    with pytest.raises(RuntimeError, match="in the middle"), mixed(model, 2):
        raise RuntimeError("in the middle")
    assert torch.equal(model(x), plain)
    assert {name for name in model.state_dict() if not name.startswith("frozen.")} == keys


def test_a_fast_attack_between_two_steps_sees_the_norms_that_adapt() -> None:
    torch.manual_seed(0)
    model = create("resnet_micro_64", 3)
    x, y, threat = torch.rand(4, 3, 64, 64), torch.arange(4) % 3, ThreatModel("linf", 8 / 255)
    training = twins(model)
    fast = PGD(steps=2, random_start=False).on(model, precision="fp32", capture="on")
    for _ in range(3):
        set_train_mode(model, training)
        twins_loss(model)(model, x, y, partial(fast, threat=threat)).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * (torch.zeros_like(p) if p.grad is None else p.grad)
                p.grad = None
    served = create("resnet_micro_64", 3)
    served.load_state_dict({key: v for key, v in model.state_dict().items() if not key.startswith("frozen.")})
    plain = PGD(steps=2, random_start=False)(served, x, y, threat)
    # The fast one folds norms into convolutions: a sign may differ where a gradient is nearly zero.
    assert (fast(x, y, threat) == plain).float().mean() > 0.99


@pytest.mark.parametrize("name", ["swin_micro_64", "vit_tiny_patch16_224"])
def test_a_model_without_batch_norm_is_told_what_to_use(name: str) -> None:
    with torch.device("meta"):
        model = create(name, 3)
    with pytest.raises(SettingsError, match=rf"{name} has no BatchNorm.*(?s:.)*roli-full"):
        twins(model)


def test_settings_that_the_strategy_decides_itself_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"loss is trades, which twins does not use; leave out --loss"):
        list(strategies.load_all()["twins"].stages(TwinsRecipe(strategy="twins", loss="trades")))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_weight_that_cannot_be_meant_is_refused(weight: float) -> None:
    with pytest.raises(SettingsError, match=r"frozen_weight is .*; --frozen-weight takes a positive number"):
        TwinsRecipe(frozen_weight=weight)
    with pytest.raises(SettingsError, match="eps is 8"):
        TwinsRecipe(eps=8.0)


def test_what_is_served_is_a_plain_classifier(tmp_path: Path) -> None:
    """The run's model has no frozen branch, gives what it gave while training, and its file loads as any other."""
    recipe = dataclasses.replace(
        TwinsRecipe(strategy="twins", weights="none", per_class=3, val_images=10, epochs=1, batch_size=7),
        **{"train_steps": 1, "eval_steps": 1, "precision": "fp32", "image_size": 32},
    )
    splits = assemble.splits(recipe)
    (stage,) = strategies.load_all()["twins"].stages(recipe)
    with Progress() as progress, Run(tmp_path / "run", recipe, progress) as run:
        run.begin(splits)
        fit(assemble.model(recipe, 10), stage, splits, recipe, run)
    model = assemble.trained(tmp_path / "run", recipe)
    assert model.state_dict().keys() == create("resnet_micro_64", 10).state_dict().keys()
    x = torch.rand(5, 3, 32, 32)
    both = create("resnet_micro_64", 10, image_size=32)
    twins(both)
    both.load_state_dict(load_file(tmp_path / "run" / "best" / "model.safetensors"))
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    plain = create("resnet_micro_64", 10, image_size=32)
    plain.load_state_dict(load_file(tmp_path / "plain.safetensors"))
    with torch.no_grad():
        assert torch.equal(model(x), both.eval()(x))
        assert torch.equal(model(x), plain.eval()(x))


def test_the_papers_settings_are_the_defaults() -> None:
    recipe = strategies.load_all()["twins"].recipe
    assert isinstance(recipe, TwinsRecipe)
    assert (recipe.optimizer, recipe.schedule, recipe.train_steps) == ("sgd", "drops", 10)
    assert (recipe.frozen_weight, recipe.weight_decay) == (1.0, 1e-5)
    assert (recipe.eps, recipe.step_size) == (Recipe.eps, Recipe.step_size) == (8 / 255, 2 / 255)
