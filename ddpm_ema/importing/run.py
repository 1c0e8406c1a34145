"""`import_run`: weights that other programs stored → a run directory.

Every file becomes a snapshot. Where settings can express the network, the newest steps also become checkpoints, so that scoring,
sweeps, report and export work. For any other network averages can be reconstructed.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ddpm_ema import config as settings
from ddpm_ema import model, options
from ddpm_ema.averaging.coefficients import RAW
from ddpm_ema.averaging.naming import check_tensors
from ddpm_ema.averaging.profiles import profile_to_dict
from ddpm_ema.averaging.snapshots import Snapshot, write_snapshot
from ddpm_ema.errors import UserError, explained
from ddpm_ema.importing.network import Tree, diffusion_settings, read_unet, with_unet
from ddpm_ema.importing.sources import Found, diffusers_checkpoints, series
from ddpm_ema.named_weights import PipelineFolder, parse_target
from ddpm_ema.rundir import RunDir, as_user_error, atomic_write, new_folder, weights_file


def import_run(path: Path, found: Sequence[Found], origin: str, tree: Tree | None, num_checkpoints: int = 1) -> None:
    """Writes the run directory `path`, whole or not at all.

    Args:
        path: The run directory, which may exist only if it is empty.
        found: The weights, of one network, by step; each step and name once. Of several networks they are a UserError.
        origin: Where they are from, in words.
        tree: Settings of the network, as far as they are known; None where nothing is to be scored.
        num_checkpoints: How many of the newest steps with raw weights become checkpoints.
    """
    with new_folder(path, "--output-dir") as partial:
        run = RunDir(partial)
        raw = [snapshot for snapshot in _write_snapshots(run, found) if snapshot.profile == RAW]
        described = {"imported": True, "source": origin, "step_variance": _step_variance(raw)}
        atomic_write(run.imported_path, json.dumps(described, indent=1))
        steps = [snapshot.step for snapshot in raw if snapshot.step][-num_checkpoints:] if num_checkpoints else []
        if tree is None:
            return
        model.fitting(settings.validate(tree), found[-1].read(), str(found[-1].path))
        last = [f for f in found if steps and f.step == steps[-1]]
        tree = {**tree, "output_dir": str(path), "averages": _profiles(last)}
        tree["training"] = tree.get("training", {}) | {"steps": max(1, found[-1].step)}
        for step in steps:
            _write_checkpoint(run, step, [f for f in found if f.step == step], origin, tree)
        atomic_write(run.config_path, json.dumps(tree, indent=2))  # JSON is YAML


def _profiles(found: Sequence[Found]) -> Tree:
    return {f.name: profile_to_dict(f.profile) for f in found if f.profile != RAW}


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
        if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise UserError(f"{one.path}: {bad[0]!r} has values that are not finite; leave this file out")
        shapes = shapes or {name: tensor.shape for name, tensor in tensors.items()}
        dtypes = {tensor.dtype for tensor in tensors.values()}
        dtype = torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32
        needed = sum(t.numel() * dtype.itemsize for t in tensors.values())
        with explained(f"{one.path}: ", ValueError, RuntimeError), as_user_error(path, needed, "Nothing was imported"):
            check_tensors(tensors, shapes, f"not of the same network as {found[0].path}")
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
    files = {weights_file(f.name): f for f in found}
    tensors = {file: {name: tensor.float() for name, tensor in f.read().items()} for file, f in files.items()}
    manifest = {
        "imported": True,
        "source": origin,
        "settings": tree,
        "settings_digest": settings.digest(tree),
        "dataset": {} if "source" in tree["data"] else {"name": "unknown"},
        "profiles": _profiles(found),
        "parameters": sum(tensor.numel() for tensor in tensors[weights_file("raw")].values()),
    }
    run.write_checkpoint(step, tensors, manifest)


def _find(arguments: argparse.Namespace) -> tuple[list[Found], list[str]]:
    """The weights that the arguments describe, by step, and notes for the user."""
    source, patterns = arguments.source, arguments.pattern
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    if not patterns:
        found, notes = diffusers_checkpoints(source)
        if not found:
            hint = "name other files, such as --pattern 'step_{step}.safetensors'"
            raise UserError(f"{source}: holds no checkpoint-N/unet of diffusers' train_unconditional.py; {hint}")
        return found, notes
    found = []
    options = [_one_each(arguments, name) for name in ("profile", "prefix", "key")]
    for pattern, rule, prefix, key in zip(patterns, *options, strict=True):
        profile = RAW if rule in (None, "raw") else parse_target(rule, "--profile")
        found += series(source, pattern, profile, prefix or "", key)
    return sorted(found, key=lambda one: one.step), []


def _one_each(arguments: argparse.Namespace, name: str) -> list[Any]:
    """An option's value for each --pattern: none, one for all, or as many."""
    given, count = getattr(arguments, name), len(arguments.pattern)
    if len(given) not in (0, 1, count):
        raise UserError(f"--{name}: given {len(given)} times; give it once, or once for each of {count} --pattern")
    return (given or [None]) * count if len(given) < 2 else given


def _settings(arguments: argparse.Namespace, newest: Found, notes: list[str]) -> Tree | None:
    """What is known of the settings; None where they cannot express the network, which a note then explains."""
    tree = settings.to_dict(settings.load(arguments.config)) if arguments.config else {}
    try:
        unet = read_unet(arguments.unet) if arguments.unet else None
        if not arguments.pattern:
            diffusion = diffusion_settings(arguments.source)
            tree |= {"diffusion": diffusion} if diffusion else {}
            if diffusion is None and not arguments.config:
                notes.append(f"{arguments.source} has no scheduler: scored with the default diffusion settings")
            unet = unet or dict(PipelineFolder(newest.path.with_name("unet")).config.unet)
        if unet is None and not arguments.config:
            notes.append("imported for averaging only: to score, name the network with --unet or --config")
            return None
        tree = with_unet(tree, unet) if unet else tree
    except UserError as error:
        notes.append(f"{error}; imported for averaging only; diffusers folders can be scored by their path")
        return None
    if not arguments.config:
        notes.append("the images it was trained on are unknown: name them when scoring (--data.source, --data.path)")
    return tree


def main(argv: Sequence[str] | None = None) -> Path:
    """The command `ddpm-ema import`: writes the run directory and prints what it holds."""
    arguments = options.importing().parse_args(argv)
    found, notes = _find(arguments)
    tree = _settings(arguments, found[-1], notes)
    import_run(arguments.output_dir, found, str(arguments.source), tree, max(0, arguments.checkpoints))
    names, steps = ", ".join(dict.fromkeys(one.name for one in found)), sorted({one.step for one in found})
    print(f"wrote {arguments.output_dir}: {names} at {len(steps)} steps, {steps[0]:,} to {steps[-1]:,}")
    for note in notes:
        print(f"note: {note}")
    return Path(arguments.output_dir)
