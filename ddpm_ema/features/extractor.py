"""Images → features: one object for Inception, any timm backbone, and our own classifier."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ddpm_ema.errors import UserError, nearest
from ddpm_ema.features.classifier import Classifier, load_classifier
from ddpm_ema.features.inception import INCEPTION, open_inception, where_inception_lies
from ddpm_ema.features.timm_backbone import TIMM, is_installed, open_timm

CLASSIFIER = "classifier"
CPU_BATCH = 16
"""Images of ImageNet's size per pass on a CPU: the activations of more do not fit its caches."""


@dataclass(kw_only=True)
class Extractor:
    """Images → features, on one device: evaluation mode, no gradients, no autocast, no TF32."""

    network: nn.Module  # uint8 [n, channels, h, w] -> a tuple that begins with the features, [n, dim]
    name: str
    sha256: str  # of the weights file
    feature_layer: str
    device: torch.device
    batch_size: int  # most images per pass
    label: str = ""  # the name for people, with that of a file that was given
    channels: int | None = 3  # 3 if grey images must be repeated for the network, None if it takes both
    is_published_inception: bool = False  # whether a Fréchet distance of these features is a FID

    def __post_init__(self) -> None:
        self.label = self.label or self.name
        self.network.eval().requires_grad_(False).to(self.device)
        if self.device.type == "cpu" and not isinstance(self.network, Classifier):
            # Networks of ImageNet's size: a third to a half less time on CPUs, features equal to rounding.
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.batch_size = min(self.batch_size, CPU_BATCH)
        self.dim = self._features(torch.zeros(1, self.channels or 3, 32, 32, dtype=torch.uint8)).shape[1]
        """Length of a feature vector."""

    @property
    def identity(self) -> dict[str, str]:
        """What its features are, for files that depend on them."""
        return {"extractor": self.name, "extractor_sha256": self.sha256, "feature_layer": self.feature_layer}

    @property
    def key(self) -> str:
        """Names files of its features: what they depend on."""
        return f"{re.sub(r'[^A-Za-z0-9_.]+', '_', self.name)}-{self.sha256[:12]}"

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 images [n, 1 or 3, h, w] -> features fp32 [n, dim], on the extractor's device.

        Raises:
            ValueError: another dtype or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be uint8 [n, 1 or 3, h, w], got {images.dtype} {tuple(images.shape)}")
        if self.channels == 3 and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return torch.cat([self._features(batch) for batch in images.split(self.batch_size)])

    def _features(self, batch: Tensor) -> Tensor:
        with torch.inference_mode(), full_precision(self.device):
            features: Tensor = self.network(batch.to(self.device))[0]
            return features.float()


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """fp32 means fp32 inside: no TF32, no reduced-precision matrix products, no autocast. Restored afterwards."""
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


def split_entry(entry: str) -> tuple[str, Path | None]:
    """`NAME=FILE` of `evaluation.extractors` -> name and weights file; None for `NAME` alone. Raises UserError for an unknown name."""
    name, _, file = entry.partition("=")
    if name not in (CLASSIFIER, INCEPTION) and not name.startswith(TIMM):
        known = nearest(name, [CLASSIFIER, INCEPTION, f"{TIMM}NAME"])
        raise UserError(f"evaluation.extractors: no extractor is called {name!r}{known}")
    return name, Path(file) if file else None


def open_extractor(
    entry: str, output_dir: Path, device: torch.device | str = "cpu", batch_size: int = 256
) -> Extractor:
    """The extractor that an entry of `evaluation.extractors` names; without a file the classifier lies in `output_dir`.

    Raises UserError for an unknown name, missing weights that cannot be downloaded, a damaged file or a wrong sha256. Nothing is
    unpickled before its sha256 is checked.
    """
    name, file = split_entry(entry)
    network: nn.Module
    is_published = False
    if name == CLASSIFIER:
        network, sha256 = load_classifier(file or Path(output_dir) / "features.safetensors")
        layer = "features"
    elif name == INCEPTION:
        network, sha256, layer, is_published = open_inception(file)
    else:
        network, sha256, layer = open_timm(name.removeprefix(TIMM), file)
    return Extractor(
        network=network,
        name=name,
        sha256=sha256,
        label=f"{name} {file.stem}" if file else name,
        feature_layer=layer,
        channels=None if name == CLASSIFIER else 3,
        is_published_inception=is_published,
        device=torch.device(device),
        batch_size=batch_size,
    )


def missing(entry: str, output_dir: Path) -> str:
    """What a later scoring will lack, and what to do about it; empty if nothing. No network is opened, nothing downloaded."""
    name, file = split_entry(entry)
    if name.startswith(TIMM) and not is_installed():
        return "scoring will need timm: pip install 'ddpm_ema[timm]'"
    cure, path = "put it there", file
    try:
        if name == CLASSIFIER:
            path = file or Path(output_dir) / "features.safetensors"
            cure = "make it with ddpm-ema features, or name another run's with classifier=FILE"
        elif name == INCEPTION and file is None:
            path = where_inception_lies()
            cure = "it is downloaded then, which needs a network; or use evaluation.extractors classifier"
    except ImportError:
        return "scoring will need torch-fidelity: pip install 'ddpm_ema[score]'"
    return "" if path is None or path.is_file() else f"scoring will need {path}: {cure}"
