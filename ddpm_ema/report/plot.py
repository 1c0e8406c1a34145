"""Values → what the template draws as SVG: scales, ticks, the look of each set of weights; and the same values as CSV.

The style sheet holds all colours, so that one drawing serves light, dark and print. Text and values are escaped by the template.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple
from urllib.parse import quote

from ddpm_ema.numbers import with_error

WIDTH, RIGHT, TOP, BOTTOM = 400, 14, 22, 38  # units of the drawing, which is about as many pixels wide
LETTER = 6.3  # width of a digit of a tick's label
COLOURS = 7
DASHES = ("", "7 3", "2 2", "8 3 2 3")
MARKERS = (
    "M-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0-6.4 0z",
    "M-2.8-2.8h5.6v5.6h-5.6z",
    "M0-3.6 3.4 2.8H-3.4z",
    "M0-4 4 0 0 4-4 0z",
    "M0 3.6 3.4-2.8H-3.4z",
)
NINES = (0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999, 0.99995, 0.99999, 0.999999)
SCALES: dict[str, Callable[[float], float]] = {
    "linear": float,
    "log": lambda value: math.log10(max(value, 1e-30)),
    "nines": lambda decay: -math.log10(max(1 - decay, 1e-9)),
}
MOST_POINTS = 300  # of one line that are drawn; the CSV has all


class Look(NamedTuple):
    """How one set of weights is drawn, everywhere on the page: a class of the style sheet, a path, a stroke-dasharray."""

    colour: str
    marker: str = MARKERS[0]
    dash: str = ""


def looks(names: Iterable[str]) -> dict[str, Look]:
    """One look per name: raw is grey; the others take colours in turn, then dashes and markers distinguish further ones."""
    found = {"raw": Look("raw")}
    for i, name in enumerate(name for name in names if name != "raw"):
        turn = i // COLOURS
        found[name] = Look(f"c{i % COLOURS}", MARKERS[(i + turn) % len(MARKERS)], DASHES[turn % len(DASHES)])
    return found


class Point(NamedTuple):
    """One value with its standard error. `note` replaces the name of the series in the text on hover."""

    x: float
    y: float
    error: float = 0.0
    note: str = ""
    hollow: bool = False


class Series(NamedTuple):
    """Values of one name. `kind`: a plain `line`; marks with `errors`; marks with a `band` of one and two errors; an `area`.

    It is drawn at `base + scale * y`, which sets rows of one plot above each other.
    """

    name: str
    look: Look
    points: Sequence[Point]
    kind: str = "line"
    base: float = 0.0
    scale: float = 1.0

    @property
    def drawn(self) -> Sequence[Point]:
        """The lowest and highest point of each of at most MOST_POINTS / 2 equal parts, in order."""
        if len(self.points) <= MOST_POINTS:
            return self.points
        size = math.ceil(2 * len(self.points) / MOST_POINTS)
        parts = (self.points[i : i + size] for i in range(0, len(self.points), size))
        return [point for part in parts for point in sorted({min(part, key=_y), max(part, key=_y)})]

    def ends(self, point: Point, errors: float = 1.0) -> tuple[float, float]:
        middle, reach = self.base + self.scale * point.y, self.scale * point.error * errors
        return middle - reach, middle + reach


def _y(point: Point) -> float:
    return point.y


class Level(NamedTuple):
    """A horizontal line, such as the floor of the data."""

    y: float
    text: str


@dataclass(frozen=True)
class Plot:
    """Series over x with axes. `labels`: (x, y, text) in the plot; `ring`: the point that is marked as the best."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    caption: str = ""
    x_scale: str = "linear"
    linear: bool = False
    level: Level | None = None
    labels: tuple[tuple[float, float, str], ...] = ()
    ring: Point | None = None
    height: int = 210
    legend: bool = True
    y_axis: bool = True

    @cached_property
    def y_scale(self) -> str:
        """Logarithmic where values span more than a factor of 8 and all are positive."""
        values = [point.y for one in self.series for point in one.points] + ([self.level.y] if self.level else [])
        return "log" if not self.linear and 0 < 8 * min(values) < max(values) else "linear"

    @cached_property
    def _x_range(self) -> tuple[float, float]:
        return _range((point.x for one in self.series for point in one.points), self.x_scale, 0.02)

    @cached_property
    def _y_range(self) -> tuple[float, float]:
        values = [end for one in self.series for p in one.points for end in one.ends(p, 2.0 * (one.kind == "band") or 1.0)]
        values += [self.level.y] if self.level else []
        if self.y_scale == "log":
            lowest = min(p.y for one in self.series for p in one.points)
            values = [max(value, lowest / 2) for value in values]  # an error may reach below zero
        values += [0.0] if any(one.kind == "area" for one in self.series) else []
        return _range(values, self.y_scale, 0.07)

    @cached_property
    def y_ticks(self) -> list[tuple[float, str]]:
        low, high = self._y_range
        return [(value, plain(value)) for value in ticks(low, high, self.y_scale)] if self.y_axis else []

    @cached_property
    def x_ticks(self) -> list[tuple[float, str]]:
        return [(value, plain(value)) for value in ticks(*self._x_range, self.x_scale)]

    @cached_property
    def left(self) -> float:
        return 10 + LETTER * max((len(text) for _, text in self.y_ticks), default=0)

    def x(self, value: float) -> float:
        """Where a value of x is drawn."""
        return round(self.left + (WIDTH - RIGHT - self.left) * _share(value, self._x_range, self.x_scale), 1)

    def y(self, value: float) -> float:
        return round(self.height - BOTTOM - (self.height - BOTTOM - TOP) * _share(value, self._y_range, self.y_scale), 1)

    def line(self, one: Series) -> str:
        """The line of a series as path data."""
        return "M" + "L".join(f"{self.x(p.x)} {self.y(one.ends(p, 0)[0])}" for p in one.drawn)

    def band(self, one: Series, errors: float) -> str:
        """The region of `errors` standard errors around a series; of an area, down to its base."""
        ends = [(self.x(p.x), *map(self.y, one.ends(p, errors))) for p in one.drawn]
        if one.kind == "area":
            ends = [(x, self.y(one.base), y) for x, _, y in ends]
        corners = [f"{x} {high}" for x, _, high in ends] + [f"{x} {low}" for x, low, _ in reversed(ends)]
        return f"M{'L'.join(corners)}Z"

    def bars(self, one: Series) -> str:
        """The error bars of a series."""
        return "".join(f"M{self.x(p.x)} {low}V{high}" for p in one.drawn for low, high in [map(self.y, one.ends(p))])

    def hover(self, one: Series, point: Point) -> str:
        """`power_0_10, step 1,000: 2.70 ± 0.80`."""
        name = point.note or one.name
        value = with_error(point.y, point.error) if point.error else f"{point.y:,.4g}"
        return f"{name}{', ' if name else ''}{self.x_label} {plain(point.x)}: {value}"

    def anchor(self, x: float) -> str:
        """On which side of x a text finds room."""
        share = _share(x, self._x_range, self.x_scale)
        return "start" if share < 0.25 else "end" if share > 0.75 else "middle"

    @property
    def spoken(self) -> str:
        """What is read aloud: the title, and where each series begins and ends."""
        spans = [f"{s.name} {s.points[0].y:.4g} to {s.points[-1].y:.4g}".strip() for s in self.series if s.points]
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


def ticks(low: float, high: float, scale: str, most: int = 6) -> list[float]:
    """At most about `most` round values between two."""
    if scale == "nines":
        found = [decay for decay in NINES if low <= decay <= high]
    elif scale == "log":
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [m * 10.0**power for power in powers for m in (1, 2, 5) if low <= m * 10.0**power <= high]
        found = found if len(found) <= most else [10.0**power for power in powers if low <= 10.0**power <= high]
    else:
        unit = 10.0 ** math.floor(math.log10((high - low) / most))
        step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m * most >= high - low)
        found = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return found[:: math.ceil(len(found) / most) or 1]


def plain(value: float) -> str:
    """A value of an axis: `1,000`, `0.9995`."""
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e15 else f"{value:.6g}"


def _range(values: Iterable[float], scale: str, margin: float) -> tuple[float, float]:
    """The least and the greatest value with a margin that is a share of their distance on the scale."""
    known = list(values)
    low, high = min(known), max(known)
    if scale == "log":
        factor = (high / low) ** margin
        return low / factor, high * factor
    if scale == "nines":
        return low - margin * (1 - low), high + margin * (1 - high)
    reach = (high - low) * margin or abs(high) * margin or margin
    return low - reach, high + reach


def _share(value: float, between: tuple[float, float], scale: str) -> float:
    """Where a value lies between two on the scale, in 0 ... 1; values outside lie at the ends."""
    low, high, at = (SCALES[scale](one) for one in (*between, value))
    return min(1.0, max(0.0, (at - low) / (high - low or 1.0)))
