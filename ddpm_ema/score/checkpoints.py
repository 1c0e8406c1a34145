"""Which checkpoints of a run are scored, and whether the settings describe the network that they hold."""

from ddpm_ema.config import Config, Effect, differing, to_dict
from ddpm_ema.errors import UserError
from ddpm_ema.rundir import Checkpoint, RunDir
from ddpm_ema.weight_names import parse, profile_named


def checkpoints(config: Config) -> list[Checkpoint | None]:
    """The checkpoints that `evaluation.steps` asks for; a single None where there is none and no name needs one.

    Raises:
        UserError: a checkpoint is missing or damaged, or of another network than the settings describe.
    """
    rundir, steps = RunDir(config.output_dir), config.evaluation.steps
    everything = rundir.checkpoints()
    if not everything:
        if _needs_no_checkpoint(config):
            return [None]
        raise UserError(
            f"{rundir.path}: no checkpoint to score: train first (ddpm-ema train), or name another run (ddpm-ema score RUN)"
        )
    if steps == "all":
        found = everything
    elif steps == "last":
        found = [newest] if (newest := rundir.newest_usable()) is not None else []
    else:
        found = [rundir.checkpoint(step) for step in steps]
    for checkpoint in found:
        check_settings(config, checkpoint)
    return [*found]


def _needs_no_checkpoint(config: Config) -> bool:
    """Whether every name is a diffusers folder, or reconstructed from snapshots."""
    parts = [part for name in config.evaluation.weights for part in parse(name, config.averages)]
    return bool(parts) and all(part.folder or profile_named(part.name) is not None for part in parts)


def check_settings(config: Config, checkpoint: Checkpoint) -> None:
    """Raises UserError where the settings describe another network than the one that was trained."""
    trained = checkpoint.manifest.get("settings")
    problems = [
        f"{key}: {before!r} was trained, {after!r} is set"
        for key, before, after in differing(trained or {}, to_dict(config), Effect.RUN | Effect.SAMPLES)
    ]
    if problems:
        lines = "\n  ".join(problems)
        raise UserError(f"{checkpoint.path}: the settings are not those of this run:\n  {lines}")
