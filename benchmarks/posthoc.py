"""Reconstructed averages against the same averages kept during training; EDM2's fit beside ours; limits of the model.

    python benchmarks/posthoc.py FOLDER [--runs constant cosine ...] [--counts 5 10 20 50] [--output FILE.json] [--figure FILE.png]

Trains the network of `configs/digits.yaml` 3,000 steps at a constant rate, with cosine decay, with a warm-up of a tenth, and at batch
size 4 (a finished run in FOLDER is reused). Every average below is kept; power functions .05 and .10, `uniform` and raw are stored
every 30 steps. Each kept average is then reconstructed from 5, 10, 20 and 50 of the stored ones. The error is that of all weights as a
share of the average's distance from the raw weights; `predicted` is known before any tensor is read.

EDM2's fit is that of Karras et al. 2024, appendix C.3: least squares of the weightings. The paper solves it for power functions by
closed forms of continuous time and normal equations; here it is solved over the discrete weightings, for any target, by an orthogonal
factorisation, and its coefficients are held to sum to 1, which is in its favour.

    python benchmarks/posthoc.py --simulate [--output FILE.json]

simulates weights that do not move as the model assumes, and prints actual / predicted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from environment import environment
from safetensors.torch import load_file
from torch import Tensor

from ddpm_ema import config
from ddpm_ema.averaging import (
    RAW,
    BiasCorrected,
    ConstantDecay,
    PowerFunction,
    Profile,
    Snapshot,
    StochasticWeightAverage,
    Uniform,
    find_snapshots,
    posthoc_coefficients,
    profile_to_dict,
)
from ddpm_ema.averaging.posthoc import fit

ROOT = Path(__file__).parents[1]
STEPS, STORED_EVERY = 3000, 30
TRAINING: dict[str, dict[str, Any]] = {
    "constant": {},
    "cosine": {"learning_rate_schedule": "cosine"},
    "warmup": {"warmup_steps": STEPS // 10},
    "batch4": {"batch_size": 4},
}
TITLES = {
    "constant": "constant rate",
    "cosine": "cosine decay",
    "warmup": "warm-up of a tenth",
    "batch4": "batch size 4",
}
STORED: dict[str, Profile] = {
    "power_0_05": PowerFunction(0.05),
    "power_0_10": PowerFunction(0.10),
    "uniform": Uniform(),
}


def kept_profiles(steps: int) -> dict[str, Profile]:
    """The averages that are kept while training. Of the two windows one starts at a snapshot."""
    return {
        **STORED,
        **{f"power_0_{std:02.0f}": PowerFunction(std / 100) for std in (3, 15, 20, 25)},
        "debiased_0_99": BiasCorrected(0.99),
        "debiased_0_999": BiasCorrected(0.999),
        "debiased_0_9999": BiasCorrected(0.9999),
        "constant_0_9999": ConstantDecay(0.9999),
        "last_20": StochasticWeightAverage(steps * 80 // 100 + 1),
        "last_17": StochasticWeightAverage(steps * 83 // 100 + 1),
    }


SETS = {
    "power .05, .10": ["power_0_05", "power_0_10"],
    "power .05, uniform": ["power_0_05", "uniform"],
    "power .05, .10, uniform": ["power_0_05", "power_0_10", "uniform"],
    "raw": ["raw"],
    "raw, uniform": ["raw", "uniform"],
}


def train(folder: Path, name: str) -> Path:
    """The run directory of one run; trains it if it does not exist."""
    run = folder / name
    if (run / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json").exists():
        return run
    settings = config.to_dict(config.load(ROOT / "configs" / "digits.yaml"))
    settings["output_dir"] = str(run)
    settings["training"] |= {"steps": STEPS, "warmup_steps": 0, "sample_every": 0} | TRAINING[name]
    settings["averages"] = {name: profile_to_dict(profile) for name, profile in kept_profiles(STEPS).items()}
    settings["checkpoints"] |= {"every": STEPS // 4, "snapshots_every": STORED_EVERY, "snapshots": [*STORED, "raw"]}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    subprocess.run([sys.executable, ROOT / "scripts" / "train.py", "--config", path], check=True)
    return run


def flat(path: Path) -> Tensor:
    """All weights of a file, by name, as one vector: fp32 [num_weights]."""
    return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(path).items())])


def edm2(stored: Sequence[Snapshot], target: Profile, step_out: int) -> np.ndarray:
    """Least squares of the weightings, over coefficients that sum to 1: the last one is what the others lack to 1."""
    columns = np.stack([np.pad(s.profile.weighting(s.step), (0, step_out - s.step)) for s in stored], axis=1)
    matrix, goal = columns[:, :-1] - columns[:, -1:], target.weighting(step_out) - columns[:, -1]
    free = np.linalg.lstsq(matrix, goal, rcond=None)[0]
    return np.append(free, 1.0 - free.sum())


def distances(coefficients: np.ndarray, stored: Tensor, targets: Tensor, chunk: int = 1 << 16) -> np.ndarray:
    """Distance of each combination [num_fits, num_stored] from its target [num_fits, num_weights], summed in float64."""
    squares = torch.zeros(len(coefficients), dtype=torch.float64)
    for first in range(0, stored.shape[1], chunk):
        part = slice(first, first + chunk)
        made = torch.from_numpy(coefficients) @ stored[:, part].double()
        squares += (made - targets[:, part].double()).square().sum(dim=1)
    return squares.sqrt().numpy()


def measure(run: Path, counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """One cell for every set of stored averages, number of snapshots, average that is not in the set, and fit."""
    training = config.load(run / "config.yaml").training
    steps, checkpoint = training.steps, run / "checkpoints" / f"step-{training.steps:08d}"
    rates = None if training.step_variance(0) == training.step_variance(steps - 1) == 1.0 else training.step_variance
    variances: dict[str, Callable[[float], float] | None] = {"constant": None} | ({"rate^2": rates} if rates else {})
    files = {(snapshot.path.stem, snapshot.step): snapshot for snapshot in find_snapshots(run / "snapshots")}
    profiles = kept_profiles(steps)
    kept = {name: flat(checkpoint / "averages" / f"{name}.safetensors") for name in profiles}
    raw = flat(checkpoint / "raw.safetensors")
    scale = {name: float((kept[name].double() - raw.double()).norm()) for name in profiles}
    for title, names in SETS.items():
        for count in counts:
            stored = [files[name, steps * (i + 1) // count] for i in range(count) for name in names]
            stack = torch.stack([flat(files["raw", 0].path), *(flat(s.path) for s in stored)])
            cells, rows = [], []
            for target in (name for name in profiles if name not in names):
                base = {"run": run.name, "stored": title, "snapshots": count, "target": target}
                cells.append(base | {"fit": "weightings (EDM2)", "step_variance": None, "predicted": None})
                rows.append(np.concatenate([[0.0], edm2(stored, profiles[target], steps)]))
                for label, variance in variances.items():
                    found = fit([files["raw", 0], *stored], steps, profiles[target], step_variance=variance)
                    told = {"predicted": found.coefficients.predicted_relative_error, "white_noise": found.white_noise}
                    cells.append(base | {"fit": "cumulative (ours)", "step_variance": label} | told)
                    rows.append(found.coefficients.weights)
            wanted = torch.stack([kept[cell["target"]] for cell in cells])
            for cell, distance in zip(cells, distances(np.stack(rows), stack, wanted), strict=True):
                yield cell | {"actual": float(distance) / scale[cell["target"]]}


FLOOR = 1e-5  # of predicted errors: below it the error is rounding alone


def has_ratio(names: Sequence[str], target: str, predicted: float | None) -> bool:
    """False if the target is an exact combination of stored averages, 5 U(T) - 4 U(0.8 T): nothing to predict."""
    return predicted is not None and predicted >= FLOOR and not ("uniform" in names and target == "last_20")


def summary(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Actual over predicted for every run, set and variance, over targets and numbers of snapshots; EDM2's error beside ours."""
    theirs = {key(c): c["actual"] for c in cells if c["predicted"] is None}
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for cell in cells:
        if has_ratio(SETS[cell["stored"]], cell["target"], cell["predicted"]):
            groups.setdefault((cell["run"], cell["stored"], cell["step_variance"]), []).append(cell)
    found = []
    for (run, stored, variance), group in groups.items():
        ratios = [cell["actual"] / cell["predicted"] for cell in group]
        better = [theirs[key(cell)] / cell["actual"] for cell in group]
        spread = {"minimum": min(ratios), "median": float(np.median(ratios)), "maximum": max(ratios)}
        gain = {"minimum": min(better), "median": float(np.median(better)), "maximum": max(better)}
        found.append(
            {"run": run, "stored": stored, "step_variance": variance, "cells": len(group)}
            | {"actual_over_predicted": spread, "edm2_error_over_ours": gain}
        )
    return found


def key(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(cell[name] for name in ("run", "stored", "snapshots", "target"))


COLUMNS = ("run", "stored", "snapshots", "target", "step_variance", "predicted", "actual", "edm2_actual")


def table(cells: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Our cells as rows of `COLUMNS`, with the error of EDM2's fit beside ours."""
    theirs = {key(c): c["actual"] for c in cells if c["predicted"] is None}
    ours = (cell | {"edm2_actual": theirs[key(cell)]} for cell in cells if cell["predicted"] is not None)
    return [[cell[column] for column in COLUMNS] for cell in ours]


def simulate(steps: int = 3000, count: int = 10, size: int = 2000) -> list[dict[str, Any]]:
    """Actual over predicted for weights that do not move as the model assumes; minimum and maximum over the targets."""
    random, time = np.random.default_rng(0), np.arange(steps)
    moves = random.standard_normal((steps, size))
    rate = 0.5 * (1 + np.cos(np.pi * time / steps))
    walk = np.concatenate([np.zeros((1, size)), np.cumsum(moves, axis=0)])
    noise = random.standard_normal(walk.shape)
    decayed = np.concatenate([np.zeros((1, size)), np.cumsum(moves * rate[:, None], axis=0)])
    kinds: dict[str, tuple[np.ndarray, Any, float]] = {
        "random walk": (walk, None, 0.0),
        "walk plus white noise, sd of 10 steps": (walk + 10 * noise, None, 0.0),
        "the same, white_noise given": (walk + 10 * noise, None, 100.0),
        "walk plus white noise, sd of 30 steps": (walk + 30 * noise, None, 0.0),
        "the same, white_noise given ": (walk + 30 * noise, None, 900.0),
        "mean-reverting within 30 steps": (reverting(moves, 30), None, 0.0),
        "mean-reverting within 300 steps": (reverting(moves, 300), None, 0.0),
        "walk, cosine rate, v held constant": (decayed, None, 0.0),
        "walk, cosine rate, v = rate^2": (decayed, lambda t: (0.5 * (1 + np.cos(np.pi * t / steps))) ** 2, 0.0),
    }
    profiles = kept_profiles(steps)
    found = []
    for kind, (theta, variance, white) in kinds.items():
        for title, names in SETS.items():
            at = [0, *(steps * (i + 1) // count for i in range(count) for _ in names)]
            stored = [RAW, *[profiles.get(name, RAW) for name in names] * count]
            made = np.stack([written_out(p, step, steps) for step, p in zip(at, stored, strict=True)]) @ theta
            ratios = []
            for name in (name for name in profiles if name not in names):
                ours = posthoc_coefficients(
                    at,
                    stored,
                    steps,
                    profiles[name],
                    step_variance=variance,
                    white_noise=white if "raw" in names else 0.0,
                )
                exact = written_out(profiles[name], steps, steps) @ theta
                actual = np.linalg.norm(ours.weights @ made - exact) / np.linalg.norm(exact - theta[-1])
                if has_ratio(names, name, ours.predicted_relative_error):
                    ratios.append(actual / ours.predicted_relative_error)
            found.append({"weights move as": kind, "stored": title, "minimum": min(ratios), "maximum": max(ratios)})
    return found


def reverting(moves: np.ndarray, within: float) -> np.ndarray:
    theta = [np.zeros(moves.shape[1])]
    for move in moves:
        theta.append((1 - 1 / within) * theta[-1] + move)
    return np.stack(theta)


def written_out(profile: Profile, step: int, steps: int) -> np.ndarray:
    """Weights of the initial parameters and those after each step: float64 [steps + 1]."""
    weights = np.zeros(steps + 1)
    weights[: step + 1] = np.concatenate([[profile.initial_weight(step)], profile.weighting(step)]) if step else 1.0
    return weights


def draw(cells: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Predicted against actual, a panel for each run; with rate^2 where the rate changed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    runs = list(dict.fromkeys(cell["run"] for cell in cells))
    figure, axes = plt.subplots(1, len(runs), figsize=(3.6 * len(runs), 4.1), sharey=True, squeeze=False)
    for axis, run in zip(axes.flat, runs, strict=True):
        mine = [c for c in cells if c["run"] == run and has_ratio(SETS[c["stored"]], c["target"], c["predicted"])]
        told = "rate^2" if any(cell["step_variance"] == "rate^2" for cell in mine) else "constant"
        for number, title in enumerate(SETS):
            shown = [c for c in mine if c["stored"] == title and c["step_variance"] == told]
            x, y = [c["predicted"] for c in shown], [c["actual"] for c in shown]
            axis.loglog(x, y, "os^Dv"[number], color=f"C{number}", markersize=4, alpha=0.7, label=title)
        limits = np.array([FLOOR, 10.0])
        axis.loglog(limits, limits, color="0.3", linewidth=1)
        axis.fill_between(limits, limits / 2, limits * 2, color="0.5", alpha=0.15, linewidth=0)
        axis.set(title=TITLES[run], xlabel="predicted error / distance from raw", xlim=limits, ylim=limits)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("actual error / distance from raw")
    axes[0, 0].legend(fontsize=7, loc="upper left")
    figure.suptitle(
        "Reconstructed averages against the same averages kept while training; grey: within a factor of two"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def one_row_per_line(results: Mapping[str, Any]) -> str:
    """JSON whose tables have a line for each row, numbers to four digits."""
    shown = json.loads(json.dumps(results), parse_float=lambda text: float(f"{float(text):.4g}"))
    parts = [
        f" {json.dumps(name)}: [\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        if isinstance(value, list) and name != "columns"
        else f" {json.dumps(name)}: {json.dumps(value)}"
        for name, value in shown.items()
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def report(results: Mapping[str, Any]) -> None:
    for row in results.get("summary", []):
        ratio, gain = (row[name] for name in ("actual_over_predicted", "edm2_error_over_ours"))
        print(
            f"{row['run']:9s} {row['stored']:24s} v {row['step_variance']:9s} {row['cells']:3d} cells   actual/predicted "
            f"{ratio['minimum']:.2f} {ratio['median']:.2f} {ratio['maximum']:.2f}   EDM2's error / ours "
            f"{gain['minimum']:.2f} {gain['median']:.2f} {gain['maximum']:.3g}"
        )
    for row in results.get("simulated", []):
        print(f"{row['weights move as']:40s} {row['stored']:24s} {row['minimum']:.2f} to {row['maximum']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="folder of the runs")
    parser.add_argument("--runs", nargs="+", default=list(TRAINING), choices=list(TRAINING))
    parser.add_argument(
        "--counts", type=int, nargs="+", default=[5, 10, 20, 50], help="snapshots of each stored average"
    )
    parser.add_argument("--simulate", action="store_true", help="also simulate weights that do not move as assumed")
    parser.add_argument("--device", default="cpu", choices=["cpu"], help="reconstruction is a sum on the CPU")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "posthoc.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "images" / "averaging_predicted.png")
    arguments = parser.parse_args()
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    if arguments.simulate:
        results["simulated"] = simulate()
    if arguments.folder:
        results |= {"environment": environment("diffusers"), "steps": STEPS}
        cells = [c for name in arguments.runs for c in measure(train(arguments.folder, name), arguments.counts)]
        results |= {"summary": summary(cells), "columns": COLUMNS, "cells": table(cells)}
        draw(cells, arguments.figure)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(one_row_per_line(results))
    report(results)


if __name__ == "__main__":
    main()
