"""Run directories to score, made by hand: a tiny network, weights that differ, snapshots, a classifier nobody trained."""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import live_runs
import torch
from live_runs import TINY, Launch, changed
from torch import Tensor

from ddpm_ema import config, model, score
from ddpm_ema.averaging import PowerFunction, write_snapshot
from ddpm_ema.features import Architecture, Classifier, Trained, save_classifier
from ddpm_ema.rundir import RunDir

STEPS = (4, 8)
EVALUATION: dict[str, Any] = {
    "num_images": 60,
    "batch_size": 25,
    "sampler": "ddim",
    "num_inference_steps": 4,
    "extractors": ["classifier"],
    "groups": 10,
    "grid_images": 5,
}


def settings(output_dir: Path, **changes: Any) -> config.Config:
    """The tiny configuration, with changes by dotted key (`evaluation__seed=1`)."""
    tree = json.loads(json.dumps(TINY))
    tree["output_dir"] = str(output_dir)
    tree["model"]["initialization"] = "pytorch"  # the paper's first weights say zero, whatever they are scaled by
    tree["evaluation"] = dict(EVALUATION)
    tree["data"]["cache_dir"] = str(output_dir.parent / "cache")
    return changed(tree, changes)


@lru_cache(maxsize=8)
def _weights(seed: int, labels: bool) -> dict[str, Tensor]:
    changes = {"model__class_conditional": True} if labels else {}
    built = model.build(settings(Path("unused"), seed=seed, **changes), 10 if labels else None)
    return {name: tensor.clone() for name, tensor in built.state_dict().items()}


def weights(seed: int = 0, scale: float = 1.0, labels: bool = False) -> dict[str, Tensor]:
    """The network's initial weights, times `scale`."""
    return {name: tensor * scale for name, tensor in _weights(seed, labels).items()}


def make_run(output_dir: Path, labels: bool = False, **changes: Any) -> config.Config:
    """A trained run as far as scoring looks: two checkpoints, snapshots at both steps, a classifier."""
    run = settings(output_dir, **({"model__class_conditional": True} if labels else {}), **changes)
    rundir = RunDir(output_dir)
    profiles = {"ema_0_9": {"kind": "constant", "decay": 0.9}, "power_0_10": {"kind": "power_function", "std": 0.10}}
    manifest = {"settings": config.to_dict(run), "profiles": profiles}
    for step in STEPS:
        late = step / STEPS[-1]
        files = {
            "raw.safetensors": weights(0, 1 + 0.3 * late, labels),
            "averages/ema_0_9.safetensors": weights(0, 1 + 0.1 * late, labels),
            "averages/power_0_10.safetensors": weights(0, 1 + 0.2 * late, labels),
        }
        rundir.write_checkpoint(step, files, manifest)
        for place, std in enumerate((0.05, 0.10)):
            tensors = weights(0, 1 + (0.25 - 0.05 * place) * late, labels)
            name = f"power_{std:.2f}".replace(".", "_")
            path = rundir.snapshot_path(step, name)
            write_snapshot(path, tensors, step, PowerFunction(std=std))
    network = classifier()
    save_classifier(output_dir / "features.safetensors", Trained(network, 0.1), fingerprint="none", seed=0)
    return run


@lru_cache(maxsize=1)
def classifier() -> Classifier:
    """Nobody trained it, but its features have the spread that a trained one's have."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = Classifier(Architecture(channels=1, image_size=8, num_classes=10, width=4, dim=8)).eval()
        features = network(torch.randint(0, 256, (500, 1, 8, 8)))[0]
        network.standardize.running_mean.copy_(features.mean(dim=0))
        network.standardize.running_var.copy_(features.var(dim=0))
    return network


def again(run: config.Config, **changes: Any) -> config.Config:
    """The same run directory under other settings."""
    return changed(config.to_dict(run), changes)


def results(run: config.Config) -> dict[str, Any]:
    """Scores the run in this process; results.json of its last step."""
    return score.run(run)[-1]


def figures(found: dict[str, Any]) -> dict[str, tuple[float, ...]]:
    """What of the rows does not depend on clocks: weights -> numbers."""
    keys = ("frechet_distance", "frechet_distance_unbiased", "stderr", "kid", "precision", "recall")
    return {row["weights"]: tuple(row[key] for key in keys) for row in found["rows"]}


def start(run: config.Config, world_size: int = 1, command: Callable[[config.Config], Any] = score.run) -> Launch:
    """Scores the run in processes of their own, which can be killed or stopped."""
    return live_runs.start(run, world_size, command=command)
