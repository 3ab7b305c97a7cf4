"""Pre-training: each objective teaches a backbone something, and a stopped run ends in the same bits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastadv import assemble, checkpoint, data, models, pretrain, report, train
from fastadv.average import Average
from fastadv.cli import command
from fastadv.data import ImageSet, Splits
from fastadv.features import features
from fastadv.linear_evaluation import PENALTY, fitted_head, linear_evaluation
from fastadv.neighbours import neighbours_accuracy
from fastadv.pgd import PGD
from fastadv.pretraining import AdversarialRecipe, ContrastiveRecipe, one_step, wide_noise
from fastadv.recipe import Recipe, read_recipe
from fastadv.run import Run
from fastadv.runlog import Progress
from fastadv.strategies import load_all
from fastadv.threat import ThreatModel
from fastadv.trainer import fit

SMALL = {"model": "resnet_micro_64", "image_size": 32, "data": "digits", "precision": "fp32", "eval_steps": 1}
# Two steps per epoch and a checkpoint after each.
FLAGS = [
    *("--model", "resnet_micro_64", "--image-size", "32", "--data", "digits", "--weights", "none"),
    *("--per-class", "2", "--val-images", "10", "--batch-size", "8", "--epochs", "3", "--probe-epochs", "1"),
    *("--eval-steps", "1", "--train-steps", "1", "--precision", "fp32", "--val-every", "1"),
    *("--checkpoint-minutes", "0", "--ema", "0.8"),
]


@pytest.fixture(scope="module", autouse=True)
def no_pictures() -> Any:
    """Pictures and the page take longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report.plots, "curves", lambda *args, **more: None)
        patch.setattr(report, "draw_examples", lambda *args, **more: None)
        patch.setattr(report, "write_page", lambda *args, **more: None)
        yield


@pytest.fixture(scope="module")
def few() -> ImageSet:
    """Fifty labelled digits, five of each class: with many a head on random features does well too."""
    train = data.load("digits", image_size=32).train
    rows = torch.cat([(train.labels == label).nonzero().squeeze(1)[:5] for label in range(10)])
    return ImageSet(train.images[rows], train.labels[rows], train.classes)


def recipe_of(objective: str, **changes: Any) -> Recipe:
    name = f"pretrain-{objective}"
    return dataclasses.replace(load_all()[name].recipe, strategy=name, **{**SMALL, "val_images": 60, **changes})


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        ("standard", {"epochs": 1}),
        ("adversarial", {"epochs": 1, "single_step": "n-fgsm"}),
        ("contrastive", {"epochs": 2, "ema": 0.9}),
        ("adversarial-contrastive", {"epochs": 2, "ema": 0.9}),
    ],
)
def test_each_objective_beats_a_random_backbone(
    objective: str, changes: dict[str, Any], tmp_path: Path, few: ImageSet
) -> None:
    recipe = recipe_of(objective, batch_size=64, lr=3e-3, per_class=60, **changes)
    splits, model = assemble.splits(recipe), assemble.model(recipe, 10)
    _, before = linear_evaluation(model, few, splits.test, recipe)
    stage = next(iter(load_all()[recipe.strategy].stages(recipe)))
    with Progress() as progress, Run(tmp_path / "run", recipe, progress) as run:
        run.begin(splits)
        fit(model, stage, splits, recipe, run)
        run.back_to_best(model)
    _, after = linear_evaluation(model, few, splits.test, recipe)
    # Of 400 images: 5 points are twice the standard error.
    assert after.clean > before.clean + 0.05
    assert after.robust > before.robust + 0.1


def test_a_stopped_contrastive_run_ends_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--objective", "adversarial-contrastive", *FLAGS]
    assert command(pretrain.main, [*argv, "--out", str(tmp_path / "whole"), "--json"]) == 0
    card = json.loads(capsys.readouterr().out.splitlines()[-1])
    saves, averages = [], []
    save = Run.save

    def dies(self: Run, *args: Any) -> None:
        save(self, *args)
        saves.append((self.stage, self.stage_step))
        if len(saves) in (1, 4, 6):
            files, _ = checkpoint.load(checkpoint.steps(self.folder)[-1])
            averages.append(sum(key.endswith(":average") for key in files.get("optimizer.safetensors", ())))
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", dies)
    assert command(pretrain.main, [*argv, "--out", str(tmp_path / "run")]) == 130
    for _ in range(2):
        assert command(pretrain.main, ["--resume", str(tmp_path / "run")]) == 130
    assert command(pretrain.main, ["--resume", str(tmp_path / "run")]) == 0
    whole, again = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "run"))
    assert list(whole) == list(again)
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert card["linear"]["n"] == card["test"]["n"] == 400
    # Anyone who may read a new file may read the weights.
    (tmp_path / "new").touch()
    assert (tmp_path / "whole/weights.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode
    assert not any("projector" in key for key in whole)
    # Inside an epoch, behind the second, in the third; the average of every parameter was among what was saved.
    assert [saves[place] for place in (0, 3, 5)] == [(0, 1), (0, 4), (0, 6)]
    assert min(averages) > 30
    models.load_backbone(models.create("resnet_micro_64", 10, image_size=32), str(tmp_path / "run/weights.safetensors"))


def test_the_average_is_what_is_validated_and_kept(tmp_path: Path) -> None:
    recipe = recipe_of("standard", epochs=1, ema=0.99, per_class=4, val_images=10, batch_size=8)
    splits, model = assemble.splits(recipe), assemble.model(recipe, 10)
    stage = next(iter(load_all()[recipe.strategy].stages(recipe)))
    with Progress() as progress, Run(tmp_path / "run", recipe, progress) as run:
        run.begin(splits)
        fit(model, stage, splits, recipe, run)
        (last,) = checkpoint.steps(run.folder)
    best, _ = checkpoint.load(tmp_path / "run" / "best")
    files, _ = checkpoint.load(last)
    averages = {k.removesuffix(":average"): v for k, v in files["optimizer.safetensors"].items() if ":average" in k}
    assert set(averages) == {name for name, _ in model.named_parameters()}
    for name, average in averages.items():
        assert torch.equal(best["model.safetensors"][name], average), name
        assert torch.equal(files["model.safetensors"][name], model.get_parameter(name)), name
    assert not torch.equal(best["model.safetensors"]["head.weight"], model.head.weight)


def test_an_average_follows_its_formula_and_gives_the_weights_back() -> None:
    layer = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    average = Average({"weight": layer.weight}, optimizer, 0.5)
    values = []
    for step in range(1, 5):
        with torch.no_grad():
            layer.weight.fill_(float(step))
        average.update(step)
        with average.in_place():
            values.append(float(layer.weight[0, 0].detach()))
        assert torch.equal(layer.weight, torch.full((1, 2), float(step)))
    wanted = [1.0]
    for step in range(2, 5):
        decay = min(0.5, (1 + step) / (10 + step))
        wanted.append(decay * wanted[-1] + (1 - decay) * step)
    assert values == pytest.approx(wanted, rel=1e-6)
    with Average({"weight": layer.weight}, optimizer, 0.0).in_place():
        assert float(layer.weight[0, 0].detach()) == 4.0


def test_n_fgsm_steps_by_eps_from_twice_the_noise_and_stays_there() -> None:
    threat = ThreatModel("linf", 8 / 255)
    x = 0.3 + 0.4 * torch.rand(16, 3, 8, 8)
    y = torch.arange(16) % 3
    noisy, labels = wide_noise(x, y, torch.Generator().manual_seed(0), True, threat=threat)
    assert labels is y
    spread = (noisy - x).abs()
    assert 1.9 * threat.eps < float(spread.max()) <= 2 * threat.eps
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    fast = one_step(PGD(), model, length=threat.eps, precision="fp32", compile="off", capture="off")
    adv = fast(noisy, y, threat)
    leaf = noisy.clone().requires_grad_()
    nn.functional.cross_entropy(model(leaf), y, reduction="sum").backward()
    assert leaf.grad is not None
    torch.testing.assert_close(adv, noisy + threat.eps * leaf.grad.sign())
    # Not brought back into the ball around the clean image.
    assert float((adv - x).abs().max()) > 1.5 * threat.eps


def test_a_fitted_head_is_the_optimum_of_what_it_minimises() -> None:
    y = torch.arange(60) % 3
    known = torch.randn(60, 4) * torch.tensor([1.0, 5.0, 0.2, 1.0]) + torch.tensor([3.0, 0.0, 0.0, -7.0])
    known[:, 0] += y
    head = fitted_head(known, y, 3)
    mean, std = known.mean(0), known.std(0, correction=0)
    weight = (head.weight * std).requires_grad_()
    bias = (head.bias + head.weight @ mean).requires_grad_()
    logits = ((known - mean) / std) @ weight.T + bias
    torch.testing.assert_close(logits, head(known), rtol=1e-4, atol=1e-4)
    (nn.functional.cross_entropy(logits, y) + PENALTY * weight.square().sum()).backward()
    assert weight.grad is not None
    assert float(weight.grad.abs().max()) < 1e-3
    accuracy = float((head(known).argmax(1) == y).float().mean())
    assert accuracy > 0.5


def test_neighbours_name_what_lies_beside_them() -> None:
    """Three colours; nine of ten votes of another class lose against what is near."""

    class Colours(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))

    model = models.Classifier(Colours(), 3, 3, name="c", input_size=4, mean=(0, 0, 0), std=(1, 1, 1)).eval()
    labels = torch.arange(90) % 3
    images = torch.zeros(90, 3, 4, 4, dtype=torch.uint8)
    images[torch.arange(90), labels] = 200
    shown = ImageSet(images, labels, ("r", "g", "b"))
    wrong = ImageSet(images, (labels + (torch.arange(90) % 10 == 0)) % 3, ("r", "g", "b"))
    splits = Splits("colours", shown, wrong, shown, (), "train", (), 0)
    assert neighbours_accuracy(model, splits, Recipe()) == {"clean": pytest.approx(0.9)}
    (found,) = features(model, shown, 100)
    torch.testing.assert_close(found.argmax(1), labels)


def refused(
    capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], Any], *argv: str | Path
) -> tuple[int, str, str]:
    code = command(main, [str(arg) for arg in argv])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2, lines
    return code, lines[0].removeprefix("error: "), lines[1].removeprefix("fix: ")


@pytest.mark.parametrize(
    ("objective", "flags", "what", "fix"),
    [
        ("contrastive", ["--batch-size", "1"], "one image has nothing to contrast it with", "--batch-size 2"),
        ("adversarial-contrastive", ["--batch-size", "1"], "nothing to contrast", "--batch-size 2"),
        ("contrastive", ["--temperature", "0"], "temperature is 0", "--temperature takes a positive number"),
        ("contrastive", ["--temperature", "-1"], "temperature is -1", "--temperature takes a positive number"),
        ("contrastive", ["--pairs", "a2a"], "pairs is a2a, which pretrain-contrastive does not use", "--pairs"),
        ("contrastive", ["--loss", "trades"], "loss is trades, which", "--loss"),
        ("contrastive", ["--crop", "0"], "crop is 0", "--crop takes 0.001 to 1"),
        ("contrastive", ["--projector-size", "1"], "projector_size is 1", "--projector-size 2"),
        ("standard", ["--ema", "1"], "ema is 1", "--ema takes at least 0 and below 1"),
        ("adversarial", ["--single-step", "n-fgsm", "--train-steps", "3"], "n-fgsm with 3 steps", "--train-steps 1"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_exit_code_2(
    objective: str, flags: list[str], what: str, fix: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = refused(capsys, pretrain.main, "--objective", objective, *FLAGS, *flags, "--out", tmp_path / "run")
    assert found[0] == 2
    assert what in found[1]
    assert fix in found[2]
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_processes_that_do_not_find_each_other_are_told_how(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    code, what, fix = refused(capsys, pretrain.main, "--objective", "standard", *FLAGS)
    assert (code, "MASTER_ADDR" in what, fix) == (2, True, "start them with torchrun")


def test_recipes_saved_before_there_were_averages_still_load(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(Recipe(strategy="pretrain-adversarial", eps=4 / 255).to_json())
    found = read_recipe(path, AdversarialRecipe)
    assert isinstance(found, AdversarialRecipe)
    assert (found.ema, found.single_step, found.eps) == (0.0, "rs-fgsm", 4 / 255)
    assert isinstance(load_all()["pretrain-contrastive"].recipe, ContrastiveRecipe)


def test_trades_pre_trains_too(tmp_path: Path) -> None:
    recipe = recipe_of(
        "adversarial", epochs=1, loss="trades", label_smoothing=0.1, per_class=2, val_images=10, batch_size=8
    )
    found = train.train(recipe, tmp_path / "run")
    assert found["reports"][0]["n"] == 400


def test_a_run_of_train_is_left_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.json").write_text(load_all()["linear"].recipe.to_json())
    code, what, fix = refused(capsys, pretrain.main, "--resume", tmp_path)
    assert (code, "is one of" in what) == (2, True)
    assert fix == f"python -m fastadv.train --resume {tmp_path}"
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


def test_a_misspelt_objective_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(pretrain.main, []) == 0
    said = capsys.readouterr().out
    assert "--json" in said and "--debug" in said
    code, what, fix = refused(capsys, pretrain.main, "--objectiv", "standard")
    assert (code, what, fix) == (2, "unknown option --objectiv", "did you mean --objective?")
