"""Values → what the template draws as SVG: axes, the look of each set of weights; and the same values as CSV.

The style sheet holds all colours, so that one drawing serves light, dark and print. The template escapes all text.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple
from urllib.parse import quote

from ddpm_ema.numbers import with_error

WIDTH, RIGHT, TOP, BOTTOM = 400, 14, 22, 38  # units of the drawing, about a pixel each; margins beside, above and below
COLOURS = 7
DASHES = ("", "7 3", "2 2", "8 3 2 3")
MARKERS = (  # circle, square, triangle, diamond, triangle
    "M-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0-6.4 0z",
    "M-2.8-2.8h5.6v5.6h-5.6z",
    "M0-3.6 3.4 2.8H-3.4z",
    "M0-4 4 0 0 4-4 0z",
    "M0 3.6 3.4-2.8H-3.4z",
)
MOST_POINTS = 300  # of one line that are drawn; the CSV has all
MOST_TICKS = 6
TINY = 1e-300  # smaller figures lose their digits


class Look(NamedTuple):
    """How one set of weights is drawn, everywhere on the page: a class of the style sheet, a path, a stroke-dasharray."""

    colour: str
    marker: str = MARKERS[0]
    dash: str = ""


def looks(names: Iterable[str]) -> dict[str, Look]:
    """One look per name: raw is grey, the others take colours in turn; markers and dashes tell 20 names apart without colour."""
    found = {"raw": Look("raw")}
    for i, name in enumerate(name for name in names if name != "raw"):
        found[name] = Look(f"c{i % COLOURS}", MARKERS[(i + 1) % len(MARKERS)], DASHES[(i + 1) % len(DASHES)])
    return found


class Point(NamedTuple):
    """One value with its standard error. `note` replaces the name of the series in the text on hover."""

    x: float
    y: float
    error: float = 0.0
    note: str = ""
    hollow: bool = False


class Series(NamedTuple):
    """Values of one name. `kind`: a plain `line`; marks with `errors`; marks with a `band` of one and two standard errors."""

    name: str
    look: Look
    points: Sequence[Point]
    kind: str = "line"

    @property
    def drawn(self) -> Sequence[Point]:
        """The lowest and highest point of each of at most MOST_POINTS / 2 equal parts, in order."""
        size = math.ceil(2 * len(self.points) / MOST_POINTS) if len(self.points) > MOST_POINTS else 1
        parts = (sorted(self.points[i : i + size], key=lambda p: p.y) for i in range(0, len(self.points), size))
        return [point for part in parts for point in sorted({part[0], part[-1]})]


class Axis:
    """Values along `start` ... `end` of the drawing, linear or logarithmic."""

    def __init__(self, values: Iterable[float], start: float, end: float, log: bool) -> None:
        self.start, self.end, self.log = start, end, log
        lengths = [self._length(value) for value in values]
        self.low, self.high = min(lengths), max(lengths)
        margin = max(0.05 * ((self.high - self.low) or abs(self.high) or 1.0), TINY)
        self.low, self.high = self.low - margin, self.high + margin

    def _length(self, value: float) -> float:
        return math.log10(max(value, TINY)) if self.log else value

    def __call__(self, value: float) -> float:
        """Where a value is drawn; what lies outside is drawn at the end."""
        share = (self._length(value) - self.low) / (self.high - self.low)
        return round(self.start + (self.end - self.start) * min(1.0, max(0.0, share)), 1)

    @cached_property
    def ticks(self) -> list[tuple[float, str]]:
        """Place and text of at most about MOST_TICKS round values."""
        unit = 10.0 ** math.floor(math.log10((self.high - self.low) / MOST_TICKS))
        step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m * MOST_TICKS >= self.high - self.low)
        found = [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        if self.log:
            powers = range(math.floor(self.low), math.ceil(self.high) + 1, max(1, math.ceil(step)))
            tens = (1, 2, 5) if self.high - self.low < MOST_TICKS / 3 else (1,)
            found = [m * 10.0**power for power in powers for m in tens]
            found = [value for value in found if self.low <= math.log10(value) <= self.high]
        return [(self(value), plain(value)) for value in found]


@dataclass(frozen=True)
class Plot:
    """Series over x. `level`: height and text of a horizontal line; `ring`: the best point."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    caption: str = ""
    x_log: bool = False
    linear: bool = False
    level: tuple[float, str] | None = None
    ring: Point | None = None
    height: int = 210

    @cached_property
    def y(self) -> Axis:
        """Logarithmic where the series span more than a factor of 8 and all is positive; a level near 0 makes no axis so."""
        values, level = [p.y for s in self.series for p in s.points], [self.level[0]] if self.level else []
        log = not self.linear and 8 * min(values) < max(values) and min(values + level) > 0
        values += level
        ends = [
            p.y + e * p.error for s in self.series for p in s.points for e in ((-2, 2) if s.kind == "band" else (-1, 1))
        ]
        low = min(values) / 2 if log else -math.inf  # an error may reach below zero
        return Axis([max(end, low) for end in (*values, *ends)], self.height - BOTTOM, TOP, log)

    @cached_property
    def x(self) -> Axis:
        return Axis((p.x for s in self.series for p in s.points), self.left, WIDTH - RIGHT, self.x_log)

    @property
    def left(self) -> float:
        return 10 + 6.3 * max((len(text) for _, text in self.y.ticks), default=0)

    def line(self, one: Series) -> str:
        """The line of a series as path data."""
        return "M" + "L".join(f"{self.x(p.x)} {self.y(p.y)}" for p in one.drawn)

    def band(self, one: Series, errors: float) -> str:
        """The region of `errors` standard errors around a series."""
        around = [(p, errors) for p in one.drawn] + [(p, -errors) for p in reversed(one.drawn)]
        return "M" + "L".join(f"{self.x(p.x)} {self.y(p.y + e * p.error)}" for p, e in around) + "Z"

    def bars(self, one: Series) -> str:
        """The error bars of a series."""
        return "".join(f"M{self.x(p.x)} {self.y(p.y - p.error)}V{self.y(p.y + p.error)}" for p in one.drawn)

    def hover(self, one: Series, point: Point) -> str:
        """`power_0_10, step 1,000: 2.70 ± 0.80`."""
        name = f"{point.note or one.name}, " if point.note or one.name else ""
        value = with_error(point.y, point.error) if point.error else f"{point.y:,.4g}"
        return f"{name}{self.x_label} {plain(point.x)}: {value}"

    @property
    def spoken(self) -> str:
        """What is read aloud: the title, and where each series begins and ends."""
        spans = (f"{s.name} {s.points[0].y:.4g} to {s.points[-1].y:.4g}".strip() for s in self.series)
        return f"{self.title}: {'; '.join(spans)}"

    @property
    def csv(self) -> str:
        """All values as a data URI."""
        header = ("series", self.x_label, self.y_label, "standard error")
        return csv_uri([header, *((p.note or s.name, p.x, p.y, p.error) for s in self.series for p in s.points)])


def csv_uri(rows: Iterable[Sequence[object]]) -> str:
    """A data URI of CSV. A text that a spreadsheet would take for a formula is quoted: a run may be a stranger's."""
    written = io.StringIO()
    for row in rows:
        cells = [f"'{cell}" if isinstance(cell, str) and cell[:1] in tuple("=+-@\t\r") else cell for cell in row]
        csv.writer(written, lineterminator="\n").writerow(cells)
    return "data:text/csv;charset=utf-8," + quote(written.getvalue().encode(errors="replace"), safe=",.-()_")


def plain(value: float) -> str:
    """A value of an axis: `1,000`, `0.9995`."""
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e15 else f"{value:.6g}"
