"""Learning-rate decays beside the averages that emulate them.

    python benchmarks/cooldowns.py FOLDER [--steps 1500] [--num-images 1797] [--only window_150_1500 ...] [--output FILE.json]

Trains the network of `configs/digits.yaml` at a constant rate (after a warm-up of a tenth), and keeps averages that emulate a
linear, a cosine and a 1-sqrt decay over the last tenth and the last three tenths of the steps. For each of them the run is forked:
its checkpoint before those steps is copied and resumed exactly, on the same images and noise, with the learning rate times
r((t - (T - D)) / D). The fork's last raw weights are then scored beside the average, over the same noise. Results in FOLDER are
reused, so a benchmark that was stopped continues.

`weights_apart` is ||fork - average|| / ||fork - raw||: 0 if the average equals the fork, 1 if it is as far from it as raw is.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from environment import environment, save
from torch import Tensor

from ddpm_ema import classifier_training, config, metrics, score, train
from ddpm_ema.averaging import CosineCooldown, SqrtCooldown, Window, profile_to_dict
from ddpm_ema.averaging.cooldown import Cooldown
from ddpm_ema.config import TrainingSettings
from ddpm_ema.export import export
from ddpm_ema.named_weights import WeightResolver, name_of
from ddpm_ema.rundir import RunDir
from ddpm_ema.score.folder import ScoreFolder

ROOT = Path(__file__).parents[1]
SHARES = (0.1, 0.3)
RATES: dict[type[Cooldown], Callable[[float], float]] = {
    Window: lambda u: 1 - u,
    CosineCooldown: lambda u: (1 + math.cos(math.pi * u)) / 2,
    SqrtCooldown: lambda u: 1 - math.sqrt(u),
}


def settings_of(folder: Path, steps: int, num_images: int) -> config.Config:
    """The constant run: one checkpoint for each fork, and raw and `uniform` often enough to reconstruct the averages."""
    settings = config.to_dict(config.load(ROOT / "configs" / "digits.yaml"))
    settings["output_dir"] = str(folder / "constant")
    settings["training"] |= {"steps": steps, "warmup_steps": steps // 10, "sample_every": 0}
    settings["machine"] = {"device": "cpu"}
    kept = {name_of(profile): profile_to_dict(profile) for profile in emulated(steps)}
    settings["averages"] = {"uniform": {"kind": "uniform"}, **kept}
    settings["checkpoints"] |= {"every": steps // 10, "keep_every": steps // 10, "snapshots_every": steps // 30}
    settings["checkpoints"]["snapshots"] = ["uniform", "raw"]
    settings["evaluation"] |= {"num_images": num_images}
    return config.validate(settings)


def emulated(steps: int) -> list[Cooldown]:
    return [kind(length=round(share * steps), end=steps) for share in SHARES for kind in RATES]


def fork(run: config.Config, average: Cooldown, folder: Path) -> Path:
    """The last raw weights of the run forked before the last `length` steps, their rate decayed, as a diffusers folder."""
    exported = folder / f"real_{average.kind}_{average.length}"
    if exported.exists():
        return exported
    begin, rate = average.end - average.length, RATES[type(average)]
    forked = run.model_copy(update={"output_dir": folder / f"fork_{average.kind}_{average.length}"})
    if not forked.output_dir.exists():  # a copy that was interrupted has another name
        partial = folder / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(run.output_dir, partial, ignore=shutil.ignore_patterns("scores", "samples", "snapshots"))
        for checkpoint in RunDir(partial).checkpoints():
            if checkpoint.step > begin:
                shutil.rmtree(checkpoint.path)
        partial.rename(forked.output_dir)
    constant = TrainingSettings.learning_rate_at

    def decayed(training: TrainingSettings, step: float) -> float:
        return constant(training, step) * rate((step - begin) / average.length)

    with mock.patch.object(TrainingSettings, "learning_rate_at", decayed):
        train.run(forked)
    export(forked.output_dir, "raw", exported)
    shutil.rmtree(forked.output_dir)
    return exported


def scored(run: config.Config, forks: Mapping[Cooldown, Path]) -> list[dict[str, Any]]:
    """One row for each decay: the two distances, their paired difference, and how far apart the weights are."""
    weights = ["raw", *map(name_of, forks), *map(str, forks.values())]
    evaluation = run.evaluation.model_copy(update={"weights": tuple(weights), "precision_recall": False})
    results = score.run(run.model_copy(update={"evaluation": evaluation}))[-1]
    rows = {row["weights"]: row for row in results["rows"]}
    rundir = RunDir(run.output_dir)
    resolver = WeightResolver(rundir, rundir.newest_whole()[0], run)
    raw = flat(resolver, "raw")
    folder = ScoreFolder(rundir.score_dir(results["step"], results["settings_digest"]))

    def paired(a: str, b: str) -> dict[str, Any]:
        """a - b with the 95% interval of this comparison alone."""
        records = [folder.record(rows[name]["weights_sha256"]) for name in (a, b)]
        ours, theirs = (record.estimates[results["num_images"]] for record in records if record is not None)
        gap = metrics.difference(ours, theirs)
        return {"delta": gap.unbiased, "interval": list(gap.interval()), "significant": gap.p_value <= metrics.ALPHA}

    found = []
    for average, folder in forks.items():
        name, real = name_of(average), str(folder)
        made, true = flat(resolver, name), flat(resolver, real)
        rebuilt = resolver.reconstructed(average)
        assert rebuilt.reconstruction is not None
        error = torch.linalg.norm(joined(rebuilt.members[0]()) - made) / torch.linalg.norm(made - raw)
        found.append(
            {
                "decay": average.kind,
                "length": average.length,
                "real": distance(rows[real]),
                "emulated": distance(rows[name]),
                "real_less_emulated": paired(real, name),
                "real_less_raw": paired(real, "raw"),
                "emulated_less_raw": paired(name, "raw"),
                "weights_apart": float(torch.linalg.norm(true - made) / torch.linalg.norm(true - raw)),
                "reconstructed": {
                    "predicted": rebuilt.reconstruction["predicted_relative_error"],
                    "actual": float(error),
                },
            }
        )
    return [{"weights": "raw", **distance(rows["raw"])}, *found]


def joined(tensors: Mapping[str, Tensor]) -> Tensor:
    """All weights by name as one vector: fp64 [num_weights]."""
    return torch.cat([tensor.flatten().double() for _, tensor in sorted(tensors.items())])


def flat(resolver: WeightResolver, name: str) -> Tensor:
    return joined(resolver.named(name).members[0]())


def distance(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"distance": row["frechet_distance_unbiased"], "stderr": row["stderr"]}


def report(rows: list[dict[str, Any]]) -> None:
    print(f"raw, constant rate: {rows[0]['distance']:.3f} ± {rows[0]['stderr']:.3f}")
    for row in rows[1:]:
        low, high = row["real_less_emulated"]["interval"]
        print(
            f"{row['decay']:16s} D {row['length']:4d}   real {row['real']['distance']:.3f} ± {row['real']['stderr']:.3f}"
            f"   emulated {row['emulated']['distance']:.3f} ± {row['emulated']['stderr']:.3f}   real − emulated "
            f"{row['real_less_emulated']['delta']:.3f} [{low:.3f}, {high:.3f}]   weights apart {row['weights_apart']:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=1500, help="of the constant run: a multiple of 30")
    parser.add_argument(
        "--num-images", type=int, default=1797, help="sampled from raw, the averages and the forks, each"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cooldowns.json")
    parser.add_argument("--only", nargs="+", help="names of the averages: fewer forks (default: all six)")
    arguments = parser.parse_args()
    wanted = [a for a in emulated(arguments.steps) if arguments.only is None or name_of(a) in arguments.only]
    run = settings_of(arguments.folder, arguments.steps, arguments.num_images)
    here = environment("diffusers")
    train.run(run)
    classifier_training.train_features(run)
    rows = scored(run, {average: fork(run, average, arguments.folder) for average in wanted})
    made = {"steps": arguments.steps, "num_images": arguments.num_images, "training_runs": 1}
    save(arguments.output, {"environment": here, **made, "rows": rows})
    report(rows)


if __name__ == "__main__":
    main()
