"""What the page draws: differences, weightings, curves over training, the sweep. Each function is one figure or none."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from ddpm_ema.numbers import with_error
from ddpm_ema.report.answer import UNCLEAR, against_raw
from ddpm_ema.report.drawing import INK, LINE, MUTED, PAPER, QUARTERS, Drawing, Look, canvas, to_svg
from ddpm_ema.report.record import Logged, Number, Row, Scoring
from ddpm_ema.weight_names import split_step

Looks = Mapping[str, Look]
Rows = Sequence[Logged]


def differences(scoring: Scoring, looks: Looks) -> Drawing | None:
    """Paired difference from raw of each average with its 95% interval, the lowest distance on top."""
    rows = [(row, gap) for row in scoring.rows if (gap := row.versus_raw) is not None]
    if not rows:
        return None
    figure, axes = canvas(0.75 + 0.3 * len(rows))
    axes.axvline(0, color=INK, linewidth=1.0)
    for y, (row, gap) in enumerate(rows):
        look = looks[row.name]
        axes.plot([gap.low, gap.high], [y, y], color=look.colour, linewidth=2.4)
        face = PAPER if against_raw(row) == UNCLEAR else look.colour
        axes.plot(gap.delta, y, look.marker, color=look.colour, markerfacecolor=face, markersize=7, markeredgewidth=1.6)
    axes.set_yticks(range(len(rows)), [row.weights for row, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"{scoring.metric_name}, difference from raw  (left is better)")
    spoken = "; ".join(
        f"{row.weights} {with_error(gap.delta, gap.stderr, signed=True)}, {against_raw(row)}" for row, gap in rows
    )
    caption = (
        f"{scoring.conditions}. Distances {scoring.against}, paired over the same noise; an interval leaves out zero where the "
        "difference is significant at the error rate of the whole table. A hollow mark is a difference that is not."
    )
    svg = to_svg(figure, "differences", f"Difference from raw: {spoken}")
    return Drawing(svg, f"Difference from raw: {scoring.metric_name}", caption)


def weightings(given: Mapping[str, Sequence[Number]], looks: Looks) -> Drawing | None:
    """Where in training each average's weights come from, one row per average, each on its own scale.

    A weighting is a density over [0, 1] in equal parts; what its integral lacks to 1 is the weight of the initial parameters.
    """
    known = {name: values for name, values in given.items() if len(values) > 1 and None not in values}
    curves = {name: np.asarray(values, dtype=np.float64) for name, values in known.items()}
    curves = {name: curve for name, curve in curves.items() if name in looks and curve.max() > 0}
    if not curves:
        return None
    figure, axes = canvas(0.6 + 0.42 * len(curves))
    for row, (name, curve) in enumerate(curves.items()):
        base, look = len(curves) - 1 - row, looks[name]
        times = (np.arange(len(curve)) + 0.5) / len(curve)
        height = base + 0.86 * curve / curve.max()
        axes.fill_between(times, base, height, color=look.colour, alpha=0.28, linewidth=0)
        axes.plot(times, height, color=look.colour, linestyle=look.dash)
        axes.axhline(base, color=LINE, linewidth=0.7)
        if (initial := 1 - curve.mean()) >= 0.005:
            inside = curve[: len(curve) // 2].max() > 0.5 * curve.max()  # the text stands where the line is not
            y = base + (0.08 if inside else 0.55)
            axes.text(0.01, y, f"{initial:.0%} initial weights", va="bottom", fontsize=8.5, color=INK)
        axes.plot((curve @ times) / curve.sum(), base, look.marker, color=look.colour, markersize=5, clip_on=False)
    axes.set_yticks([len(curves) - 1 - row + 0.3 for row in range(len(curves))], list(curves))
    axes.set_ylim(-0.12, len(curves))
    axes.set_xlim(0, 1)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_xlabel("share of training")
    caption = "Weight of the parameters of each training step in the average. Each row has its own scale; its mark is the centre."
    svg = to_svg(figure, "profiles", "Weighting profiles of " + ", ".join(curves))
    return Drawing(svg, "Weighting of each average over training", caption)


class Line(NamedTuple):
    """Values over training steps, with standard errors where there are some."""

    name: str
    look: Look
    steps: Sequence[int]
    values: Sequence[float]
    errors: Sequence[float] | None = None


def _over_training(
    lines: Sequence[Line], title: str, label: str, caption: str, prefix: str, height: float, linear: bool = False
) -> Drawing | None:
    """Lines over the training step; None where none has two points. A single line without a name has no legend."""
    lines = [line for line in lines if len(line.steps) > 1]
    if not lines:
        return None
    figure, axes = canvas(height)
    for _, look, steps, values, errors in lines:
        marker = look.marker if errors is not None else None
        axes.errorbar(
            steps,
            values,
            errors,
            None,
            marker=marker,
            markersize=5,
            color=look.colour,
            linestyle=look.dash,
            elinewidth=1.2,
        )
    _step_axis(axes)
    axes.set_ylabel(label)
    everything = [value for line in lines for value in line.values]
    if not linear:
        _log_if_wide(axes, everything)
    names = [line.name for line in lines if line.name]
    spoken = f" of {', '.join(names)}" if names else f", from {everything[0]:.4g} to {everything[-1]:.4g}"
    legend = tuple((line.name, line.look) for line in lines if line.name)
    return Drawing(to_svg(figure, prefix, f"{title}{spoken}"), title, caption, legend)


def distance(
    series: Sequence[tuple[int, Sequence[Row]]], label: str, caption: str, looks: Looks, prefix: str
) -> Drawing | None:
    """Distance of all weights over training, with standard errors, from scorings that can be compared with each other."""
    points: dict[str, dict[int, Row]] = {}
    for step, rows in series:
        for row in rows:
            name, at = split_step(row.weights)
            points.setdefault(name, {})[step if at is None else at] = row
    lines = []
    for name, look in looks.items():
        steps, found = sorted(points.get(name, ())), points.get(name, {})
        values, errors = [found[step].distance for step in steps], [found[step].stderr or 0.0 for step in steps]
        lines.append(Line(name, look, steps, values, errors))
    caption += " Bars are one standard error. The same noise at every step and for all weights."
    return _over_training(lines, f"{label} over training", label, caption, prefix, 2.9)


def curve(rows: Rows, key: str, title: str, label: str, caption: str, linear: bool = False) -> Drawing | None:
    """One figure of metrics.jsonl over the step; `linear` keeps it from a logarithmic axis."""
    prefix = "curve-" + key.replace("/", "-").replace("_", "-")
    return _over_training([Line("", Look(INK), *_column(rows, key))], title, label, caption, prefix, 2.1, linear)


def quarters(rows: Rows, num_timesteps: int) -> Drawing | None:
    """The loss of each quarter of the noise levels."""
    bounds = [-(-num_timesteps * quarter // 4) for quarter in range(5)]
    names = [f"t = {low}\u2013{high - 1}" for low, high in itertools.pairwise(bounds)]
    lines = [Line(name, Look(QUARTERS[i]), *_column(rows, f"loss_q{i}")) for i, name in enumerate(names)]
    caption = "t is the noise level: little noise at 0, which is hardest to predict; almost only noise at the last."
    return _over_training(lines, "Loss by quarter of the timesteps", "loss", caption, "quarters", 2.5)


def distances(rows: Rows, looks: Looks) -> Drawing | None:
    """How far the weights of each average lie from the raw ones."""
    lines = [Line(name, look, *_column(rows, f"distance/{name}")) for name, look in looks.items()]
    caption = "\u2016average \u2212 raw\u2016 / \u2016raw\u2016 over all parameters."
    title = "Distance of each average's weights from raw's"
    return _over_training(lines, title, "relative distance", caption, "distances", 2.5)


def _column(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    pairs = [(row.step, value) for row in rows if (value := row.get(key)) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def sweep(scoring: Scoring, key: str, look: Look, note: str) -> list[Drawing]:
    """Distance, then precision and recall, over the width of reconstructed averages, `key` (a key of WIDTHS).

    `note` is added to the caption of precision.
    """
    points = sorted((row for row in scoring.sweep if row.get(key) is not None), key=lambda row: row.get(key) or 0.0)
    if len(points) < 2:
        return []
    drawings = [_sweep_distance(points, key, scoring, look)]
    shares = [(row.get("precision"), row.get("recall")) for row in points]
    if sum(None not in share for share in shares) > 1:
        drawings.append(_sweep_shares(points, key, look, note))
    return drawings


def _sweep_distance(points: Sequence[Row], key: str, scoring: Scoring, look: Look) -> Drawing:
    x = np.array([row.get(key) for row in points], dtype=np.float64)
    y = np.array([row.distance for row in points])
    error = np.array([row.stderr or 0.0 for row in points])
    best = points.index(min(points, key=lambda row: (-row.num_images, row.distance)))
    figure, axes = canvas(2.9)
    axes.fill_between(x, y - 2 * error, y + 2 * error, color=look.colour, alpha=0.14, linewidth=0)
    axes.fill_between(x, y - error, y + error, color=look.colour, alpha=0.22, linewidth=0)
    axes.plot(x, y, color=look.colour)
    for row, at, value in zip(points, x, y, strict=True):
        face = look.colour if row.weights in scoring.may_be_best else PAPER
        axes.plot(at, value, "o", color=look.colour, markerfacecolor=face, markersize=5, markeredgewidth=1.3)
    axes.plot(x[best], y[best], "o", color=look.colour, markersize=11, markerfacecolor="none", markeredgewidth=1.8)
    width = f"{x[best]:,.0f} steps" if key == "cooldown" else f"{x[best]:.4g}"
    above = y[best] < (y.min() + y.max()) / 2
    side = {0: "left", len(x) - 1: "right"}.get(best, "center")
    spot, offset = (x[best], y[best] + (2 if above else -2) * error[best]), (0, 9 if above else -16)
    axes.annotate(f"lowest: {width}", spot, offset, textcoords="offset points", ha=side)
    axes.margins(y=0.16)
    _width_axis(axes, key)
    axes.set_ylabel(scoring.metric_name)
    title = f"{scoring.metric_name} over {WIDTHS[key]}"
    caption = (
        f"At step {scoring.step:,}, {scoring.sampling}. Averages reconstructed after training. "
        f"Bands are one and two standard errors; the ring is the lowest, {width}. Filled marks may be the best of all weights."
    )
    if best in (0, len(x) - 1):
        caption += " It lies at the end of the range: a wider range may hold a better one."
    return Drawing(to_svg(figure, f"sweep-{key}", f"{title}; lowest at {width}"), title, caption)


def _sweep_shares(points: Sequence[Row], key: str, look: Look, note: str) -> Drawing:
    figure, axes = canvas(2.5)
    for share, dash, marker in (("precision", "-", "o"), ("recall", (0, (4, 1.6)), "s")):
        known = [row for row in points if row.get(share) is not None]
        columns = ([row.get(of) or 0.0 for row in known] for of in (key, share, f"{share}_stderr"))
        x, y, error = map(np.asarray, columns)
        if error.any():
            axes.fill_between(x, y - error, y + error, color=look.colour, alpha=0.18, linewidth=0)
        axes.plot(x, y, color=look.colour, linestyle=dash, marker=marker, markersize=4)
        up = 6 if y[-1] >= y[0] else -14  # the side that the line does not come from
        axes.annotate(share, (x[-1], y[-1]), (-2, up), textcoords="offset points", ha="right")
    axes.margins(y=0.16)
    _width_axis(axes, key)
    axes.set_ylabel("share of images")
    title = f"Precision and recall over {WIDTHS[key]}"
    caption = (
        "Precision (solid): share of the samples that lie among reference images. "
        f"Recall (dashed): share of the reference images that lie among samples. {note}"
    ).rstrip()
    return Drawing(to_svg(figure, f"shares-{key}", title), title, caption)


WIDTHS = {"std": "the width of the average", "decay": "the decay", "cooldown": "the length of the emulated decay"}


def _width_axis(axes: Axes, key: str) -> None:
    if key == "std":
        axes.set_xlabel("width of the average, \u03c3_rel")
        return
    if key == "cooldown":
        _step_axis(axes)
        axes.set_xlabel("steps of the emulated linear decay of the learning rate")
        return
    axes.set_xscale("function", functions=(lambda d: -np.log10(np.maximum(1 - d, 1e-9)), lambda v: 1 - 10.0 ** (-v)))
    low, high = axes.get_xlim()
    nines = [0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999, 0.99995, 0.99999, 0.999999]
    shown = [decay for decay in nines if low <= decay <= high]
    axes.set_xticks(shown, [f"{decay:g}" for decay in shown])
    axes.minorticks_off()
    axes.set_xlabel("constant decay")


def _step_axis(axes: Axes) -> None:
    axes.set_xlabel("step", color=MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _log_if_wide(axes: Axes, values: Sequence[float], factor: float = 8.0) -> None:
    """A logarithmic axis with plain numbers where values span more than `factor` and none is negative or zero."""
    if not (min(values) > 0 and max(values) > factor * min(values)):
        return
    axes.set_yscale("log")
    many = max(values) > 300 * min(values)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if many else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
