"""Does a difference between raw weights and averages hold on photographs, whatever the training seed?

    python benchmarks/photographs_seeds.py IMAGES FOLDER [--seeds 4] [--steps 1250] [--num-images 1000] [--output FILE.json]

IMAGES is laid out as for `photographs.py`, whose data, network and averages these runs have; they are shorter, in fp32 and without
torch.compile, and differ in the training seed alone. One classifier measures all of them; within a run, weights are scored from the
same noise, so that differences are paired; then the runs are combined (`ddpm_ema/metrics/across_runs.py`). The weights were named
before the first score, and no setting was chosen by a reported figure. Results in FOLDER are reused: runs that other processes
train or score meanwhile (`ddpm-ema train FOLDER/seed_2`) are taken as they lie.
"""

import argparse
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment, save
from photographs import settings_of

from ddpm_ema import classifier_training, score, train
from ddpm_ema.config import Config
from ddpm_ema.metrics import Estimate, difference
from ddpm_ema.metrics.across_runs import across_runs
from ddpm_ema.numbers import verdict_of

WEIGHTS = ("raw", "ema_0_999", "ema_0_999_debiased", "power_0_05", "power_0_10")
FIGURES = ("frechet_distance_unbiased", "stderr", "delta_vs_raw", "delta_stderr", "recall", "saturated")


def run_of(images: Path, folder: Path, seed: int, steps: int, num_images: int) -> Config:
    run = settings_of(images, folder, steps, num_images, eager=True)
    update = {"mixed_precision": "no", "sample_every": 0}
    training = run.training.model_copy(update=update)
    update = {"mixed_precision": "no", "compile": False, "num_inference_steps": 15, "extractors": ("classifier",)}
    evaluation = run.evaluation.model_copy(update={**update, "weights": WEIGHTS})
    place = {"seed": seed, "output_dir": folder / f"seed_{seed}"}
    return run.model_copy(update={**place, "training": training, "evaluation": evaluation})


def study(runs: list[Config]) -> dict[str, Any]:
    first = runs[0]
    tables = []
    for run in runs:
        train.run(run)
        features = run.output_dir / "features.safetensors"
        if run is first:
            classifier_training.train_features(run)
        elif not features.exists():
            shutil.copy(first.output_dir / features.name, features)
        tables.append({row["weights"]: row for row in score.run(run)[-1]["rows"]})
    estimates = [{name: Estimate.from_dict(row["estimate"]) for name, row in table.items()} for table in tables]
    rows = []
    for name, found in sorted(across_runs(estimates).items(), key=lambda item: item[1].distance.mean):
        row: dict[str, Any] = {"weights": name, **asdict(found)}
        row["errors_correlate"] = {"distance": correlation([table[name] for table in estimates])}
        if name != "raw":
            row["errors_correlate"]["difference"] = correlation(
                [difference(table[name], table["raw"]) for table in estimates]
            )
        row["runs"] = [{key: table[name][key] for key in FIGURES if key in table[name]} for table in tables]
        rows.append(row)
    size = {"seeds": len(runs), "steps": first.training.steps, "num_images": first.evaluation.num_images}
    return {**size, "training": first.model_dump(mode="json")["training"], "rows": rows}


def correlation(estimates: Sequence[Estimate]) -> float:
    """Mean over pairs of runs of the correlation of their errors of sampling, by the groups that have the same noise."""
    found = np.corrcoef([estimate.sides[0].pseudo_values for estimate in estimates])
    return float(found[np.triu_indices(len(estimates), 1)].mean())


def markdown(results: Mapping[str, Any]) -> str:
    """The table, as docs/results.md has it."""
    lines = [
        "| weights | distance | minus raw | over seeds | from the seed | errors of two seeds correlate | each run |"
    ]
    lines.append("|---" * 7 + "|")
    for row in results["rows"]:
        distance, difference = row["distance"], row["difference"]
        cells = [f"`{row['weights']}`", f"{distance['mean']:.2f} ± {distance['stderr']:.2f}", "", ""]
        if difference is not None:
            word = verdict_of(difference["mean"], row["holds"])
            cells[2:] = [f"{difference['mean']:+.2f} ± {difference['stderr']:.2f}", f"{word} (p {row['p_value']:.2g})"]
        each = ", ".join(f"{run['frechet_distance_unbiased']:.1f}" for run in row["runs"])
        shared = " / ".join(f"{share:.2f}" for share in row["errors_correlate"].values())
        lines.append(f"| {' | '.join(cells)} | {distance['training_std']:.2f} | {shared} | {each} |")
    return re.sub(r"-(?=\d)", "\N{MINUS SIGN}", "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of photographs, with train/CLASS/ and test/CLASS/")
    parser.add_argument("folder", type=Path, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1250, help="of 64 images each; a multiple of 125")
    parser.add_argument("--num-images", type=int, default=1000, help="sampled from each set of weights")
    parser.add_argument("--output", type=Path, help="default: photographs_seeds.json in FOLDER")
    given = parser.parse_args()
    here = environment("diffusers")
    results = study([run_of(given.images, given.folder, s, given.steps, given.num_images) for s in range(given.seeds)])
    save(given.output or given.folder / "photographs_seeds.json", {"environment": here, **results})
    print(markdown(results))


if __name__ == "__main__":
    main()
