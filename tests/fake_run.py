"""A run directory as training and scoring leave it, with made-up figures, for the tests of what reads one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw
from safetensors.numpy import save_file

STEPS = 3000
AVERAGES: dict[str, dict[str, Any]] = {
    "ema_0_999": {"kind": "constant", "decay": 0.999},
    "ema_0_999_debiased": {"kind": "bias_corrected", "decay": 0.999},
    "ema_0_9999_debiased": {"kind": "bias_corrected", "decay": 0.9999},
    "power_0_05": {"kind": "power_function", "std": 0.05},
    "power_0_10": {"kind": "power_function", "std": 0.10},
}
# copy -> corrected distance, its error, difference from raw and its error, kid, precision, recall
FIGURES = {
    "raw": (27.4, 2.0, None, None, 0.0311, 0.712, 0.644),
    "ema_0_999": (9.1, 1.2, -18.3, 2.2, 0.0102, 0.858, 0.671),
    "ema_0_999_debiased": (3.1, 0.9, -24.3, 2.0, 0.0041, 0.884, 0.744),
    "ema_0_9999_debiased": (14.2, 1.4, -13.2, 2.3, 0.0163, 0.871, 0.602),
    "power_0_05": (4.9, 1.0, -22.5, 1.9, 0.0050, 0.861, 0.751),
    "power_0_10": (2.7, 0.8, -24.7, 2.0, 0.0039, 0.889, 0.741),
}
SETTINGS: dict[str, Any] = {
    "output_dir": "runs/digits",
    "seed": 0,
    "data": {"source": "digits", "image_size": 8, "channels": 1},
    "model": {"block_out_channels": [32, 64, 64]},
    "diffusion": {"num_train_timesteps": 1000, "prediction": "epsilon"},
    "training": {"steps": STEPS, "batch_size": 64, "learning_rate": 1e-3},
    "averages": AVERAGES,
    "evaluation": {"num_images": 6000, "every": 500, "every_num_images": 1000},
}


def results(step: int = STEPS, num_images: int = 6000, names: tuple[str, ...] = tuple(FIGURES), **changes: Any) -> dict:
    """A results.json; figures are worse at earlier steps."""
    late = STEPS / step
    rows = []
    for name in names:
        distance, error, delta, delta_error, kid, precision, recall = FIGURES[name]
        row = {
            "weights": name,
            "profile": AVERAGES.get(name),
            "frechet_distance": distance * late + 1.2,
            "frechet_distance_unbiased": distance * late,
            "stderr": error,
            "kid": kid,
            "precision": precision,
            "recall": recall,
            "seconds": 21.4,
        }
        if delta is not None and "raw" in names:
            row |= {"delta_vs_raw": delta, "delta_stderr": delta_error}
            row["interval"] = [delta - 2.1 * delta_error, delta + 2.1 * delta_error]
        rows.append(row)
    pairs = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            delta, error = FIGURES[a][0] - FIGURES[b][0], 2.0 if "raw" in (a, b) else 0.6
            interval = [delta - 2.1 * error, delta + 2.1 * error]
            pairs.append({"a": a, "b": b, "delta": delta, "stderr": error, "interval": interval})
    return {
        "schema": 2,
        "step": step,
        "metric": "fd",
        "extractor": "classifier",
        "extractor_sha256": "ab" * 32,
        "reference": "train: digits, 1797 images",
        "num_images": num_images,
        "sampler": "dpm_solver++",
        "num_inference_steps": 25,
        "seed": 0,
        "groups": 20,
        "rows": rows,
        "pairs": pairs,
        **changes,
    }


def sweep_rows() -> list[dict[str, Any]]:
    """Twelve widths with a minimum near 0.13."""
    rows = []
    for std in np.linspace(0.02, 0.24, 12):
        distance = 2.5 + 900 * (std - 0.13) ** 2 * (1.8 if std < 0.13 else 0.6)
        row = {
            "weights": f"power_{std:.3f}".replace(".", "_"),
            "std": float(std),
            "frechet_distance": distance + 1.1,
            "frechet_distance_unbiased": distance,
            "stderr": 0.7 + 8 * abs(std - 0.13),
            "precision": 0.86 + 0.2 * (std - 0.02) - 0.3 * (std - 0.02) ** 2,
            "recall": 0.76 - 0.9 * (std - 0.05) ** 2,
        }
        rows.append(row)
    rows.sort(key=lambda row: row["frechet_distance_unbiased"])
    rows[-1]["warnings"] = ["reconstructed poorly: profile error 12%, condition number 1e6"]
    return rows


def write_results(run: Path, content: dict[str, Any], digest: str = "0123456789ab") -> Path:
    folder = run / "scores" / f"{content['step']:08d}-{digest}"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def weightings(num: int = 200) -> dict[str, list[float]]:
    """Density of each average over training, in `num` equal parts."""
    t = (np.arange(num) + 0.5) / num
    rate = {"ema_0_999": 3.0, "ema_0_999_debiased": 3.0, "ema_0_9999_debiased": 0.3}
    kept = {name: 1.0 if name == "ema_0_999" else 1 - math.exp(-r) for name, r in rate.items()}
    found = {name: (r * np.exp(-r * (1 - t)) / kept[name]).tolist() for name, r in rate.items()}
    for name, gamma in (("power_0_05", 16.97), ("power_0_10", 6.94)):
        found[name] = ((gamma + 1) * t**gamma).tolist()
    return found


def metrics(steps: int = STEPS, every: int = 50) -> str:
    """metrics.jsonl of a run that went well, with three quick scorings."""
    noise = np.random.default_rng(0)
    lines = []
    for step in range(every, steps + 1, every):
        loss = 0.045 + 0.6 * math.exp(-step / 160) + 0.004 * noise.standard_normal()
        row: dict[str, Any] = {"step": step, "loss": loss}
        row |= {f"loss_q{q}": loss * scale for q, scale in enumerate((2.9, 0.7, 0.3, 0.12))}
        row |= {
            "grad_norm": 0.3 + math.exp(-step / 200) + 0.05 * noise.random(),
            "learning_rate": 1e-3 * min(1, step / 200),
            "images_per_second": 1200 + 40 * noise.standard_normal(),
            "data_wait": 0.01,
            "seconds": 2.6,
            "skipped_steps": 0,
            "peak_memory": 6e8,
            "save_seconds": 0.1,
        }
        for i, name in enumerate(AVERAGES):
            row[f"decay/{name}"] = 0.999
            row[f"distance/{name}"] = 0.05 + 0.25 / (1 + i) * math.exp(-step / 1500)
        lines.append(json.dumps(row))
        if step % 1000 == 0:
            lines.append(json.dumps({"step": step, "scores": results(step, 1000)["rows"]}))
    return "\n".join(lines) + "\n"


def grid(path: Path, labels: tuple[str, ...] = tuple(FIGURES), columns: int = 16, cell: int = 32) -> None:
    """A labelled grid of blobs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(1)
    image = Image.new("RGB", (150 + columns * cell, len(labels) * cell), "white")
    draw = ImageDraw.Draw(image)
    for row, label in enumerate(labels):
        draw.text((4, row * cell + 10), label, fill="black")
        for column in range(columns):
            patch = Image.fromarray((noise.random((8, 8)) * 255).astype(np.uint8))
            image.paste(patch.resize((cell - 2, cell - 2), Image.Resampling.NEAREST), (150 + column * cell, row * cell))
    image.save(path)


def manifest(step: int = STEPS) -> dict[str, Any]:
    return {
        "schema": 1,
        "step": step,
        "seed": 0,
        "settings": SETTINGS,
        "dataset": {"name": "digits", "size": 1797, "fingerprint": "f00d" * 16},
        "world_size": 2,
        "versions": {"python": "3.11.7", "torch": "2.15.0", "diffusers": "0.42.1"},
        "profiles": AVERAGES,
        "weightings": weightings(),
        "files": {},
    }


def make_run(run: Path) -> Path:
    """A complete run directory: trained, sampled, scored at three steps, swept."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(SETTINGS, sort_keys=False))
    (run / "metrics.jsonl").write_text(metrics())
    checkpoint = run / "checkpoints" / f"step-{STEPS:08d}"
    checkpoint.mkdir(parents=True)
    save_file({"conv.weight": np.zeros((701, 1000), np.float32)}, checkpoint / "raw.safetensors")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest()))
    for step in (500, 1500, 3000):
        grid(run / "samples" / f"step-{step:08d}.png")
    for step in (1000, 2000):
        write_results(run, results(step))
    rows = sweep_rows()
    best = {
        "std": {
            "weights": rows[0]["weights"],
            "std": rows[0]["std"],
            "not_significantly_worse": [row["weights"] for row in rows[1:4]],
        }
    }
    grid(write_results(run, results(sweep=rows, sweep_best=best)) / "grid.png")
    return run
