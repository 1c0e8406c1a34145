"""Axes, lines and CSV of the page's plots, against values by hand."""

from __future__ import annotations

import csv
from urllib.parse import unquote

import pytest

from ddpm_ema.report.plot import MOST_POINTS, WIDTH, Axis, Look, Plot, Point, Series, csv_uri


@pytest.mark.parametrize(
    ("values", "log", "ticks"),
    [
        ((0, 3000), False, ["0", "1,000", "2,000", "3,000"]),
        ((0.02, 0.24), False, ["0.05", "0.1", "0.15", "0.2", "0.25"]),
        ((-0.3, 0.2), False, ["-0.3", "-0.2", "-0.1", "0", "0.1", "0.2"]),
        ((2.0, 80.0), True, ["2", "5", "10", "20", "50"]),
        ((1e-5, 1e4), True, ["0.0001", "0.01", "1", "100", "10,000"]),
        ((5, 5), False, ["4.8", "4.9", "5", "5.1", "5.2"]),
    ],
)
def test_ticks_are_round_and_few(values, log, ticks) -> None:
    assert [text for _, text in Axis(values, 0, 100, log).ticks] == ticks


def test_a_value_is_drawn_where_its_share_of_the_axis_is() -> None:
    assert Axis([0, 10], 0, 110, log=False)(5) == 55  # a margin of a twentieth at either end
    assert Axis([0, 10], 0, 110, log=False)(0) == 5
    assert Axis([1, 100], 110, 0, log=True)(10) == 55
    assert Axis([1, 100], 110, 0, log=True)(-3) == 110  # has no logarithm


def plot(*points: Point, **more) -> Plot:
    return Plot("t", "step", "loss", (Series("s", Look("c0"), points),), **more)


def test_an_axis_is_logarithmic_only_for_positive_values_that_span_a_factor_of_8() -> None:
    assert plot(Point(0, 1), Point(1, 9)).y.log
    assert not plot(Point(0, 1), Point(1, 7)).y.log
    assert not plot(Point(0, 0), Point(1, 9)).y.log
    assert not plot(Point(0, 1), Point(1, 9), linear=True).y.log
    assert not plot(Point(0, 5), Point(1, 9), level=(0.005, "floor")).y.log  # which would press the series flat
    assert not plot(Point(0, 1), Point(1, 9), level=(0, "floor")).y.log


def test_a_long_line_keeps_its_extremes_and_the_csv_all_its_values() -> None:
    points = [Point(x, 1000.0 if x == 777 else -5.0 if x == 778 else x % 7) for x in range(10_000)]
    drawn = Series("s", Look("c0"), points).drawn
    assert len(drawn) <= MOST_POINTS
    assert {1000.0, -5.0} <= {point.y for point in drawn}
    assert [point.x for point in drawn] == sorted(point.x for point in drawn)
    assert plot(*points).csv.count("%0A") == 10_001


def test_band_and_bars_reach_as_many_standard_errors_as_they_say() -> None:
    one = plot(Point(0, 10, 1), Point(10, 10, 2), linear=True)
    y = one.y
    assert one.bars(one.series[0]) == f"M{one.x(0)} {y(9)}V{y(11)}M{one.x(10)} {y(8)}V{y(12)}"
    assert (
        one.band(one.series[0], 1) == f"M{one.x(0)} {y(11)}L{one.x(10)} {y(12)}L{one.x(10)} {y(8)}L{one.x(0)} {y(9)}Z"
    )
    assert one.x(10) < WIDTH


def test_csv_quotes_what_a_spreadsheet_would_run() -> None:
    text = unquote(csv_uri([("a,b", "=1+1", "@x", -1.5)]).partition(",")[2])
    assert next(csv.reader([text])) == ["a,b", "'=1+1", "'@x", "-1.5"]
