"""The page of an evaluation says what was found, nothing more, and the same in figures, tables and words."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure as Canvas
from sample_evaluation import FINDINGS, PER_CLASS, invented, report

from fastadv import evaluation_page, svg
from fastadv import evaluation_plots as plots
from fastadv.evaluation_page import Evaluation, verdict
from fastadv.evaluation_plots import ClassCounts
from fastadv.measure import Curve, Stage
from fastadv.page import Figure


def written(folder: Path, evaluation: Evaluation) -> str:
    evaluation_page.write(folder / "page.html", evaluation)
    return (folder / "page.html").read_text(encoding="utf-8")


def headings(text: str) -> list[str]:
    return re.findall(r"<h2[^>]*><a[^>]*>(.*?)</a></h2>", text)


def plain(text: str) -> str:
    """What the page says, without markup, on one line."""
    body = re.sub(r"<style>.*?</style>|<svg.*?</svg>", " ", text, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", "", body).split())


def painted(figure: Figure, wide: bool = True) -> Canvas:
    """The matplotlib figure that is drawn into the page."""
    canvases = []
    svg.draw(lambda canvas: canvases.append(canvas) or figure.paint(canvas, wide), 720, figure.heights[0], "a")
    return canvases[0]


def smallest(**changes: Any) -> Evaluation:
    settings: dict[str, Any] = {"reports": [report(400, 378, 320)], "classes": ("a", "b"), "environment": {}}
    return Evaluation(title="small", command="true", **{**settings, **changes})


def test_the_verdict_is_one_sentence_with_its_conditions() -> None:
    assert verdict(smallest()) == (
        "Of 400 images 94.5 % (91.8-96.3) are classified right; 80.0 % (75.8-83.6) stay right when PGD-10 may change "
        "every pixel by up to 8/255."
    )
    far = smallest(reports=[report(400, 378, 320, norm="l2", eps=0.5)])
    assert verdict(far).endswith("when PGD-10 may change the image by up to 0.5 in Euclidean length.")


def test_the_headline_is_the_strongest_attack_at_the_first_threat() -> None:
    weak, strong = report(400, 378, 320), report(400, 378, 310, attack="AutoAttack standard")
    larger, other = report(400, 378, 10, eps=16 / 255), report(400, 378, 10, norm="l2")
    assert smallest(reports=[weak, larger, strong, other]).headline is strong


def test_a_plain_evaluation_has_no_empty_sections(tmp_path: Path) -> None:
    text = written(tmp_path, smallest())
    assert headings(text) == ["The numbers", "What the numbers do not say", "How it was made"]
    assert "No checks for hidden gradients were made." in text
    assert "PGD alone tends to overstate robustness." in plain(text)
    assert "Caution" not in text


def test_everything_has_its_section(tmp_path: Path) -> None:
    text = written(tmp_path, invented())
    said = plain(text)
    assert headings(text) == [
        *("The numbers", "Accuracy against the radius", "Class by class", "Most fragile and most stable"),
        *("Stage by stage", "Checks", "What the numbers do not say", "Recipe", "How it was made"),
    ]
    for finding in FINDINGS:
        assert f"{evaluation_page.OUTCOMES[finding.passed]} {finding.name} {finding.sentence}" in said
    assert "Caution. 1 of 2 checks is suspicious: gradient-free." in said
    assert "AutoAttack standard noticed: 3 images have zero gradients" in said
    assert "A further note." in said
    assert "python -m fastadv.evaluate runs/&#39;made up&#39; --attack autoattack" in said
    assert "PGD alone" not in said
    assert text.count("<img ") == 9
    assert "<script" not in text


def test_the_table_is_that_of_the_terminal(tmp_path: Path) -> None:
    text = written(tmp_path, smallest(reports=[report(400, 378, 320), report(400, 378, 190, eps=16 / 255)]))
    cells = [re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<t[hd] [^>]*>.*?</t[hd]>", text)]
    assert cells == [
        *("threat", "clean", "robust", "attack", "images", "seconds"),
        *("linf 8/255", "94.5\u202f% (91.8\u201396.3)", "80.0\u202f% (75.8\u201383.6)", "PGD-10 worst, fp32"),
        *("400", "12.3"),
        *("linf 16/255", "94.5\u202f% (91.8\u201396.3)", "47.5\u202f% (42.7\u201352.4)", "PGD-10 worst, fp32"),
        *("400", "12.3"),
    ]


def test_passed_checks_cause_no_alarm(tmp_path: Path) -> None:
    said = plain(written(tmp_path, smallest(findings=FINDINGS[::2])))
    assert "Caution" not in said
    assert "The one check that applies passed." in said
    said = plain(written(tmp_path, smallest(findings=FINDINGS[:1] * 7)))
    assert "All 7 checks passed." in said


def test_an_attack_in_bf16_is_admitted(tmp_path: Path) -> None:
    said = plain(written(tmp_path, smallest(reports=[report(400, 378, 320, precision="bf16")])))
    assert "The attack computed in bf16, which may make it a little weaker than in fp32." in said


def test_the_same_evaluation_gives_the_same_bytes(tmp_path: Path) -> None:
    assert written(tmp_path, invented()) == written(tmp_path, invented())


def test_classes_are_counted_one_by_one() -> None:
    evaluation = invented(7)
    counts = evaluation_page.class_counts(evaluation)
    assert counts == [ClassCounts(name=name, n=PER_CLASS, clean=4, robust=2) for name in evaluation.classes]
    assert evaluation.labels is not None
    fewer = dataclasses.replace(evaluation, labels=evaluation.labels.clamp(max=5))
    assert [row.n for row in evaluation_page.class_counts(fewer)] == [PER_CLASS] * 5 + [2 * PER_CLASS]
    assert evaluation_page.class_counts(smallest()) == []


def falling(*hits: int, n: int = 100) -> Curve:
    """A curve at 0, 1/255, 2/255, 4/255, ... with so many images left."""
    eps = [0.0, *(2**step / 255 for step in range(len(hits) - 1))]
    return Curve(tuple(eps), torch.stack([torch.arange(n) < number for number in hits]))


def test_the_curve_is_drawn_where_the_numbers_are() -> None:
    figure = plots.against_radius(falling(90, 80, 49, 0), "PGD-10", report(100, 90, 45, eps=2 / 255), 10)
    (axes,) = painted(figure).axes
    ((x, y),) = [line.get_data() for line in axes.lines if line.get_marker() == "o"]
    assert list(x) == [0, 1, 2, 4]
    assert list(y) == [90, 80, 49, 0]
    ((mark_x, mark_y),) = [line.get_data() for line in axes.lines if line.get_marker() == "D"]
    assert (list(mark_x), list(mark_y)) == ([2], [45])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "4"]
    assert axes.get_ylim() == (0, 100)
    assert figure.caption.startswith(
        "90.0 % are right when nothing is changed. At 2/255 fewer than half are left. At 4/255 none is left. "
        "PGD-10 at every radius on 100 images"
    )
    assert figure.table is not None
    assert [tuple(row[::2]) for row in figure.table.rows] == [
        *(("0", "90 of 100"), ("1/255", "80 of 100"), ("2/255", "49 of 100"), ("4/255", "0 of 100"))
    ]


def test_a_curve_that_does_not_reach_zero_is_explained(tmp_path: Path) -> None:
    said = plain(written(tmp_path, smallest(curve=falling(90, 80, 70), probe="PGD-10")))
    assert "Even at 2/255, the largest radius tried, 70.0 % are left." in said
    assert "would mean that the attack fails, not that the model is robust" in said
    said = plain(written(tmp_path, smallest(curve=falling(90, 80, 0), probe="PGD-10")))
    assert "would mean that the attack fails" not in said


@pytest.mark.parametrize("hits", [(0,), (1, 0), (20, 10, 0)])
def test_a_model_that_is_hardly_ever_right_has_a_curve_too(hits: tuple[int, ...]) -> None:
    figure = plots.against_radius(falling(*hits), "PGD-10", report(100, 20, 0, norm="l2", eps=1.0), 102)
    (axes,) = painted(figure).axes
    assert axes.get_ylim()[1] <= 40
    assert axes.get_xlabel() == "radius of the attack (l2)"


def counts(num_classes: int) -> list[ClassCounts]:
    return [
        ClassCounts(name=f"class {index}", n=200, clean=150, robust=index * 7919 % 101) for index in range(num_classes)
    ]


@pytest.mark.parametrize(("num_classes", "columns"), [(2, 1), (10, 1), (20, 1), (30, 2), (102, 3), (1000, 3)])
def test_bars_are_sorted_and_large_enough_to_read(num_classes: int, columns: int) -> None:
    figure = plots.class_bars(counts(num_classes))
    ordered = sorted(counts(num_classes), key=lambda row: row.robust)
    for wide in (True, False):
        canvas = painted(figure, wide)
        assert len(canvas.axes) == (columns if wide else 1)
        most = plots.MOST_WIDE if wide else plots.MOST_NARROW
        shown = [*ordered[: most // 2], *ordered[-(most // 2) :]] if num_classes > most else ordered
        clean, robust = (
            [bar[1][0] for axes in canvas.axes for bar in axes.collections[kind].get_segments()] for kind in (0, 1)
        )
        assert clean == [75.0] * len(shown)
        assert robust == [row.robust / 2 for row in shown]
        left_out = [text.get_text() for axes in canvas.axes for text in axes.texts if "between" in text.get_text()]
        assert left_out == ([f"\u22ee {num_classes - most} between"] if num_classes > most else [])
        rows = round(canvas.axes[0].get_ylim()[0] + 0.4)
        assert (figure.heights[0 if wide else 1] - 60) / rows >= 15, "pixels for a row of letters 11 high"
    assert figure.table is not None
    assert [row[0] for row in figure.table.rows] == [row.name for row in ordered], "the table leaves out none"


def test_the_caption_names_both_ends() -> None:
    few = [ClassCounts(name=name, n=n, clean=n, robust=robust) for name, n, robust in (("a", 4, 4), ("b", 8, 2))]
    assert plots.class_bars(few).caption == (
        "Weakest under attack: b (25 %), a (100 %). Strongest: a (100 %), b (25 %). Sorted, weakest first; "
        "4 to 8 images per class."
    )


def test_stages_add_up() -> None:
    stages = [Stage("apgd-ce", 30, 10.0), Stage("apgd-t", 5, 40.0), Stage("square", 0, 160.0)]
    figure = plots.stage_bars(stages, clean=90)
    assert figure.table is not None
    assert [tuple(row) for row in figure.table.rows] == [
        ("apgd-ce", "30", "60", "10.0"),
        ("apgd-t", "5", "55", "40.0"),
        ("square", "0", "55", "160.0"),
    ]
    assert "apgd-ce breaks most (30 of 35), square takes longest (160.0 of 210.0 seconds)." in figure.caption
    broken, seconds = painted(figure).axes
    assert [bar.get_width() for bar in broken.containers[0]] == [30, 5, 0]
    assert [bar.get_width() for bar in seconds.containers[0]] == [10.0, 40.0, 160.0]


@pytest.mark.parametrize(("n", "clean", "robust"), [(400, 378, 320), (10, 0, 0), (10, 10, 10), (1, 1, 0)])
def test_the_fates_of_all_images_fill_one_bar(n: int, clean: int, robust: int) -> None:
    figure = plots.fates(n, clean, robust)
    (axes,) = painted(figure).axes
    starts = [container[0].get_x() for container in axes.containers]
    assert starts == [0, robust, clean]
    assert [text.get_text().split()[0] for text in axes.texts] == [str(robust), str(clean - robust), str(n - clean)]
    assert figure.alt.startswith(f"Of {n} images: {robust} stay right")
