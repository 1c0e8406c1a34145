"""The model card (README.md) of an exported pipeline: what the weights are, how they were made, how good they are, how to use them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ddpm_ema.averaging.profiles import profile_from_dict
from ddpm_ema.config import Config, EvaluationSettings
from ddpm_ema.export.scorings import Scored
from ddpm_ema.export.usage import Usage
from ddpm_ema.named_weights import NamedWeights
from ddpm_ema.numbers import decimals, figure, listed, metric_label, sampler_label, verdict_of, with_error
from ddpm_ema.rundir import RunDir
from ddpm_ema.weight_names import split_step

HEADER = """---
library_name: {library}
pipeline_tag: unconditional-image-generation
tags:
- ddpm
# license: choose one before you share this
---
"""


def render(
    config: Config, run: RunDir, weights: NamedWeights, usage: Usage, variant: str | None, scored: Sequence[Scored]
) -> str:
    """The card as Markdown. `variant`: the name that diffusers' variant has; `scored`: of exactly these weights, the newest first."""
    name, step = split_step(weights.name)[0], weights.step
    assert step is not None  # only folders and ensembles have none
    if weights.profile is None:
        what = "These are the raw weights: those of the optimizer, not averaged."
    else:
        what = f"These weights are an average over training: `{name}`, {profile_from_dict(weights.profile).describe(step)}."
    notes = "".join(f"\n\n> Warning: {warning}" for warning in weights.warnings)
    sections = [
        HEADER.format(library="diffusers" if usage.factory is None else "pytorch")
        + f"# {_literal(run.path.resolve().name)}: {name} at step {step:,}",
        f"A denoising diffusion model (Ho et al. 2020, arXiv 2006.11239). {what}{notes}",
        "## Training\n\n" + "\n".join(f"- {line}" for line in _training(config, run, step, usage.network)),
        "## Scores\n\n" + _scores(scored),
        "## Sampling\n\n" + _sampling(config, usage, scored),
        f"```python\n{usage.code(variant)}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _training(config: Config, run: RunDir, step: int, network: Any) -> Iterator[str]:
    training, model, diffusion, data = config.training, config.model, config.diffusion, config.data
    dataset = _dataset(run, step)
    size = f", {dataset['size']:,} images" if "size" in dataset else ""
    shape = f"{data.image_size}×{data.image_size}, {'grey' if data.channels == 1 else 'RGB'}"
    flips = ", mirrored at random" if data.horizontal_flip else ""
    yield f"data: {_literal(dataset.get('name') or data.name or data.source)}{size}; {shape}{flips}"
    if "fingerprint" in dataset:
        yield f"fingerprint of the data: {_literal(dataset['fingerprint'])}"
    kind, channels = "U-Net", f", channels {', '.join(map(str, model.block_out_channels))}"
    if model.factory is not None:
        kind, channels = _literal(model.factory), ""
    yield f"network: {kind}, {sum(p.numel() for p in network.parameters()):,} parameters{channels}"
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


def _literal(text: Any) -> str:
    """Text of somebody else's as one line of code: nothing in it is Markdown or HTML."""
    line = "".join(character if character.isprintable() else " " for character in str(text)).replace("`", "'")
    return f"`{' '.join(line.split())}`"


def _scores(scored: Sequence[Scored]) -> str:
    """A table of every scoring of exactly these weights."""
    if not scored:
        return "These weights have not been scored."
    lines = dict.fromkeys(_score(one) for one in scored)
    head = "| metric | value | bias removed | images | sampler | reference | difference from raw |\n|---|---|---|---|---|---|---|\n"
    foot = (
        '\n\n± is one standard error. "Bias removed" subtracts what a finite number of images adds (jackknife). The difference '
        "is paired (both were sampled from the same noise). Verdict and interval are those of all averages of its table together, "
        "at a family-wise error rate of 5%."
    )
    only_fd = any(one.results.get("metric") != "fid" for one in scored)
    return (
        head + "\n".join(lines) + foot + (" FD is not FID: do not compare it with published FIDs." if only_fd else "")
    )


def _score(scored: Scored) -> str:
    results, row = scored.results, scored.row
    cells = [
        metric_label(results),
        figure(row["frechet_distance"], decimals(row.get("stderr"))),
        with_error(row.get("frechet_distance_unbiased"), row.get("stderr")),
        f"{row['num_images']:,}",
        _sampled(scored.evaluation),
        _literal(results["reference"]),
        _difference(row),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _sampled(settings: EvaluationSettings) -> str:
    return sampler_label(settings.model_dump()) + (", x_0 clipped" if settings.clip_sample else "")


def _difference(row: Mapping[str, Any]) -> str:
    """From raw, with its verdict and interval; raw has none, and neither has a row over other images."""
    if "significant" not in row:
        return figure(None)
    delta, error = row["delta_vs_raw"], row["delta_stderr"]
    low, high = (figure(bound, decimals(error), signed=True) for bound in row["interval"])
    return f"{with_error(delta, error, signed=True)} ({low} to {high}), {verdict_of(delta, row['significant'])}"


def _sampling(config: Config, usage: Usage, scored: Sequence[Scored]) -> str:
    """What the code below does, and how it differs from the scoring."""
    used, precision = _sampled(usage.settings), usage.settings.mixed_precision
    text = [f"The folder's scheduler and this code follow the run's evaluation settings ({used}): not scored."]
    if scored:
        text = [
            f"The folder's scheduler and this code sample as the newest scoring did, the first of the table ({used}).",
            "From the same noise they make the same images, up to rounding in batches of another size.",
        ]
    if scored and precision != "no":
        text.append(f"The scoring ran the network in {precision}, this code runs it in fp32.")
    if usage.beyond:
        text.append(f"The pipeline's own call {listed(usage.beyond)}, so the code writes out the sampling loop.")
    if config.model.class_conditional:
        text.append("The scoring draws each label as often as it occurs in the data.")
    return " ".join(text)
