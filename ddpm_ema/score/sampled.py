"""Images sampled from the weights of one checkpoint, and their features by every extractor: `scores/<step>-<digest>/`.

The digest is of the settings that change the images alone, so any number of scorings (other extractors, another reference, more
images) share one folder, and none samples an image again that another has.

docs/scoring.md lists its files. Beside it, `scores/<step>-<digest>-<digest>/` of each scoring has its table: see `folder`.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_ema.metrics import installed_version
from ddpm_ema.named_weights import NamedWeights
from ddpm_ema.rundir import as_user_error, atomic_write
from ddpm_ema.score.driver import Job, Jobs
from ddpm_ema.score.feature_store import FIRST_IMAGES, KEPT, BatchStore, FeatureBatch, ImageBatch
from ddpm_ema.score.generate import IMAGES, Generator, Made

KEPT_BYTES = 2**30
"""Images of one set of weights are all kept where they take no more than this: 50,000 of 3×32×32 take 0.15 GB."""


def made_with(device: torch.device) -> dict[str, str]:
    """What images and features may depend on beside the settings: versions, and the device with the kernels it chooses."""
    packages = ("ddpm_ema", "diffusers", "numpy", "timm", "torch-fidelity")
    found = {package: installed_version(package) for package in packages}
    found["torch"] = str(torch.__version__)  # says which build, too
    cpu = f"cpu, {torch.backends.cpu.get_cpu_capability()}"
    return {**found, "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu}


class Sampled:
    """The folder at `path`, whose lock its caller holds; `generator` is asked about image size and extractors alone."""

    def __init__(self, path: Path, generator: Generator) -> None:
        evaluation = generator.config.evaluation
        self.path, self.extractors = path, tuple(generator.extractors)
        whole = evaluation.num_images * math.prod(generator.image_shape) <= KEPT_BYTES
        self.num_kept = math.inf if whole else max(FIRST_IMAGES, evaluation.grid_images)
        self._stores: dict[tuple[str, str], BatchStore[Any]] = {}

    def images(self, key: str) -> BatchStore[ImageBatch]:
        """Images of the weights with this key."""
        return self._store(key, IMAGES, ImageBatch)

    def features(self, key: str, extractor: str) -> BatchStore[FeatureBatch]:
        """Features of the weights with this key, by the extractor with that one."""
        return self._store(key, f"features-{extractor}", FeatureBatch)

    def _store(self, key: str, prefix: str, kind: Any) -> BatchStore[Any]:
        if (key, prefix) not in self._stores:
            self._stores[key, prefix] = BatchStore(self.path / "weights" / key[:16], prefix, kind)
        return self._stores[key, prefix]

    def sample(self, weights: NamedWeights, count: int) -> Jobs[None]:
        """Asks for the features of images 0 ... `count` − 1 that are missing, and samples those images alone that are not kept."""
        images = self.images(weights.key)
        stores = {extractor: self.features(weights.key, extractor) for extractor in self.extractors}

        def take(made: Made) -> None:
            if IMAGES in made:
                images.add(made[IMAGES].select(made[IMAGES].indices < self.num_kept))
            for extractor in made.keys() & stores.keys():
                stores[extractor].add(made[extractor])

        lacking = {extractor: store.missing(count) for extractor, store in stores.items()}
        lacking = {extractor: missing for extractor, missing in lacking.items() if missing}
        if wanted := sorted(set().union(*lacking.values()) & set(images.missing(count))):
            yield Job(weights.name, wanted, tuple(lacking), take, weights)
        for extractor in lacking:
            if missing := stores[extractor].missing(count):
                title = f"{weights.name}, {extractor}"
                yield Job(title, missing, (extractor,), take, kept=lambda indices: images.read(indices).images)

    def first_images(self, key: str, count: int) -> Tensor | None:
        """At most the first `count` images of some weights, uint8 `[m, C, H, W]`; None where they were lost."""
        store = self.images(key)
        there = sorted(set(range(count)) - set(store.missing(count)))
        return store.read(torch.tensor(there)).images if there else None

    def made_with(self) -> list[dict[str, str]]:
        """Versions and device that its images were sampled with, an entry per extractor, as they came; `[{}]` if the file is lost."""
        try:
            found: list[dict[str, str]] = json.loads((self.path / "made_with.json").read_text())
        except (OSError, ValueError):
            return [{}]
        return found

    def keep_made_with(self, versions: Sequence[Mapping[str, str]]) -> None:
        text = json.dumps(versions, indent=1)
        with as_user_error(self.path, len(text), KEPT):
            atomic_write(self.path / "made_with.json", text)

    def is_empty(self) -> bool:
        """Whether no image was finished here."""
        return not any(self.path.glob("weights/*/*-*.safetensors"))

    def set_aside(self) -> Path:
        """Moves all content into a new folder beside this one, which is returned, and the tables with it; the lock stays."""
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        with as_user_error(aside, 0, KEPT):
            aside.mkdir()
            # Tables first: a kill leaves no rows beside images that are not theirs.
            for table in self.path.parent.glob(f"{self.path.name}-*"):
                os.replace(table, table.with_name(table.name.replace(self.path.name, aside.name, 1)))
            for path in [path for path in self.path.iterdir() if path.name != ".lock"]:
                os.replace(path, aside / path.name)
        self._stores.clear()
        return aside
