"""What the page draws: differences, profiles, curves over training, the sweep. Each function is one figure or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from ddpm_ema.numbers import with_error
from ddpm_ema.report.comparison import UNCLEAR, against_raw
from ddpm_ema.report.drawing import INK, LINE, MUTED, PAPER, QUARTERS, Drawing, Look, canvas, to_svg
from ddpm_ema.report.record import Scoring
from ddpm_ema.report.schema import Logged, Number, Row

Looks = Mapping[str, Look]
Rows = Sequence[Logged]


def differences(scoring: Scoring, looks: Looks) -> Drawing | None:
    """Every average's paired difference from raw with its 95% interval, the lowest distance on top."""
    rows = [row for row in scoring.rows if row.versus_raw is not None]
    if not rows:
        return None
    figure, axes = canvas(0.75 + 0.3 * len(rows))
    axes.axvline(0, color=INK, linewidth=1.0)
    for y, row in enumerate(rows):
        look, gap = looks[row.name], row.versus_raw
        assert gap is not None
        axes.plot([gap.low, gap.high], [y, y], color=look.colour, linewidth=2.4)
        face = PAPER if against_raw(row) == UNCLEAR else look.colour
        axes.plot(gap.delta, y, look.marker, color=look.colour, markerfacecolor=face, markersize=7, markeredgewidth=1.6)
    axes.set_yticks(range(len(rows)), [row.weights for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"{scoring.metric} minus raw\u2019s  (left is better)")
    spoken = "; ".join(
        f"{row.weights} {with_error(row.versus_raw.delta, row.versus_raw.stderr, signed=True)}, {against_raw(row)}"
        for row in rows
        if row.versus_raw
    )
    caption = (
        f"{scoring.conditions}. Paired over the same noise, with the 95% interval of each comparison alone. "
        "A hollow mark is a difference that is not significant."
    )
    svg = to_svg(figure, "differences", f"Difference from raw: {spoken}")
    return Drawing(svg, f"Difference from raw: {scoring.metric}", caption)


def profiles(weightings: Mapping[str, Sequence[Number]], looks: Looks) -> Drawing | None:
    """Where in training each average's weights come from, one row per average, each on its own scale.

    A weighting is a density over [0, 1] in equal parts; what its integral lacks to 1 is the weight of the initial parameters.
    """
    curves = {
        name: np.asarray(values, dtype=np.float64)
        for name, values in weightings.items()
        if len(values) > 1 and None not in values
    }
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
        initial = 1 - curve.mean()
        if initial >= 0.005:
            inside = curve[: len(curve) // 2].max() > 0.5 * curve.max()  # the text stands where the line is not
            text, y = f"{initial:.0%} still the initial weights", base + (0.08 if inside else 0.55)
            axes.text(0.01, y, text, va="bottom", fontsize=8.5, color=INK)
        axes.plot((curve @ times) / curve.sum(), base, look.marker, color=look.colour, markersize=5, clip_on=False)
    axes.set_yticks([len(curves) - 1 - row + 0.3 for row in range(len(curves))], list(curves))
    axes.set_ylim(-0.12, len(curves))
    axes.set_xlim(0, 1)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_xlabel("share of training")
    caption = "Weight given to the parameters of every moment of training. Each row has its own height; its mark is the centre."
    svg = to_svg(figure, "profiles", "Weighting profiles of " + ", ".join(curves))
    return Drawing(svg, "What each average holds", caption)


def over_steps(
    series: Sequence[tuple[int, Sequence[Row]]], label: str, caption: str, looks: Looks, prefix: str
) -> Drawing | None:
    """Distance of all weights over training, with standard errors, from scorings that can be compared with each other."""
    points: dict[str, dict[int, Row]] = {}
    for step, rows in series:
        for row in rows:
            name, _, at = row.weights.partition("@")
            points.setdefault(name, {})[int(at) if at.isdigit() else step] = row
    lines = {name: points[name] for name in looks if len(points.get(name, ())) > 1}
    if not lines:
        return None
    figure, axes = canvas(2.9)
    for name, line in lines.items():
        steps, look = sorted(line), looks[name]
        axes.errorbar(
            steps,
            [line[step].distance for step in steps],
            [line[step].stderr or 0.0 for step in steps],
            color=look.colour,
            linestyle=look.dash,
            marker=look.marker,
            markersize=5,
            elinewidth=1.2,
        )
    _step_axis(axes)
    axes.set_ylabel(label)
    values = [row.distance for line in lines.values() for row in line.values()]
    _log_if_wide(axes, values)
    svg = to_svg(figure, prefix, f"{label} over training step of {', '.join(lines)}")
    caption += " Bars are one standard error. The same noise at every step and for all weights."
    return Drawing(svg, f"{label} over training", caption, tuple((name, looks[name]) for name in lines))


def sweep(scoring: Scoring, key: str, look: Look, note: str) -> list[Drawing]:
    """Distance, then precision and recall, over the width of reconstructed averages, `key` (std, decay or cooldown).

    `note` says what to know of precision.
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
    told = scoring.results.sweep_best.get(key)
    close = told.not_significantly_worse if told is not None else ()
    names = [row.weights for row in points]
    best = names.index(told.weights) if told is not None and told.weights in names else int(y.argmin())
    figure, axes = canvas(2.9)
    axes.fill_between(x, y - 2 * error, y + 2 * error, color=look.colour, alpha=0.14, linewidth=0)
    axes.fill_between(x, y - error, y + error, color=look.colour, alpha=0.22, linewidth=0)
    axes.plot(x, y, color=look.colour)
    for row, at, value in zip(points, x, y, strict=True):
        face = look.colour if row.weights in (names[best], *close) else PAPER
        axes.plot(at, value, "o", color=look.colour, markerfacecolor=face, markersize=5, markeredgewidth=1.3)
    axes.plot(x[best], y[best], "o", color=look.colour, markersize=11, markerfacecolor="none", markeredgewidth=1.8)
    name = f"{x[best]:,.0f} steps" if key == "cooldown" else f"{x[best]:.4g}"
    above = y[best] < (y.min() + y.max()) / 2
    side = {0: "left", len(x) - 1: "right"}.get(best, "center")
    spot, offset = (x[best], y[best] + (2 if above else -2) * error[best]), (0, 9 if above else -16)
    axes.annotate(f"best: {name}", spot, offset, textcoords="offset points", ha=side)
    axes.margins(y=0.16)
    _width_axis(axes, key)
    axes.set_ylabel(scoring.metric)
    svg = to_svg(figure, f"sweep-{key}", f"{scoring.metric} over {WIDTHS[key]}; best at {name}")
    caption = (
        f"At step {scoring.step:,}, {scoring.sampler}. Averages "
        f"reconstructed after training. Bands are one and two standard errors; the ring is the best, {name}."
    )
    if close:
        caption += " Filled marks are not significantly worse."
    if best in (0, len(x) - 1):
        caption += " It lies at the end of the range: a wider range may hold a better one."
    return Drawing(svg, f"{scoring.metric} over {WIDTHS[key]}", caption)


def _sweep_shares(points: Sequence[Row], key: str, look: Look, note: str) -> Drawing:
    figure, axes = canvas(2.5)
    for share, dash, marker in (("precision", "-", "o"), ("recall", (0, (4, 1.6)), "s")):
        known = [
            (row.get(key), row.get(share), row.get(f"{share}_stderr") or 0.0)
            for row in points
            if row.get(share) is not None
        ]
        x, y, error = (np.array(column, dtype=np.float64) for column in zip(*known, strict=True))
        if error.any():
            axes.fill_between(x, y - error, y + error, color=look.colour, alpha=0.18, linewidth=0)
        axes.plot(x, y, color=look.colour, linestyle=dash, marker=marker, markersize=4)
        up = 6 if y[-1] >= y[0] else -14  # the side that the line does not come from
        axes.annotate(share, (x[-1], y[-1]), (-2, up), textcoords="offset points", ha="right")
    axes.margins(y=0.16)
    _width_axis(axes, key)
    axes.set_ylabel("share of images")
    svg = to_svg(figure, f"shares-{key}", f"Precision and recall over {WIDTHS[key]}")
    caption = "Precision (solid): samples that lie among real images. Recall (dashed): real images that samples reach."
    caption = f"{caption} {note}".rstrip()
    return Drawing(svg, f"Precision and recall over {WIDTHS[key]}", caption)


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
    axes.set_xticks([d for d in nines if low <= d <= high], [f"{d:g}" for d in nines if low <= d <= high])
    axes.minorticks_off()
    axes.set_xlabel("constant decay")


def curve(rows: Rows, key: str, title: str, label: str, caption: str, linear: bool = False) -> Drawing | None:
    """One figure of metrics.jsonl over the step; `linear` keeps it from a logarithmic axis."""
    steps, values = _column(rows, key)
    if len(steps) < 2:
        return None
    figure, axes = canvas(2.1)
    axes.plot(steps, values, color=INK, linewidth=1.4)
    _step_axis(axes)
    axes.set_ylabel(label)
    if not linear:
        _log_if_wide(axes, values)
    prefix = "curve-" + key.replace("/", "-").replace("_", "-")
    return Drawing(to_svg(figure, prefix, f"{title}: from {values[0]:.4g} to {values[-1]:.4g}"), title, caption)


def quarters(rows: Rows, num_timesteps: int) -> Drawing | None:
    """The loss of each quarter of the noise levels."""
    columns = [_column(rows, f"loss_q{quarter}") for quarter in range(4)]
    if any(len(steps) < 2 for steps, _ in columns):
        return None
    figure, axes = canvas(2.5)
    bounds = [-(-num_timesteps * quarter // 4) for quarter in range(5)]
    legend = []
    for quarter, (steps, values) in enumerate(columns):
        axes.plot(steps, values, color=QUARTERS[quarter], linewidth=1.5)
        legend.append((f"t = {bounds[quarter]}\u2013{bounds[quarter + 1] - 1}", Look(QUARTERS[quarter], "o", "-")))
    _step_axis(axes)
    axes.set_ylabel("loss")
    _log_if_wide(axes, [value for _, values in columns for value in values])
    svg = to_svg(figure, "quarters", "Loss by quarter of the timesteps")
    caption = "t is the noise level: little noise at 0, hardest to predict; almost only noise at the last."
    return Drawing(svg, "Loss by quarter of the timesteps", caption, tuple(legend))


def distances(rows: Rows, looks: Looks) -> Drawing | None:
    """How far the weights of each average lie from the raw ones."""
    columns = {name: _column(rows, f"distance/{name}") for name in looks}
    columns = {name: column for name, column in columns.items() if len(column[0]) > 1}
    if not columns:
        return None
    figure, axes = canvas(2.5)
    for name, (steps, values) in columns.items():
        axes.plot(steps, values, color=looks[name].colour, linestyle=looks[name].dash, linewidth=1.5)
    _step_axis(axes)
    axes.set_ylabel("relative distance")
    _log_if_wide(axes, [value for _, values in columns.values() for value in values])
    title = "How far each average's weights lie from raw's"
    svg = to_svg(figure, "distances", f"{title}, over training")
    caption = "\u2016average \u2212 raw\u2016 / \u2016raw\u2016 over all parameters."
    return Drawing(svg, title, caption, tuple((name, looks[name]) for name in columns))


def _column(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    pairs = [(row.step, value) for row in rows if (value := row.get(key)) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


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
