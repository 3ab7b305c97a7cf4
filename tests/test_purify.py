"""``python -m fastadv.purify``: every experiment once, tiny; what is refused; what is not done twice."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from browser import Browser, program
from PIL import Image

from fastadv.cli import command
from fastadv.errors import SettingsError
from fastadv.purification import laboratory_page, poster, training
from fastadv.purification.lab import Lab, Settings
from fastadv.purification.laboratory import EXPERIMENTS, choose, finished
from fastadv.purification.marks import Mark, Outcome, spread
from fastadv.purification.sparse import SparseCoding, World
from fastadv.purify import main

SMALL = [*("--d", "16"), *("--k", "2"), *("--units", "32"), *("--samples", "40"), *("--batch-size", "16")]
TINY = [*SMALL, *("--steps", "6"), *("--head-steps", "6"), *("--seeds", "2")]


class Ran:
    """A tiny run of everything: its folder, exit code and what was printed."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> None:
        self.folder = folder
        self.code = command(main, [*words, "--out", str(folder)])
        said = capsys.readouterr()
        self.out, self.err = said.out, said.err


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("purify")
    return folder, command(main, ["all", *TINY, "--out", str(folder)])


def refusal(err: str) -> list[str]:
    lines = err.strip().splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["error", "fix"], err
    return lines


def plain(text: str) -> str:
    """What the page says, without markup, on one line."""
    body = re.sub(r"<style>.*?</style>|<svg.*?</svg>", " ", text, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", "", body).split())


def test_every_experiment_has_marks_numbers_and_figures(everything: tuple[Path, int]) -> None:
    folder, code = everything
    assert code == 0
    found = finished(folder)
    assert list(found) == [f"E{number}" for number in range(9)]
    for each in EXPERIMENTS:
        outcome = found[each.key]
        assert outcome.marks and outcome.numbers and not outcome.failure
        assert each.show(outcome.numbers), each.key
    # What needs no training holds at any size.
    assert all(mark.holds for mark in found["E0"].marks)
    assert sum(mark.control for outcome in found.values() for mark in outcome.marks) >= 3


def test_every_number_has_one_value_for_each_seed(everything: tuple[Path, int]) -> None:
    numbers = finished(everything[0])
    for arm in numbers["E2"].numbers["arms"].values():
        assert {len(values) for group in ("purification", "own", "down") for values in arm[group].values()} == {2}
        assert all(0 <= value <= 1 for values in arm["down"].values() for value in values)
    sweep = numbers["E7"].numbers
    assert list(sweep["by_eps"]) == ["0", "0.05", "0.1", "0.2"] and list(sweep["by_d"]) == ["8", "16", "32"]
    assert {len(values) for each in sweep["by_eps"].values() for values in each["down"].values()} == {2}


def test_the_table_is_in_the_csv_and_on_the_page(everything: tuple[Path, int]) -> None:
    folder, _ = everything
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    marks = [mark for outcome in finished(folder).values() for mark in outcome.marks]
    assert [row["claim"] for row in rows] == [mark.claim for mark in marks]
    assert [row["holds"] == "True" for row in rows] == [mark.holds for mark in marks]
    text = (folder / "purify.html").read_text(encoding="utf-8")
    said = plain(text)
    for each in EXPERIMENTS:
        assert f"{each.key} {each.title}" in said
    assert f"{sum(mark.holds for mark in marks)} of {len(marks)} claims hold" in said
    assert "marks are missed" in said and "The settings are not the defaults" in said
    assert "<script" not in text and text.count("<svg") >= 2 * len(EXPERIMENTS)


def test_what_is_done_is_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Ran(tmp_path, capsys, "E0", "E5", *TINY).code == 0
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("E*.json")}
    (tmp_path / "E5.json").unlink()
    again = Ran(tmp_path, capsys, "closed-form", "pairs", *TINY)
    assert again.code == 0
    assert "E0 closed-form: done before" in again.out and re.search(r"E5 pairs: \d of 2 hold", again.out)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("E*.json")}
    assert set(after) == set(before) == {"E0.json", "E5.json"}
    assert [name for name in after if after[name] != before[name]] == ["E5.json"]


def test_the_same_numbers_come_again(everything: tuple[Path, int], tmp_path: Path) -> None:
    lab = Lab(Settings(d=16, k=2, units=32, steps=6, head_steps=6, samples=40, batch_size=16, seeds=2))
    marks, numbers = choose(["E6"])[0].run(lab)
    assert json.loads(json.dumps(numbers)) == finished(everything[0])["E6"].numbers
    assert marks == finished(everything[0])["E6"].marks


def test_other_settings_need_another_folder(everything: tuple[Path, int], capsys: pytest.CaptureFixture[str]) -> None:
    other = Ran(everything[0], capsys, "E0", *TINY, "--eps", "0.1")
    what, fix = refusal(other.err)
    assert other.code == 2 and "eps was 0.2 when" in what and "now it is 0.1" in what and "--out OTHER" in fix


def test_another_version_needs_another_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "settings.json").write_text(json.dumps({"fastadv": "0.0.1"}))
    other = Ran(tmp_path, capsys, "E0", *TINY)
    assert other.code == 2
    what, fix = refusal(other.err)
    assert "fastadv was 0.0.1 when" in what and fix == "fix: --out OTHER"


def test_the_page_is_written_again_from_the_folder(
    everything: tuple[Path, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = everything
    for name in ("settings.json", "E0.json", "E1.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert command(main, ["--page-only", str(tmp_path), "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["experiment"] for row in last["rows"]} == {"E0", "E1"}
    said = plain((tmp_path / "purify.html").read_text(encoding="utf-8"))
    assert "Not done: E2, E3, E4, E5, E6, E7, E8." in said
    assert command(main, ["--page-only", str(tmp_path / "none")]) == 4
    refusal(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["E2", "--d", "16", "--k", "17"], "k is 17 of d = 16 features"),
        (["E2", "--k", "0"], "k is 0"),
        (["E6", "--batch-size", "1"], "batch_size is 1"),
        (["E6", "--temperature", "0"], "temperature is 0"),
        (["E6", "--temperature", "-1"], "temperature is -1"),
        (["E6", "--temperature", "nan"], "temperature is nan"),
        (["E2", "--eps", "0"], "eps is 0"),
        (["E2", "--sigma", "-0.1"], "sigma is -0.1"),
        (["E2", "--units", "0"], "units is 0"),
        (["E2", "--seeds", "0"], "seeds is 0"),
        (["E2", "--steps", "many"], "many"),
        (["E2", "--colour", "red"], "colour"),
        (["E2", "--out"], "--out has no value"),
        (["E22"], "unknown experiment 'E22'"),
        ([*TINY], "no experiment named"),
        (["--page-only", "x", "E0"], "--page-only with names"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(main, words) == 2
    assert said in refusal(capsys.readouterr().err)[0]
    assert not list(tmp_path.iterdir())


def test_a_sweep_refuses_before_it_trains() -> None:
    """Half of the dimension has no room for these active features."""
    with pytest.raises(SettingsError, match="k is 9 of d = 8 features"):
        choose(["sweeps"])[0].run(Lab(Settings(d=16, k=9)))


def test_an_eps_that_ends_training_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dead = Ran(tmp_path / "dead", capsys, "E2", *SMALL, "--steps", "200", "--seeds", "2", "--eps", "20")
    what, fix = refusal(dead.err)
    assert dead.code == 5
    assert "training collapsed at eps = 20, seed 0, 1" in what and "--eps below 0.49" in fix
    said = plain((tmp_path / "dead" / "purify.html").read_text(encoding="utf-8"))
    assert "This experiment failed. Training collapsed at eps = 20" in said
    # A failure is not taken for a result: the next run tries again.
    assert finished(tmp_path / "dead")["E2"].failure


def test_a_training_that_learned_something_is_not_told_to_have_collapsed() -> None:
    world = World(SparseCoding(d=16, k=2), [0])
    settings = training.Training(units=32, steps=200, batch_size=64)
    assert training.supervised(world, settings, [0.0], world.theta(0)).collapsed == [False]
    untrained = training.supervised(world, training.Training(units=32, steps=0), [0.0], world.theta(0))
    assert untrained.collapsed == [True]
    with pytest.raises(training.CollapseError, match="seed 7"):
        training.check_learned(untrained, [7], 0.2, 5)


def test_a_batch_of_one_has_no_pairs() -> None:
    world = World(SparseCoding(d=16, k=2), [0])
    with pytest.raises(SettingsError, match="batch_size is 1 for contrastive pairs"):
        training.contrastive(world, training.Training(units=8, batch_size=1), [0.1])


@pytest.mark.parametrize("attack", ["none", "fgm", "pgd", "smoothed"])
@pytest.mark.parametrize("activation", ["soft", "hard"])
def test_every_kind_of_training_lowers_its_loss(attack: training.Kind, activation: training.Activation) -> None:
    world = World(SparseCoding(d=16, k=2), [0, 1])
    own = {"units": 32, "steps": 60, "batch_size": 64, "activation": activation, "attack": attack}
    theta, start = (
        world.theta(0),
        training.supervised(world, training.Training(**{**own, "steps": 0}), [0] * 2, world.theta(0)),
    )
    for found in (
        training.supervised(world, training.Training(**own), [0.1, 0.1], theta),
        training.contrastive(world, training.Training(**own, projection=8), [0.1, 0.1]),
    ):
        assert found.collapsed == [False, False]
        assert torch.equal(found.hidden.b, start.hidden.b) == (activation == "hard")
        assert found.hidden.b.min() >= 0


def test_a_collapsed_arm_that_was_predicted_is_no_failure(everything: tuple[Path, int]) -> None:
    (mark,) = [mark for mark in finished(everything[0])["E7"].marks if mark.control]
    assert mark.predicted == "training at eps = 0.4 is found to have collapsed"


def test_a_missed_mark_is_on_the_page_with_its_numbers(tmp_path: Path) -> None:
    missed = Mark(claim="Pigs fly", predicted="at 3 m", measured="0.000 \u00b1 0.000", holds=False, control=True)
    held = Mark(claim="Pigs walk", predicted="at 0 m", measured="0.1", holds=True)
    outcomes = {"E0": Outcome(marks=[missed, held], numbers={"differences": {"soft": {"as it is": [0.0]}}})}
    laboratory_page.write(tmp_path / "page.html", Settings(), outcomes, "true")
    said = plain((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "1 of 2 claims hold, 0 of 1 negative controls among them." in said
    assert "1 mark is missed. Pigs fly: predicted at 3 m, measured 0.000 \u00b1 0.000." in said
    assert "The settings are not the defaults" not in said


def test_experiments_are_named_by_key_or_name_in_any_case() -> None:
    assert [each.key for each in choose(["inherit", "e0", "E4"])] == ["E0", "E4"]
    assert choose(["ALL"]) == list(EXPERIMENTS)
    assert len({each.name for each in EXPERIMENTS} | {each.key for each in EXPERIMENTS}) == 2 * len(EXPERIMENTS)


def test_the_help_lists_every_experiment_and_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(main, ["--help"]) == 0
    said = capsys.readouterr().out
    for each in EXPERIMENTS:
        assert f"{each.key}  {each.name}" in said
    for flag in ("--eps ", "--temperature ", "--seeds ", "--batch-size "):
        assert flag in said
    assert command(main, ["E2", "--help"]) == 0 and command(main, []) == 0


def test_a_spread_is_that_of_the_seeds() -> None:
    assert spread([0.5]) == "0.500" and spread([0.4, 0.6]) == "0.500 \u00b1 0.141"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = program()
    if path is None:
        pytest.skip("needs Chromium, and there is none")
    with Browser(path, tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_a_browser_finds_nothing_wrong(browser: Browser, everything: tuple[Path, int], width: int, scheme: str) -> None:
    view = browser.look(everything[0] / "purify.html", width, scheme)
    assert view.wrong == []
    assert view.width == width
    assert (min(view.paper) > 240 and max(view.ink) < 60) == (scheme == "light")


def test_the_picture_shows_two_layers_and_four_heads(everything: tuple[Path, int], tmp_path: Path) -> None:
    folder, _ = everything
    with Image.open(folder / "purification.png") as picture:
        assert picture.size[0] > 1000
    found = finished(folder)
    assert not poster.draw(tmp_path / "none.png", {"E2": found["E2"]}) and not list(tmp_path.iterdir())
