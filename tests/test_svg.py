"""Figures inside a page: the page's colours, ids of their own, nothing but what is drawn, the same bytes every time."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.figure import Figure

from fastadv import svg


def paint(figure: Figure) -> None:
    """Something with clip paths, markers, a band, text and every ink."""
    axes = figure.add_subplot()
    axes.plot([0, 1, 2], [1, 0, 2], marker="o", color=svg.BLUE)
    axes.fill_between([0, 1, 2], [0, 0, 1], [2, 1, 3], color=svg.VERMILION, alpha=0.2)
    axes.bar([1], [2], color=svg.LINE, edgecolor=svg.MUTED, hatch="//")
    axes.text(1, 1, "<b> & $x_{", color=svg.INK, parse_math=False)
    axes.plot([0, 1], [0, 0], color="#123456")


def drawn(prefix: str = "a") -> str:
    return str(svg.draw(paint, 350, 200, prefix))


def test_the_same_figure_gives_the_same_bytes() -> None:
    assert drawn() == drawn()


def test_ids_are_used_and_differ_between_figures() -> None:
    for prefix in ("a", "b"):
        ids = re.findall(r'\bid="([^"]+)"', drawn(prefix))
        assert ids
        assert len(set(ids)) == len(ids)
        assert all(name.startswith(f"{prefix}-") for name in ids)
        assert set(ids) == set(re.findall(rf"(?:url\(|href=\")#({prefix}-[^\")]+)", drawn(prefix)))


def test_inks_become_the_colours_of_the_page() -> None:
    text = drawn()
    for ink, colour in svg.COLOURS.items():
        assert ink not in text
        assert colour in text
    assert "#123456" in text, "another colour stays what it is"


def test_only_what_is_drawn_comes_into_the_page() -> None:
    text = drawn()
    root = ElementTree.fromstring(text)
    assert dict(root.attrib)["viewBox"] == "0 0 350 200"
    assert {element.tag for element in root.iter()} <= {
        *("svg", "g", "defs", "path", "use", "text", "rect", "clipPath", "pattern")
    }
    for left_out in ("xmlns", "<?xml", "<!DOCTYPE", "<style", "metadata", "font-family", "DejaVu", "matplotlib"):
        assert left_out not in text
    assert "&lt;b&gt; &amp; $x_{" in text


def test_sizes_are_css_pixels() -> None:
    text = svg.draw(lambda figure: figure.text(0.5, 0.5, "twelve", fontsize=12), 350, 200, "a")
    assert "font-size: 12px" in text
    assert re.search(r'x="175(\.00)?" y="100(\.00)?"', text)


def test_matplotlibs_settings_are_as_before_also_after_an_error() -> None:
    before = dict(matplotlib.rcParams)
    drawn()
    assert dict(matplotlib.rcParams) == before

    def fail(figure: Figure) -> None:
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        svg.draw(fail, 350, 200, "a")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("text", ["a\x00b", "a\x07b", "\ud800", "\u4e2d\u6587", "\u202e", "tab\tand\nline"])
def test_a_label_can_always_be_drawn(text: str) -> None:
    svg.draw(lambda figure: figure.text(0.5, 0.5, svg.label(text), parse_math=False), 350, 200, "a")


def test_a_long_label_is_cut_where_it_shows() -> None:
    assert svg.label("x" * 40) == "x" * 40
    assert svg.label("x" * 41) == "x" * 39 + "\u2026"
    assert svg.label("passion flower", 9) == "passion\u2026"
