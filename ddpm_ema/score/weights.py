"""Weights by name: raw, averages, reconstructed ones, earlier steps, diffusers pipeline folders, and ensembles of them.

    raw   ema_0_999   power_0_075   ema_0_999@1500   /models/ddpm-cifar10-32   raw+ema_0_999

Only rank 0 opens files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import diffusers
from torch import Tensor

from ddpm_ema.averaging import profile_to_dict
from ddpm_ema.averaging.profiles import Profile
from ddpm_ema.config import NAME, digest
from ddpm_ema.errors import UserError
from ddpm_ema.reconstruction import check_from, fit_from, target_named, weights_from
from ddpm_ema.rundir import Checkpoint, RunDir, file_sha256

UNET2D: Any = diffusers.UNet2DModel
# Of a U-Net's settings, those that its weights and its computation do not depend on.
INDIFFERENT = ("sample_size", "dropout")
Tensors: TypeAlias = "dict[str, Tensor]"


@dataclass(frozen=True)
class Source:
    """One name and where its weights come from. `key` changes whenever they would."""

    name: str
    key: str
    profile: dict[str, Any] | None
    members: tuple[Callable[[], Tensors], ...]
    reconstruction: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """A folder's name: readable, and its own for each content."""
        return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', self.name).strip('_')[-60:]}-{self.key}"


class Shelf:
    """What can be scored at one checkpoint. `unet_config` is the model's, held against those of pipeline folders."""

    def __init__(self, rundir: RunDir, checkpoint: Checkpoint | None, unet_config: Mapping[str, Any]) -> None:
        self.rundir, self.checkpoint, self.unet_config = rundir, checkpoint, unet_config

    def source(self, name: str) -> Source:
        """Raises UserError for a name that means nothing here."""
        parts = [self._part(part) for part in name.split("+")]
        if len(parts) == 1:
            return parts[0]
        return Source(
            name=name,
            key=digest([part.key for part in parts]),
            profile={
                "kind": "ensemble",
                "members": [{"weights": part.name, "profile": part.profile} for part in parts],
            },
            members=tuple(member for part in parts for member in part.members),
            warnings=tuple(warning for part in parts for warning in part.warnings),
        )

    def _part(self, text: str) -> Source:
        name, _, step = text.partition("@")
        if not NAME.fullmatch(name):
            return self._folder(text)
        target = target_named(name)
        checkpoint = self._checkpoint(int(step) if step else None, needed=target is None)
        if checkpoint is not None and name in checkpoint.names:
            return _stored(text, name, checkpoint)
        if target is not None:
            return self.reconstructed(text, target, int(step) if step else None)
        if Path(name).is_dir():
            return self._folder(text)
        where = checkpoint.path if checkpoint else self.rundir.path
        there = ", ".join(checkpoint.names) if checkpoint else "no checkpoint"
        raise UserError(
            f"evaluation.weights: {where} holds no {name!r}; there: {there}, and power_0_NNN by reconstruction"
        )

    def _checkpoint(self, step: int | None, needed: bool) -> Checkpoint | None:
        """Of one step. Reconstruction does without: snapshots are taken at steps of their own."""
        if step is None:
            return self.checkpoint
        steps = [checkpoint.step for checkpoint in self.rundir.checkpoints()]
        return self.rundir.checkpoint(step) if needed or step in steps else None

    def reconstructed(self, name: str, target: Profile, step: int | None = None) -> Source:
        """`target` at `step` (None: the checkpoint's) from the run's snapshots, whose tensors are read when asked for."""
        at = step if step is not None else self.checkpoint.step if self.checkpoint else 0
        found = fit_from(self.rundir, target, at)
        check, profile = check_from(self.rundir, found), profile_to_dict(target)
        return Source(
            name=name,
            key=digest(
                [found.identity, profile, [_sha256(s.path, s.path.stat().st_mtime_ns) for s in found.snapshots]]
            ),
            profile=profile,
            members=(lambda: weights_from(self.rundir, found),),
            reconstruction=found.summary(check),
            warnings=tuple(found.warnings(check)),
        )

    def _folder(self, text: str) -> Source:
        """A diffusers pipeline folder, or the folder of a U-Net alone."""
        folder = Path(text)
        unet = folder / "unet" if (folder / "unet").is_dir() else folder
        files = sorted(unet.glob("*.safetensors"))
        if not (unet / "config.json").is_file() or not files:
            raise UserError(
                f"evaluation.weights: {text!r}: no diffusers folder with config.json and .safetensors weights "
                "(a pickle, .bin, is not opened: convert it first)"
            )
        config = UNET2D.load_config(unet)
        wanted = dict(UNET2D.from_config(dict(config)).config)
        differing = sorted(
            f"{key}: {wanted.get(key)!r} there, {value!r} here"
            for key, value in self.unet_config.items()
            if not key.startswith("_") and key not in INDIFFERENT and _plain(wanted.get(key)) != _plain(value)
        )
        if differing:
            raise UserError(f"evaluation.weights: {text!r}: its U-Net is not this run's: {'; '.join(differing)}")
        return Source(
            name=text,
            key=digest([_sha256(path, path.stat().st_mtime_ns) for path in files]),
            profile=None,
            members=(lambda: {k: v.float() for k, v in UNET2D.from_pretrained(unet).state_dict().items()},),
        )


def _stored(text: str, name: str, checkpoint: Checkpoint) -> Source:
    file = "raw.safetensors" if name == "raw" else f"averages/{name}.safetensors"
    return Source(
        name=text,
        key=digest([checkpoint.step, checkpoint.manifest["files"][file]["sha256"]]),
        profile=checkpoint.manifest.get("profiles", {}).get(name),
        members=(lambda: checkpoint.weights(name),),
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@lru_cache(maxsize=4096)
def _sha256(path: Path, modified: int) -> str:
    """Of a file's content; a sweep asks for the same snapshots again and again."""
    return file_sha256(path)
