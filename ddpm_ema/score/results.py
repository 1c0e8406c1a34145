"""The content of results.json, and the table that a person sees."""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from ddpm_ema import numbers
from ddpm_ema.config import Config, Effect, chosen, digest, to_dict
from ddpm_ema.features import Extractor
from ddpm_ema.numbers import aligned, decimals, figure, metric_label, says_nothing, verdict_of, with_error
from ddpm_ema.sampling import PROTOCOL
from ddpm_ema.score.real_images import RealImages
from ddpm_ema.score.reference import reading_of
from ddpm_ema.score.rows import Score, compare, ranked

SCHEMA = 3


def sampling_settings(config: Config, labels: Tensor | None = None) -> dict[str, Any]:
    """The settings that change the images sampled from given weights, those marked SAMPLES; an inert one counts as None.

    Their digest names the folder of the images. `labels`: classes that samples are drawn from, int64 `[size]`.
    """
    settings = {"protocol": PROTOCOL, **_marked(config, Effect.SAMPLES)}
    if settings["sampler"] != "ddim":
        settings["eta"] = None
    if not config.model.class_conditional:
        settings["guidance_scale"] = None
    return settings | {
        "labels_sha256": None if labels is None else hashlib.sha256(labels.numpy().tobytes()).hexdigest()
    }


def _marked(config: Config, mark: Effect) -> dict[str, Any]:
    """The settings with this mark: those of `evaluation` by name, the others by section."""
    settings: dict[str, Any] = {}
    for key, value in chosen(to_dict(config), lambda found: mark in found).items():
        section, _, name = key.partition(".")
        (settings if section == "evaluation" else settings.setdefault(section, {}))[name] = value
    return settings


def settings_of(
    config: Config, extractor: Extractor, origin: Mapping[str, Any], labels: Tensor | None = None
) -> dict[str, Any]:
    """The settings that change the scores: those of the samples, and those marked SCORES. Their digest names a table's folder.

    `origin`: what the samples are compared with, as in results.json.
    """
    return {
        **sampling_settings(config, labels),
        **_marked(config, Effect.SCORES),
        **extractor.identity,
        "reference": {key: value for key, value in origin.items() if key != "versions"},
    }


def metric_of(extractor: Extractor) -> str:
    """`fid` is a name for Inception at its published weights alone."""
    return "fid" if extractor.is_published_inception else "fd"


def results_of(real: RealImages, settings: Mapping[str, Any], step: int, scores: Sequence[Score]) -> dict[str, Any]:
    """results.json without the sweep and the versions. `settings` are those of `settings_of`."""
    config, extractor, reference = real.config, real.extractor, real.reference
    rows, may_be_best = compare(scores)
    warnings = [warning for row in rows for warning in row["warnings"]]
    if text := numbers.precision_note(reference.precision_of_noise):
        warnings.insert(0, text)
    return {
        "schema": SCHEMA,
        "step": step,
        "metric": metric_of(extractor),
        **{key: value for key, value in settings.items() if key != "reference"},
        "extractor": extractor.label,
        "reference": _reference_text(config, settings["reference"]),
        "reference_origin": settings["reference"],
        "reading": reading_of(config),
        "reference_saturated": reference.saturated,
        "precision_of_noise": reference.precision_of_noise,
        "timestep_spacing": "trailing",
        "variance": config.diffusion.variance,
        "settings_digest": digest(settings),
        "evaluation": to_dict(config)["evaluation"],
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": ranked(rows),
        "may_be_best": may_be_best,
        "warnings": [*reference.warnings, *dict.fromkeys(warnings)],
    }


def _reference_text(config: Config, origin: Mapping[str, Any]) -> str:
    """For a person: which images, and how many."""
    if "file" in origin:
        return f"{origin['file']} ({origin['layout']}, sha256 {str(origin['sha256'])[:12]})"
    name = config.data.name or (config.data.path.name if config.data.path else config.data.source)
    return f"{origin.get('split', config.evaluation.reference)} of {name}, {origin.get('size', '?')} images"


def heading(results: Mapping[str, Any]) -> str:
    """What the table is of."""
    images = f"{results['num_images']:,} images per row"
    return f"step {results['step']}, {numbers.sampler_label(results)}, {images}, {numbers.reading(results)}"


def table(results: Mapping[str, Any]) -> str:
    """All that was scored, from the best to the worst, for a terminal. The distance is the bias-corrected one ± its error."""
    head = ["weights", "images", metric_label(results), "plain", "vs raw", ""]
    head += ["KID", "precision", "recall", "near train", "seconds"]
    hidden, usual = says_nothing(results.get("precision_of_noise")), results["num_images"]
    rows = {row["weights"]: row for row in (*results.get("sweep", ()), *results["rows"])}  # a name has one line
    body = [_cells(row, usual, hidden) for row in ranked(rows.values())]
    shown = [i for i in range(len(head)) if any(cells[i] for cells in body)]
    num_rows = len(body)
    if floor := results.get("floor"):
        real = [f"real images ({floor['split']})", "", with_error(floor["distance"], floor["stderr"])]
        body.append([*real, *[""] * (len(head) - len(real))])
    text = aligned([[line[i] for i in shown] for line in [head, *body]])
    if num_rows > 1:
        text.append(f"may be the best of these: {', '.join(results['may_be_best'])}")
    return "\n".join(text)


def _cells(row: Mapping[str, Any], usual_images: int, without_precision: bool) -> list[str]:
    return [
        str(row["weights"]),
        f"{row['num_images']:,}" if row["num_images"] != usual_images else "",
        with_error(row["frechet_distance_unbiased"], row["stderr"]),
        figure(row["frechet_distance"], decimals(row["stderr"])),
        with_error(row["delta_vs_raw"], row["delta_stderr"], signed=True) if "delta_vs_raw" in row else "",
        verdict_of(row["delta_vs_raw"], row["significant"]) if "significant" in row else "",
        with_error(row["kid"], row["kid_stderr"]) if "kid" in row else "",
        with_error(row["precision"], row["precision_stderr"]) if "precision" in row and not without_precision else "",
        with_error(row["recall"], row["recall_stderr"]) if "recall" in row else "",
        f"{row['nearer_to_training']:.2f}" if "nearer_to_training" in row else "",
        f"{row['seconds']:.1f}",
    ]
