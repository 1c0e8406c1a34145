"""A table of averages as they will be at the end of a run."""

from collections.abc import Mapping

from ddpm_ema.averaging.profiles import Profile

MAX_INITIAL_WEIGHT = 0.01
"""Share of the initial weights from which `summarize` warns that an average is too long for its run."""


def summarize(profiles: Mapping[str, Profile], num_steps: int) -> list[str]:
    """A table of averages after `num_steps` steps, and a warning for each that is too long for the run.

    Columns: the time constant 1 / (1 - decay) and the equal-weight window in steps, the centre as a share of the run, and the
    share of the initial weights still held. Lines of text; none without averages.
    """
    rows = [("average", "time constant (steps)", "window (steps)", "centred at", "initial weights")]
    warnings = []
    for name, profile in profiles.items():
        constant, initial = profile.time_constant(num_steps), profile.initial_weight(num_steps)
        window, centre = profile.effective_window(num_steps), profile.centre(num_steps)
        shown = "-" if constant is None else f"{constant:,.0f}"
        rows.append((name, shown, f"{window:,.0f}", f"{centre:.1%}", f"{initial:.1%}"))
        if initial >= MAX_INITIAL_WEIGHT:
            warnings.append(
                f"warning: {name} will still hold {initial:.0%} of the initial weights after {num_steps:,} steps: "
                "use bias_corrected or power_function"
            )
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return lines + warnings if profiles else []
