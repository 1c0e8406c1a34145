"""`import_run`: what other programs stored of a training run -> a run directory that every later stage takes as it is.

Every file becomes a snapshot. Where settings express the network, the newest steps become checkpoints, too, so that scoring,
sweeps, report and export work; of any other network averages can be reconstructed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ddpm_ema import config as settings
from ddpm_ema import options
from ddpm_ema.averaging.coefficients import RAW
from ddpm_ema.averaging.naming import check_tensors
from ddpm_ema.averaging.profiles import profile_to_dict
from ddpm_ema.averaging.snapshots import Snapshot, write_snapshot
from ddpm_ema.errors import UserError
from ddpm_ema.importing.network import Tree, check_network, diffusion_settings, read_unet, with_unet
from ddpm_ema.importing.sources import Found, diffusers_checkpoints, series
from ddpm_ema.named_weights import PipelineFolder, parse_target
from ddpm_ema.rundir import RunDir, as_user_error, atomic_write

__all__ = ["import_run", "main"]


def import_run(path: Path, found: Sequence[Found], origin: str, tree: Tree | None, num_checkpoints: int = 1) -> None:
    """Writes the run directory `path`, whole or not at all.

    Args:
        path: the run directory; what is there already is refused.
        found: the weights, of one network, each step and name once.
        origin: where they are from, in words.
        tree: settings of the network, as far as they are known; None where nothing is to be scored.
        num_checkpoints: how many of the newest steps with raw weights become checkpoints.

    Raises UserError for files of different networks, a network that is not the settings', or a full disk.
    """
    with _appearing(path) as partial:
        run = RunDir(partial)
        snapshots = _write_snapshots(run, found)
        raw = [snapshot for snapshot in snapshots if snapshot.profile == RAW]
        described = {"imported": True, "source": origin, "step_variance": _step_variance(raw)}
        atomic_write(run.imported_path, json.dumps(described, indent=1))
        steps = [snapshot.step for snapshot in raw if snapshot.step][-num_checkpoints:] if num_checkpoints else []
        if tree is None:
            return
        check_network(tree, found[-1].read(), found[-1].path)
        averages = {
            f.name: profile_to_dict(f.profile) for f in found if steps and f.step == steps[-1] and f.profile != RAW
        }
        tree = {**tree, "output_dir": str(path), "averages": averages}
        tree["training"] = tree.get("training", {}) | {"steps": max(1, found[-1].step)}
        for step in steps:
            _write_checkpoint(run, step, [f for f in found if f.step == step], origin, tree)
        atomic_write(run.config_path, json.dumps(tree, indent=2))  # JSON is YAML


def _write_snapshots(run: RunDir, found: Sequence[Found]) -> list[Snapshot]:
    written: list[Snapshot] = []
    shapes: dict[str, torch.Size] = {}
    for one in found:
        path = run.snapshot_path(one.step, one.name)
        if path.exists():
            raise UserError(
                f"{one.path}: step {one.step} has weights {one.name!r} already; give each its own --profile"
            )
        tensors = one.read()
        shapes = shapes or {name: tensor.shape for name, tensor in tensors.items()}
        try:
            check_tensors(tensors, shapes, f"{one.path}: not of the same network as {found[0].path}")
        except ValueError as error:
            raise UserError(str(error)) from None
        dtypes = {tensor.dtype for tensor in tensors.values()}
        dtype = torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32
        with as_user_error(path, sum(t.numel() * dtype.itemsize for t in tensors.values()), "Nothing was imported"):
            written.append(write_snapshot(path, tensors, one.step, one.profile, dtype))
    return written


def _step_variance(raw: Sequence[Snapshot]) -> dict[str, Any] | None:
    """|A_k - A_(k-1)|^2 per step between raw files, as (ends, values) of `posthoc_coefficients`; the first also holds before.

    None for fewer than two files, or where nothing moved.
    """
    values = []
    for earlier, later in itertools.pairwise(raw):
        names = list(later.shapes())
        pairs = zip(earlier.tensors(names), later.tensors(names), strict=True)
        moved = sum(float((b.double() - a.double()).square().sum()) for (_, a), (_, b) in pairs)
        values.append(moved / (later.step - earlier.step))
    return {"ends": [snapshot.step for snapshot in raw[1:]], "values": values} if any(values) else None


def _write_checkpoint(run: RunDir, step: int, found: Sequence[Found], origin: str, tree: Tree) -> None:
    files = {"raw.safetensors" if f.name == "raw" else f"averages/{f.name}.safetensors": f for f in found}
    tensors = {file: {name: tensor.float() for name, tensor in f.read().items()} for file, f in files.items()}
    manifest = {
        "imported": True,
        "source": origin,
        "settings": tree,
        "settings_digest": settings.digest(tree),
        "dataset": {} if "source" in tree["data"] else {"name": "unknown"},
        "profiles": {f.name: profile_to_dict(f.profile) for f in found if f.profile != RAW},
        "parameters": sum(tensor.numel() for tensor in tensors["raw.safetensors"].values()),
    }
    run.write_checkpoint(step, tensors, manifest)


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, renamed to it at the end, deleted if anything goes wrong."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--output-dir {path}: already holds something; choose another folder")
    partial = path.absolute().with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"--output-dir {path}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _find(arguments: argparse.Namespace) -> tuple[list[Found], list[str]]:
    source, patterns = arguments.source, arguments.pattern
    if not source.is_dir():
        raise UserError(f"{source}: no folder")
    if not patterns:
        found, notes = diffusers_checkpoints(source)
        if not found:
            raise UserError(
                f"{source}: holds no checkpoint-N/unet of diffusers' train_unconditional.py; for other files give their names, "
                "such as --pattern 'step_{step}.safetensors'"
            )
        return found, notes
    options = [_one_each(arguments, name) for name in ("profile", "prefix", "key")]
    found = [
        one
        for pattern, profile, prefix, key in zip(patterns, *options, strict=True)
        for one in series(
            source, pattern, RAW if profile in (None, "raw") else parse_target(profile, "--profile"), prefix or "", key
        )
    ]
    return sorted(found, key=lambda one: one.step), []


def _one_each(arguments: argparse.Namespace, name: str) -> list[str | None]:
    """An option's value for each --pattern: none, one for all, or as many."""
    given, count = getattr(arguments, name), len(arguments.pattern)
    if len(given) not in (0, 1, count):
        raise UserError(f"--{name}: given {len(given)} times; give it once, or once for each of {count} --pattern")
    return (given or [None]) * count if len(given) < 2 else given


def _settings(arguments: argparse.Namespace, newest: Found, notes: list[str]) -> Tree | None:
    """What is known of the settings; None where they cannot express the network, which a note then explains."""
    tree = settings.to_dict(settings.load(arguments.config)) if arguments.config else {}
    try:
        if not arguments.pattern:
            diffusion = diffusion_settings(arguments.source)
            tree |= {"diffusion": diffusion} if diffusion else {}
            if diffusion is None and not arguments.config:
                notes.append(
                    f"{arguments.source} has no scheduler: scored with the default diffusion settings, or those given"
                )
            tree = with_unet(tree, read_unet(arguments.unet) if arguments.unet else _unet(newest))
        elif arguments.unet:
            tree = with_unet(tree, read_unet(arguments.unet))
        elif not arguments.config:
            notes.append("imported for averaging alone: to score, name the network with --unet or --config")
            return None
    except UserError as error:
        notes.append(
            f"{error}; imported for averaging alone (reconstruct.py); diffusers folders can be scored by their path"
        )
        return None
    if not arguments.config:
        notes.append("the images it was trained on are unknown: name them when scoring (--data.source, --data.path)")
    return tree


def _unet(newest: Found) -> Tree:
    folder = newest.path.with_name("unet")
    return dict(PipelineFolder(folder).config.unet)


def main(argv: Sequence[str] | None = None) -> Path:
    """The command `ddpm-ema import`."""
    arguments = options.importing().parse_args(argv)
    found, notes = _find(arguments)
    tree = _settings(arguments, found[-1], notes)
    import_run(arguments.output_dir, found, str(arguments.source), tree, max(0, arguments.checkpoints))
    names, steps = ", ".join(dict.fromkeys(one.name for one in found)), sorted({one.step for one in found})
    print(f"wrote {arguments.output_dir}: {names} at {len(steps)} steps, {steps[0]:,} to {steps[-1]:,}")
    for note in notes:
        print(f"note: {note}")
    return Path(arguments.output_dir)
