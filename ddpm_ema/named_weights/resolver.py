"""Names → weights: raw, averages, reconstructed ones, earlier steps, diffusers folders, and ensembles of them."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

from safetensors.torch import save
from torch import Tensor

from ddpm_ema import config
from ddpm_ema.averaging.coefficients import RAW, ROUNDOFF, StepVariance
from ddpm_ema.averaging.posthoc import fit
from ddpm_ema.averaging.profiles import Profile, profile_from_dict, profile_to_dict
from ddpm_ema.averaging.snapshots import Snapshot
from ddpm_ema.config import Config
from ddpm_ema.errors import UserError, explained
from ddpm_ema.named_weights.folder import PipelineConfig, PipelineFolder, sha256_of
from ddpm_ema.rundir import Checkpoint, RunDir, buffers_file, read_tensors, weights_file
from ddpm_ema.weight_names import WeightName, name_of_profile, parse, profile_named

Tensors: TypeAlias = "dict[str, Tensor]"


@dataclass(frozen=True)
class NamedWeights:
    """Weights that were found; their tensors are read when `members` are called.

    The key is 64 hex digits that change whenever the weights would: the sha256 of a stored file, else one over what they are made
    from.
    """

    name: str  # in its canonical spelling
    key: str
    step: int | None  # completed optimizer steps they stand at; None for folders and ensembles
    profile: dict[str, Any] | None  # how they were averaged, as plain values; None for raw weights and folders
    members: tuple[Callable[[], Tensors], ...]  # each gives fp32 CPU tensors by name: one, or those of an ensemble
    pipeline: PipelineConfig | None = None  # network and noise schedule they belong to; None: those of the settings
    reconstruction: dict[str, Any] | None = None  # how well the profile was matched, where one was reconstructed
    warnings: tuple[str, ...] = ()  # what to know before trusting them


class WeightResolver:
    """What can be named in one run directory, at one checkpoint: a name without a step is taken from that.

    `own_pipeline` gives network and noise schedule of the settings, to ensembles that mix them with a folder's. `settle` gives an
    average, as it was stored or reconstructed, the batch-norm statistics that belong to it.
    """

    def __init__(
        self,
        run: RunDir,
        checkpoint: Checkpoint | None,
        config: Config | None = None,
        num_classes: int | None = None,
        own_pipeline: Callable[[], PipelineConfig] | None = None,
        settle: Callable[[Tensors], Tensors] = dict,
    ) -> None:
        self.run, self.checkpoint = run, checkpoint
        self.config = config if config is not None else Config()
        self._num_classes, self._own_pipeline, self._settle = num_classes, own_pipeline, settle
        self.averages = {name: profile_to_dict(profile) for name, profile in self.config.averages.items()}
        if checkpoint is not None:
            self.averages |= {name: _profile_in(checkpoint, name) or {} for name in checkpoint.names if name != "raw"}

    def named(self, text: str) -> NamedWeights:
        """The weights that `text` names (see `weight_names`). Raises UserError for what means nothing here."""
        with explained("weights ", ValueError):
            names = parse(text, self.averages)
        parts = [self._part(name) for name in names]
        if len(parts) == 1:
            return parts[0]
        return NamedWeights(
            name="+".join(part.name for part in parts),
            key=_key([part.key for part in parts]),
            step=None,
            profile={"kind": "ensemble", "members": [{"weights": p.name, "profile": p.profile} for p in parts]},
            members=tuple(member for part in parts for member in part.members),
            pipeline=self._common_pipeline(parts),
            warnings=tuple(warning for part in parts for warning in part.warnings),
        )

    def _common_pipeline(self, parts: list[NamedWeights]) -> PipelineConfig | None:
        """What all members are sampled with: their predictions can be averaged only where it is the same."""
        if all(part.pipeline is None for part in parts):
            return None
        if self._own_pipeline is None:
            raise UserError(f"weights {parts[0].name!r}: an ensemble with a diffusers folder can be scored only")
        own = self._own_pipeline()
        common = [part.pipeline or own for part in parts]
        common = [PipelineConfig(found.unet, found.schedule or own.schedule) for found in common]
        for part, found in zip(parts, common, strict=True):
            for what in ("unet", "schedule"):
                here, there = getattr(found, what), getattr(common[0], what)
                if differing := [key for key in here if here[key] != there[key]]:
                    raise UserError(
                        f"weights {part.name!r}: no ensemble with {parts[0].name!r}, whose {what} has another "
                        f"{', '.join(differing)}"
                    )
        return common[0]

    def _part(self, name: WeightName) -> NamedWeights:
        if name.folder:
            return self._folder(name)
        checkpoint = self._checkpoint(name.step)
        if checkpoint is not None and name.name in checkpoint.names:
            return self._stored(name, checkpoint)
        if checkpoint is None and name.step is not None and (found := self._from_snapshot(name, name.step)) is not None:
            return found
        profile = profile_named(name.name)
        # An average's name means that average: where it is not stored, only the same profile may stand for it.
        if profile is not None and self.averages.get(name.name, profile) == profile:
            with explained(f"{name.name!r}: ", ValueError):
                target = profile_from_dict(profile)
            return self.reconstructed(target, name.step)
        if checkpoint is None and name.step is not None:
            self.run.checkpoint(name.step)  # names the steps there are
        if checkpoint is None:
            raise UserError(f"{self.run.path}: holds no checkpoint to take {name.name!r} from; train first")
        raise UserError(
            f"{self.run.path}: no weights {name.name!r} at step {checkpoint.step}; there are "
            f"{', '.join(checkpoint.names)}, and from snapshots any profile by its name (power_0_075, bias_corrected_0_999)"
        )

    def _checkpoint(self, step: int | None) -> Checkpoint | None:
        if step is None:
            return self.checkpoint
        return next((checkpoint for checkpoint in self.run.checkpoints() if checkpoint.step == step), None)

    def _stored(self, name: WeightName, checkpoint: Checkpoint) -> NamedWeights:
        settle = dict if name.name == "raw" else self._settle
        key = checkpoint.manifest["files"][weights_file(name.name)]["sha256"]
        profile, read = _profile_in(checkpoint, name.name), lambda: settle(checkpoint.weights(name.name))
        return NamedWeights(str(name), key, checkpoint.step, profile, (read,))

    def _from_snapshot(self, name: WeightName, step: int) -> NamedWeights | None:
        """The weights as a snapshot, which outlives its step's checkpoint, has them; None where it was rounded or is of others."""
        path, raw = self.run.snapshot_path(step, name.name), name.name == "raw"
        if not path.is_file():
            return None
        [snapshot] = _opened(self.run, [path])
        profile = profile_to_dict(snapshot.profile)
        meant = profile_to_dict(RAW) if raw else self.averages.get(name.name) or profile_named(name.name)
        if snapshot.roundoff() > ROUNDOFF or profile != (meant or profile):
            return None
        settle = dict if raw else self._settle
        key = _key_in_checkpoint(path, path.stat().st_mtime_ns)
        members = (lambda: settle(read_tensors(path) | _buffers_beside(path)),)
        return NamedWeights(str(name), key, step, None if raw else profile, members)

    def reconstructed(self, target: Profile, step: int | None = None) -> NamedWeights:
        """The average with profile `target` as it would stand after `step` steps (None: the checkpoint's, else the last
        snapshot's), from the run's snapshots.

        Raises UserError for a run without snapshots, a step that none was stored at (the nearest are named), or a profile
        whose name an average of another profile has.
        """
        profile, name = profile_to_dict(target), name_of(target)
        if self.averages.get(name, profile) != profile:
            raise UserError(
                f"{name}: averages.{name} is another average, {self.averages[name]}; rename it to reconstruct this one"
            )
        snapshots = snapshots_of(self.run)
        newest = self.checkpoint.step if self.checkpoint else snapshots[-1].step
        at = newest if step is None else step
        told = partial(
            explained, f"{self.run.path}: {name} cannot be reconstructed at step {at}: ", ValueError, OSError
        )
        with told():
            found = fit(snapshots, at, target, step_variance=self._step_variance)
            check = found.checked(self._kept_at(at))

        def read() -> Tensors:
            with told():
                combined = found.combined() | _buffers_beside(found.snapshots[-1].path)
            return self._settle(combined)

        made_from = [[s.step, profile_to_dict(s.profile), sha256_of(s.path)] for s in found.snapshots]
        return NamedWeights(
            name=str(WeightName(name, step)),
            key=_key([found.identity, profile, made_from]),
            step=at,
            profile=profile,
            members=(read,),
            reconstruction=found.summary(check),
            warnings=tuple(found.warnings(check)),
        )

    @cached_property
    def _step_variance(self) -> StepVariance | None:
        """How far each step of the run moved its weights: as measured where it was imported, else by its learning rates."""
        if self.run.imported_path.is_file():
            return _measured(self.run.imported_path)
        return config.load(self.run.config_path).training.step_variance if self.run.config_path.is_file() else None

    def _kept_at(self, step: int) -> list[Snapshot]:
        """Averages and raw weights of a checkpoint at `step`, by which a prediction is checked."""
        checkpoint = self._checkpoint(step)
        if checkpoint is None or checkpoint.step != step:
            return []
        files = [
            Snapshot(step, profile_from_dict(profile), checkpoint.path / weights_file(name))
            for name in checkpoint.names
            if name != "raw" and (profile := _profile_in(checkpoint, name)) is not None
        ]
        return [*files, Snapshot(step, RAW, checkpoint.path / weights_file("raw"))]

    def _folder(self, name: WeightName) -> NamedWeights:
        folder = PipelineFolder(Path(name.name))
        folder.check(self.config, self._num_classes)
        key, warnings = folder.key, []
        if folder.config.schedule is None:
            given = self.config.diffusion
            told = f"{given.schedule}, {given.prediction}, {given.num_train_timesteps} noise levels"
            warnings.append(
                f"The folder has no scheduler_config.json: sampled with the diffusion settings given ({told})."
            )
        read = partial(folder.read, key)
        return NamedWeights(name.name, key, None, None, (read,), folder.config, warnings=tuple(warnings))


def trained_settings(run: RunDir, checkpoint: Checkpoint | None, factory: str | None) -> Config:
    """The settings the run was trained with: those of its newest checkpoint, else its config.yaml.

    Raises UserError for no run directory, or where `factory` does not name the code of its network (`config.require_named`).
    """
    if checkpoint is not None:
        where = f"{checkpoint.path}/manifest.json"
        return config.require_named(config.validate(checkpoint.manifest["settings"], where), factory, where)
    if not run.config_path.is_file():
        raise UserError(f"{run.path}: is no run directory: it has neither a checkpoint nor config.yaml")
    return config.require_named(config.load(run.config_path), factory, run.config_path)


def name_of(profile: Profile) -> str:
    """The name of a reconstructed average, such as power_0_075."""
    return name_of_profile(profile_to_dict(profile))


def snapshots_of(run: RunDir) -> list[Snapshot]:
    """Every snapshot of the run, by step. Raises UserError where there is none."""
    found = _opened(run, [path for paths in run.snapshots().values() for path in paths])
    if not found:
        raise UserError(
            f"{run.path}: holds no snapshots, so no other average can be reconstructed; train with a power_function and "
            "a uniform average and checkpoints.snapshots_every"
        )
    return sorted(found, key=lambda snapshot: snapshot.step)


def _opened(run: RunDir, paths: list[Path]) -> list[Snapshot]:
    with explained(f"{run.path}: a snapshot cannot be read: ", ValueError, OSError):
        return [Snapshot.open(path) for path in paths]


def _measured(path: Path) -> StepVariance | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["step_variance"]
        return None if found is None else (found["ends"], found["values"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: has no valid step_variance ({error}); import the run again") from None


@cache  # a table asks for the key of each of its rows again and again
def _key_in_checkpoint(snapshot: Path, modified: int) -> str:
    """The key that a snapshot's weights had in the checkpoint, so that images and scores from its time are still theirs."""
    return hashlib.sha256(save(read_tensors(snapshot), {})).hexdigest()


def _buffers_beside(snapshot: Path) -> Tensors:
    path = snapshot.parent / buffers_file(snapshot.stem)
    return read_tensors(path) if path.is_file() else {}


def _profile_in(checkpoint: Checkpoint, name: str) -> dict[str, Any] | None:
    profiles = checkpoint.manifest.get("profiles")
    return profiles.get(name) if isinstance(profiles, dict) else None


def _key(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
