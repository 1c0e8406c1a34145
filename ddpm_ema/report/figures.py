"""What the page plots: weightings, curves over training, sweeps. Each function gives one plot, or None without two points."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from ddpm_ema.numbers import listed, with_error
from ddpm_ema.report.plot import Look, Plot, Point, Series
from ddpm_ema.report.record import Logged, Number, Row, Scoring
from ddpm_ema.weight_names import split_step

Looks = Mapping[str, Look]
Rows = Sequence[Logged]
WIDTHS = {
    "std": ("the width of the average", "\u03c3_rel"),
    "decay": ("the decay", "1 / (1 \u2212 decay), steps"),
    "cooldown": ("the length of the emulated decay", "steps of the emulated linear decay of the learning rate"),
}
"""What a sweep varies: as a title says it, and as an axis says it."""


def weightings(given: Mapping[str, Sequence[Number]], looks: Looks) -> Plot | None:
    """Which share of each average's weight lies on parameters from before a moment of training.

    A weighting is a density over [0, 1] in equal parts; what its integral lacks to 1 is the weight of the initial parameters.
    """
    series = []
    for name in [name for name in given if name in looks]:
        density = [value for value in given[name] if value is not None]
        shares = [0.0, *itertools.accumulate(value / len(density) for value in density)]
        points = [Point(100 * i / len(density), 1 - shares[-1] + share) for i, share in enumerate(shares) if density]
        series.append(Series(name, looks[name], points))
    caption = "Share of an average's weight that lies on parameters from before. At 0% it is the share of the initial parameters."
    return over_training(series, "Weighting of each average", "share", caption, x_label="% of training", linear=True)


def over_training(series: Iterable[Series], title: str, label: str, caption: str, **more: object) -> Plot | None:
    """Series over the training step, of those that have two points."""
    known = tuple(one for one in series if len(one.points) > 1)
    more = {"x_label": "step", **more}
    return Plot(title, y_label=label, series=known, caption=caption, **more) if known else None  # type: ignore[arg-type]


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
    scored: Iterable[tuple[int, Sequence[Row]]],
    label: str,
    caption: str,
    looks: Looks,
    level: tuple[float, str] | None = None,
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
        Series(f"t = {low}\u2013{high - 1}", Look(f"q{i}"), column(rows, f"loss_q{i}"))
        for i, (low, high) in enumerate(bounds)
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


def swept(scoring: Scoring, key: str, value: str = "", prefix: str = "") -> list[Point]:
    """The sweep that varies `key` (a key of WIDTHS) as points: the distance, or another value of its rows, over the width.

    Marks of rows that cannot be the best of all weights are hollow.
    """
    points = []
    for row in scoring.sweep:
        x, y = row.get(key), row.get(value) if value else row.distance
        error = row.get(f"{value}_stderr" if value else "stderr") or 0.0
        if x is not None and y is not None and not (key == "decay" and x >= 1):
            x = 1 / (1 - x) if key == "decay" else x
            points.append(
                Point(x, y, error, prefix + row.weights, row.weights not in scoring.may_be_best and not value)
            )
    return sorted(points)


def sweep(scoring: Scoring, key: str) -> list[Plot]:
    """Distance, then precision (unless it says nothing) and recall, over the width of reconstructed averages."""
    (title, label), points, metric = WIDTHS[key], swept(scoring, key), scoring.metric_name
    if len(points) < 2:
        return []
    drawn_rows = [row for row in scoring.sweep if row.weights in {point.note for point in points}]
    best = min(drawn_rows, key=lambda row: (-row.num_images, row.distance))
    ring = next(point for point in points if point.note == best.weights)
    caption = (
        f"At step {scoring.step:,}, {scoring.sampling}. Averages reconstructed after training. Bands are one and two standard "
        f"errors; the ring is the lowest over {best.num_images:,} images, {ring.note}. Filled marks may be the best of all weights."
    )
    if ring in (points[0], points[-1]):
        caption += " It lies at the end of the range: a wider range may hold a better one."
    drawn, log = (Series("sweep", Look("c0"), points, "band"),), key == "decay"
    found = [Plot(f"{metric} over {title}", label, metric, drawn, caption, log, level=floor(scoring), ring=ring)]
    shares = [Series("recall", Look("c1", dash="7 3"), swept(scoring, key, "recall"), "band")]
    caption = "Recall: share of the reference images that lie among samples."
    if scoring.precision_note:
        caption += f" {scoring.precision_note}"
    else:
        shares.insert(0, Series("precision", Look("c0"), swept(scoring, key, "precision"), "band"))
        caption = f"Precision: share of the samples that lie among reference images. {caption}"
    if all(len(one.points) > 1 for one in shares):
        names = listed([one.name for one in shares]).capitalize()
        found.append(Plot(f"{names} over {title}", label, "share of images", tuple(shares), caption, log, linear=True))
    return found


def floor(scoring: Scoring) -> tuple[float, str] | None:
    """The distance of real images from the reference, where it was measured."""
    known = scoring.floor
    if known is None or known.distance is None:
        return None
    return known.distance, f"real images ({known.split}): {with_error(known.distance, known.stderr)}"
