"""What the page plots: weightings, curves over training, sweeps. Each function gives one plot, or None without two points."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ddpm_ema.numbers import with_error
from ddpm_ema.report.plot import Level, Look, Plot, Point, Series
from ddpm_ema.report.record import Logged, Number, Row, Scoring
from ddpm_ema.weight_names import split_step

Looks = Mapping[str, Look]
Rows = Sequence[Logged]
WIDTHS = {
    "std": ("the width of the average", "\u03c3_rel", "linear"),
    "decay": ("the decay", "constant decay", "nines"),
    "cooldown": ("the length of the emulated decay", "steps of the emulated linear decay of the learning rate", "linear"),
}
"""What a sweep varies: as a title says it, as an axis says it, and the scale of that axis."""


def weightings(given: Mapping[str, Sequence[Number]], looks: Looks) -> Plot | None:
    """Where in training each average's weights come from, one row per average, each on its own scale.

    A weighting is a density over [0, 1] in equal parts; what its integral lacks to 1 is the weight of the initial parameters.
    """
    known = {name: np.array(values, float) for name, values in given.items() if len(values) > 1 and None not in values}
    curves = {name: curve for name, curve in known.items() if name in looks and curve.max() > 0}
    series, labels = [], []
    for base, (name, curve) in zip(range(len(curves) - 1, -1, -1), curves.items(), strict=True):
        times = 100 * (np.arange(len(curve)) + 0.5) / len(curve)
        points = [Point(x, y, note=name) for x, y in zip(times.tolist(), curve.tolist(), strict=True)]
        series.append(Series(name, looks[name], points, "area", base, 0.56 / curve.max()))
        initial = 1 - curve.mean()
        held = f": {initial:.0%} initial weights" if initial >= 0.005 else ""
        labels.append((0.0, base + 0.86, f"{name}{held}; centre {(curve @ times) / curve.sum():.0f}%"))
    caption = "Weight of the parameters of each training step in the average. Each row has its own scale."
    return series and Plot(
        "Weighting of each average over training",
        *("% of training", "density", tuple(series), caption),
        labels=tuple(labels),
        height=60 + 44 * len(series),
        linear=True,
        y_axis=False,
        legend=False,
    ) or None


def over_training(series: Iterable[Series], title: str, label: str, caption: str, **more: object) -> Plot | None:
    """Series over the training step, of those that have two points."""
    known = tuple(one for one in series if len(one.points) > 1)
    return Plot(title, "step", label, known, caption, **more) if known else None  # type: ignore[arg-type]


def by_weights(scored: Iterable[tuple[int, Sequence[Row]]]) -> dict[str, list[Point]]:
    """Name of weights -> its distance at each step."""
    points: dict[str, dict[int, Point]] = {}
    for step, rows in scored:
        for row in rows:
            name, at = split_step(row.weights)
            at = step if at is None else at
            points.setdefault(name, {})[at] = Point(at, row.distance, row.stderr or 0.0)
    return {name: [found[at] for at in sorted(found)] for name, found in points.items()}


def distance(
    scored: Iterable[tuple[int, Sequence[Row]]], label: str, caption: str, looks: Looks, level: Level | None = None
) -> Plot | None:
    """Distance of all weights over training, with standard errors, from scorings that can be compared with each other."""
    points = by_weights(scored)
    series = [Series(name, look, points.get(name, []), "errors") for name, look in looks.items()]
    caption += " Bars are one standard error. The same noise at every step and for all weights."
    return over_training(series, f"{label} over training", label, caption, level=level)


def curve(rows: Rows, key: str, title: str, label: str, caption: str, linear: bool = False) -> Plot | None:
    """One figure of metrics.jsonl over the step; `linear` keeps it from a logarithmic axis."""
    return over_training([Series("", Look("ink"), column(rows, key))], title, label, caption, linear=linear, height=180)


def quarters(rows: Rows, num_timesteps: int) -> Plot | None:
    """The loss of each quarter of the noise levels."""
    bounds = itertools.pairwise(-(-num_timesteps * quarter // 4) for quarter in range(5))
    series = [
        Series(f"t = {low}\u2013{high - 1}", Look(f"q{i}"), column(rows, f"loss_q{i}")) for i, (low, high) in enumerate(bounds)
    ]
    caption = "t is the noise level: little noise at 0, which is hardest to predict; almost only noise at the last."
    return over_training(series, "Loss by quarter of the timesteps", "loss", caption)


def distances(rows: Rows, looks: Looks) -> Plot | None:
    """How far the weights of each average lie from the raw ones."""
    series = [Series(name, look, column(rows, f"distance/{name}")) for name, look in looks.items()]
    caption = "\u2016average \u2212 raw\u2016 / \u2016raw\u2016 over all parameters."
    return over_training(series, "How far each average's weights lie from raw's", "relative distance", caption)


def column(rows: Rows, key: str) -> list[Point]:
    return [Point(row.step, value) for row in rows if (value := row.get(key)) is not None]


def swept(scoring: Scoring, key: str) -> list[Row]:
    """The rows of the sweep that varies `key` (a key of WIDTHS), in its order."""
    return sorted((row for row in scoring.sweep if row.get(key) is not None), key=lambda row: row.get(key) or 0.0)


def sweep(scoring: Scoring, key: str, note: str) -> list[Plot]:
    """Distance, then precision and recall, over the width of reconstructed averages. `note` is added to the second caption."""
    rows = swept(scoring, key)
    if len(rows) < 2:
        return []
    title, label, scale = WIDTHS[key]
    shares = []
    for share, look in (("precision", Look("c0")), ("recall", Look("c1", dash="7 3"))):
        values = [(row, row.get(share)) for row in rows]
        points = [Point(row.get(key) or 0.0, y, row.get(f"{share}_stderr") or 0.0) for row, y in values if y is not None]
        shares += [Series(share, look, points, "band")] if len(points) > 1 else []
    caption = "Precision: share of the samples that lie among reference images. Recall: share of the reference images that lie "
    drawn = Plot(
        f"Precision and recall over {title}",
        *(label, "share of images", tuple(shares), f"{caption}among samples. {note}".rstrip(), scale),
        linear=True,
    )
    return [_sweep_distance(scoring, rows, key), *([drawn] if shares else [])]


def _sweep_distance(scoring: Scoring, rows: Sequence[Row], key: str) -> Plot:
    title, label, scale = WIDTHS[key]
    told = scoring.sweep_best.get(key)
    names = [row.weights for row in rows]
    lowest = min(rows, key=lambda row: row.distance).weights
    best = names.index(told.weights if told is not None and told.weights in names else lowest)
    filled = {names[best], *(told.not_significantly_worse if told is not None else ())}
    points = [
        Point(row.get(key) or 0.0, row.distance, row.stderr or 0.0, row.weights, row.weights not in filled) for row in rows
    ]
    ring = points[best]
    width = f"{ring.x:,.0f} steps" if key == "cooldown" else f"{ring.x:.4g}"
    caption = (
        f"At step {scoring.step:,}, {scoring.sampling}. Averages reconstructed after training. "
        f"Bands are one and two standard errors; the ring is the best, {width}."
    )
    caption += " Filled marks are not significantly worse." if len(filled) > 1 else ""
    if best in (0, len(rows) - 1):
        caption += " It lies at the end of the range: a wider range may hold a better one."
    return Plot(
        f"{scoring.metric_name} over {title}",
        *(label, scoring.metric_name, (Series("sweep", Look("c0"), points, "band"),), caption, scale),
        level=floor(scoring),
        labels=((ring.x, ring.y + 2 * ring.error, f"best: {width}"),),
        ring=ring,
        legend=False,
    )


def floor(scoring: Scoring) -> Level | None:
    """The distance of real images from the reference, where it was measured."""
    known = scoring.floor
    if known is None or known.distance is None:
        return None
    return Level(known.distance, f"real images ({known.split}): {with_error(known.distance, known.stderr)}")
