"""The page of a comparison says what the cells found: in its table, its arrows, its curves and its words."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, program
from matplotlib.figure import Figure as Canvas
from matplotlib.text import Annotation
from sample_comparison import DIFFICULT, FIGURE_1, failed, invented, result

from fastadv import comparison_page, svg
from fastadv import comparison_plots as plots
from fastadv.comparison import Comparison
from fastadv.comparison_plots import Panel, Probes, overfitting
from fastadv.comparison_results import Group, Result, groups, table_rows
from fastadv.page import Figure

PHONE, DESK = 390, 1280


def written(folder: Path, whole: Comparison, results: list[Result], classes: int = 10) -> str:
    path = folder / "compare.html"
    comparison_page.write(path, whole, results, dict.fromkeys(whole.data_names, classes))
    return path.read_text(encoding="utf-8")


def plain(text: str) -> str:
    """What the page says, without markup, on one line."""
    body = re.sub(r"<style>.*?</style>|<svg.*?</svg>", " ", text, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", "", body).split())


def headings(text: str) -> list[str]:
    return re.findall(r"<h2[^>]*><a[^>]*>(.*?)</a></h2>", text)


def painted(figure: Figure, wide: bool = True) -> Canvas:
    canvases = []
    svg.draw(lambda canvas: canvases.append(canvas) or figure.paint(canvas, wide), 720, figure.heights[0], "a")
    return canvases[0]


def panel(folder: Path, numbers: dict[str, tuple[int, int]] = FIGURE_1, seeds: int = 1) -> Panel:
    return Panel("digits", groups(invented(folder, numbers, seeds=seeds)[1]))


def arrows(figure: Figure) -> list[tuple[Any, Any]]:
    """Where the arrows of the scatter begin and end."""
    texts = [text for text in painted(figure).axes[0].texts if isinstance(text, Annotation) and text.arrow_patch]
    return [(text.xyann, text.xy) for text in texts]


def test_an_arrow_leads_from_ranli_to_roli_of_every_tuning(tmp_path: Path) -> None:
    found = arrows(plots.scatter(panel(tmp_path), "PGD-10"))
    truth = [
        tuple(tuple(value / 100 for value in FIGURE_1[f"{head}-{tuning}"]) for head in ("ranli", "roli"))
        for tuning in ("full", "adapter", "lora", "bias")
    ]
    assert [pytest.approx(end) for arrow in truth for end in arrow] == [end for arrow in found for end in arrow]


def test_without_its_other_half_a_point_has_no_arrow(tmp_path: Path) -> None:
    few = {name: FIGURE_1[name] for name in ("linear", "roli-full", "ranli-lora")}
    figure = plots.scatter(panel(tmp_path, few), "PGD-10")
    assert arrows(figure) == []
    assert "Arrows" not in figure.caption


def test_every_point_is_named_once_and_names_do_not_cover_each_other(tmp_path: Path) -> None:
    for wide in (True, False):
        canvas = painted(plots.scatter(panel(tmp_path), "PGD-10"), wide)
        canvas.draw_without_rendering()
        named = [text for text in canvas.axes[0].texts if text.get_text()]
        assert sorted(text.get_text() for text in named) == sorted(FIGURE_1)
        boxes = [text.get_window_extent() for text in named]
        crossing = [
            (one, other)
            for place, one in enumerate(boxes)
            for other in boxes[place + 1 :]
            if one.shrunk(0.9, 0.6).overlaps(other.shrunk(0.9, 0.6))
        ]
        assert len(crossing) <= (0 if wide else 2)


def test_the_papers_gains_come_out_as_the_paper_has_them(tmp_path: Path) -> None:
    """The caption of its Figure 1: +3.88 clean, +2.44 robust on average; full fine-tuning alone +7.74 and +6.22."""
    said = comparison_page.verdict([panel(tmp_path)])
    assert re.search(r"From RanLI to RoLI: \+2\.[45] points robust and \+3\.9 clean, on average over 4 pairs", said)
    assert "robust accuracy rises in 4." in said
    assert "Most robust: roli-full on digits (46.3 %)." in said
    assert "full +7.7 clean and +6.2 robust" in plots.scatter(panel(tmp_path), "PGD-10").caption


def test_means_and_spread_are_those_of_the_seeds(tmp_path: Path) -> None:
    whole, results = invented(tmp_path, {"linear": (7000, 3000)}, seeds=3)
    (row,) = table_rows(whole, groups(results))
    # 70, 71, 72: mean 71, standard deviation of a sample 1.
    assert (row["clean %"], row["robust %"], row["seeds"]) == ("71.0 +- 1.0", "31.0 +- 1.0", "3")
    assert (row["encoder"], row["all"], row["seconds"]) == ("770,048", "780,298", "50")
    assert "71.0 \u00b1 1.0" in plain(written(tmp_path, whole, results))
    (group,) = groups(results[:1])
    assert group.spread("clean") is None
    # One seed has no spread: the interval of its images stands there.
    assert table_rows(whole, [group])[0]["clean %"] == "70.0 (69.1-70.9)"


def test_failed_cells_take_no_part_in_means(tmp_path: Path) -> None:
    whole, results = invented(tmp_path, {"linear": (7000, 3000), "autolora": (1, 1)}, seeds=2)
    results = [failed(r.cell, "no stages") if r.cell.strategy == "autolora" or r.cell.seed else r for r in results]
    rows = {row["strategy"]: row for row in table_rows(whole, groups(results))}
    assert (rows["linear"]["clean %"][:4], rows["linear"]["seeds"]) == ("70.0", "1")
    assert (rows["autolora"]["clean %"], rows["autolora"]["seeds"]) == ("-", "0")
    said = plain(written(tmp_path, whole, results))
    assert "Caution. 3 of 4 cells failed. autolora: no stages; linear: no stages." in said


def test_everything_has_its_section_and_nothing_an_empty_one(tmp_path: Path) -> None:
    numbers = {name: FIGURE_1[name] for name in ("linear", "roli-full", "ranli-full")}
    whole, results = invented(tmp_path, {**numbers, "lp-full": (8200, 4300)}, weights=("robust", "standard"))
    text = written(tmp_path, whole, results)
    first = ["The numbers", "Clean against robust", "Over the epochs"]
    last = ["What was set", "What the numbers do not say", "How it was made"]
    assert headings(text) == [*first, "What a probe foretells", *last]
    assert "<script" not in text
    said = plain(text)
    assert "python -m fastadv.compare --strategies &#39;roli-full&#39; --train-steps 2" in said
    assert f"python -m fastadv.compare {tmp_path}" in said
    assert re.search(r"train_steps 2 7\b", said)
    assert "2 seeds" not in said
    assert "1 seed says little" in said
    assert headings(written(tmp_path, *invented(tmp_path, numbers))) == [*first, *last]
    unfinished = [Result(cell=one.cell, row=None) for one in results]
    text = written(tmp_path, whole, unfinished)
    assert headings(text) == last
    assert "8 of 8 cells have no result yet." in plain(text)


@pytest.mark.parametrize(
    ("robust", "gap"),
    [([0.3, 0.5, 0.4], (0.5, 0.4)), ([0.3, None, 0.4], (0.4, 0.4)), ([0.3], None), ([None, None], None)],
)
def test_the_gap_is_best_minus_last_of_the_last_stage(
    robust: list[float | None], gap: tuple[float, float] | None
) -> None:
    probe = [{"stage_index": 0, "robust": 0.9}] * 2
    assert overfitting([*probe, *({"stage_index": 1, "robust": value} for value in robust)]) == gap


def test_the_curves_are_those_of_every_seed(tmp_path: Path) -> None:
    _, results = invented(tmp_path, {"roli-full": (8000, 4000), "ranli-full": (7000, 3000)}, seeds=3)
    figure = plots.curves(Panel("digits", groups(results)), results)
    canvas = painted(figure)
    assert [axes.get_title(loc="left") for axes in canvas.axes[:2]] == ["roli-full", "ranli-full"]
    for axes, probe in zip(canvas.axes[:2], (True, False), strict=True):
        # Three seeds with two curves each, and with a probe a line between the stages for each seed.
        drawn = [line for line in axes.lines if line.get_marker() == "o"]
        assert (len(drawn), len(axes.lines) - len(drawn)) == (6, 3 if probe else 0)
    assert figure.table is not None
    # Best 100 %, last 90 % of 41 or 31, the means.
    assert [row[1:] for row in figure.table.rows] == [("41.0 %", "36.9 %", "4.1"), ("31.0 %", "27.9 %", "3.1")]
    assert "furthest behind the best one in roli-full, by 4.1 points" in figure.caption


def test_what_a_probe_foretells_needs_both_probes(tmp_path: Path) -> None:
    whole, results = invented(tmp_path, {"linear": (7000, 3000), "lp-full": (8000, 3500)}, seeds=2)
    (section,) = (block for block in comparison_page._probes(whole, groups(results)))
    assert isinstance(section, Figure)
    assert section.table is not None
    # The robust accuracy of `linear`, 30 and 31 %, against the clean probe's 80 %.
    assert section.table.rows == [("digits, robust backbone", "80.0 %", "30.5 %")]
    for strategy in ("linear", "lp-full"):
        half = [one for one in results if one.cell.strategy == strategy]
        assert comparison_page._probes(whole, groups(half)) == []
    assert "too few" in plots.foretold([Probes("a", 0.5, 0.2)]).caption
    assert "too few" not in plots.foretold([Probes(name, 0.5, 0.2) for name in "abc"]).caption


def test_a_probe_that_learned_little_is_called_undertrained(tmp_path: Path) -> None:
    whole, results = invented(tmp_path, {"linear": (3000, 1000)})
    assert "Undertrained: on digits, robust backbone the probe reaches 30.0 % clean" in plain(
        written(tmp_path, whole, results, classes=10)
    )
    assert "Undertrained" not in written(tmp_path, whole, results, classes=17)


def test_of_few_classes_a_probe_need_not_be_better_than_all_right(tmp_path: Path) -> None:
    """Five times chance are 167 % of three classes."""
    for clean, classes, under in ((6000, 3, True), (7000, 3, False), (9000, 4, False), (7000, 2, True)):
        whole, results = invented(tmp_path, {"linear": (clean, 1000)})
        assert ("Undertrained" in written(tmp_path, whole, results, classes=classes)) == under, (clean, classes)


def test_cells_of_two_machines_are_told_apart(tmp_path: Path) -> None:
    whole, results = invented(tmp_path, {"linear": (3000, 1000)}, seeds=2)
    assert "The cells differ" not in written(tmp_path, whole, results)
    results[1] = result(results[1].cell, 3000, 1000, device="cuda")
    assert "The cells differ in device" in plain(written(tmp_path, whole, results))


def test_difficult_names_do_no_harm(tmp_path: Path) -> None:
    whole, results = invented(tmp_path, {"linear": (7000, 3000), "lp-full": (8000, 3500)}, data=DIFFICULT)
    whole = dataclasses.replace(whole, commands=("</pre><script>alert(1)</script>",))
    results[0] = failed(results[0].cell, "<script>alert(1)</script> $x_{ \udcff")
    assert "<script" not in written(tmp_path, whole, results)


def test_pages_are_the_same_bytes_for_the_same_results(tmp_path: Path) -> None:
    few = {"linear": (7000, 3000)}
    assert written(tmp_path, *invented(tmp_path, few)) == written(tmp_path, *invented(tmp_path, few))


def test_a_group_of_none_has_no_mean() -> None:
    with pytest.raises(ZeroDivisionError):
        Group(strategy="linear", data="digits", weights="robust", rows=[]).mean("clean")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = program()
    if path is None:
        pytest.skip("needs Chromium, and there is none")
    with Browser(path, tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small comparison, and one with many panels, hard names, and failures."""
    found = {}
    for name in ("few", "many"):
        folder = tmp_path_factory.mktemp(name)
        numbers = {**FIGURE_1, "lp-full": (8200, 4300)} if name == "many" else {"roli-full": (9450, 8000)}
        data = DIFFICULT[1:] if name == "many" else ("digits",)
        whole, results = invented(folder, numbers, data=data, seeds=2 if name == "many" else 1)
        if name == "many":
            results[3] = failed(results[3].cell, "a reason " * 20)
        written(folder, whole, results)
        found[name] = folder / "compare.html"
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("name", ["few", "many"])
def test_a_browser_finds_nothing_wrong(
    browser: Browser, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    view = browser.look(pages[name], width, scheme)
    assert view.wrong == []
    assert view.width == width
    assert (min(view.paper) > 240 and max(view.ink) < 60) == (scheme == "light")
    assert len(browser.picture()) > 10_000
