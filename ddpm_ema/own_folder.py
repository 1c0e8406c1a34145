"""Settings for a folder of images that were given without any: `ddpm-ema train --data.path FOLDER`."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from ddpm_ema import config
from ddpm_ema.config import Config
from ddpm_ema.data.decode import readable
from ddpm_ema.data.folder_source import open_folder
from ddpm_ema.errors import UserError
from ddpm_ema.messages import logger

LOOKED_AT = 64  # images, spread over the folder
# For a CPU and for a GPU.
LARGEST, COARSEST, BATCH, STEPS = (32, 64), (8, 4), (64, 128), (3000, 100_000)
AVERAGES = {
    "ema_0_999_debiased": {"kind": "bias_corrected", "decay": 0.999},
    "ema_0_9999_debiased": {"kind": "bias_corrected", "decay": 0.9999},
    "power_0_05": {"kind": "power_function", "std": 0.05},
    "power_0_10": {"kind": "power_function", "std": 0.10},
    "uniform": {"kind": "uniform"},
}


def settings(overrides: Mapping[str, list[str]]) -> Config:
    """The settings of the folder `data.path` in a command line's overrides: those of its run directory, else chosen.

    The choice depends on the folder, the overrides and the kind of device alone, so every rank makes the same one. Raises UserError
    for no such folder, no images in it, or a bad override.
    """
    if len(overrides["data.path"]) != 1:
        words = " ".join(overrides["data.path"])
        raise UserError(f"--data.path: takes one folder{f'; quote a name with spaces: {words!r}' if words else ''}")
    folder = Path(*overrides["data.path"])
    output = " ".join(overrides.get("output_dir", [f"runs/{folder.resolve().name}"]))
    if Path(output, "config.yaml").is_file():
        logger.info(f"the settings are those of {output}/config.yaml")
        was = config.load(Path(output, "config.yaml")).data
        if was.path is None or was.path.resolve() != folder.resolve():
            of = was.path or was.name or was.source
            logger.warning(f"{output} is a run of {of}, not of {folder}; for a new run add --output_dir runs/OTHER")
        return config.resolve(output, None, overrides)
    on_gpu = overrides.get("machine.device") != ["cpu"] and torch.cuda.is_available()
    source = open_folder(folder, " ".join(overrides.get("data.split", ["train"])))
    some = (image for _, image in readable(source.read, range(0, len(source), -(-len(source) // LOOKED_AT))))
    tree, seen = choose(some, len(source), source.classes, on_gpu, overrides)
    tree["data"]["path"], tree["output_dir"] = str(folder), output
    chosen = config.load(tree, overrides)
    text = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=120)
    kept = f"{output}/config.yaml will hold these and the defaults"
    logger.info(f"{seen}; settings chosen for them and a {'GPU' if on_gpu else 'CPU'} ({kept}):\n\n{text}")
    return chosen


def choose(
    images: Iterable[Image.Image], count: int, classes: str, on_gpu: bool, given: Mapping[str, list[str]]
) -> tuple[dict[str, Any], str]:
    """Settings for a folder of `count` such images, and what they are in words. The network fits an image size that is `given`."""
    looked = [(min(image.size), _is_grey(image)) for image in images]  # one at a time, because they may be large
    short, grey = [side for side, _ in looked] or [32], all(is_grey for _, is_grey in looked)
    size = _size(short, LARGEST[on_gpu])
    if (asked := "".join(given.get("data.image_size", []))).isdecimal():
        size = int(asked)
    batch = min(BATCH[on_gpu], 2 ** (count.bit_length() - 1))
    tree = {
        "data": {"source": "folder", "image_size": size, "channels": 1 if grey else 3, "horizontal_flip": not grey},
        "model": _network(size, on_gpu),
        "training": {"steps": STEPS[on_gpu], "batch_size": batch, "learning_rate": 2e-4 if on_gpu else 5e-4},
        "averages": AVERAGES,
        "checkpoints": {"every": "5%", "keep_every": "25%", "snapshots_every": "5%"},
        "evaluation": {
            "num_images": 10_000 if on_gpu else 1280,  # ten per dimension of the classifier's features
            "sampler": "dpm_solver++",
            "num_inference_steps": 25,
            "extractors": ["classifier"],
        },
    }
    tree["training"] |= {"warmup_steps": "5%", "log_every": "1%", "sample_every": "25%"}
    sides = f"{min(short)}" if min(short) == max(short) else f"{min(short)} to {max(short)}"
    return tree, f"{count:,} {'grey' if grey else 'colour'} images, shorter side {sides} pixels, {classes}"


def _is_grey(image: Image.Image) -> bool:
    if image.mode in ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F"):
        return True
    pixels = np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.NEAREST)).astype(int)  # [64, 64, 3]
    return bool((pixels.max(axis=2) - pixels.min(axis=2)).max() <= 8)  # JPEG rounds


def _size(short: Sequence[int], largest: int) -> int:
    """The images' own size where all have one that fits, else the largest power of two that enlarges less than half of them."""
    typical = int(statistics.median(short))
    if min(short) == max(short) <= largest and typical % 4 == 0:
        return typical
    return min(largest, max(8, 2 ** (typical.bit_length() - 1)))


def _network(size: int, on_gpu: bool) -> dict[str, Any]:
    """The paper's network for a GPU, a small one for a CPU; halved to the coarsest resolution, attention at 16 pixels or there."""
    sizes = [size]
    while sizes[-1] % 2 == 0 and (sizes[-1] > COARSEST[on_gpu] or len(sizes) == 1):
        sizes.append(sizes[-1] // 2)
    if not on_gpu:
        channels, attention = [32, *[64] * (len(sizes) - 1)], [False] * (len(sizes) - 1) + [True]
        return {"block_out_channels": channels, "layers_per_block": 1, "attention": attention, "norm_num_groups": 8}
    return {"block_out_channels": [128, *[256] * (len(sizes) - 1)], "attention": [one == 16 for one in sizes]}
