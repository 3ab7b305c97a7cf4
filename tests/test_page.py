"""A page is one sound, escaped, accessible document that needs nothing else."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure as Canvas
from PIL import Image

from fastadv import page, svg
from fastadv.page import Caution, Claim, Claims, Data, Figure, Gallery, Picture, Points, Section, Table

CSS = (Path(page.__file__).parent / "templates" / "page.css").read_text()
HOSTILE = """<script>alert("1")</script>'&{{ 7 * 7 }}"""
VOID = {"meta", "img", "br", "link"}


class Document(HTMLParser):
    """The elements of a page in order, each with its attributes; fails on a tag that is closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute of <{tag}> stands twice"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def values(self, name: str) -> list[str]:
        """The values of an attribute, wherever it is."""
        return [attributes[name] or "" for _, attributes in self.elements if name in attributes]

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of all elements of one name."""
        return [attributes for found, attributes in self.elements if found == tag]


def paint(canvas: Canvas, wide: bool) -> None:
    canvas.add_subplot().plot([0, 1], marker="o", color=svg.BLUE)
    canvas.text(0.5, 0.5, HOSTILE, parse_math=False)


def every_block(text: str) -> list[page.Block]:
    """One block of every kind that says ``text`` wherever it can."""
    table = Table(columns=[text, "number", text], rows=[[text, "1", text], [text, "-2.5", text]], caption=text)
    picture = Picture(pixels=np.arange(192, dtype=np.uint8).reshape(8, 8, 3), alt=text, label=text)
    return [
        text,
        Points([text, text]),
        Caution(text),
        table,
        Figure(paint=paint, heights=(100, 90), alt=text, caption=text, table=table),
        Gallery(cards=[(text, [picture, picture])], caption=text),
        Claims([Claim(name=text, holds=holds, word=text, sentence=text) for holds in (True, False, None)]),
        Data(summary=text, value={text: [text, 1.5, None, Path("/a")]}),
    ]


def built(text: str) -> str:
    sections = [Section(title=title, blocks=every_block(text)) for title in ("", text, text)]
    return page.build(text, sections, command=text, environment={text: text})


@pytest.fixture(scope="module")
def words() -> str:
    """A page with every block twice, and nothing special in it."""
    return built("words")


def test_every_text_is_escaped() -> None:
    text = built(HOSTILE)
    document = Document(text)
    assert "script" not in {tag for tag, _ in document.elements}
    assert not [name for _, attributes in document.elements for name in attributes if name.startswith("on")]
    assert "<script" not in text
    assert text.count("{{ 7 * 7 }}") == text.count("alert(") > 50, "nothing was taken for a template"
    assert document.values("alt") == [HOSTILE] * 6


def test_nothing_is_loaded_from_anywhere(words: str) -> None:
    document = Document(words)
    (policy,) = (meta["content"] for meta in document.named("meta") if "http-equiv" in meta)
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    for name in ("src", "href", "srcset", "action", "data", "poster"):
        assert all(value.startswith(("#", "data:image/png;base64,")) for value in document.values(name))
    assert "url(" not in CSS
    assert "@import" not in CSS


def test_ids_are_unique_and_every_reference_leads_somewhere(words: str) -> None:
    text = words
    document = Document(text)
    ids = document.values("id")
    assert len(set(ids)) == len(ids)
    targets = [value[1:] for value in document.values("href")] + re.findall(r"url\(#([^)]+)\)", text)
    targets += document.values("aria-labelledby")
    assert set(targets) <= set(ids)
    assert len([target for target in targets if target.startswith("figure-")]) > 0


def test_a_screen_reader_finds_its_way(words: str) -> None:
    document = Document(words)
    assert document.named("html") == [{"lang": "en"}]
    headings = [tag for tag, _ in document.elements if re.fullmatch("h[1-6]", tag)]
    assert headings == ["h1", *["h2"] * 3]
    assert all(image["alt"] for image in document.named("img"))
    drawings = [attributes for _, attributes in document.elements if attributes.get("role") == "img"]
    assert [attributes["aria-label"] for attributes in drawings] == ["words"] * 3
    assert all(attributes["aria-hidden"] == "true" for attributes in document.named("svg"))
    assert {attributes.get("scope") for attributes in document.named("th")} == {"col", "row"}
    assert all(attributes["aria-label"] for _, attributes in document.elements if attributes.get("class") == "scroll")


def test_a_figure_is_drawn_for_a_desk_and_for_a_phone(words: str) -> None:
    boxes = [attributes["viewbox"] for attributes in Document(words).named("svg")]
    assert boxes == [f"0 0 {page.WIDE} 100", f"0 0 {page.NARROW} 90"] * 3


def test_the_same_content_gives_the_same_page(words: str) -> None:
    assert built("words") == words


def test_pictures_come_out_as_they_went_in() -> None:
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    for given in (pixels, pixels[:, :, 0]):
        head, _, data = Picture(pixels=given, alt="x").source.partition(",")
        assert head == "data:image/png;base64"
        assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) == given).all()


def test_columns_of_numbers_are_found() -> None:
    rows = [["7", "80.0 % (75.8-83.6)", "PGD-10", "-1", ""], ["8", "3", "4", "\u22122.5", "\u2013"]]
    assert Table(columns=list("abcde"), rows=rows).numeric == [False, True, False, True, True]
    assert Table(columns=["a", "b"], rows=[]).numeric == [False, True]


def test_a_short_wide_table_is_cards_on_a_phone_and_a_long_one_scrolls() -> None:
    def table(columns: int, rows: int) -> Table:
        return Table(columns=["x"] * columns, rows=[["1"] * columns] * rows)

    assert table(6, 2).stacked
    assert not table(6, 20).stacked
    assert not table(3, 2).stacked


@pytest.mark.parametrize(
    ("text", "set_as"),
    [
        ("80.0 % (75.8-83.6)", "80.0\u202f% (75.8\u201383.6)"),
        ("on 2026-11-20, PGD-10, (10-step), 1e-05", "on 2026-11-20, PGD-10, (10-step), 1e-05"),
        ("the %s of it", "the %s of it"),
    ],
)
def test_numbers_are_set_with_care(text: str, set_as: str) -> None:
    assert page.typeset(text) == set_as


def test_what_belongs_together_stays_on_a_line() -> None:
    text = built("PGD-10 at linf 8/255: 80.0 % (75.8-83.6)")
    for whole in ("PGD-10", "linf 8/255", "(75.8\u201383.6)"):
        assert f"<span class='unbroken'>{whole}</span>" in text
    assert "<span class='unbroken'>ranli-full</span>" in built("ranli-full")
    assert 'alt="PGD-10 at linf 8/255: 80.0\u202f% (75.8\u201383.6)"' in text


def test_anchors_are_made_of_titles() -> None:
    titles = ["The numbers", "the numbers!", "\u4e2d\u6587", "", "Made with"]
    text = page.build("x", [Section(title=name, blocks=["x"]) for name in titles], command="x", environment={})
    ids = [value for value in Document(text).values("id") if not value.startswith("figure")]
    assert ids == ["main", "the-numbers", "the-numbers--2", "section", "made-with--2", "made-with"]


def test_the_environment_is_told_in_words() -> None:
    environment = {"torch": "2.15.0", "gpus": [], "modified": True, "cuda": None, "command": "another one"}
    text = page.build("x", [], command="python -m x", environment=environment)
    told = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert told == {"torch": "2.15.0", "gpus": "\u2013", "modified": "yes", "cuda": "\u2013"}
    assert "<pre>python -m x</pre>" in text
    assert "another one" not in text


def colours(rules: str) -> dict[str, str]:
    found = re.findall(r"--([\w-]+): #([0-9a-f]+);", rules)
    return {name: f"#{digits}" if len(digits) == 6 else f"#{''.join(2 * d for d in digits)}" for name, digits in found}


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours. Source: WCAG 2.2, relative luminance."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_enough_in_light_in_dark_and_on_paper() -> None:
    light, dark, printed = (colours(rules) for rules in re.findall(r":root \{(.*?)\}", CSS, flags=re.DOTALL))
    assert light.keys() == dark.keys() == printed.keys()
    assert {f"var(--{name})" for name in light} >= set(svg.COLOURS.values()) - {"currentColor"}
    for scheme in (light, dark, printed):
        # WCAG AA asks for 4.5 of text and for 3 of what carries meaning in a drawing.
        for text, ground in (("ink", "paper"), ("muted", "paper"), ("link", "paper"), ("alarm", "paper")):
            assert contrast(scheme[text], scheme[ground]) >= 4.5, (text, ground)
        assert contrast(scheme["ink"], scheme["raised"]) >= 4.5
        assert contrast(scheme["alarm"], scheme["alarm-paper"]) >= 4.5
        assert contrast(scheme["ink"], scheme["alarm-paper"]) >= 4.5
        for mark in ("clean", "robust"):
            assert contrast(scheme[mark], scheme["paper"]) >= 3, mark
