"""A diffusers U-Net and its noise schedule as our settings, as far as they can express it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ddpm_ema import config as settings
from ddpm_ema import model
from ddpm_ema.diffusion import SCHEDULES, VARIANCES, noise_scheduler
from ddpm_ema.errors import UserError, explained
from ddpm_ema.named_weights import build_unet, schedule_of, unet_config_of
from ddpm_ema.named_weights.folder import SCHEDULER, PipelineFolder

Tree = dict[str, Any]


def read_unet(file: Path) -> Tree:
    """The arguments of the U-Net that a config.json describes. Raises UserError for another network."""
    with explained(f"{file}: describes no UNet2DModel (", OSError, ValueError, TypeError, AttributeError, after=")"):
        given = json.loads(file.read_text(encoding="utf-8"))
        if given.get("_class_name") != "UNet2DModel":
            raise UserError(f"{file}: is of a {given.get('_class_name')!s:.80}; only a UNet2DModel can be scored")
        with torch.device("meta"):
            return unet_config_of(build_unet(given))


def with_unet(tree: Tree, unet: Mapping[str, Any]) -> Tree:
    """The settings `tree`, with the sections data and model of this U-Net.

    Raises UserError that names the fields which settings cannot express.
    """
    size = unet["sample_size"]
    square = isinstance(size, list) and len(set(size)) == 1
    data = {"image_size": size[0] if square else size, "channels": unet["in_channels"]}
    same = ("block_out_channels", "layers_per_block", "attention_head_dim", "norm_num_groups")
    network = {name: unet[name] for name in same} | {
        "attention": [kind == "AttnDownBlock2D" for kind in unet["down_block_types"]],
        "layout": "ddpm" if unet["freq_shift"] == 1 else "diffusers",
        "initialization": "pytorch",
    }
    tree = {**tree, "data": tree.get("data", {}) | data, "model": tree.get("model", {}) | network}
    config = settings.validate(tree, where="settings of this U-Net")
    built = unet_config_of(model.build(config))
    built["sample_size"] = size if square else built["sample_size"]
    if wrong := [f"{name} is {unet[name]!r}, here {built[name]!r}" for name in built if built[name] != unet[name]]:
        raise UserError(f"no settings express this U-Net: {'; '.join(wrong)}")
    return tree


def diffusion_settings(source: Path) -> Tree | None:
    """The section diffusion of SOURCE/scheduler; None where there is none. Raises UserError as `with_unet`."""
    schedule = PipelineFolder(source).schedule()
    if schedule is None:
        return None
    folder = source / "scheduler"
    file = folder / SCHEDULER
    given = json.loads((file if file.is_file() else source / SCHEDULER).read_text())
    schedules = {theirs: ours for ours, theirs in SCHEDULES.items()}
    variances = {theirs: ours for ours, theirs in VARIANCES.items()}
    tree: Tree = {
        "num_train_timesteps": schedule["num_train_timesteps"],
        "schedule": schedules.get(given.get("beta_schedule", "linear"), "linear"),
        **{name: given[name] for name in ("beta_start", "beta_end") if name in given},
        "prediction": schedule["prediction_type"],
        "variance": variances.get(schedule["variance_type"], "fixed_small"),
    }
    built = schedule_of(noise_scheduler(settings.validate({"diffusion": tree}, where=str(folder)).diffusion))
    if wrong := [name for name in built if built[name] != schedule[name]]:
        raise UserError(f"{folder}: the settings cannot express its {', '.join(wrong)}")
    return tree
