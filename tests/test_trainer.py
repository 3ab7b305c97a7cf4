"""The loop: its parts have known answers, and bad numbers never reach the weights."""

from __future__ import annotations

import dataclasses
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadv import assemble
from fastadv.errors import NumericalError, SettingsError
from fastadv.losses import adversarial_ce
from fastadv.models import Classifier
from fastadv.recipe import Recipe
from fastadv.run import Run
from fastadv.runlog import Progress, read
from fastadv.strategies import Stage
from fastadv.trainer import adamw, check_overfitting, fit, optimizer_of
from fastadv.tuning import full, linear

RECIPE = Recipe(
    weights="none",
    per_class=5,
    val_images=20,
    train_steps=1,
    eval_steps=1,
    epochs=1,
    batch_size=4,
    precision="fp32",
)


def stage(**changes: Any) -> Stage:
    return dataclasses.replace(Stage(name="s", tuning=linear, loss=adversarial_ce, epochs=1, lr=1e-2), **changes)


def run_fit(folder: Path, **changes: Any) -> tuple[Classifier, Run]:
    splits = assemble.splits(RECIPE)
    model = assemble.model(RECIPE, 10)
    with Progress() as progress, Run(folder, RECIPE, progress) as run:
        run.begin(splits)
        fit(model, stage(**changes), splits, RECIPE, run)
    return model, run


def test_decay_is_for_matrices_only() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    model.register_parameter("relative_position_bias_table", nn.Parameter(torch.zeros(9, 3)))
    optimizer = adamw(dict(model.named_parameters()), stage(weight_decay=0.1))
    decayed = [p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]]
    assert [p is model["a"].weight for p in decayed] == [True]


def test_sgd_is_torchs_with_momentum_and_decay_on_matrices() -> None:
    """Fused, and with its rate in a tensor, as a recorded update needs it; found_inf voids a step."""
    ours, plain = nn.Linear(3, 2), nn.Linear(3, 2)
    plain.load_state_dict(ours.state_dict())
    optimizer = optimizer_of(dict(ours.named_parameters()), stage(optimizer="sgd", weight_decay=0.1), 1e-8)
    groups = [{"params": [plain.weight], "weight_decay": 0.1}, {"params": [plain.bias]}]
    other = torch.optim.SGD(groups, lr=1e-2, momentum=0.9, foreach=False)
    x = torch.rand(4, 3)
    for _ in range(3):
        for model, each in ((ours, optimizer), (plain, other)):
            each.zero_grad()
            model(x).square().sum().backward()
            each.step()
    torch.testing.assert_close(ours.weight, plain.weight)
    torch.testing.assert_close(ours.bias, plain.bias)
    before = ours.weight.detach().clone()
    optimizer.grad_scale, optimizer.found_inf = None, torch.ones(())
    optimizer.step()
    assert torch.equal(ours.weight, before)


def test_without_learners_there_is_nothing_to_fit() -> None:
    for kind in ("adamw", "sgd"):
        with pytest.raises(SettingsError, match="stage 's' trains no parameter"):
            optimizer_of({}, stage(optimizer=kind), 1e-8)


def test_a_nan_loss_stops_before_the_update(tmp_path: Path) -> None:
    weights: list[Tensor] = []

    def loss(forward: Any, x: Tensor, y: Tensor, attack: Any) -> Tensor:
        good = adversarial_ce(forward, x, y, attack)
        weights.append(model_of(forward).head.weight.detach().clone())
        return good * float("nan") if len(weights) == 4 else good

    def model_of(forward: Any) -> Classifier:
        return dict(zip(forward.__code__.co_freevars, forward.__closure__, strict=True))["model"].cell_contents

    with pytest.raises(NumericalError, match=r"not finite \(loss nan\) at stage s, step 4; the update was skipped"):
        run_fit(tmp_path / "run", loss=loss)
    # Read one step late: the fifth step saw the weights of the fourth, not NaN.
    assert len(weights) == 5
    assert not torch.equal(weights[2], weights[3])
    assert torch.equal(weights[3], weights[4])


def test_a_nan_weight_is_found_by_the_attack_and_stops_the_run(tmp_path: Path) -> None:
    def broken(model: Classifier) -> list[nn.Module]:
        with torch.no_grad():
            model.backbone.norm.weight[0] = float("nan")
        return linear(model)

    with pytest.raises(NumericalError, match="not finite"):
        run_fit(tmp_path / "run", tuning=broken)


def test_a_parameter_that_gets_exactly_zero_gradient_is_named(tmp_path: Path) -> None:
    class Dead(nn.Module):
        """Two zero factors, as the released RoLI-LoRA starts: neither ever moves."""

        def __init__(self, head: nn.Linear) -> None:
            super().__init__()
            self.head = head
            self.out_features = head.out_features
            self.a, self.b = nn.Parameter(torch.zeros(4, 192)), nn.Parameter(torch.zeros(10, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) + x @ self.a.T @ self.b.T

    def with_dead(model: Classifier) -> list[nn.Module]:
        model.requires_grad_(False)
        model.head = Dead(model.head).requires_grad_(True)
        return [model.head]

    with pytest.raises(SettingsError, match=r"2 parameters should learn .* first head\.a"):
        run_fit(tmp_path / "run", tuning=with_dead)


def test_a_learner_outside_of_the_loss_is_named(tmp_path: Path) -> None:
    def with_stranger(model: Classifier) -> list[nn.Module]:
        training = full(model)
        model.stranger = nn.Parameter(torch.zeros(1))
        return training

    with pytest.raises(SettingsError, match="stranger should learn but is not part of the loss"):
        run_fit(tmp_path / "run", tuning=with_stranger)


def test_catastrophic_overfitting_is_told_from_ordinary_training() -> None:
    check_overfitting({"one_step": 0.40, "robust": 0.30}, 3)
    check_overfitting({"one_step": 0.05, "robust": 0.01}, 3)
    with pytest.raises(NumericalError, match=r"catastrophic overfitting in epoch 4: 80.0% .* 2.0%"):
        check_overfitting({"one_step": 0.80, "robust": 0.02}, 3)


def test_a_stage_that_adds_modules_is_resumed_from_the_end_of_the_one_before(tmp_path: Path) -> None:
    """The checkpoint found there knows nothing of these modules, and they start as in a run that was not killed."""

    def with_branch(model: Classifier) -> list[nn.Module]:
        model.requires_grad_(False)
        model.head = nn.Sequential(model.head, nn.Linear(10, 10)).requires_grad_(True)
        return [model.head]

    splits, stages = assemble.splits(RECIPE), [stage(), stage(name="branch", tuning=with_branch)]
    whole = assemble.model(RECIPE, 10)
    with Progress() as progress, Run(tmp_path / "run", RECIPE, progress, stages=2) as run:
        run.begin(splits)
        fit(whole, stages[0], splits, RECIPE, run)
        run.finish_stage(whole)
        shutil.copytree(tmp_path / "run", tmp_path / "killed")
        fit(whole, stages[1], splits, RECIPE, run)
    torch.manual_seed(1)
    again = assemble.model(RECIPE, 10)
    with Progress() as progress, Run(tmp_path / "killed", RECIPE, progress, stages=2, resume=True) as run:
        run.begin(splits)
        stages[0].tuning(again)
        fit(again, stages[1], splits, RECIPE, run)
    for key, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_the_epoch_is_logged_with_its_accuracies(tmp_path: Path) -> None:
    _, run = run_fit(tmp_path / "run", loss=partial(adversarial_ce, label_smoothing=0.1))
    (epoch,) = [event for event in read(tmp_path / "run" / "log.jsonl") if event["event"] == "epoch"]
    assert epoch["steps"] == 12
    assert {"clean", "robust", "one_step", "loss", "lr", "seconds"} <= epoch.keys()
    assert run.history[0]["clean"] == epoch["clean"]
