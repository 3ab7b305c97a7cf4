"""Recipes: frozen values that round-trip and refuse nonsense."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from fastadv.errors import SettingsError
from fastadv.recipe import Recipe, parse_number, read_recipe, show_pixels


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


@pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), ("0.5", 0.5), ("1", 1.0)])
def test_pixels_are_read_as_the_field_writes_them(text: str, value: float) -> None:
    assert parse_number(text) == value


def test_a_division_by_zero_is_no_number() -> None:
    with pytest.raises(ValueError, match="divides by zero"):
        parse_number("8/0")


def test_pixels_are_shown_as_the_field_writes_them() -> None:
    assert [show_pixels(v) for v in (8 / 255, 0.5, 0.0, 1.0)] == ["8/255", "0.5", "0", "255/255"]


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
