"""`export`: named weights of a run → a diffusers pipeline folder, which appears whole or not at all."""

from collections.abc import Sequence
from pathlib import Path

from ddpm_ema import diffusion, options, sampling
from ddpm_ema.config import Config, EvaluationSettings
from ddpm_ema.errors import UserError
from ddpm_ema.export import card
from ddpm_ema.export.usage import Usage
from ddpm_ema.from_run import load
from ddpm_ema.rundir import RunDir, new_folder, refuse_used
from ddpm_ema.weight_names import split_step


def export(
    run: Path | str,
    name: str,
    folder: Path | str,
    step: int | None = None,
    variant: bool = False,
    factory: str | None = None,
) -> Path:
    """Writes the weights `name` of a run as a folder that `DiffusionPipeline.from_pretrained` loads.

    Its scheduler, and the code in its card, sample as the newest scoring of exactly these weights did; where there is none,
    as the run's evaluation settings say. No pipeline fits a network of `model.factory`: its folder has the weights as
    model.safetensors, the scheduler, and the card with the code.

    Args:
        run, name, step, factory: As of `ddpm_ema.load`.
        folder: The folder to write, which is returned; it may exist only if it is empty.
        variant: Whether the weights are stored as diffusers' variant of that name.

    Raises:
        UserError: The name or step is unknown, a file is damaged, or `folder` already holds something.
    """
    rundir, target = RunDir(run), Path(folder)
    refuse_used(target, "--output")
    loaded = load(run, name, step=step, factory=factory)
    config, weights = loaded.config, loaded.weights
    if len(weights.members) > 1:
        raise UserError(f"{name!r} is an ensemble of several predictions, which no single pipeline folder holds")
    if weights.pipeline is not None:
        raise UserError(f"{name!r} is a pipeline folder already; name weights of the run")
    scored = card.scorings_of(rundir, weights.key)
    usage = Usage(config, scored[0].evaluation if scored else _affordable(config), loaded.network)
    variant_name = split_step(weights.name)[0] if variant else None
    with new_folder(target, "--output") as partial:
        usage.save(partial, variant_name)
        readme = partial / "README.md"
        readme.write_text(card.render(config, rundir, weights, usage, variant_name, scored), encoding="utf-8")
        for path in partial.rglob("*.safetensors"):  # safetensors makes them 0600; the card is what the umask allows
            path.chmod(readme.stat().st_mode & 0o777)
    return target


def _affordable(config: Config) -> EvaluationSettings:
    """The run's evaluation settings, in no more steps than its sampler has noise levels: the default, 1,000, may be more."""
    evaluation = config.evaluation
    usable = sampling.usable_levels(diffusion.noise_scheduler(config.diffusion).config, evaluation)
    return evaluation.model_copy(update={"num_inference_steps": min(evaluation.num_inference_steps, usable)})


def main(argv: Sequence[str] | None = None) -> Path:
    """The command `ddpm-ema export`: writes the folder and prints how to load it."""
    arguments = options.export().parse_args(argv)
    folder = arguments.output or arguments.run / "export" / arguments.name.replace("@", "-step-")
    path = export(arguments.run, arguments.name, folder, arguments.step, arguments.variant, arguments.factory)
    how = f"load it with diffusers.DiffusionPipeline.from_pretrained({str(path)!r})"
    print(f"wrote {path}; {how if arguments.factory is None else 'the code in its README.md loads it'}")
    return path
