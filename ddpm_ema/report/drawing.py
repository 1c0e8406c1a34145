"""matplotlib figures → inline SVG whose colours and type come from the page, so one drawing serves light, dark and print."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Placeholder colours that nobody would choose: each is replaced by a variable of the page's style sheet.
INK, MUTED, LINE, PAPER, RAW = "#010203", "#010204", "#010205", "#010206", "#010207"
SERIES = tuple(f"#0102{0x10 + i:02x}" for i in range(7))
QUARTERS = tuple(f"#0102{0x20 + i:02x}" for i in range(4))
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    PAPER: "--card",
    RAW: "--raw",
    **{colour: f"--c{i}" for i, colour in enumerate(SERIES)},
    **{colour: f"--q{i}" for i, colour in enumerate(QUARTERS)},
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.6)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
WIDTH = 5.0  # inches; one column of the page, and as wide as a phone lets letters stay readable

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ddpm_ema",
    "font.size": 9.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "text.parse_math": False,  # a name with two $ is a name
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


class Look(NamedTuple):
    """How one set of weights is drawn, everywhere on the page."""

    colour: str
    marker: str = "o"
    dash: Any = "-"

    @property
    def variable(self) -> str:
        """The style sheet's name of the colour."""
        return VARIABLES[self.colour]


class Drawing(NamedTuple):
    """One figure of the page: markup, what it shows, and which weights its legend names."""

    svg: str
    title: str
    caption: str
    legend: tuple[tuple[str, Look], ...] = ()


def looks(names: Sequence[str]) -> dict[str, Look]:
    """One look per name: raw is grey; the others take colours in turn, then markers and dashes distinguish further ones."""
    found = {"raw": Look(RAW)}
    for i, name in enumerate(name for name in names if name != "raw"):
        turn = i // len(SERIES)
        found[name] = Look(SERIES[i % len(SERIES)], MARKERS[(i + turn) % len(MARKERS)], DASHES[turn % len(DASHES)])
    return found


def style() -> AbstractContextManager[None]:
    """The page's look, for the figures made and written inside it."""
    return matplotlib.rc_context(STYLE)


def canvas(height: float) -> tuple[Figure, Axes]:
    """An empty figure of one column, `height` in inches. No pyplot: nothing global is left behind."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def to_svg(figure: Figure, prefix: str, label: str) -> str:
    """The figure as one <svg> element; `prefix` keeps its ids apart from those of other figures, `label` is read aloud."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the reader's browser draws the letters, with fonts of its own
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"font: (?:\w+ )?([\d.]+)px [^;\"]+", r"font-size: \1px", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    size = re.search(r'viewBox="[^"]*"', svg)
    assert size is not None
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size[0]} role="img" aria-label="{html.escape(label)}">'
    body = svg[svg.index(">") + 1 :].replace("xlink:href", "href")
    return opening + re.sub(r"\n\s*", "\n", body).strip()
