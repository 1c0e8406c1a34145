"""What a scoring leaves for people and for the report: results.json, the labelled grid, the table."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_ema.config import Config, EvaluationSettings, digest
from ddpm_ema.features import Extractor
from ddpm_ema.grids import save_grid
from ddpm_ema.numbers import figure, metric_label, with_error
from ddpm_ema.rundir import atomic_save, atomic_write, read_tensors
from ddpm_ema.score.measure import Score, pairs, rows

SCHEMA = 2


def settings_of(config: Config, extractor: Extractor, reference: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting that changes the numbers, and none that does not: what names the folder of a scoring."""
    evaluation = config.evaluation
    settings: dict[str, Any] = {
        "seed": evaluation.seed,
        "sampler": evaluation.sampler,
        "num_inference_steps": evaluation.num_inference_steps,
        "eta": evaluation.eta if evaluation.sampler == "ddim" else None,
        "clip_sample": evaluation.clip_sample,
        "guidance_scale": evaluation.guidance_scale if config.model.class_conditional else None,
        "mixed_precision": evaluation.mixed_precision,
        "num_images": evaluation.num_images,
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "feature_layer": extractor.feature_layer,
        "reference": {key: value for key, value in reference.items() if key not in ("versions", "notes")},
        "groups": evaluation.groups,
        "kid_subsets": evaluation.kid_subsets,
        "kid_subset_size": evaluation.kid_subset_size,
        "precision_recall": evaluation.precision_recall,
    }
    return settings


def metric_of(extractor: Extractor) -> str:
    """`fid` is a name for Inception at its published weights alone."""
    return "fid" if extractor.is_published_inception else "fd"


class ScoreFolder:
    """One `scores/<step>-<digest>/`: finished copies, results.json and grid.png. Rank 0 alone writes to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results_path, self.grid_path = path / "results.json", path / "grid.png"

    def copy_folder(self, slug: str) -> Path:
        return self.path / "copies" / slug

    def finished(self, slug: str) -> Score | None:
        """The score of a copy that is complete. A damaged file counts as none."""
        try:
            return Score.from_dict(json.loads((self.copy_folder(slug) / "score.json").read_text()))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def finish(self, slug: str, score: Score, images: Tensor) -> None:
        """Keeps the score of a complete copy, and its images for the grid (uint8 `[n, C, H, W]`)."""
        atomic_save(self.copy_folder(slug) / "grid.safetensors", {"images": images})
        atomic_write(self.copy_folder(slug) / "score.json", json.dumps(score.to_dict(), indent=1))

    def grid_images(self, slug: str) -> Tensor | None:
        """uint8 `[n, C, H, W]`, or None where they were lost."""
        path = self.copy_folder(slug) / "grid.safetensors"
        return read_tensors(path)["images"] if path.is_file() else None

    def others(self, slugs: Sequence[str], names: Sequence[str]) -> list[tuple[str, Score]]:
        """(slug, score) of copies that earlier starts finished here under names that are not among `names`."""
        found: dict[str, tuple[str, Score]] = {}
        for path in sorted((self.path / "copies").glob("*/score.json"), key=lambda path: path.stat().st_mtime_ns):
            score = self.finished(path.parent.name)
            if score is not None and path.parent.name not in slugs and score.row["weights"] not in names:
                found[str(score.row["weights"])] = (path.parent.name, score)
        return list(found.values())

    def write_grid(self, slugs: Mapping[str, str], step: int, settings: EvaluationSettings) -> None:
        """A labelled row a copy: name -> slug."""
        images = {name: grid for name, slug in slugs.items() if (grid := self.grid_images(slug)) is not None}
        if images:
            save_grid(self.grid_path, images, step, settings)

    def results(self) -> dict[str, Any]:
        """results.json, or {} where there is none that can be read."""
        try:
            value = json.loads(self.results_path.read_text())
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def write_results(self, results: Mapping[str, Any]) -> None:
        atomic_write(self.results_path, json.dumps(results, indent=1, allow_nan=False))


def results_of(
    config: Config,
    extractor: Extractor,
    settings: Mapping[str, Any],
    step: int,
    scores: Sequence[Score],
    world_size: int,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """results.json but for the sweep. `notes` are warnings about the reference."""
    raw = next((score for score in scores if score.row["weights"] == "raw"), None)
    found = rows(scores, raw)
    return {
        "schema": SCHEMA,
        "step": step,
        "metric": metric_of(extractor),
        **{key: value for key, value in settings.items() if key != "reference"},
        "reference": _reference_text(config, settings["reference"]),
        "reference_origin": settings["reference"],
        "timestep_spacing": "trailing",
        "variance": config.diffusion.variance,
        "settings_digest": digest(settings),
        "rows": found,
        "pairs": pairs([score for row in found for score in scores if score.row["weights"] == row["weights"]]),
        "warnings": list(dict.fromkeys([*notes, *(warning for row in found for warning in row["warnings"])])),
        "versions": _versions(),
        "world_size": world_size,
    }


def _reference_text(config: Config, origin: Mapping[str, Any]) -> str:
    """For a person: which images, and how many."""
    if "file" in origin:
        return f"{origin['file']} ({origin['layout']}, sha256 {str(origin['sha256'])[:12]})"
    name = config.data.name or (config.data.path.name if config.data.path else config.data.source)
    return f"{origin.get('split', config.evaluation.reference)} of {name}, {origin.get('size', '?')} images"


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("ddpm_ema", "torch", "diffusers", "torch-fidelity", "numpy", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found


def table(results: Mapping[str, Any], entries: Sequence[Mapping[str, Any]] | None = None) -> str:
    """Rows from the best to the worst, for a terminal. The distance is the bias-corrected one, ± one standard error."""
    head = ["weights", metric_label(results), "plain", "vs raw", "", "KID", "precision", "recall", "seconds"]
    body = [_cells(row) for row in (results["rows"] if entries is None else entries)]
    shown = [i for i in range(len(head)) if any(cells[i] for cells in body)]
    lines = [[line[i] for i in shown] for line in [head, *body]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(shown))]
    text = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in text)


def _cells(row: Mapping[str, Any]) -> list[str]:
    verdict = ""
    if "significant" in row:
        verdict = ("better" if row["delta_vs_raw"] < 0 else "worse") if row["significant"] else "not significant"
    return [
        str(row["weights"]),
        with_error(row["frechet_distance_unbiased"], row["stderr"]),
        figure(row["frechet_distance"]),
        with_error(row["delta_vs_raw"], row["delta_stderr"], signed=True) if "delta_vs_raw" in row else "",
        verdict,
        figure(row["kid"], 5) if "kid" in row else "",
        f"{row['precision']:.3f}" if "precision" in row else "",
        f"{row['recall']:.3f}" if "recall" in row else "",
        f"{row['seconds']:.1f}",
    ]
