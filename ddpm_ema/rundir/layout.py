"""Names of the files and folders of a run directory: the only thing that passes between stages.

    checkpoints/step-00003000/   manifest.json (written last), raw.safetensors, optimizer.safetensors, averages/<name>.safetensors
    snapshots/step-00001500/     <name>.safetensors, for post-hoc reconstruction
    either                       buffers/<name>.safetensors, where the network has buffers
    samples/  scores/  metrics.jsonl  config.yaml  report.html  imported.json (of a run that was trained elsewhere)

Order comes from step numbers, never from clocks. This module loads no other, so that every stage can use it.
"""

import re
from pathlib import Path

STEP_FOLDER = re.compile(r"step-(\d{8,})")


def step_folder(step: int) -> str:
    """3000 -> 'step-00003000'."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step that a folder is named after: the inverse of `step_folder`."""
    return int(folder.name.removeprefix("step-"))


def step_folders(parent: Path) -> list[Path]:
    """The folders in `parent` that are named after a step, by step."""
    folders = [path for path in parent.glob("step-*") if path.is_dir() and STEP_FOLDER.fullmatch(path.name)]
    return sorted(folders, key=step_of)


OPTIMIZER_FILE = "optimizer.safetensors"


def weights_file(name: str) -> str:
    """Where a checkpoint holds the parameters of `raw` or an average."""
    return "raw.safetensors" if name == "raw" else f"averages/{name}.safetensors"


def buffers_file(name: str) -> str:
    """Where a checkpoint, or a snapshot's folder, holds the buffers of `raw` or an average, if the network has any."""
    return f"buffers/{name}.safetensors"
