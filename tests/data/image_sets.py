"""Sets of images for tests, and how they are opened."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ddpm_ema import data
from ddpm_ema.config import DataSettings

STORAGES = ["memory", "mmap"]


def settings(**fields: Any) -> DataSettings:
    return DataSettings.model_validate(fields)


def load(root: Path, storage: str = "memory", **fields: Any) -> data.ImageDataset:
    fields = {"image_size": 4, "channels": 3, "cache_dir": root.parent / "cache", **fields}
    return data.load(settings(source="folder", path=root, storage=storage, **fields))


def everything(dataset: data.ImageDataset) -> torch.Tensor:
    return dataset.batch(torch.arange(len(dataset)))


PREAMBLE = """
import os, sys, torch, signal, resource, time
from pathlib import Path
from ddpm_ema import data
from ddpm_ema.config import DataSettings
from ddpm_ema.errors import UserError
root = Path(sys.argv[1])
def load(storage, **fields):
    fields = {"image_size": 4, "channels": 3, "cache_dir": root.parent / "cache", **fields}
    return data.load(DataSettings(source="folder", path=root, storage=storage, **fields))
"""


def start(root: Path, script: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + script, str(root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
