"""A real browser finds nothing wrong with the pages, on phone and desk, in light and dark; and it can find faults."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, View, program
from matplotlib.figure import Figure as Canvas
from sample_evaluation import invented

from fastadv import evaluation_page, page
from fastadv.page import Figure, Gallery, Picture, Section, Table

PHONE, DESK = 390, 1280
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = program()
    if path is None:
        pytest.skip("needs Chromium, and there is none")
    with Browser(path, tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An evaluation of few classes with everything on it, and one of many."""
    folder = tmp_path_factory.mktemp("pages")
    for name, evaluation in (("few", invented()), ("many", invented(102, stages=False, findings=()))):
        evaluation_page.write(folder / f"{name}.html", evaluation)
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("name", ["few", "many"])
def test_nothing_is_wrong(browser: Browser, pages: dict[str, Path], name: str, width: int, scheme: str) -> None:
    view = browser.look(pages[name], width, scheme)
    assert view.wrong == []
    assert view.width == width
    assert (min(view.paper) > 240 and max(view.ink) < 60) == (scheme == "light")
    assert (max(view.paper) < 40 and min(view.ink) > 200) == (scheme == "dark")
    # The top of it is on the screen: an empty picture of this size has less than 10 kB.
    assert len(browser.picture()) > 10_000


@pytest.fixture(scope="module")
def small(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page with one block of every kind that a fault can be planted in, and nothing wrong with it."""

    def paint(canvas: Canvas, wide: bool) -> None:
        canvas.add_subplot().plot([0, 1])

    picture = Picture(pixels=np.zeros((8, 8, 3), np.uint8), alt="black")
    table = Table(columns=[f"column {number}" for number in range(30)], rows=[["a long word"] * 30])
    blocks = [Figure(paint=paint, heights=(90, 90), alt="a line"), Gallery(cards=[("card", [picture])]), table]
    text = page.build("small", [Section(title="All", blocks=blocks)], command="true", environment={})
    path = tmp_path_factory.mktemp("small") / "small.html"
    path.write_text(text, encoding="utf-8")
    assert [browser.look(path, width, "light").wrong for width in (PHONE, DESK)] == [[], []]
    return text


def first_picture_broken(text: str) -> str:
    return re.sub(r'src="data:[^"]+"', 'src="data:image/png;base64,AAAA"', text, count=1)


def first_picture_flat(text: str) -> str:
    return text.replace("<img ", '<img style="height: 0; border: 0" ', 1)


def with_foreign_script(text: str) -> str:
    return text.replace("</body>", '<script src="https://example.invalid/x.js"></script></body>')


def with_foreign_picture(text: str) -> str:
    return text.replace("</body>", '<img src="https://example.invalid/x.png" alt="foreign"></body>')


def without_policy(change: Callable[[str], str]) -> Callable[[str], str]:
    return lambda text: re.sub("<meta http-equiv[^>]+>", "", change(text))


def with_wide_box(text: str) -> str:
    return text.replace("</main>", '<div style="width: 3000px">too wide</div></main>')


def with_wide_picture(text: str) -> str:
    return text.replace("<img ", '<img style="width: 3000px" ', 1)


def with_error(text: str) -> str:
    return text.replace("</body>", "<script>console.error('planted')</script></body>")


def with_exception(text: str) -> str:
    return text.replace("</body>", "<script>throw new Error('planted')</script></body>")


def with_narrow_drawings_only(text: str) -> str:
    return text.replace('class="on-wide"', 'class="on-narrow"')


def with_text_over_the_edge(text: str) -> str:
    return text.replace("</svg>", '<text x="690">a label that nobody can read to its end</text></svg>', 1)


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (first_picture_broken, "broken picture"),
        (first_picture_flat, "picture without size"),
        (with_foreign_script, "Content Security Policy"),
        (without_policy(with_foreign_script), "fetched: https://example.invalid/x.js"),
        (without_policy(with_foreign_picture), "fetched: https://example.invalid/x.png"),
        (with_wide_box, "<div> over the right edge"),
        (with_wide_picture, "the page scrolls sideways"),
        (without_policy(with_error), "console.error: planted"),
        (without_policy(with_exception), "exception: Uncaught"),
        (with_narrow_drawings_only, "0 drawings shown"),
        (with_text_over_the_edge, "text cut off in a drawing"),
    ],
)
def test_a_planted_fault_is_found(
    browser: Browser, small: str, tmp_path: Path, plant: Callable[[str], str], told: str
) -> None:
    planted = plant(small)
    assert planted != small
    (tmp_path / "planted.html").write_text(planted, encoding="utf-8")
    view = browser.look(tmp_path / "planted.html", DESK, "light")
    assert [line for line in view.wrong if told in line], view.wrong


def test_a_fault_of_the_phone_alone_is_found_there(browser: Browser, small: str, tmp_path: Path) -> None:
    planted = small.replace("</main>", '<p style="width: 600px">wide</p></main>')
    (tmp_path / "planted.html").write_text(planted, encoding="utf-8")

    def look(width: int) -> View:
        return browser.look(tmp_path / "planted.html", width, "light")

    assert look(DESK).wrong == []
    assert look(PHONE).wrong
