"""The pictures of docs/averaging.md, drawn from the library itself.

    python benchmarks/averaging_images.py [--folder docs/images]

`averaging_profiles.png`: the weight that each rule gives to every step; `averaging_posthoc.png`: predicted errors of reconstructions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np

from ddpm_ema.averaging import (
    RAW,
    BiasCorrected,
    ConstantDecay,
    CosineCooldown,
    HalfLife,
    HalfLifeShare,
    HardCopy,
    PowerFunction,
    Profile,
    SqrtCooldown,
    StochasticWeightAverage,
    Uniform,
    Warmup,
    Window,
    posthoc_coefficients,
)

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STEPS = 10_000


def label(profile: Profile) -> str:
    fields = ", ".join(f"{name}={value:g}" for name, value in profile.settings().items())
    initial = profile.initial_weight(STEPS)
    return f"{type(profile).__name__}({fields})" + (f" + {initial:.0%} initial weights" if initial > 0.01 else "")


def profiles_picture(path: Path) -> None:
    panels: list[tuple[str, list[Profile]]] = [
        ("the same decay at every step", [ConstantDecay(0.999), ConstantDecay(0.9999), BiasCorrected(0.9999)]),
        ("the same share of training", [PowerFunction(0.05), PowerFunction(0.10), PowerFunction(0.20), Uniform()]),
        ("warmed up", [Warmup(0.9999), Warmup(0.9999, inv_gamma=9, power=1)]),
        ("half-lives", [HalfLife(200), HalfLifeShare(0.05), HalfLifeShare(0.20)]),
        ("the last steps", [shape(2000, STEPS) for shape in (Window, CosineCooldown, SqrtCooldown)]),
        ("snapshots", [StochasticWeightAverage(5000, 500), HardCopy(3000)]),
    ]
    figure, axes = plt.subplots(3, 2, figsize=(12, 10.5))
    time = np.arange(1, STEPS + 1) / STEPS
    for axis, (title, profiles) in zip(axes.flat, panels, strict=True):
        for number, profile in enumerate(profiles):
            weights, colour = profile.weighting(STEPS), f"C{number}"
            at = np.flatnonzero(weights)
            if len(at) < 100:  # snapshots: a stem for each, as a share of the whole average
                axis.stem(
                    time[at], weights[at], linefmt=colour, markerfmt=f"{colour}o", basefmt=" ", label=label(profile)
                )
            else:
                axis.plot(time, weights * STEPS, color=colour, label=label(profile))
        top = 15 if title == "the last steps" else None  # the first of them has 224 in a 1-sqrt decay
        axis.set(title=title, xlim=(0, 1.02), ylim=(0, top), xlabel="time, as a share of training")
        axis.set_ylabel("weight" if title == "snapshots" else "weight x steps")
        axis.legend(fontsize=8, loc="upper left" if title != "snapshots" else "center left")
    figure.suptitle(f"The weight that each rule gives to the parameters after each of {STEPS:,} steps")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def predicted(stored: list[Profile], count: int, target: Profile, steps: int = 100_000) -> float:
    """Predicted error of `target` from the initial weights and averages stored `count` times, evenly."""
    at = [0, *(steps * (i + 1) // count for i in range(count) for _ in stored)]
    return posthoc_coefficients(at, [RAW, *stored * count], steps, target).predicted_relative_error or 0.0


def posthoc_picture(path: Path) -> None:
    stds, lengths = np.geomspace(0.01, 0.285, 40), np.geomspace(3e-4, 1.0, 40)
    narrow, wide, uniform = PowerFunction(0.05), PowerFunction(0.10), Uniform()
    sets = {
        "power .05, .10 (EDM2's pair)": [narrow, wide],
        "power .05, uniform": [narrow, uniform],
        "power .05, .10, uniform": [narrow, wide, uniform],
        "raw, uniform": [RAW, uniform],
        "raw": [RAW],
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), sharey=True)
    for number, (title, stored) in enumerate(sets.items()):
        errors = [predicted(stored, 20, PowerFunction(float(std))) for std in stds]
        left.loglog(stds, errors, color=f"C{number}", label=title)
    for number, count in enumerate((10, 20, 50, 100)):
        errors = [predicted([narrow, wide, uniform], count, BiasCorrected(1 - 1e-5 / share)) for share in lengths]
        right.loglog(lengths, errors, color=f"C{number}", label=f"{count} snapshots")
    for decay, steps in ((0.999, 800_000), (0.999, 100_000), (0.9999, 800_000), (0.9999, 100_000), (0.999, 1500)):
        share = 1 / (1 - decay) / steps
        right.axvline(share, color="0.6", linewidth=0.8, linestyle=":")
        right.text(
            share, 2e-6, f" {decay:g} of {steps:,}", rotation=90, fontsize=7, va="bottom", ha="right", color="0.3"
        )
    for axis in (left, right):
        axis.axhline(0.05, color="0.5", linestyle="--", linewidth=1)
        axis.grid(alpha=0.3)
        axis.set_ylim(1e-6, 10)
    left.set(
        xlabel="power function of width sigma_rel",
        ylabel="predicted error / distance from raw",
        title="20 snapshots of",
    )
    right.set(
        xlabel="time constant of a debiased decay, as a share of the run", title="power .05, .10 and uniform, from"
    )
    left.legend(fontsize=8, loc="lower left")
    right.legend(fontsize=8, loc="upper right")
    left.text(0.0102, 0.057, "above: a warning", fontsize=8, color="0.4")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1] / "docs" / "images")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    profiles_picture(folder / "averaging_profiles.png")
    posthoc_picture(folder / "averaging_posthoc.png")


if __name__ == "__main__":
    main()
