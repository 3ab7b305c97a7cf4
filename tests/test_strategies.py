"""Every registered strategy trains; what should learn moves, what should not stays bit for bit."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fastadv import assemble, comparison, data, ops, strategies
from fastadv.errors import SettingsError
from fastadv.heads import ranli, zero
from fastadv.losses import clean_ce
from fastadv.models import create
from fastadv.recipe import Recipe
from fastadv.runlog import read
from fastadv.strategies import STRATEGIES, Stage, strategy
from fastadv.strategies.finetune import HEADS, TUNINGS
from fastadv.train import overview, train
from fastadv.tuning import full, linear

NAMES = sorted(strategies.load_all())
# Seconds on one core: 64 training images, 20 for validation and 40 for the test, one or two attack steps.
TINY = {
    "weights": "none",
    "per_class": 7,
    "val_images": 20,
    "train_steps": 2,
    "eval_steps": 1,
    "probe_epochs": 1,
    "epochs": 1,
    "batch_size": 16,
    "precision": "fp32",
}


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digits as a folder of .npz files with few test images."""
    folder, splits = tmp_path_factory.mktemp("digits"), data.load("digits")
    for name, images, count in (("train", splits.train, 300), ("test", splits.test, 40)):
        pixels = images.images[:count].permute(0, 2, 3, 1).numpy()
        np.savez(folder / f"{name}.npz", images=pixels, labels=images.labels[:count].numpy())
    return str(folder)


def in_the_backbone(key: str) -> str:
    """The name a parameter has before a tuning wraps the module it belongs to."""
    return key.replace(".base.", ".").replace(".mlp.mlp.", ".mlp.").replace(".block.", ".")


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_trains_and_only_what_should_moves(name: str, tmp_path: Path, few_digits: str) -> None:
    recipe = dataclasses.replace(strategies.load_all()[name].recipe, strategy=name, data=few_digits, **TINY)
    stages = list(STRATEGIES[name].stages(recipe))
    model = create(recipe.model, 10)
    learns: dict[str, bool] = {}
    for stage in stages:
        stage.tuning(model)
        for key, parameter in model.named_parameters():
            learns[in_the_backbone(key)] = learns.get(in_the_backbone(key), False) or parameter.requires_grad
    before = assemble.model(recipe, 10).state_dict()
    report = train(recipe, tmp_path / "run")
    after = assemble.trained(tmp_path / "run", recipe).state_dict()
    known = [key for key in after if in_the_backbone(key) in before]
    assert len(known) == len(before)
    for key in known:
        inner = in_the_backbone(key)
        statistic = "running_" in key or "num_batches" in key
        # Strategies for BatchNorm networks let everything learn, and its statistics follow.
        assert torch.equal(after[key], before[inner]) != (statistic or learns[inner]), key
    # What a tuning adds learns.
    assert all(learns[key] for key in after if key not in known)
    assert report["reports"][0]["n"] == 40
    began = [event for event in read(tmp_path / "run" / "log.jsonl") if event["event"] == "stage"]
    assert [event["name"] for event in began] == [stage.name for stage in stages]
    # It was the fast body that ran, wherever there is one.
    assert {event["step"] for event in began} == {ops.body("linf_step")} == {"cpp"}
    for file in ("recipe.json", "env.json", "log.jsonl", "report.json", "curves.png", "examples.png", "best"):
        assert (tmp_path / "run" / file).exists(), file


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_says_where_it_comes_from(name: str) -> None:
    chosen = STRATEGIES[name]
    assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", chosen.source)
    assert chosen.summary.endswith(".")
    assert len(inspect.getsource(inspect.getmodule(chosen.stages)).splitlines()) < 80


def test_roli_is_a_probe_and_then_full_finetuning_from_its_head() -> None:
    stages = list(STRATEGIES["roli-full"].stages(Recipe(probe_epochs=3, epochs=5)))
    assert [(s.name, s.tuning, s.epochs) for s in stages] == [("probe", linear, 3), ("finetune", full, 5)]
    assert stages[0].head is ranli
    assert stages[1].head is None
    (only,) = STRATEGIES["ranli-full"].stages(Recipe(epochs=5))
    assert (only.tuning, only.head, only.epochs) == (full, ranli, 5)


def test_every_head_meets_every_tuning() -> None:
    assert {f"{head}-{tuning}" for head in HEADS for tuning in TUNINGS} | {"linear"} <= set(NAMES)
    assert len(HEADS) * len(TUNINGS) == 20
    for tuning, (learns, _, _) in TUNINGS.items():
        heads = {head: list(STRATEGIES[f"{head}-{tuning}"].stages(Recipe())) for head in HEADS}
        assert all(getattr(s[-1].tuning, "func", s[-1].tuning) is learns for s in heads.values())
        assert [stages[-1].head for stages in heads.values()] == [ranli, None, None, zero]
        assert [len(stages) for stages in heads.values()] == [1, 2, 2, 1]
    (probe, _) = STRATEGIES["lp-full"].stages(Recipe())
    # Clean from loss to choice of the best weights.
    assert (probe.tuning, probe.loss.func, probe.robust) == (linear, clean_ce, False)
    assert STRATEGIES["roli-lora"].summary != STRATEGIES["ranli-lora"].summary != STRATEGIES["ranli-bias"].summary


def test_the_papers_attack_is_the_default() -> None:
    recipe = STRATEGIES["roli-full"].recipe
    assert (recipe.train_steps, recipe.eval_steps, recipe.norm) == (7, 10, "linf")
    assert (recipe.eps, recipe.step_size, recipe.eval_step_size) == (8 / 255, 2 / 255, 2 / 255)


def test_the_random_head_is_the_papers() -> None:
    head = torch.nn.Linear(1024, 100)
    ranli(head, torch.Generator().manual_seed(0))
    assert head.weight.std().item() == pytest.approx((2 / 100) ** 0.5, rel=0.01)
    assert head.bias.tolist() == pytest.approx([-4.59512] * 100, abs=1e-5)


def test_a_name_is_registered_once_and_an_unknown_one_gets_a_hint() -> None:
    def again(recipe: Recipe) -> Iterator[Stage]:
        """Never runs."""
        yield from ()

    with pytest.raises(SettingsError, match="'roli-full' is registered already"):
        strategy("roli-full", source="arXiv:2312.05716")(again)
    with pytest.raises(SettingsError, match="unknown strategy 'roli-ful'; did you mean 'roli-full'"):
        STRATEGIES["roli-ful"]


def test_a_strategy_needs_a_docstring() -> None:
    with pytest.raises(SettingsError, match="'silent' has no docstring"):
        strategy("silent", source="arXiv:2312.05716")(lambda recipe: iter(()))
    assert "silent" not in STRATEGIES


def test_a_strategys_own_settings_come_back_from_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Ranked(Recipe):
        """A recipe with a field more."""

        rank: int = 4

    chosen = dataclasses.replace(STRATEGIES["linear"], name="ranked", recipe=Ranked())
    monkeypatch.setitem(STRATEGIES._items, "ranked", chosen)
    recipe = Ranked(strategy="ranked", rank=8)
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    assert assemble.saved_recipe(tmp_path) == recipe


MODULE = """
from fastadv.heads import zero
from fastadv.strategies import Stage, strategy
from fastadv.tuning import linear


@strategy("elsewhere", source="arXiv:0000.00000")
def elsewhere(recipe):
    \"\"\"A probe from a head of zeros.\"\"\"
    yield Stage(name="probe", tuning=linear, epochs=recipe.epochs, lr=recipe.lr, head=zero)
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Another package with an entry point for strategies, as pip leaves it; what is written here is its module."""
    info = tmp_path / "site" / "elsewhere_fastadv-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere-fastadv\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fastadv.strategies]\nelsewhere = elsewhere_fastadv\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    strategies._import_all.cache_clear()
    yield tmp_path / "site" / "elsewhere_fastadv.py"
    strategies._import_all.cache_clear()
    STRATEGIES._items.pop("elsewhere", None)
    sys.modules.pop("elsewhere_fastadv", None)


def test_a_strategy_of_another_package_is_one_like_ours(installed: Path, tmp_path: Path, few_digits: str) -> None:
    installed.write_text(MODULE)
    known = strategies.load_all()
    assert ["elsewhere", "A probe from a head of zeros."] in [
        line.split(maxsplit=1) for line in overview("train", known).splitlines()
    ]
    recipe = dataclasses.replace(known["elsewhere"].recipe, strategy="elsewhere", data=few_digits, **TINY)
    assert train(recipe, tmp_path / "run", page=False)["reports"][0]["n"] == 40
    assert assemble.trained(tmp_path / "run", assemble.saved_recipe(tmp_path / "run")).head.bias.abs().max() > 0
    cell = comparison.Cell(strategy="elsewhere", data="digits", weights="none", seed=0)
    assert comparison.cell_recipe(cell, {}).strategy == "elsewhere"


def test_a_package_that_cannot_be_imported_is_named(installed: Path) -> None:
    installed.write_text("import no_such_module\n")
    with pytest.raises(SettingsError, match=r"strategies of elsewhere-fastadv cannot be imported: No module named"):
        strategies.load_all()


def test_what_is_installed_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 ms each time, and a comparison of sixty cells asks more than a thousand times before it starts one."""
    strategies.load_all()
    monkeypatch.setattr(strategies, "entry_points", None)
    assert strategies.load_all() is STRATEGIES


def test_linear_probing_keeps_the_backbone_in_eval_mode() -> None:
    model = create("resnet18", 3)
    assert linear(model) == [model.head]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
