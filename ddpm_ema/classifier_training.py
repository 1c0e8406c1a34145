"""Trains the feature classifier on the configured data set: where data and features meet."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from ddpm_ema import data
from ddpm_ema.config import Config
from ddpm_ema.errors import UserError
from ddpm_ema.features import read_metadata, save_classifier, train_classifier
from ddpm_ema.messages import logger

MOST_IMAGES = 60_000  # held in memory for training; more cost minutes and change little


def train_features(config: Config) -> Path:
    """Trains `<output_dir>/features.safetensors` on the data set's labels, unless it is there already; returns its path.

    Raises:
        UserError: the data set has no labels.
    """
    path = config.output_dir / "features.safetensors"
    dataset = data.load(config.data)
    if dataset.labels is None:
        raise UserError(
            f"{dataset.name} has no labels and a feature classifier needs them: put images into one folder per class, or score with "
            "--evaluation.extractors inception-v3-compat"
        )
    fingerprint = hashlib.sha256(f"{dataset.fingerprint} {dataset.labels.tolist()}".encode()).hexdigest()
    if _is_done(path, fingerprint, config.seed):
        return path
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.seed))[:MOST_IMAGES]
    device = "cuda" if config.machine.device != "cpu" and torch.cuda.is_available() else "cpu"
    trained = train_classifier(
        dataset.batch(chosen).cpu(),
        dataset.labels.cpu()[chosen],
        seed=config.seed,
        num_classes=dataset.num_classes,
        device=device,
    )
    save_classifier(path, trained, fingerprint=fingerprint, seed=config.seed)
    logger.info(f"{path}: feature classifier of {dataset.name}, accuracy {trained.accuracy:.1%} on images it never saw")
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
