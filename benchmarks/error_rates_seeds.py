"""How often runs of several training seeds, read together, say something false of averages whose true distances are known.

    python benchmarks/error_rates_seeds.py [--draws 2000] [--output FILE.json]

Every draw makes R runs of raw and five averages from jackknife pseudo-values (20 groups, Gaussian) and gives them to
`metrics.across_runs`. All is in standard errors of a distance within a run: the training seed adds N(0, seed²) to each of the
weights, one half of it in common; the errors of sampling correlate `noise` between runs, because they are scored from the same
noise, and .5 between weights. "different": a table calls an average different from raw that is equal to it, which is to be
seen in at most 5% of tables; "spread_alone": Student's t over the R differences calls it so, with the same correction;
"power": an average 4 errors below raw is called different.
"""

import argparse
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment, save
from scipy import stats

from ddpm_ema.metrics import ALPHA, Estimate, Side
from ddpm_ema.metrics.across_runs import across_runs
from ddpm_ema.metrics.comparisons import holm

GROUPS, WEIGHTS = 20, 6
FIGURES = ("different", "spread_alone", "power")
RUNS, NOISE, SEEDS = (2, 3, 4, 8), (0.0, 0.4, 0.8, 0.95), (0.3, 1.0)


def mixed(random: np.random.Generator, shape: tuple[int, ...], shared: float, axis: int) -> np.ndarray:
    """Standard normal numbers that correlate `shared` along the axis."""
    alike = random.standard_normal([1 if place == axis else size for place, size in enumerate(shape)])
    return shared**0.5 * alike + (1 - shared) ** 0.5 * random.standard_normal(shape)


def a_table(random: np.random.Generator, runs: int, noise: float, seed: float, gap: float) -> tuple[bool, bool]:
    """Whether any average is called different from raw: by `across_runs`, and by the spread of the runs alone."""
    level = seed * mixed(random, (runs, WEIGHTS), 0.5, 1)
    level[:, 1:] += gap
    alike = mixed(random, (1, WEIGHTS, GROUPS), 0.5, 1)
    own = mixed(random, (runs, WEIGHTS, GROUPS), 0.5, 1)
    errors = GROUPS**0.5 * (noise**0.5 * alike + (1 - noise) ** 0.5 * own)
    made = level[..., None] + errors
    tables = [{"raw" if k == 0 else str(k): _estimate(run[k]) for k in range(WEIGHTS)} for run in made]
    found = across_runs(tables)
    means = made.mean(axis=2)
    p_values = stats.ttest_1samp(means[:, 1:] - means[:, :1], 0.0).pvalue
    alone = holm(dict(enumerate(p_values.tolist())))
    return any(one.holds for one in found.values()), min(alone.values()) <= ALPHA


def _estimate(pseudo: np.ndarray) -> Estimate:
    return Estimate(float(pseudo.mean()), (Side(tuple(pseudo.tolist()), (100,) * GROUPS),))


def simulate(runs: int, noise: float, seed: float, draws: int) -> dict[str, Any]:
    random = np.random.default_rng([runs, round(100 * noise), round(100 * seed)])
    equal = np.array([a_table(random, runs, noise, seed, 0.0) for _ in range(draws)])
    far = np.array([a_table(random, runs, noise, seed, -4.0) for _ in range(draws // 4)])
    different, alone = equal.mean(axis=0).tolist()
    count = int(equal[:, 0].sum())
    upper = float(stats.beta.ppf(0.975, count + 1, draws - count))
    found = {"different": different, "upper": upper, "spread_alone": alone, "power": float(far[:, 0].mean())}
    return {"runs": runs, "noise": noise, "seed": seed, **found}


def markdown(results: Mapping[str, Any]) -> str:
    """The table, as docs/scoring.md has it: lowest and highest over what the seed adds."""
    lines = [
        "| runs | errors of two runs correlate | an equal average is called different | by the spread alone | power |"
    ]
    lines.append("|---" * 5 + "|")
    for (runs, noise), cells in itertools.groupby(results["rows"], lambda row: (row["runs"], row["noise"])):
        rows = list(cells)
        shares = (" to ".join(f"{end(row[key] for row in rows):.1%}" for end in (min, max)) for key in FIGURES)
        lines.append(f"| {runs} | {noise:g} | {' | '.join(shares)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    here = Path(__file__).parent / "results" / "error_rates_seeds.json"
    parser.add_argument("--output", type=Path, default=here)
    given = parser.parse_args()
    here = environment("numpy", "scipy")
    rows = [simulate(*cell, given.draws) for cell in itertools.product(RUNS, NOISE, SEEDS)]
    results = {"environment": here, "draws": given.draws, "rows": rows}
    save(given.output, results)
    print(markdown(results))
    print(f"highest upper 95% limit of the error: {max(row['upper'] for row in rows):.1%}")


if __name__ == "__main__":
    main()
