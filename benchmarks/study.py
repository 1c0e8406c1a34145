"""Every rule of averaging on the same training runs: which weights does a run of digits ship, over several training seeds?

    python benchmarks/study.py FOLDER [--seeds 2] [--steps 1500] [--num-images 1797] [--output FILE.json]

`make study` runs it. For each seed,
`configs/digits.yaml` is trained at a constant rate (after its warm-up) with every average at once; SWA's cyclical
rate needs another run, which is forked exactly from the checkpoint at two thirds and resumed with five cycles. All weights of a
seed are scored from the same noise, so that differences are paired; then the seeds are combined (`metrics/across_runs.py`).
The ensembles are means of two predictions of one run: of raw now and at two thirds, and of the two power functions.
Results in FOLDER are reused, so a study that was stopped continues. No setting was chosen by the reported figures.

What advocates say is tested as a difference between two rows: supported or contradicted where it holds across runs (their spread
and what they share of sampling, Holm over the claims), else the runs cannot tell.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from environment import environment, save

from ddpm_ema import classifier_training, config, score, train
from ddpm_ema.config import Config
from ddpm_ema.export import export
from ddpm_ema.metrics import Estimate, difference
from ddpm_ema.metrics.across_runs import across_runs, spread
from ddpm_ema.metrics.comparisons import ALPHA, holm
from ddpm_ema.numbers import verdict_of
from ddpm_ema.rundir import RunDir

ROOT = Path(__file__).parents[1]
CYCLICAL = "swa_cyclical"
# claim: the weights, what they are said to be better than, and who says so
CLAIMS = [
    ("ema_0_999", "raw", "an EMA generalises better than the raw weights (Ho et al. 2020 sample from one of 0.9999)"),
    ("ema_0_9999", "raw", "the same with the DDPM paper's own decay, 0.9999"),
    ("ema_0_999_debiased", "ema_0_999", "bias correction helps short runs (Kingma & Ba 2015 for Adam)"),
    ("ema_0_9999_debiased", "ema_0_9999", "the same at 0.9999"),
    ("power_0_05", "ema_0_999", "power functions are better while the model is improving (Karras et al. 2024)"),
    ("power_0_10", "ema_0_999", "the same at the wider of the two stored widths"),
    ("uniform", "raw", "the mean of all iterates converges fastest (Polyak & Juditsky 1992)"),
    (CYCLICAL, "ema_0_999", "SWA generalises better than EMA alone (Izmailov et al. 2018)"),
    (CYCLICAL, "power_0_10", "the same, beside an EMA that holds nothing of the first weights"),
    (CYCLICAL, "swa_constant", "SWA needs its cyclical rate"),
    ("hard_copy", "raw", "a periodic hard copy is a steadier network (Mnih et al. 2015)"),
    ("ensemble_checkpoints", "raw", "an ensemble captures diverse solutions (Lakshminarayanan et al. 2017)"),
    ("ensemble_widths", "power_0_10", "the same, of two averages"),
]


def settings_of(folder: Path, seed: int, steps: int, num_images: int) -> Config:
    """The run at a constant rate. `swa` takes the same steps as in the fork, whose cycles end there."""
    fork, cycle = fork_of(steps)
    tree = config.to_dict(config.load(ROOT / "configs" / "digits.yaml"))
    tree |= {"seed": seed, "output_dir": str(folder / f"seed_{seed}")}
    tree["machine"] = {"device": "cpu"}
    tree["training"] |= {"steps": steps, "sample_every": 0, "warmup_steps": cycle}
    tree["checkpoints"] |= {"every": cycle, "keep_every": fork, "snapshots_every": 0}
    tree["averages"] |= {
        "ema_0_9999": {"kind": "constant", "decay": 0.9999},
        "swa": {"kind": "swa", "start": fork + cycle, "every": cycle},
        "hard_copy": {"kind": "hard_copy", "every": 4 * cycle},
    }
    tree["evaluation"] |= {"num_images": num_images, "precision_recall": False}
    return config.validate(tree)


def fork_of(steps: int) -> tuple[int, int]:
    """The step at which the cyclical rate begins, and the length of each of its five cycles."""
    cycle = steps // 15
    return 10 * cycle, cycle


def cyclical(run: Config, folder: Path) -> Path:
    """SWA at its cyclical rate, forked from `run`, as a diffusers folder."""
    exported = folder / f"{run.output_dir.name}_{CYCLICAL}"
    if exported.exists():
        return exported
    fork, cycle = fork_of(run.training.steps)
    forked = run.model_copy(update={"output_dir": folder / f"{run.output_dir.name}_fork"})
    if not forked.output_dir.exists():  # a copy that was interrupted has another name
        partial = folder / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(run.output_dir, partial, ignore=shutil.ignore_patterns("scores", "samples"))
        for checkpoint in RunDir(partial).checkpoints():
            if checkpoint.step > fork:
                shutil.rmtree(checkpoint.path)
        partial.rename(forked.output_dir)
    rate = {
        "learning_rate_schedule": "cyclical",
        "cycle_steps": cycle,
        "learning_rate_end": run.training.learning_rate / 10,
    }
    train.run(forked.model_copy(update={"training": run.training.model_copy(update=rate)}))
    export(forked.output_dir, "swa", exported)
    shutil.rmtree(forked.output_dir)
    return exported


def scored(run: Config, folder: Path) -> dict[str, Any]:
    """results.json of one seed."""
    fork, _ = fork_of(run.training.steps)
    ensembles = [f"raw+raw@{fork}", "power_0_05+power_0_10"]
    weights = ("raw", *run.averages, *ensembles, str(cyclical(run, folder)))
    return score.run(run.model_copy(update={"evaluation": run.evaluation.model_copy(update={"weights": weights})}))[-1]


def short_names(results: Mapping[str, Any], run: Config) -> dict[str, str]:
    """Weights as results.json names them -> rows of the study."""
    fork, _ = fork_of(run.training.steps)
    named = {
        f"raw+raw@{fork}": "ensemble_checkpoints",
        "power_0_05+power_0_10": "ensemble_widths",
        "swa": "swa_constant",
    }
    return {w: CYCLICAL if CYCLICAL in w else named.get(w, w) for w in (row["weights"] for row in results["rows"])}


def claims_of(tables: Sequence[Mapping[str, Estimate]]) -> list[dict[str, Any]]:
    """Each claim with the mean difference over the seeds and what they say of it. Noise is the same, so differences are paired."""
    found, p_values = [], {}
    for place, (better, worse, text) in enumerate(CLAIMS):
        gaps = [difference(table[better], table[worse]) for table in tables]
        held = spread(gaps) if len(gaps) > 1 else None
        values = [gap.unbiased for gap in gaps]
        found.append(
            {"weights": better, "than": worse, "claim": text, "differences": values, "mean": sum(values) / len(values)}
        )
        p_values[str(place)] = math.nan if held is None else held.p_value
    adjusted = holm(p_values)
    for place, claim in enumerate(found):
        claim["p_value"] = adjusted[str(place)]
        sided = "supported" if claim["mean"] < 0 else "contradicted"
        claim["verdict"] = sided if claim["p_value"] <= ALPHA else "cannot tell"
    return found


def memory_of(name: str, num_parameters: int) -> tuple[int, int]:
    """Bytes that training keeps for these weights, and that sampling needs, both fp32."""
    copy = 4 * num_parameters
    if name == "raw":
        return 0, copy
    kept = {"ensemble_checkpoints": 0, "ensemble_widths": 2}.get(name, 1)
    return kept * copy, copy * (2 if name.startswith("ensemble") else 1)


def study(folder: Path, seeds: int, steps: int, num_images: int) -> dict[str, Any]:
    tables, num_parameters = [], 0
    features: Path | None = None
    for seed in range(seeds):
        run = settings_of(folder, seed, steps, num_images)
        train.run(run)
        if features is None:  # one classifier for all seeds: distances are in the same features
            classifier_training.train_features(run)
            features = run.output_dir / "features.safetensors"
        elif not (run.output_dir / features.name).exists():
            shutil.copy(features, run.output_dir)
        results = scored(run, folder)
        names = short_names(results, run)
        tables.append({names[row["weights"]]: {**row, "weights": names[row["weights"]]} for row in results["rows"]})
        checkpoint, _ = RunDir(run.output_dir).newest_whole()
        assert checkpoint is not None
        num_parameters = sum(tensor.numel() for tensor in checkpoint.weights("raw").values())
    estimates = [{name: Estimate.from_dict(row["estimate"]) for name, row in table.items()} for table in tables]
    combined = across_runs(estimates)
    rows = []
    for name, found in sorted(combined.items(), key=lambda item: item[1].distance.mean):
        training, sampling = memory_of(name, num_parameters)
        seconds = sum(table[name]["seconds"] / table["raw"]["seconds"] for table in tables) / seeds
        per_seed = [
            {key: t[name].get(key) for key in ("frechet_distance_unbiased", "stderr", "delta_vs_raw", "delta_stderr")}
            for t in tables
        ]
        rows.append(
            {
                "weights": name,
                **asdict(found),
                "runs": per_seed,
                "bytes_training": training,
                "bytes_sampling": sampling,
                "seconds_over_raw": seconds,
            }
        )
    return {
        "seeds": seeds,
        "steps": steps,
        "num_images": num_images,
        "parameters": num_parameters,
        "rows": rows,
        "claims": claims_of(estimates),
    }


def markdown(results: Mapping[str, Any]) -> str:
    """The study's two tables, as docs/results.md has them."""
    lines = ["| weights | distance | minus raw | over seeds | MB kept | sampling time |", "|---|---|---|---|---|---|"]
    for row in results["rows"]:
        distance, difference = row["distance"], row["difference"]
        gap = "" if difference is None else f"{difference['mean']:+.2f} ± {difference['stderr']:.2f}"
        told = "" if difference is None else f"{verdict_of(difference['mean'], row['holds'])} (p {row['p_value']:.2g})"
        lines.append(
            f"| `{row['weights']}` | {distance['mean']:.2f} ± {distance['stderr']:.2f} | {gap} | {told} | "
            f"{row['bytes_training'] / 1e6:.1f} | × {row['seconds_over_raw']:.1f} |"
        )
    lines += ["", "| claim | mean difference | these runs |", "|---|---|---|"]
    for claim in results["claims"]:
        lines.append(
            f"| {claim['claim']}: `{claim['weights']}` below `{claim['than']}` | {claim['mean']:+.2f} | "
            f"{claim['verdict']} (p {claim['p_value']:.2g}) |"
        )
    return re.sub(r"-(?=\d)", "\N{MINUS SIGN}", "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1500, help="of each run: a multiple of 15")
    parser.add_argument("--num-images", type=int, default=1797, help="sampled from each set of weights")
    parser.add_argument("--output", type=Path, help="default: study.json in FOLDER")
    arguments = parser.parse_args()
    here = environment("diffusers")
    results = study(arguments.folder, arguments.seeds, arguments.steps, arguments.num_images)
    save(arguments.output or arguments.folder / "study.json", {"environment": here, **results})
    print(markdown(results))


if __name__ == "__main__":
    main()
