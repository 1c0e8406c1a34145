"""A run directory as training and scoring leave it, with made-up figures, for the tests of what reads one."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw, PngImagePlugin
from safetensors.numpy import save_file

from ddpm_ema import config
from ddpm_ema.weight_names import name_of_profile

STEPS = 3000
AVERAGES: dict[str, dict[str, Any]] = {
    "ema_0_999": {"kind": "constant", "decay": 0.999},
    "ema_0_999_debiased": {"kind": "bias_corrected", "decay": 0.999},
    "ema_0_9999_debiased": {"kind": "bias_corrected", "decay": 0.9999},
    "power_0_05": {"kind": "power_function", "std": 0.05},
    "power_0_10": {"kind": "power_function", "std": 0.10},
}
# weights -> corrected distance, its error, difference from raw and its error, kid, precision, recall
FIGURES: dict[str, tuple[Any, ...]] = {
    "raw": (27.4, 2.0, None, None, 0.0311, 0.712, 0.644),
    "ema_0_999": (9.1, 1.2, -18.3, 2.2, 0.0102, 0.858, 0.671),
    "ema_0_999_debiased": (3.1, 0.9, -24.3, 2.0, 0.0041, 0.884, 0.744),
    "ema_0_9999_debiased": (14.2, 1.4, -13.2, 2.3, 0.0163, 0.871, 0.602),
    "power_0_05": (4.9, 1.0, -22.5, 1.9, 0.0050, 0.861, 0.751),
    "power_0_10": (2.7, 0.8, -24.7, 2.0, 0.0039, 0.889, 0.741),
}
MEASURES = {
    key: {"delta": 0.0, "stderr": 0.001, "interval": [-0.002, 0.002], "p_value": 1.0, "significant": False}
    for key in ("kid", "precision", "recall")
}
VERSIONS = {"ddpm_ema": "0.1.0", "torch": "2.15.0", "diffusers": "0.42.1", "device": "cpu, AVX2"}
# The settings that training had; this scoring had others on its command line, as `EVALUATION` says.
SETTINGS: dict[str, Any] = {
    "output_dir": "runs/digits",
    "data": {"source": "digits", "image_size": 8, "channels": 1},
    "model": {"block_out_channels": [32, 64, 64], "attention": [False, True, False]},
    "training": {"steps": STEPS, "batch_size": 64, "learning_rate": 1e-3},
    "averages": AVERAGES,
    "evaluation": {"sampler": "ddim", "num_inference_steps": 50, "every": 500, "every_num_images": 1000},
}


def settings() -> dict[str, Any]:
    """All settings of the run, as config.yaml holds them."""
    return config.to_dict(config.validate(SETTINGS))


def evaluation(**changes: Any) -> dict[str, Any]:
    """All evaluation settings of the scoring."""
    scored = {"sampler": "dpm_solver++", "num_inference_steps": 25, "num_images": 6000, "extractors": ["classifier"]}
    return {**settings()["evaluation"], **scored, **changes}


def difference(delta: float, error: float) -> dict[str, Any]:
    """The fields of a row's paired difference from raw."""
    low, high = delta - 2.1 * error, delta + 2.1 * error
    found = {"delta_vs_raw": delta, "delta_stderr": error, "interval": [low, high]}
    return found | {"significant": not low <= 0 <= high, "p_value": 0.5 if low <= 0 <= high else 0.01}


def row(name: str, distance: float, error: float = 1.0, **more: Any) -> dict[str, Any]:
    """One row of results.json; `delta=(difference from raw, its error)` pairs it."""
    delta = more.pop("delta", None)
    return {
        "weights": name,
        "weights_sha256": hashlib.sha256(name.encode()).hexdigest(),
        "profile": AVERAGES.get(name),
        "protocol": 2,
        "versions": VERSIONS,
        "warnings": [],
        "num_images": 6000,
        "frechet_distance": distance + 1.2,
        "frechet_distance_unbiased": distance,
        "stderr": error,
        "interval95": [distance - 2.1 * error, distance + 2.1 * error],
        "estimate": {
            "plain": distance,
            "sides": [{"pseudo_values": [distance] * 20, "counts": [300] * 20}],
            "warnings": [],
        },
        "kid": 0.01,
        "kid_stderr": 0.001,
        "precision": 0.85,
        "precision_stderr": 0.005,
        "recall": 0.7,
        "recall_stderr": 0.006,
        "saturated": 0.48,
        "seconds": 21.4,
        "seconds_of": {"sampling": 18.0, "features": 2.0, "distance": 1.4},
        **({} if delta is None else difference(*delta) | {"measures_vs_raw": MEASURES}),
        **more,
    }


def results(step: int = STEPS, num_images: int = 6000, names: tuple[str, ...] = tuple(FIGURES), **changes: Any) -> dict:
    """A results.json; figures are worse at earlier steps. `changes` replace its keys, the evaluation settings among them."""
    rows = []
    for name in names:
        distance, error, delta, delta_error, kid, precision, recall = FIGURES[name]
        paired = (delta, delta_error) if delta is not None and "raw" in names else None
        more = {"kid": kid, "precision": precision, "recall": recall, "num_images": num_images, "delta": paired}
        rows.append(row(name, distance * STEPS / step, error, **more))
    scored = evaluation(num_images=num_images)
    scored |= {key: value for key, value in changes.items() if key in scored and key != "sweep"}
    keys = ("sampler", "num_inference_steps", "num_images", "seed", "eta", "clip_sample", "mixed_precision", "groups")
    keys = (*keys, "precision_recall")
    return {
        "schema": 3,
        "protocol": 2,
        "step": step,
        "finished": "2025-06-01T12:00:00+00:00",
        "metric": "fd",
        **{key: scored[key] for key in keys},
        "guidance_scale": None,
        "extractor": "classifier",
        "extractor_sha256": "ab" * 32,
        "feature_layer": "features",
        "reference": "train of digits, 1797 images",
        "reference_origin": {"data": "f00d" * 16, "split": "train", "size": 1797},
        "reading": "training images",
        "reference_saturated": 0.5,
        "precision_of_noise": 0.01,
        "timestep_spacing": "trailing",
        "variance": "fixed_large",
        "data": {"image_size": 8, "channels": 1},
        "model": {"block_out_channels": [32, 64, 64]},
        "diffusion": {"schedule": "linear", "prediction": "epsilon"},
        "labels_sha256": None,
        "settings_digest": hashlib.sha256(json.dumps([scored[key] for key in keys]).encode()).hexdigest()[:12],
        "evaluation": scored,
        "rows": sorted(rows, key=lambda row: row["frechet_distance_unbiased"]),
        "may_be_best": [name for name in ("power_0_10", "ema_0_999_debiased") if name in names] or list(names),
        "warnings": [],
        "versions": VERSIONS,
        "world_size": 1,
        **changes,
    }


def swept() -> dict[str, Any]:
    """What a sweep adds to results.json: twelve widths, the lowest near 0.13."""
    rows = []
    for std in map(float, np.linspace(0.02, 0.24, 12)):
        distance = 2.5 + 900 * (std - 0.13) ** 2 * (1.8 if std < 0.13 else 0.6)
        more = {
            "precision": 0.86 + 0.2 * (std - 0.02) - 0.3 * (std - 0.02) ** 2,
            "recall": 0.76 - 0.9 * (std - 0.05) ** 2,
        }
        quality = {"predicted_relative_error": 0.01, "profile_error": 0.01, "amplification": 1.3}
        more |= {"sweep": "std", "std": std, "reconstruction": quality, "delta": (distance - 27.4, 2.0)}
        name = name_of_profile({"kind": "power_function", "std": round(std, 2)})
        rows.append(row(name, distance, 0.7 + 8 * abs(std - 0.13), **more))
        del (
            rows[-1]["measures_vs_raw"],
            rows[-1]["estimate"],
        )  # a real sweep has fewer images than raw, and is of no seeds
    rows[-1]["warnings"] = ["reconstructed poorly: profile error 12%, condition number 1e6"]
    return {"sweep": rows}


def write_results(run: Path, content: dict[str, Any], digest: str | None = None) -> Path:
    folder = run / "scores" / f"{content['step']:08d}-{digest or content['settings_digest']}"
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
        row: dict[str, Any] = {"step": step, "loss": loss, "data_wait": 0.01, "seconds": 2.6, "skipped_steps": 0}
        row |= {f"loss_q{q}": loss * scale for q, scale in enumerate((2.9, 0.7, 0.3, 0.12))}
        row |= {
            "grad_norm": 0.3 + math.exp(-step / 200) + 0.05 * noise.random(),
            "peak_memory": 6e8,
            "save_seconds": 0.1,
        }
        row |= {"learning_rate": 1e-3 * min(1, step / 200), "images_per_second": 1200 + 40 * noise.standard_normal()}
        for i, name in enumerate(AVERAGES):
            row[f"decay/{name}"] = 0.999
            row[f"distance/{name}"] = 0.05 + 0.25 / (1 + i) * math.exp(-step / 1500)
        lines.append(json.dumps(row))
        if step % 1000 == 0:
            quick = [{**row, "metric": "fd", "extractor": "classifier"} for row in results(step, 1000)["rows"]]
            lines.append(json.dumps({"step": step, "scores": quick}))
    return "\n".join(lines) + "\n"


def grid(
    path: Path,
    title: str = "",
    columns: int = 16,
    cell: int = 34,
    real: bool = False,
    names: tuple[str, ...] = tuple(FIGURES),
) -> None:
    """A labelled grid of blobs, with the title that a picture holds, and where its rows lie."""
    labels = ("real images",) * real + names
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(1)
    image = Image.new("RGB", (150 + columns * cell, len(labels) * cell), "white")
    draw = ImageDraw.Draw(image)
    for row, label in enumerate(labels):
        draw.text((4, row * cell + 10), label, fill="black")
        for column in range(columns):
            patch = Image.fromarray((noise.random((8, 8)) * 255).astype(np.uint8))
            image.paste(patch.resize((cell - 2, cell - 2), Image.Resampling.NEAREST), (150 + column * cell, row * cell))
    places = {"names": labels, "columns": columns, "left": 150, "top": 0, "width": cell - 2, "height": cell - 2}
    entries = PngImagePlugin.PngInfo()
    entries.add_text("Rows", json.dumps({**places, "gap": 2, "scale": 4, "real": real}))
    if title:
        entries.add_text("Title", title)
    image.save(path, pnginfo=entries)


NEAREST = "Nearest training image of each sample, by Euclidean distance between features of classifier"


def nearest(folder: Path, name: str, columns: int = 16) -> Path:
    """The nearest training images to a row of a scoring's grid."""
    path = folder / "nearest" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}-{columns}.png"
    grid(path, NEAREST, columns, names=(name,))
    return path


def manifest(step: int = STEPS) -> dict[str, Any]:
    return {
        "schema": 1,
        "step": step,
        "seed": 0,
        "settings": settings(),
        "settings_digest": "0" * 12,
        "dataset": {"name": "digits", "size": 1797, "fingerprint": "f00d" * 16},
        "world_size": 2,
        "versions": {"python": "3.11.7", "torch": "2.15.0", "diffusers": "0.42.1"},
        "profiles": AVERAGES,
        "parameters": {},
        "window": {},
        "skipped_steps": 0,
        "scaler": None,
        "weightings": weightings(),
        "files": {},
    }


def make_run(run: Path) -> Path:
    """A complete run directory: trained, sampled, scored at three steps, swept."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(settings(), sort_keys=False))
    (run / "features.safetensors").touch()
    (run / "metrics.jsonl").write_text(metrics())
    checkpoint = run / "checkpoints" / f"step-{STEPS:08d}"
    checkpoint.mkdir(parents=True)
    save_file({"conv.weight": np.zeros((701, 1000), np.float32)}, checkpoint / "raw.safetensors")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest()))
    for step in (500, 1500, 3000):
        grid(
            run / "samples" / f"step-{step:08d}.png",
            f"step {step}, ddim 50 steps, the same noise in every row",
            real=True,
        )
    for step in (1000, 2000):
        write_results(run, results(step))
    scored = write_results(run, results(**swept()))
    grid(scored / "grid.png")
    for name in FIGURES:
        nearest(scored, name)
    return run
