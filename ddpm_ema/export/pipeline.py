"""`export`: named weights of a run → a diffusers pipeline folder, which appears whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ddpm_ema import config as settings
from ddpm_ema import data, diffusion, model, options, sampling
from ddpm_ema.errors import UserError
from ddpm_ema.export import card
from ddpm_ema.export.scorings import scorings_of
from ddpm_ema.export.usage import Usage
from ddpm_ema.named_weights import NamedWeights, WeightResolver
from ddpm_ema.new_folder import new_folder, refuse_used
from ddpm_ema.own_statistics import with_own_statistics
from ddpm_ema.rundir import Checkpoint, RunDir
from ddpm_ema.weight_names import WeightName, split_step


def export(run: Path | str, name: str, folder: Path | str, step: int | None = None, variant: bool = False) -> Path:
    """Writes the weights `name` of a run as a folder that `DiffusionPipeline.from_pretrained` loads.

    Its scheduler, and the code in its card, sample as the newest scoring of exactly these weights did; where there is none,
    as the run's evaluation settings say.

    Args:
        run: The run directory.
        name: raw, an average, a profile to reconstruct (power_0_075, bias_corrected_0_999), or NAME@STEP.
        folder: The folder to write; it may exist only if it is empty.
        step: Completed optimizer steps; None means those of the newest whole checkpoint.
        variant: Whether the weights are stored as diffusers' variant of that name.

    Returns:
        The folder.

    Raises:
        UserError: The name or step is unknown, a file is damaged, or `folder` already holds something.
    """
    rundir, target = RunDir(run), Path(folder)
    refuse_used(target, "--output")
    checkpoint = rundir.newest_usable()
    config = _config(rundir, checkpoint)
    weights = _find(
        WeightResolver(rundir, checkpoint, config, settle=lambda tensors: _settled(config, tensors)), name, step
    )
    tensors, where = weights.members[0](), f"{rundir.path}: weights {weights.name!r} of step {weights.step}"
    unet = model.fitting(config, tensors, where).eval()
    unet.load_state_dict(dict(tensors))
    scored = scorings_of(rundir, weights.key)
    usage = Usage(config.diffusion, scored[0].evaluation if scored else _affordable(config), unet)
    variant_name = split_step(weights.name)[0] if variant else None
    with new_folder(target, "--output") as partial:
        usage.pipeline().save_pretrained(partial, variant=variant_name)
        readme = partial / "README.md"
        readme.write_text(card.render(config, rundir, weights, usage, variant_name, scored), encoding="utf-8")
        for path in partial.rglob("*.safetensors"):  # safetensors makes them 0600; the card is what the umask allows
            path.chmod(readme.stat().st_mode & 0o777)
    return target


def _settled(config: settings.Config, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An average with its own batch-norm statistics (`own_statistics`)."""
    objective = diffusion.Objective(config.diffusion)
    return with_own_statistics(
        tensors, config, objective, lambda: model.fitting(config, tensors, "averages"), lambda: data.load(config.data)
    )


def _config(run: RunDir, checkpoint: Checkpoint | None) -> settings.Config:
    """The settings the run was trained with: those of its newest checkpoint, else its config.yaml."""
    if checkpoint is not None:
        return settings.validate(checkpoint.manifest["settings"], where=f"{checkpoint.path}/manifest.json")
    if not run.config_path.is_file():
        raise UserError(f"{run.path}: is no run directory: it has neither a checkpoint nor config.yaml")
    return settings.load(run.config_path)


def _find(resolver: WeightResolver, name: str, step: int | None) -> NamedWeights:
    """The weights called `name` (see `export`). Raises UserError that lists the names there are."""
    weights = resolver.named(name if "@" in name else str(WeightName(name, step)))
    if step is not None and weights.step != step:
        raise UserError(f"{name}: --step is {step}; give one step, as NAME@STEP or with --step")
    if len(weights.members) > 1:
        raise UserError(f"{name!r} is an ensemble of several predictions, which no single pipeline folder holds")
    if weights.pipeline is not None:
        raise UserError(f"{name!r} is a pipeline folder already; name weights of the run")
    return weights


def _affordable(config: settings.Config) -> settings.EvaluationSettings:
    """The run's evaluation settings, in no more steps than its sampler has noise levels: the default, 1,000, may be more."""
    evaluation = config.evaluation
    usable = sampling.usable_levels(diffusion.noise_scheduler(config.diffusion).config, evaluation)
    return evaluation.model_copy(update={"num_inference_steps": min(evaluation.num_inference_steps, usable)})


def main(argv: Sequence[str] | None = None) -> Path:
    """The command `ddpm-ema export`: writes the folder and prints how to load it."""
    arguments = options.export().parse_args(argv)
    folder = arguments.output or arguments.run / "export" / arguments.name.replace("@", "-step-")
    path = export(arguments.run, arguments.name, folder, arguments.step, arguments.variant)
    print(f"wrote {path}; load it with diffusers.DiffusionPipeline.from_pretrained({str(path)!r})")
    return path
