"""benchmarks/autoattack.py: sides take turns on the same images, verdicts are compared, and the table says both."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import autoattack
import nets
import table

from fastadv.attacks.verdicts import SURVIVED
from fastadv.threat import ThreatModel


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = nets.held_out()
    return x[:24], y[:24]


def test_dropping_broken_images_changes_no_verdict_and_a_weaker_side_is_seen(digits) -> None:
    x, y = digits
    case = autoattack.Case("plain", ThreatModel("linf", 0.1), len(x), 12)
    everything, survivors = (partial(autoattack.pgd, drop=drop) for drop in (False, True))
    found = autoattack.take_turns(case, {"everything": everything, "survivors": survivors}, x, y)
    assert found["verdicts_differ"] == 0
    assert found["everything"]["robust"] == found["survivors"]["robust"] < 1
    assert found["n"] == 24 and len(found["speed_up_of_batches"]) == 2

    weak = autoattack.take_turns(case, {"idle": lambda model, x, y, threat: x, "survivors": survivors}, x, y)
    assert weak["verdicts_differ"] > 0
    assert weak["idle"]["robust"] > weak["survivors"]["robust"]


def test_the_table_says_seconds_robust_accuracies_and_differing_verdicts_of_both_sides(digits) -> None:
    x, y = digits
    case = autoattack.Case("plain", ThreatModel("linf", 0.1), len(x), 12)
    sides = {"everything": partial(autoattack.pgd, drop=False), "survivors": partial(autoattack.pgd, drop=True)}
    row = autoattack.take_turns(case, sides, x, y) | {"commit": "c" * 40}
    machine = {"cpu": "a CPU", "threads": 1, "torch": "2", "pyautoattack": "0"}
    renamed = row | {"pyautoattack": row["everything"], "fastadv": row["survivors"]}
    text = table.autoattack({"environment": machine, "cases": {"robust": renamed}, "pgd": {"weak": row}})
    for side in ("everything", "survivors"):
        assert f"{row[side]['cpu_seconds']:.3g} s, {100 * row[side]['robust']:.1f} %" in text
    assert text.count(f"**{row['speed_up']:.2f}x**") == 2
    assert "| robust: linf 0.1, 24 images |" in text and "| weak: linf 0.1, 24 images |" in text
    assert text.endswith("commit ccccccccc.")
    assert "modes" not in text
    both = row | {"parity": row["everything"], "fast": row["survivors"]}
    assert "| steep units: linf 0.1, 24 images |" in table.autoattack(
        {"environment": machine, "cases": {}, "pgd": {}, "parity": {"steep units": both}}
    )


def test_the_verdicts_are_counted_stage_by_stage(tmp_path) -> None:
    found = [-1, 0, 0, 1, 3, SURVIVED, SURVIVED, SURVIVED]
    stages = ["apgd-ce", "apgd-t", "fab-t", "square"]
    run = {"eps": 0.07, "stages": stages, "published": found, "differ": [5]}
    text = table.verdicts({"runs": {"plain linf": run, "swin linf": run | {"eps": 4 / 255}}})
    assert "| plain linf 0.07 | 8 | 7 | 2 | 1 | 0 | 1 | 3 (43 %) | 1 |" in text
    assert "| swin linf 4/255 | 8 |" in text
    page = tmp_path / "results.md"
    page.write_text("<!-- verdicts:begin -->\nold\n<!-- verdicts:end -->\n")
    table.insert(page, {"verdicts": text})
    assert page.read_text() == f"<!-- verdicts:begin -->\n{text}\n<!-- verdicts:end -->\n"
