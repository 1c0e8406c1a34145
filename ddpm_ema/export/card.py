"""The model card (README.md) of an exported pipeline: what the weights are, how they were made, how good they are, how to use them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ddpm_ema.averaging.profiles import Profile
from ddpm_ema.config import Config, EvaluationSettings
from ddpm_ema.numbers import figure, metric_label, with_error
from ddpm_ema.rundir import RunDir

HEADER = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- ddpm
- diffusers
# license: choose one before you share this
---
"""
# DDPMPipeline runs each of these as it is: set_timesteps, then step(prediction, t, x_t, generator=...).
SCHEDULERS = {"ddim": "DDIMScheduler", "dpm_solver++": "DPMSolverMultistepScheduler"}


def render(
    config: Config,
    run: RunDir,
    name: str,
    step: int,
    profile: Profile | None,
    unet: Any,
    variant: bool,
    warnings: tuple[str, ...],
) -> str:
    """The card as Markdown. `unet` is the diffusers network that is exported."""
    sections = [
        HEADER + f"# {run.path.resolve().name}: {name} at step {step:,}",
        _weights(name, step, profile, warnings),
        "## Training\n\n" + "\n".join(f"- {line}" for line in _training(config, run, step, unet)),
        "## Scores\n\n" + _scores(run, name, step),
        "## Sampling\n\n" + _sampling(config, name, unet, variant),
    ]
    return "\n\n".join(sections) + "\n"


def _weights(name: str, step: int, profile: Profile | None, warnings: tuple[str, ...]) -> str:
    if profile is None:
        what = "These are the raw weights: those the optimizer holds, not averaged."
    else:
        what = f"These weights are an average over training: `{name}`, {profile.describe(step)}."
    notes = "".join(f"\n\n> Warning: {warning}" for warning in warnings)
    return f"A denoising diffusion model (Ho et al. 2020, arXiv 2006.11239). {what}{notes}"


def _training(config: Config, run: RunDir, step: int, unet: Any) -> Iterator[str]:
    training, model, diffusion, data = config.training, config.model, config.diffusion, config.data
    dataset = _dataset(run, step)
    size = f", {dataset['size']:,} images" if "size" in dataset else ""
    crop = f"{data.image_size}×{data.image_size}, {'grey' if data.channels == 1 else 'RGB'}"
    flips = ", mirrored at random" if data.horizontal_flip else ""
    yield f"data: {dataset.get('name') or data.name or data.source}{size}; {crop}{flips}"
    if "fingerprint" in dataset:
        yield f"fingerprint of the data: `{dataset['fingerprint']}`"
    channels = ", ".join(map(str, model.block_out_channels))
    yield f"network: U-Net, {sum(p.numel() for p in unet.parameters()):,} parameters, channels {channels}"
    yield (
        f"objective: {diffusion.prediction} prediction, {diffusion.schedule} schedule of {diffusion.num_train_timesteps} "
        f"noise levels, variance {diffusion.variance}"
        + (f", min-SNR gamma {diffusion.min_snr_gamma:g}" if diffusion.min_snr_gamma else "")
    )
    yield (
        f"{step:,} steps of {training.batch_size} images; {training.optimizer}, learning rate {training.learning_rate:g} "
        f"({training.learning_rate_schedule}), warm-up {training.warmup_steps}, dropout {model.dropout:g}, "
        f"precision {'fp32' if training.mixed_precision == 'no' else training.mixed_precision}, seed {config.seed}"
    )


def _dataset(run: RunDir, step: int) -> Mapping[str, Any]:
    """What the manifest of that step, or of the nearest later one, says of the data."""
    checkpoints = sorted(run.checkpoints(), key=lambda checkpoint: (checkpoint.step < step, checkpoint.step))
    return checkpoints[0].manifest.get("dataset", {}) if checkpoints else {}


def _scores(run: RunDir, name: str, step: int) -> str:
    """A table of every scoring of exactly these weights at exactly this step."""
    lines = []
    for folder in run.score_dirs():
        try:
            results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            rows = [
                row for row in results["rows"] if (row["weights"], results["step"]) in _spellings(name, step, results)
            ]
            lines += [_score(results, row) for row in rows]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a scoring that is not finished
    if not lines:
        return "These weights have not been scored."
    head = "| metric | value | bias removed | images | sampler | reference | minus raw's |\n|---|---|---|---|---|---|---|\n"
    foot = (
        '\n\n± is one standard error. "Bias removed" takes away what a finite number of images adds (jackknife). The difference '
        "is paired: both were sampled from the same noise."
    )
    only_fd = any("FD (" in line for line in lines)
    return head + "\n".join(lines) + foot + (" FD is no FID and not comparable with published FIDs." if only_fd else "")


def _spellings(name: str, step: int, results: Mapping[str, Any]) -> set[tuple[str, int]]:
    """A row speaks of these weights as NAME in a scoring of that step, or as NAME@STEP in any."""
    return {(name, step), (f"{name}@{step}", results["step"])}


def _score(results: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    unbiased = with_error(row.get("frechet_distance_unbiased"), row.get("stderr"))
    delta = (
        with_error(row.get("delta_vs_raw"), row.get("delta_stderr"), signed=True) if row["weights"] != "raw" else "–"
    )
    cells = [
        metric_label(results),
        figure(row["frechet_distance"]),
        unbiased,
        f"{results['num_images']:,}",
        f"{results['sampler']}, {results['num_inference_steps']} evaluations",
        _plain(results["reference"]),
        delta,
    ]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    return str(value)


def _sampling(config: Config, name: str, unet: Any, variant: bool) -> str:
    """Runnable code with the sampler of the scoring settings: one call, or a loop where the call cannot say what is needed."""
    settings, classes = config.evaluation, dict(unet.config)["num_class_embeds"]
    scheduler = SCHEDULERS.get(settings.sampler)
    eta = f", eta={settings.eta:g}" if settings.sampler == "ddim" and settings.eta else ""
    loop = classes is not None or bool(eta)
    imports = ", ".join(["DDPMPipeline", *([scheduler] if scheduler else [])])
    load = f'pipeline = DDPMPipeline.from_pretrained("path/to/this/folder"{f", variant={name!r}" if variant else ""})'
    lines = [*(["import torch"] if loop else []), f"from diffusers import {imports}", "", load]
    if scheduler:
        lines.append(f"pipeline.scheduler = {scheduler}.from_config(pipeline.scheduler.config)")
    lines += _loop(settings, classes, eta) if loop else _call(settings)
    return "```python\n" + "\n".join(lines) + "\n```"


def _call(settings: EvaluationSettings) -> list[str]:
    return [
        f"images = pipeline(batch_size=16, num_inference_steps={settings.num_inference_steps}).images",
        'images[0].save("sample.png")',
    ]


def _loop(settings: EvaluationSettings, num_class_embeds: int | None, eta: str) -> list[str]:
    """The last class embedding means "no label"; guidance is without + scale (with - without) (Ho & Salimans 2022)."""
    labels, predict = [], ["        prediction = unet(x_t, t).sample"]
    if num_class_embeds is not None:
        none = num_class_embeds - 1
        labels = [f"labels = torch.arange(16) % {none}  # {none} itself means: no label"]
        predict = ["        prediction = unet(x_t, t, class_labels=labels).sample"]
        if settings.guidance_scale != 1:
            predict += [
                f"        without = unet(x_t, t, class_labels=torch.full_like(labels, {none})).sample",
                f"        prediction = without.lerp(prediction, {settings.guidance_scale:g})",
            ]
    return [
        "unet, scheduler = pipeline.unet, pipeline.scheduler",
        *labels,
        "x_t = torch.randn(16, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)",
        f"scheduler.set_timesteps({settings.num_inference_steps})",
        "with torch.inference_mode():",
        "    for t in scheduler.timesteps:",
        *predict,
        f"        x_t = scheduler.step(prediction, t, x_t{eta}).prev_sample",
        "images = pipeline.numpy_to_pil((x_t / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())",
        'images[0].save("sample.png")',
    ]
