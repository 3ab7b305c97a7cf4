"""The one builder of self-contained HTML pages: sections of text, tables, figures, pictures, claims and data.

A page is one file without scripts. It loads nothing (its content security policy forbids it), reads well in light and
dark, on a phone and on paper, and says everything that a figure shows in words and in a table as well. Every text is
escaped: class names, paths and messages may contain anything.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape
from matplotlib.figure import Figure as Canvas
from PIL import Image

from fastadv import svg

# Widths in CSS pixels: of the text column, and of what a phone's margins leave. A figure is drawn for both, because one
# that is shrunk to half its width has letters of half the size.
WIDE, NARROW = 720, 346
# A table of up to so many rows becomes a list of cards on a phone; a longer one is there to be compared and scrolls.
STACKED_ROWS = 6


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under named columns. The first column names the row; columns of numbers are set flush right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    @property
    def numeric(self) -> list[bool]:
        """For every column after the first: whether each of its cells is a number, possibly with more behind it."""
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.columns)
        return [False, *(all(_NUMBER.match(cell) for cell in column) for column in columns[1:])]

    @property
    def stacked(self) -> bool:
        """Whether a phone shows every row as a card."""
        return len(self.columns) > 3 and len(self.rows) <= STACKED_ROWS


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing, made once for a wide and once for a narrow screen.

    paint(canvas, wide) draws it in the inks of `fastadv.svg` on a matplotlib figure; heights are (wide, narrow) in CSS
    pixels. alt says what the drawing shows to someone who does not see it; table holds the same numbers.
    """

    paint: Callable[[Canvas, bool], None]
    heights: tuple[int, int]
    alt: str
    caption: str = ""
    table: Table | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """Pixels uint8 (H, W, 3) or (H, W), shown large and unsmoothed, with a line of text below."""

    pixels: npt.NDArray[np.uint8]
    alt: str
    label: str = ""

    @property
    def source(self) -> str:
        """The picture as a PNG inside a ``data:`` address."""
        written = io.BytesIO()
        Image.fromarray(self.pixels).save(written, format="png", optimize=True)
        return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Cards of pictures: each a caption and the pictures that stand in one row under it."""

    cards: Sequence[tuple[str, Sequence[Picture]]]
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Something that was tested: ``holds`` None means that it could not be. ``word`` is the outcome as text."""

    name: str
    holds: bool | None
    word: str
    sentence: str


@dataclass(frozen=True)
class Points:
    """Paragraphs of a list."""

    items: Sequence[str]


@dataclass(frozen=True)
class Caution:
    """A paragraph that must not be missed."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Data:
    """Anything JSON can say, folded away under a line of text."""

    summary: str
    value: Any

    @property
    def text(self) -> str:
        """The value as indented JSON; what JSON has no word for, as Python prints it."""
        return json.dumps(self.value, indent=2, ensure_ascii=False, default=str)


@dataclass(frozen=True)
class Claims:
    """Claims, one under the other, each with its outcome."""

    items: Sequence[Claim]


Block = str | Points | Caution | Table | Figure | Gallery | Claims | Data


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands under it. Of a page's first section without a title, the first text is the lead."""

    title: str
    blocks: Sequence[Block]


def build(title: str, sections: Sequence[Section], *, command: str, environment: Mapping[str, Any]) -> str:
    """The page as HTML text, the same for the same content.

    command: what makes this page again. environment: versions and machine, as of `environment.environment`.
    """
    numbers = count(1)

    def drawn(figure: Figure, wide: bool) -> Markup:
        size = (WIDE, figure.heights[0]) if wide else (NARROW, figure.heights[1])
        return svg.draw(lambda canvas: figure.paint(canvas, wide), *size, prefix=f"figure-{next(numbers)}")

    template = _templates().get_template("page.html")
    made_with = {name: _plain(value) for name, value in environment.items() if name != "command"}
    anchored = list(zip(_anchors(sections), sections, strict=True))
    return template.render(title=title, sections=anchored, drawn=drawn, command=command, made_with=made_with)


def typeset(text: str) -> str:
    """``80.0 % (75.8-83.6)`` with a narrow space that does not break, and a dash between the numbers that is one."""
    return re.sub(r"\((\d[\d.]*)-(\d[\d.]*)\)", "(\\1\u2013\\2)", re.sub(r"(?<=\d) %", "\u202f%", text))


def _said(text: str) -> Markup:
    """The text as HTML, typeset; intervals, threats and names such as PGD-10 and roli-full stay on one line."""
    return Markup(_UNBROKEN.sub(r"<span class='unbroken'>\g<0></span>", str(escape(typeset(text)))))


_UNBROKEN = re.compile(
    r"\([\d.]+\u2013[\d.]+\)|\b[A-Z]+-\d+\b|\b(?:roli|ranli|zero|lp)-[a-z]+\b|\b(?:linf|l2) [\d./]*\d"
)
# A sign, digits, and whatever follows; or nothing to say.
_NUMBER = re.compile(r"[+\u2212-]?[\d.]|[\u2013\u2014-]?$")


def _templates() -> jinja2.Environment:
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"kind": lambda block: type(block).__name__, "typeset": typeset, "said": _said}
    return templates


def _anchors(sections: Sequence[Section]) -> list[str]:
    """One id per section, made of its title, each only once."""
    anchors = ["made-with", "main"]
    for section in sections:
        name = re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-") or "section"
        taken = sum(anchor == name or anchor.startswith(f"{name}--") for anchor in anchors)
        anchors.append(f"{name}--{taken + 1}" if taken else name)
    return anchors[2:]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return str(value) if value not in (None, "") else "\u2013"
