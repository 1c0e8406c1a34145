"""Raw weights and averages of a run on photographs: over training, over widths, in the features of two classifiers.

    python benchmarks/photographs.py IMAGES FOLDER [--steps 15625] [--image-size 16] [--num-images 2000] [...]

IMAGES holds the folders `train` and `test`, and in each a folder per class. The run and the two classifiers (which differ in their
seed) learn from `train`; all distances are to `test`, which no network has seen, read as a sample of a population. Weights at four
earlier steps and at the end are scored from the same noise, then averages of other widths, which are reconstructed from snapshots.
Everything that is scored was chosen before the first score; no setting was chosen by a reported figure. Results in FOLDER are reused,
so a run that was stopped continues; `ddpm-ema train | features | score` on several processes leave the same files.
"""

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from environment import environment, save

from ddpm_ema import classifier_training, config, score, train
from ddpm_ema.config import Config
from ddpm_ema.numbers import verdict_of

EMA = {"ema_0_999": ("constant", 0.999), "ema_0_999_debiased": ("bias_corrected", 0.999)}
EMA |= {"ema_0_9999": ("constant", 0.9999), "ema_0_9999_debiased": ("bias_corrected", 0.9999)}
SETTINGS: dict[str, Any] = {
    "seed": 0,
    "data": {"source": "folder", "split": "train", "channels": 3, "horizontal_flip": True},
    "model": {
        "block_out_channels": [64, 128, 128],
        "layers_per_block": 1,
        "attention": [False, True, False],
        "norm_num_groups": 32,
        "initialization": "ddpm",
    },
    "training": {
        "batch_size": 64,
        "learning_rate": 4e-4,
        "warmup_steps": "5%",
        "mixed_precision": "bf16",
        "compile": True,
        "log_every": 25,
        "sample_images": 32,
    },
    "averages": {
        **{name: {"kind": kind, "decay": decay} for name, (kind, decay) in EMA.items()},
        "power_0_05": {"kind": "power_function", "std": 0.05},
        "power_0_10": {"kind": "power_function", "std": 0.10},
        "uniform": {"kind": "uniform"},
    },
    "evaluation": {
        "batch_size": 250,
        "sampler": "dpm_solver++",
        "num_inference_steps": 25,
        "mixed_precision": "bf16",
        "compile": True,
        "reference": "test",
        "grid_images": 16,
    },
}
OVER_TRAINING = ("raw", "ema_0_999_debiased", "power_0_05", "power_0_10")
STDS = "0.03:0.24:8"
DECAYS = "0.99:0.9998:5"  # none of the kept ones: those would be tested twice
KEPT = (
    "weights", "num_images", "frechet_distance", "frechet_distance_unbiased", "stderr", "interval95", "delta_vs_raw",
    "delta_stderr", "interval", "p_value", "significant", "kid", "kid_stderr", "recall", "recall_stderr", "saturated",
    "nearer_to_training", "seconds", "sweep", "std", "cooldown",
)  # fmt: skip


def settings_of(
    images: Path, folder: Path, steps: int, num_images: int, image_size: int = 16, eager: bool = False
) -> Config:
    """The run: checkpoints at every fifth of it are kept, and 125 snapshots."""
    fifth = steps // 5
    tree = {**SETTINGS, "output_dir": str(folder / "run")}
    tree["data"] = {**SETTINGS["data"], "path": str(images), "image_size": image_size}
    tree["training"] = {**SETTINGS["training"], "steps": steps, "sample_every": fifth}
    if eager:
        tree["training"] |= {"compile": False, "channels_last": False}
    checkpoints = {"every": max(1, fifth // 5), "keep": 2, "keep_every": fifth, "snapshots_every": max(1, fifth // 25)}
    tree["checkpoints"] = {**checkpoints, "snapshots": ["power_0_05", "power_0_10", "uniform", "raw"]}
    extractors = ["classifier", f"classifier={folder / 'other' / 'features.safetensors'}"]
    tree["evaluation"] = {**SETTINGS["evaluation"], "num_images": num_images, "extractors": extractors}
    return config.validate(tree)


def tables(run: Config, short: bool) -> Iterator[dict[str, Any]]:
    """results.json per step and classifier: the weights over training, then all of the last step with the sweep."""
    steps = run.training.steps
    sweep = run.evaluation.sweep.model_copy(update={"stds": STDS})
    if short:
        yield from score.run(evaluating(run, sweep=sweep))
        return
    for step in range(steps // 5, steps, steps // 5):
        yield from score.run(evaluating(run, steps=(step,), weights=OVER_TRAINING))
    widths = {"decays": DECAYS, "cooldowns": f"{steps // 25}:{2 * steps // 5}:5"}
    yield from score.run(evaluating(run, sweep=sweep.model_copy(update=widths)))


def evaluating(run: Config, **changed: Any) -> Config:
    return run.model_copy(update={"evaluation": run.evaluation.model_copy(update=changed)})


def study(run: Config, folder: Path, short: bool = False) -> dict[str, Any]:
    train.run(run)
    for seed, place in ((0, run.output_dir), (1, folder / "other")):
        classifier_training.train_features(run.model_copy(update={"seed": seed, "output_dir": place}))
    found: dict[str, Any] = {"training": run.model_dump(mode="json")["training"], "classifiers": [{}, {}]}
    for place, results in enumerate(tables(run, short)):
        of = found["classifiers"][place % 2]
        for row in results["rows"]:
            of.setdefault("rows", []).append({"step": results["step"], **kept(row)})
        if "sweep" in results:
            of["sweep"] = [kept(row) for row in results["sweep"]]
        of |= {"may_be_best": results["may_be_best"], "floor": results["floor"]}  # of the last step in the end
    return found


def kept(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in KEPT if key in row}


def markdown(results: Mapping[str, Any]) -> str:
    """The tables, as docs/results.md has them."""
    one, two = results["classifiers"]
    steps = sorted({row["step"] for row in one["rows"]})
    lines = []
    if len(steps) > 1:
        lines = [
            "| weights | " + " | ".join(f"step {step:,}" for step in steps) + " |",
            "|---" * (1 + len(steps)) + "|",
        ]
        for name in OVER_TRAINING:
            cells = (at(one["rows"], name, step) for step in steps)
            lines.append(f"| `{name}` | " + " | ".join(with_error(row) for row in cells) + " |")
        lines.append("")
    lines += ["| weights | distance | minus raw | | second classifier | minus raw | | recall |", "|---" * 8 + "|"]
    for row in last(one):
        other = at(two["rows"], row["weights"], steps[-1])
        cells = [f"`{row['weights']}`", with_error(row), *gap(row), with_error(other), *gap(other)]
        lines.append(f"| {' | '.join(cells)} | {row['recall']:.2f} |")
    if "sweep" in one:
        lines += ["", "| reconstructed | distance | minus raw | | second classifier | minus raw | |", "|---" * 7 + "|"]
    for row in one.get("sweep", ()):
        other = next(found for found in two["sweep"] if found["weights"] == row["weights"])
        cells = [f"`{row['weights']}`", with_error(row), *gap(row), with_error(other), *gap(other)]
        lines.append(f"| {' | '.join(cells)} |")
    return re.sub(r"-(?=\d)", "\N{MINUS SIGN}", "\n".join(lines))


def last(of: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the last step, from the lowest distance."""
    step = max(row["step"] for row in of["rows"])
    return sorted((r for r in of["rows"] if r["step"] == step), key=lambda row: float(row["frechet_distance_unbiased"]))


def at(rows: list[dict[str, Any]], name: str, step: int) -> dict[str, Any]:
    return next(row for row in rows if (row["weights"], row["step"]) == (name, step))


def with_error(row: Mapping[str, Any]) -> str:
    return f"{row['frechet_distance_unbiased']:.2f} ± {row['stderr']:.2f}"


def gap(row: Mapping[str, Any]) -> tuple[str, str]:
    """The difference from raw with its interval, and what the test says."""
    if "delta_vs_raw" not in row:
        return "", ""
    low, high = row["interval"]
    word = verdict_of(row["delta_vs_raw"], row["significant"])
    return f"{row['delta_vs_raw']:+.2f} [{low:+.2f}, {high:+.2f}]", word


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Distance over the training step, where several are scored, and over the width of the average; a row per classifier."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    several = len({row["step"] for row in results["classifiers"][0]["rows"]}) > 1
    size = {"figsize": (10 if several else 6, 6.4), "layout": "constrained", "squeeze": False}
    figure, axes = pyplot.subplots(2, 2 if several else 1, **size)
    for across, of, which in zip(axes, results["classifiers"], ("first", "second"), strict=True):
        if several:
            for name in OVER_TRAINING:
                rows = sorted((row for row in of["rows"] if row["weights"] == name), key=lambda row: int(row["step"]))
                _plot(across[0], [row["step"] for row in rows], rows, name)
            across[0].set(xlabel="training step", ylabel=f"distance, {which} classifier")
        rows = [row for row in of["sweep"] if row["sweep"] == "std"]
        _plot(across[-1], [row["std"] for row in rows], rows, "reconstructed power functions")
        raw = at(of["rows"], "raw", max(row["step"] for row in of["rows"]))
        across[-1].axhline(raw["frechet_distance_unbiased"], color="grey", linestyle="--", label="raw")
        across[-1].set(xlabel="σ_rel, width of the average", ylabel=f"distance, {which} classifier")
        for axis in across:
            axis.axhline(of["floor"]["distance"], color="black", linestyle=":", label="real images of the training set")
            axis.legend(
                fontsize=8, **({} if several else {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 3})
            )
    figure.savefig(path, dpi=110)


def _plot(axis: Any, places: list[float], rows: list[dict[str, Any]], name: str) -> None:
    heights, errors = ([row[key] for row in rows] for key in ("frechet_distance_unbiased", "stderr"))
    axis.errorbar(places, heights, errors, marker="o", capsize=3, label=name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of photographs, with train/CLASS/ and test/CLASS/")
    parser.add_argument("folder", type=Path, help="folder of the run")
    parser.add_argument("--steps", type=int, default=15625, help="of 64 images each; a multiple of 125")
    parser.add_argument("--image-size", type=int, default=16, help="pixels; the photographs are read at this size")
    parser.add_argument("--eager", action="store_true", help="train without torch.compile and channels-last")
    parser.add_argument("--short", action="store_true", help="score only the last step: kept weights and other powers")
    parser.add_argument("--num-images", type=int, default=2000, help="sampled from each set of weights")
    parser.add_argument("--output", type=Path, help="default: photographs.json in FOLDER")
    parser.add_argument("--figure", type=Path, help="default: photographs.png in FOLDER")
    arguments = parser.parse_args()
    folder = arguments.folder
    size = (arguments.steps, arguments.num_images, arguments.image_size)
    here = environment("diffusers")
    results = study(settings_of(arguments.images, folder, *size, arguments.eager), folder, arguments.short)
    save(arguments.output or folder / "photographs.json", {"environment": here, **results})
    draw(results, arguments.figure or folder / "photographs.png")
    print(markdown(results))


if __name__ == "__main__":
    main()
