"""A named copy → a diffusers pipeline folder with a model card. The folder appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_ema import config as settings
from ddpm_ema import diffusion, model, options, sampling
from ddpm_ema.averaging.profiles import profile_from_dict
from ddpm_ema.errors import UserError
from ddpm_ema.export import card
from ddpm_ema.export.scorings import scorings_of
from ddpm_ema.export.usage import Usage
from ddpm_ema.named_weights import NamedWeights, WeightResolver
from ddpm_ema.rundir import Checkpoint, RunDir


def export(run: Path | str, name: str, folder: Path | str, step: int | None = None, variant: bool = False) -> Path:
    """Writes the weights `name` of a run as a folder that `DiffusionPipeline.from_pretrained` loads; returns the folder.

    Its scheduler, and the code in its card, sample as the newest scoring of exactly these weights did; where there is none,
    as the run's evaluation settings say.

    `name` is raw, an average, a profile to reconstruct (power_0_075, bias_corrected_0_999), or NAME@STEP; `step` defaults to
    the newest checkpoint's. With `variant` the weights are stored as diffusers' variant of that name.
    Raises UserError for an unknown name or step, damaged files, or a folder that already holds something.
    """
    rundir, target = RunDir(run), Path(folder)
    _refuse_used(target)
    config = _config(rundir)
    weights = _find(rundir, config, name, step)
    name, at = weights.name.partition("@")[0], weights.step
    assert at is not None  # weights of a run stand at a step
    profile = profile_from_dict(weights.profile) if weights.profile else None
    unet = _network(config, weights.members[0](), f"{rundir.path}: weights {name!r} of step {at}")
    scored = scorings_of(rundir, weights.key)
    usage = Usage(config.diffusion, scored[0].evaluation if scored else _affordable(config), unet)
    with _appearing(target) as partial:
        usage.pipeline().save_pretrained(partial, variant=name if variant else None)
        text = card.render(config, rundir, name, at, profile, usage, variant, weights.warnings, scored)
        (partial / "README.md").write_text(text, encoding="utf-8")
        for path in partial.rglob("*.safetensors"):  # safetensors makes them 0600; the card is what the umask allows
            path.chmod((partial / "README.md").stat().st_mode & 0o777)
    return target


def _find(run: RunDir, config: settings.Config, name: str, step: int | None) -> NamedWeights:
    """The weights called `name` (see `export`). Raises UserError that lists the names there are."""
    text = name if step is None or "@" in name else f"{name}@{step}"
    weights = WeightResolver(run, _newest_checkpoint(run), config).named(text)
    if step is not None and weights.step != step:
        raise UserError(f"{name}: --step is {step}; give one step, as NAME@STEP or with --step")
    if len(weights.members) > 1:
        raise UserError(f"{name!r} is an ensemble of several predictions, which no single pipeline folder holds")
    if weights.pipeline is not None:
        raise UserError(f"{name!r} is a pipeline folder already; name weights of the run")
    return weights


def _newest_checkpoint(run: RunDir) -> Checkpoint | None:
    """The newest whole checkpoint; None where there is none (snapshots may still be there)."""
    checkpoint, passed_over = run.newest_whole()
    if checkpoint is None and passed_over:
        raise UserError(f"{run.path}: no checkpoint is whole:\n  " + "\n  ".join(passed_over))
    for reason in passed_over:
        print(f"warning: passed over a checkpoint that is not whole: {reason}", file=sys.stderr)
    return checkpoint


def _config(run: RunDir) -> settings.Config:
    """The settings the run was trained with: those of its newest checkpoint, else its config.yaml."""
    for checkpoint in reversed(run.checkpoints()):
        with contextlib.suppress(UserError):
            return settings.validate(checkpoint.manifest["settings"], where=f"{checkpoint.path}/manifest.json")
    if not run.config_path.is_file():
        raise UserError(
            f"{run.path}: holds neither a checkpoint nor config.yaml, so it is no run directory to export from"
        )
    return settings.load(run.config_path)


def _affordable(config: settings.Config) -> settings.EvaluationSettings:
    """The run's evaluation settings, in no more steps than its sampler has noise levels: the default, 1,000, may be more."""
    evaluation = config.evaluation
    usable = sampling.usable_levels(diffusion.noise_scheduler(config.diffusion).config, evaluation)
    return evaluation.model_copy(update={"num_inference_steps": min(evaluation.num_inference_steps, usable)})


def _network(config: settings.Config, tensors: Mapping[str, Tensor], where: str) -> Any:
    """The U-Net with these weights; every tensor must be there and fit."""
    labels = tensors.get("class_embedding.weight")
    unet: Any = model.build(config, num_classes=len(labels) - 1 if labels is not None else None)
    try:
        unet.load_state_dict(dict(tensors))
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise UserError(f"{where} do not fit the network of its settings: " + " ".join(lines)) from None
    return unet.eval()


def _refuse_used(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already holds something; remove it or choose another folder with --output")


@contextlib.contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, synced and renamed to it at the end, deleted if anything goes wrong."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in sorted(partial.rglob("*")):
            _sync(path)
        _sync(partial)
        os.replace(partial, folder)
        _sync(folder.parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            _refuse_used(folder)
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}); choose another folder with --output"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main(argv: Sequence[str] | None = None) -> Path:
    """The command `ddpm-ema export`."""
    arguments = options.export().parse_args(argv)
    folder = arguments.output or arguments.run / "export" / arguments.name.replace("@", "-step-")
    path = export(arguments.run, arguments.name, folder, arguments.step, arguments.variant)
    print(f"wrote {path}; load it with diffusers.DiffusionPipeline.from_pretrained({str(path)!r})")
    return path
