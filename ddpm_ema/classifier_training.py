"""Trains the feature classifier on the configured data set: where data and features meet."""

import hashlib
from pathlib import Path

import torch

from ddpm_ema import data
from ddpm_ema.config import Config
from ddpm_ema.errors import UserError
from ddpm_ema.features import read_metadata, save_classifier, train_classifier
from ddpm_ema.messages import logger
from ddpm_ema.rundir import as_user_error

MOST_IMAGES = 60_000  # more cost minutes and change little
MOST_BYTES = 2**30  # held in memory for training; where each image is turned four ways, nine times as much for a moment


def train_features(config: Config) -> Path:
    """Trains `<output_dir>/features.safetensors`, unless it is there already; returns its path.

    It learns the data set's labels; without any, which way up an image is.
    """
    path = config.output_dir / "features.safetensors"
    dataset = data.load(config.data)
    labels = dataset.labels if (dataset.num_classes or 0) > 1 else None
    told = "which way up" if labels is None else labels.tolist()
    fingerprint = hashlib.sha256(f"{dataset.fingerprint} {told}".encode()).hexdigest()
    if _is_done(path, fingerprint, config.seed):
        return path
    most = min(MOST_IMAGES, MOST_BYTES // (config.data.channels * config.data.image_size**2))
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.seed))[:most]
    device = "cuda" if config.machine.device != "cpu" and torch.cuda.is_available() else "cpu"
    trained = train_classifier(
        dataset.batch(chosen).cpu(),
        None if labels is None else labels[chosen],
        seed=config.seed,
        num_classes=dataset.num_classes,
        device=device,
    )
    needed = sum(tensor.nbytes for tensor in trained.network.state_dict().values())
    with as_user_error(path, needed, "Nothing was written"):
        save_classifier(path, trained, fingerprint=fingerprint, seed=config.seed)
    what = f"feature classifier of {dataset.name}{', by which way up they are,' if labels is None else ','}"
    logger.info(f"{path}: {what} accuracy {trained.accuracy:.1%} on images it never saw")
    return path


def _is_done(path: Path, fingerprint: str, seed: int) -> bool:
    """Whether `path` is a classifier of this data set and seed; tells what becomes of a file that is there."""
    if not path.exists():
        return False
    try:
        metadata = read_metadata(path)
    except UserError as error:
        logger.info(f"{error}; training it anew")
        return False
    if metadata.get("fingerprint") != fingerprint or metadata.get("seed") != seed:
        logger.info(f"{path}: made from other data or another seed; training it anew")
        return False
    logger.info(f"{path}: already complete (accuracy {metadata['accuracy']:.1%}); nothing to do")
    return True
