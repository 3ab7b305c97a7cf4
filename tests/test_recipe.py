"""Recipes: frozen values that round-trip and refuse nonsense."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from fastadv.errors import CheckpointError, SettingsError
from fastadv.recipe import Recipe, parse_number, read_recipe, show_pixels
from fastadv.strategies import load_all


def test_a_recipe_round_trips_through_json_with_its_hash(tmp_path: Path) -> None:
    recipe = Recipe(eps=4 / 255, lr=3e-4, per_class=5)
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    again = read_recipe(tmp_path / "recipe.json")
    assert again == recipe
    assert again.sha256 == recipe.sha256 != Recipe().sha256


def test_an_unknown_saved_field_is_named(tmp_path: Path) -> None:
    saved = json.loads(Recipe().to_json()) | {"train_step": 3}
    (tmp_path / "recipe.json").write_text(json.dumps(saved))
    with pytest.raises(SettingsError, match=r"unknown field 'train_step'.*did you mean 'train_steps'"):
        read_recipe(tmp_path / "recipe.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("epochs", None), ("batch_size", True), ("batch_size", 8.0), ("eps", "8/255"), ("lr", [1]), ("augment", 1)),
        *(("norm", "l3"), ("val_images", "all"), ("data", None), ("beta", {})),
    ],
)
def test_a_saved_value_of_another_kind_is_named(tmp_path: Path, field: str, value: object) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(json.loads(Recipe().to_json()) | {field: value}))
    with pytest.raises(CheckpointError, match=rf"recipe\.json has .* for {field}, which no run writes"):
        read_recipe(tmp_path / "recipe.json")


def test_what_json_may_hold_for_a_field_is_read(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text('{"eps": 0, "beta": 3, "per_class": null, "lr": 1, "augment": false}')
    assert read_recipe(tmp_path / "recipe.json") == Recipe(eps=0, beta=3, per_class=None, lr=1, augment=False)


def test_the_recipe_of_every_strategy_is_read_again(tmp_path: Path) -> None:
    for strategy in load_all().values():
        (tmp_path / "recipe.json").write_text(strategy.recipe.to_json())
        assert read_recipe(tmp_path / "recipe.json", type(strategy.recipe)) == strategy.recipe


@pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), ("0.5", 0.5), ("1", 1.0)])
def test_pixels_are_read_as_the_field_writes_them(text: str, value: float) -> None:
    assert parse_number(text) == value


def test_a_division_by_zero_is_no_number() -> None:
    with pytest.raises(ValueError, match="divides by zero"):
        parse_number("8/0")


def test_pixels_are_shown_as_the_field_writes_them() -> None:
    assert [show_pixels(v) for v in (8 / 255, 0.5, 0.0, 1.0)] == ["8/255", "0.5", "0", "255/255"]
    assert [show_pixels(v, "l2") for v in (1.0, 128 / 255, 0.5)] == ["1", "0.501961", "0.5"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("eps", 8.0, "did you mean 8/255"),
        ("eps", -0.1, "eps"),
        ("eps", float("nan"), "eps"),
        ("train_steps", -1, "--train-steps"),
        ("eval_step_size", -0.1, "--eval-step-size"),
        ("step_size", 2.0, "did you mean 2/255"),
        ("checkpoint_minutes", float("nan"), "--checkpoint-minutes"),
        ("lr", 0.0, "--lr"),
        ("batch_size", 0, "--batch-size"),
        ("warmup", 1.0, "--warmup"),
        ("val_images", 0, "--val-images"),
    ],
)
def test_nonsense_is_refused_with_the_cure(field: str, value: float, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        dataclasses.replace(Recipe(), **{field: value})
