"""What the jackknife gives, on Gaussian features whose true distances are known: bias, standard errors, pairing, coverage.

python benchmarks/jackknife.py [--repeats 200] [--output benchmarks/results/jackknife.json]

Two copies, `a` and `b`, with features correlated 0.9 (as the same noise makes them), against a reference known exactly. Each row draws
both anew `repeats` times. Spectrum "flat" gives every dimension the same variance; "falling" gives dimension i the variance 1/i, as
the features of real networks have it.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from environment import environment, save
from torch import Tensor

from ddpm_ema.metrics import Estimate, FrechetReference, Statistics, difference, estimate_distance

CORRELATION = 0.9
MEAN_A, SCALE_A = 0.10, 1.06  # offset and scale of each dimension, in its standard deviations
MEAN_B, SCALE_B = 0.05, 1.02


@dataclass(frozen=True)
class Case:
    dim: int
    images: int
    groups: int
    spectrum: str = "flat"


CASES = [
    Case(32, 1000, 20),
    Case(64, 2000, 20),
    Case(64, 2000, 10),
    Case(64, 500, 20, "falling"),
    Case(64, 2000, 20, "falling"),
    Case(256, 5120, 20),
    Case(256, 1280, 20),
    Case(256, 1280, 20, "falling"),
    Case(256, 200, 20, "falling"),
]


def true_distance(deviations: Tensor, mean: float, scale: float) -> float:
    """In closed form: the covariances commute."""
    return float(((mean * deviations) ** 2 + ((scale - 1) * deviations) ** 2).sum())


def covers(found: Estimate, true: float) -> bool:
    low, high = found.interval()
    return low <= true <= high


def simulate(case: Case, repeats: int, seed: int = 0) -> dict[str, object]:
    """One row of the table."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.arange(1, case.dim + 1, dtype=torch.float64)
    deviations = torch.ones_like(ranks) if case.spectrum == "flat" else ranks**-0.5
    reference = FrechetReference(Statistics(torch.zeros(case.dim).double(), torch.diag(deviations**2), 10**9))
    truth_a = true_distance(deviations, MEAN_A, SCALE_A)
    truth = truth_a - true_distance(deviations, MEAN_B, SCALE_B)
    indices = torch.arange(case.images)
    rows = []
    for _ in range(repeats):
        shared = torch.randn(case.images, case.dim, generator=generator, dtype=torch.float64)
        fresh = torch.randn(case.images, case.dim, generator=generator, dtype=torch.float64)
        other = CORRELATION * shared + (1 - CORRELATION**2) ** 0.5 * fresh
        a = estimate_distance((shared * SCALE_A + MEAN_A) * deviations, indices, case.groups, reference)
        b = estimate_distance((other * SCALE_B + MEAN_B) * deviations, indices, case.groups, reference)
        delta = difference(a, b)
        rows.append(
            [
                *(a.plain, a.unbiased, a.stderr, covers(a, truth_a), b.stderr),
                *(
                    a.plain - b.plain,
                    delta.unbiased,
                    delta.stderr,
                    covers(delta, truth),
                ),
            ]
        )
    plain, corrected, stderr, covered, stderr_b, plain_delta, delta, delta_stderr, delta_covered = np.array(rows).T
    return {
        **asdict(case),
        "repeats": repeats,
        "true": truth_a,
        "plain": plain.mean(),
        "corrected": corrected.mean(),
        "sd": corrected.std(ddof=1),
        "stderr": stderr.mean(),
        "covered": covered.mean(),
        "true_delta": truth,
        "plain_delta": plain_delta.mean(),
        "delta": delta.mean(),
        "delta_sd": delta.std(ddof=1),
        "delta_stderr": delta_stderr.mean(),
        "unpaired_stderr": np.hypot(stderr, stderr_b).mean(),
        "delta_covered": delta_covered.mean(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "jackknife.json")
    arguments = parser.parse_args()
    print(
        "| dimension, images, groups, spectrum | true | plain | corrected | sd, real / jackknife | covers | "
        "difference: true / plain / corrected | its sd, real / jackknife / unpaired | covers |\n" + "|---" * 9 + "|"
    )
    here, rows, start = environment(), [], time.perf_counter()
    for case in CASES:
        r = simulate(case, arguments.repeats)
        rows.append({key: value if isinstance(value, (int, str)) else float(value) for key, value in r.items()})  # type: ignore[arg-type]
        print(
            "| {dim}, {images}, {groups}, {spectrum} | {true:.3f} | {plain:.3f} | {corrected:.3f} | {sd:.3f} / {stderr:.3f} | "
            "{covered:.0%} | {true_delta:.3f} / {plain_delta:.3f} / {delta:.3f} | {delta_sd:.3f} / {delta_stderr:.3f} / "
            "{unpaired_stderr:.3f} | {delta_covered:.0%} |".format(**r),
            flush=True,
        )
    result = {
        "rows": rows,
        "seconds": time.perf_counter() - start,
    }
    save(arguments.output, {"environment": here, **result})


if __name__ == "__main__":
    main()
