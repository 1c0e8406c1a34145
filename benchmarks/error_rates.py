"""How often a table says something false of averages whose true distances are known, and how much it says that is true.

python benchmarks/error_rates.py [--draws 2000] [--output benchmarks/results/error_rates.json] [--figure docs/images/error_rates.png]

Every draw makes one table of raw and K - 1 averages from jackknife pseudo-values (20 groups, Gaussian, in units of the standard
error of a distance) and gives it to the functions that score uses. "alike": neighbouring averages correlate 0.95 over the same
noise, and 0.5 with raw; "unlike": all are independent. A search draws its images in the same nested order as score does.

| truth | |
|---|---|
| equal | all weights are equally far |
| half | every second average is 3 errors below raw, the others are equal to raw |
| parabola | averages in a valley whose ends are 6 errors above its floor, raw at its ends |

False: "different": a table calls an average different that is equal to raw. "lost": the best average (of equals one named
beforehand) is not among those that may be the best. "separated": a whole search finds any two equals significantly different.
Each is to be seen in at most 5% of tables. "fréchet" repeats `equal` with real Fréchet distances in 8 dimensions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import environment, save
from scipy.stats import beta

from ddpm_ema.metrics import (
    ALPHA,
    Estimate,
    FrechetReference,
    Side,
    Statistics,
    difference,
    estimate_distance,
)
from ddpm_ema.score.rows import Score, compare
from ddpm_ema.score.search import Search, ladder

GROUPS, RUNGS = 20, ladder(250, 2000)
SIZES = (2, 6, 12, 24)
TRUTHS = ("equal", "half", "parabola")


def true_distances(truth: str, size: int) -> np.ndarray:
    """Of raw, then of the averages, in standard errors."""
    averages = np.zeros(size - 1)
    if truth == "half":
        averages[::2] = -3.0
    if truth == "parabola" and size > 2:
        averages = 6.0 * np.linspace(-1, 1, size - 1) ** 2
    return np.concatenate([averages[:1] if truth == "parabola" else [0.0], averages])


def noise(random: np.random.Generator, size: int, alike: bool, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers [size, *shape], raw's first."""
    if not alike:
        return random.standard_normal((size, *shape))
    places = np.arange(size - 1)
    covariance = np.full((size, size), 0.5)
    covariance[1:, 1:] = 0.5 + 0.5 * 0.9 ** np.abs(places[:, None] - places)  # 0.95 between neighbours
    np.fill_diagonal(covariance, 1.0)
    return np.einsum("ij,j...->i...", np.linalg.cholesky(covariance), random.standard_normal((size, *shape)))


def estimated(pseudo: np.ndarray, images: int = 2000) -> Estimate:
    return Estimate(float(pseudo.mean()), (Side(tuple(pseudo.tolist()), (images // GROUPS,) * GROUPS),))


def scored(name: str, estimate: Estimate, looks: int = 1) -> Score:
    return Score({"weights": name}, estimate, looks)


def counted(
    truths: np.ndarray, rows: list[dict[str, Any]], best: list[str], estimates: list[Estimate]
) -> dict[str, float]:
    """What one table says that is false, what a rule without correction would say, and what the table says that is true."""
    verdicts = {int(row["weights"]): row["significant"] for row in rows if "significant" in row}
    tagged = int(np.argmin(truths[1:])) + 1
    alone = [difference(estimates[i], estimates[0]).p_value <= ALPHA for i in range(1, len(truths))]
    equal = truths[1:] == truths[0]
    lowest = min(estimates, key=lambda one: one.unbiased)
    return {
        "different": float(any(verdicts[i] for i in verdicts if truths[i] == truths[0])),
        "different_alone": float(np.any(np.array(alone) & equal)),
        "lost": float(str(tagged) not in best),
        "lost_alone": float(difference(estimates[tagged], lowest).p_value <= ALPHA),
        "power": float(np.mean([verdicts[i] for i in verdicts if truths[i] != truths[0]] or [np.nan])),
        "may_be_best": float(len(best)),
    }


def a_table(random: np.random.Generator, truths: np.ndarray, alike: bool) -> dict[str, float]:
    pseudo = truths[:, None] + GROUPS**0.5 * noise(random, len(truths), alike, (GROUPS,))
    estimates = [estimated(values) for values in pseudo]
    scores = [scored("raw" if i == 0 else str(i), estimate) for i, estimate in enumerate(estimates)]
    return counted(truths, *compare(scores), estimates)


class Watched(Search):
    """Remembers which equal candidates it found significantly different."""

    def __init__(self, truths: np.ndarray, estimate: Callable[[int, int], Estimate]) -> None:
        super().__init__(len(truths), RUNGS, estimate)
        self.truths, self.separated = truths, False

    def is_significant(self, candidate: int) -> bool:
        found = super().is_significant(candidate)
        self.separated |= found and self.truths[candidate] == self.truths[self.best]
        return found


def a_search(random: np.random.Generator, truths: np.ndarray, alike: bool) -> dict[str, float]:
    """K candidates and raw. Pseudo-values over the first n images of each are the means of their groups' first images."""
    parts = np.diff([0, *RUNGS])
    drawn = noise(random, len(truths), alike, (len(RUNGS), GROUPS)) * parts[:, None] ** 0.5
    pseudo = np.cumsum(drawn, axis=1) / np.array(RUNGS)[:, None] * (RUNGS[-1] * GROUPS) ** 0.5
    known = {(i, n): estimated(truths[i] + pseudo[i, k], n) for i in range(len(truths)) for k, n in enumerate(RUNGS)}
    search = Watched(truths[1:], lambda candidate, n: known[candidate + 1, n])
    for _ in search:
        pass
    counts = {c + 1: n for c, n in search.counts.items()}
    scores = [scored("raw", known[0, RUNGS[-1]])]
    scores += [scored(str(i), known[i, n], len(RUNGS)) for i, n in counts.items()]

    def pair(a: Score, b: Score) -> Estimate:
        places = [0 if one.row["weights"] == "raw" else int(one.row["weights"]) for one in (a, b)]
        common = min(counts[place] for place in places if place)
        return difference(known[places[0], common], known[places[1], common])

    rows, best = compare(scores, pair, unseen=len(truths) - 1 - len(counts))
    verdicts = {int(row["weights"]): row["significant"] for row in rows if "significant" in row}
    floor = {str(i) for i in range(1, len(truths)) if truths[i] <= truths[1:].min() + 0.5}
    tagged = str(int(np.argmin(truths[1:])) + 1)
    lowest = min(estimate.unbiased for (i, n), estimate in known.items() if counts.get(i) == n)
    found = next(i for i, n in counts.items() if known[i, n].unbiased == lowest)
    return {
        "different": float(any(verdicts[i] for i in verdicts if truths[i] == truths[0])),
        "separated": float(search.separated),
        "lost": float(int(tagged) in counts and tagged not in best),
        "found": float(str(found) in floor),
        "images": sum(counts.values()) / (RUNGS[-1] * (len(truths) - 1)),
        "may_be_best": float(len(best)),
    }


def a_frechet_table(random: np.random.Generator, truths: np.ndarray, alike: bool) -> dict[str, float]:
    """The same from features: 8 dimensions, 400 images, all models equally far from a reference that is known exactly."""
    dim, images, indices = 8, 400, torch.arange(400)
    reference = FrechetReference(Statistics(torch.zeros(dim).double(), torch.eye(dim).double(), 10**9))
    features = torch.from_numpy(1.1 * noise(random, len(truths), alike, (images, dim)) + 0.1)
    estimates = [estimate_distance(rows, indices, GROUPS, reference) for rows in features]
    scores = [scored("raw" if i == 0 else str(i), estimate) for i, estimate in enumerate(estimates)]
    return counted(truths, *compare(scores), estimates)


KINDS: dict[str, Callable[[np.random.Generator, np.ndarray, bool], dict[str, float]]] = {
    "table": a_table,
    "search": a_search,
    "fréchet": a_frechet_table,
}
ERRORS = ("different", "lost", "separated")


def cells() -> Iterator[tuple[str, str, bool, int]]:
    for alike in (False, True):
        for size in SIZES:
            yield from (("table", truth, alike, size) for truth in TRUTHS)
            yield from (
                ("search", truth, alike, size + 1) for truth in ("equal", "parabola") if size > 2 or truth == "equal"
            )
    yield from (("fréchet", "equal", alike, 6) for alike in (False, True))


def simulate(cell: tuple[str, str, bool, int], draws: int) -> dict[str, Any]:
    """One cell: means over the draws, and of each error the upper 95% limit (Clopper & Pearson 1934)."""
    kind, truth, alike, size = cell
    torch.set_num_threads(1)
    random, truths = np.random.default_rng([list(cells()).index(cell), draws]), true_distances(truth, size)
    draws = draws // 2 if kind == "fréchet" else draws
    found = [KINDS[kind](random, truths, alike) for _ in range(draws)]
    means = {key: float(np.mean([draw[key] for draw in found])) for key in found[0]}
    if truth == "parabola":
        means.pop("different_alone", None)
    counts = {key: round(draws * means[key]) for key in ERRORS if key in means}
    upper = {key: float(beta.ppf(0.975, count + 1, draws - count)) for key, count in counts.items()}
    shown = {key: round(value, 5) for key, value in means.items() if not np.isnan(value)}
    return {"kind": kind, "truth": truth, "alike": alike, "weights": size, "draws": draws, **shown, "upper": upper}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Share of tables with a false statement over K, and what a rule without correction says."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.1), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    titles = (
        "an equal average is called\nbetter or worse than raw",
        "the best is left out of\nthose that may be the best",
    )
    for axes, error, title in zip(panels, ERRORS, (*titles, "a search separates equals"), strict=True):
        for alike, marker in ((False, "o"), (True, "s")):
            shown = [row for row in rows if row["truth"] == "equal" and row["alike"] == alike]
            label = "averages alike" if alike else "averages unlike"
            chosen = [row for row in shown if row["kind"] == ("search" if error == "separated" else "table")]
            sizes = [row["weights"] - (error == "separated") for row in chosen]
            axes.plot(sizes, [100 * row[error] for row in chosen], marker=marker, color="C0", label=label)
            if f"{error}_alone" in chosen[0]:
                plain = [100 * row[f"{error}_alone"] for row in chosen]
                axes.plot(sizes, plain, marker=marker, color="0.6", label=f"{label}, each pair alone at 5%")
        axes.axhline(5, color="C3", linewidth=1)
        axes.set(title=title, xlabel="weights in the table" if error != "separated" else "candidates", xticks=SIZES)
        axes.set_yscale("symlog", linthresh=10)
        axes.set_yticks([0, 5, 10, 50], ["0", "5", "10", "50"])
    panels[0].set_ylabel("tables, %")
    panels[2].legend(*panels[0].get_legend_handles_labels(), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=1)
    root = Path(__file__).parents[1]
    parser.add_argument("--output", type=Path, default=root / "benchmarks" / "results" / "error_rates.json")
    parser.add_argument("--figure", type=Path, default=root / "docs" / "images" / "error_rates.png")
    arguments = parser.parse_args()
    here, rows = environment("numpy", "scipy"), []
    with ProcessPoolExecutor(arguments.processes) as pool:
        every = list(cells())
        for row in pool.map(simulate, every, [arguments.draws] * len(every)):
            rows.append(row)
            print(json.dumps(row, ensure_ascii=False), flush=True)
    save(arguments.output, {"environment": here, "groups": GROUPS, "rungs": RUNGS, "rows": rows})
    draw(rows, arguments.figure)
    over = [row for row in rows if any(limit > 0.065 for limit in row["upper"].values())]
    print(f"{len(over)} of {len(rows)} cells have an error whose upper 95% limit is above 6.5%")


if __name__ == "__main__":
    main()
