"""matplotlib figures as inline SVG: transparent, in the page's own colours and font, the same bytes every time.

A figure is painted in five inks. In the page they become CSS variables, so that one picture reads well on white, on
black and on paper. Text stays text: it takes the reader's font and can be searched and copied.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

# The values are keys into COLOURS only; blue and vermilion are those of `fastadv.plots`.
INK, MUTED, LINE, BLUE, VERMILION = "#111111", "#666666", "#dddddd", "#0072b2", "#d55e00"
COLOURS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    BLUE: "var(--clean)",
    VERMILION: "var(--robust)",
}

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 12,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.borderaxespad": 0,
    "figure.constrained_layout.w_pad": 0,
}
# Left out of the file: they would say when it was made, and with what.
_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")


def draw(paint: Callable[[Figure], None], width: int, height: int, prefix: str) -> Markup:
    """The ``<svg>`` element of what ``paint`` draws on an empty figure, safe to put into a page.

    width, height: in CSS pixels, which are also the points that matplotlib counts in: size 12 is 12 px on the page.
    prefix: goes before every id. Figures of one page need different ones, or one takes the clip paths of the other.
    matplotlib's settings are changed while ``paint`` runs and are afterwards as before. Text that comes from users
    needs `label`, and ``parse_math=False`` where matplotlib takes it.
    """
    written = io.BytesIO()
    style: dict[Any, Any] = {**_STYLE, "svg.hashsalt": prefix}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # The reader's browser has the letters that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        paint(figure)
        figure.savefig(written, format="svg", transparent=True, metadata=_METADATA)
    return _inline(ElementTree.fromstring(written.getvalue()), prefix, width, height)


def label(text: str, longest: int = 40) -> str:
    """``text`` fit to stand in a figure: cut with an ellipsis, no character that XML has no place for."""
    plain = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
    return plain if len(plain) <= longest else plain[: longest - 1].rstrip() + "\u2026"


def _inline(root: ElementTree.Element, prefix: str, width: int, height: int) -> Markup:
    """The parsed file without what only a file needs: namespaces, unused ids, fonts, rules for the whole page."""
    elements = list(root.iter())
    used = {match for element in elements for value in element.attrib.values() for match in _REFERENCE.findall(value)}
    used |= {value[1:] for element in elements for name, value in element.attrib.items() if name.endswith("href")}
    for element in elements:
        element.tag = _local(element.tag)
        old = dict(element.attrib)
        element.attrib.clear()
        for name, value in old.items():
            if name != "id" or value in used:
                element.set(_local(name), _value(_local(name), value, prefix))
        for defs in [child for child in element if child.find("{*}style") is not None]:
            element.remove(defs)
        if element.tag != "text":
            element.text = None
        element.tail = None
    root.attrib.clear()
    # The figure's own alt text stands on the element around it.
    root.attrib.update({"viewBox": f"0 0 {width} {height}", "width": str(width), "height": str(height)})
    root.set("aria-hidden", "true")
    root.set("focusable", "false")
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _value(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return f"{prefix}-{value}"
    if name == "href":
        return f"#{prefix}-{value[1:]}"
    if name == "style":
        value = re.sub(r"font-family:[^;]*;?\s*", "", value)
    if name in ("style", "fill", "stroke"):
        value = re.sub(r"#[0-9a-f]{6}", lambda match: COLOURS.get(match[0], match[0]), value)
    if name in ("d", "x", "y", "transform"):
        # A hundredth of a pixel is enough, and half of the size.
        value = _LONG_NUMBER.sub(lambda match: f"{float(match[0]):.2f}", value).replace("\n", " ").strip()
    return _REFERENCE.sub(rf"url(#{prefix}-\1)", value)
