"""The pictures of docs/averaging.md, drawn from the library itself.

    python benchmarks/averaging_images.py [--folder docs/images]

`averaging_profiles.png`: what each rule gives every step; `averaging_posthoc.png`: which averages can be had after the fact.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np

from ddpm_ema.averaging import (
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
    figure.suptitle(f"What each rule gives the parameters after every one of {STEPS:,} steps")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def posthoc_picture(path: Path) -> None:
    stds = np.geomspace(0.01, 0.28, 25)
    decays = 1 - np.geomspace(0.02, 0.0001, 25)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), sharey=True)
    for every, colour in ((1000, "C0"), (500, "C1"), (200, "C2"), (100, "C3")):
        steps = [step for step in range(every, STEPS + 1, every) for _ in range(2)]
        stored = [0.05, 0.10] * (STEPS // every)
        label = f"every {every} steps ({STEPS // every} x 2 snapshots)"

        def error(target: Profile, steps: list[int] = steps, stored: list[float] = stored) -> float:
            return posthoc_coefficients(steps, stored, STEPS, target).profile_error

        left.loglog(stds, [error(PowerFunction(float(std))) for std in stds], color=colour, label=label)
        right.loglog(1 - decays, [error(BiasCorrected(float(decay))) for decay in decays], color=colour, label=label)
    for axis in (left, right):
        axis.axhline(0.05, color="0.5", linestyle="--", linewidth=1)
        axis.grid(alpha=0.3)
    left.set(xlabel="power function of width sigma_rel", ylabel="relative error of the profile got")
    right.set(xlabel="1 - decay of a debiased constant decay")
    right.invert_xaxis()
    left.legend(fontsize=8)
    left.text(0.0102, 0.055, "above: a warning", fontsize=8, color="0.4")
    figure.suptitle(f"Averages made from snapshots of sigma_rel 0.05 and 0.10 over {STEPS:,} steps")
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
