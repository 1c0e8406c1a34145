"""The reference as a sample: verdicts and distances with its images held fixed, and with both sides left out in turn.

python benchmarks/reference.py [--draws 1000] [--output benchmarks/results/reference.json] [--figure docs/images/reference.png]

Gaussian features of 64 dimensions, dimension i of variance 1/i (as the features of real networks fall off), 20 groups.

`equal`: two models whose means lie 0.1 to either side of the population's along the first axis, so equally far; their features
correlate 0.9, as the same noise makes them. Every draw takes a new reference of M images and new samples of N.
`copies`: a model that reproduces its M training images exactly (N of them, drawn at random) beside one that samples the population
afresh. Against the training images the copier is closer; "better" there is a statement on these images alone. Against M images
that nobody trained on, both are compared as with the population, where a fresh sample has distance 0.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import environment, save
from scipy.stats import beta
from torch import Tensor

from ddpm_ema.metrics import ALPHA, Estimate, FrechetReference, difference, estimate_distance, statistics_of

DIM, GROUPS, SHIFT, CORRELATION = 64, 20, 0.1, 0.9
DEVIATIONS = torch.arange(1, DIM + 1, dtype=torch.float64) ** -0.5
CELLS = [("equal", 1797, 1797), ("equal", 1797, 6000), ("copies", 1797, 1797)]


def normal(generator: torch.Generator, count: int) -> Tensor:
    return torch.randn(count, DIM, generator=generator, dtype=torch.float64)


def estimates(features: Tensor, reference: Tensor) -> tuple[Estimate, Estimate]:
    """Against these images, and against the population."""
    both = estimate_distance(
        features,
        torch.arange(len(features)),
        GROUPS,
        FrechetReference(statistics_of(reference)),
        sampled_from=reference,
    )
    return Estimate(both.plain, both.sides[:1]), both


def an_equal_pair(generator: torch.Generator, m: int, n: int) -> dict[str, float]:
    reference, shared, fresh = normal(generator, m), normal(generator, n), normal(generator, n)
    other = CORRELATION * shared + (1 - CORRELATION**2) ** 0.5 * fresh
    shift = torch.zeros(DIM, dtype=torch.float64)
    shift[0] = SHIFT
    pairs = [estimates(samples * DEVIATIONS, reference * DEVIATIONS) for samples in (shared + shift, other - shift)]
    found = {}
    for name, ours, theirs in zip(("fixed", "both"), *pairs, strict=True):
        low, high = ours.interval()
        found |= {
            f"different_{name}": float(difference(ours, theirs).p_value <= ALPHA),
            f"bias_{name}": ours.unbiased - SHIFT**2,
            f"missed_{name}": float(not low <= SHIFT**2 <= high),
        }
    return found


def a_copier(generator: torch.Generator, m: int, n: int) -> dict[str, float]:
    """Trained on `trained`; `held_out` is as large."""
    trained, held_out, fresh = (normal(generator, count) * DEVIATIONS for count in (m, m, n))
    copies = trained[torch.randint(m, (n,), generator=generator)]
    ours, theirs = (estimates(samples, held_out)[1] for samples in (copies, fresh))
    fixed = FrechetReference(statistics_of(trained))
    against_training = [
        estimate_distance(samples, torch.arange(n), GROUPS, fixed).unbiased for samples in (copies, fresh)
    ]
    gap = difference(ours, theirs)
    return {
        "copier_better_both": float(gap.p_value <= ALPHA and gap.unbiased < 0),
        "gap_both": gap.unbiased,
        "copier_closer_to_training_images": float(against_training[0] < against_training[1]),
    }


def simulate(cell: tuple[str, int, int], draws: int) -> dict[str, Any]:
    kind, m, n = cell
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(CELLS.index(cell))
    one = an_equal_pair if kind == "equal" else a_copier
    found = [one(generator, m, n) for _ in range(draws)]
    means = {key: float(np.mean([draw[key] for draw in found])) for key in found[0]}
    errors = [key for key in means if key.startswith(("different", "copier_better"))]
    counts = {key: round(draws * means[key]) for key in errors}
    upper = {key: float(beta.ppf(0.975, count + 1, draws - count)) for key, count in counts.items()}
    return {"kind": kind, "reference": m, "images": n, "draws": draws, **means, "upper": upper}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    equal = [row for row in rows if row["kind"] == "equal"]
    names = [f"M {row['reference']:,}\nN {row['images']:,}" for row in equal]
    places = np.arange(len(equal))
    for axes, key, factor, title in (
        (left, "different", 100, "two equal models are called different, % of draws"),
        (right, "bias", 1, f"bias of the corrected distance (true {SHIFT**2:g})"),
    ):
        for offset, name, label in ((-0.2, "fixed", "against these M images"), (0.2, "both", "against the population")):
            axes.bar(places + offset, [factor * row[f"{key}_{name}"] for row in equal], 0.4, label=label)
        axes.set_xticks(places, names)
        axes.set_title(title, fontsize=9)
    left.axhline(5, color="C3", linewidth=1)
    left.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=1)
    root = Path(__file__).parents[1]
    parser.add_argument("--output", type=Path, default=root / "benchmarks" / "results" / "reference.json")
    parser.add_argument("--figure", type=Path, default=root / "docs" / "images" / "reference.png")
    arguments = parser.parse_args()
    here, rows = environment("numpy"), []
    with ProcessPoolExecutor(arguments.processes) as pool:
        for row in pool.map(simulate, CELLS, [arguments.draws] * len(CELLS)):
            rows.append(row)
            print(json.dumps(row), flush=True)
    save(arguments.output, {"environment": here, "dimensions": DIM, "groups": GROUPS, "rows": rows})
    draw(rows, arguments.figure)


if __name__ == "__main__":
    main()
