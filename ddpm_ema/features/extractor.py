"""Images → features: one object for torch-fidelity's extractors and our own classifier."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ddpm_ema.config import EvaluationSettings
from ddpm_ema.errors import UserError, nearest
from ddpm_ema.features.classifier import Classifier, load_classifier
from ddpm_ema.features.published_weights import hub_folder, obtain, published

CLASSIFIER = "classifier"
CPU_BATCH = 16
"""Images of ImageNet's size per pass on a CPU: the activations of more do not fit its caches."""


@dataclass(kw_only=True)
class Extractor:
    """Images → features and logits, on one device: evaluation mode, no gradients, no autocast, no TF32.

    Attributes:
        network: uint8 [n, channels, h, w] -> a tuple of features and, if it has them, logits.
        name, sha256: of the extractor and its weights file.
        feature_layer: name of the features' layer.
        channels: 3 if grey images must be repeated for the network, None if it takes both.
        is_published_inception: whether a Fréchet distance of these features is a FID.
        batch_size: largest number of images per pass.
    """

    network: nn.Module
    name: str
    sha256: str
    feature_layer: str
    channels: int | None
    is_published_inception: bool
    device: torch.device
    batch_size: int

    def __post_init__(self) -> None:
        self.network.eval().requires_grad_(False).to(self.device)
        if self.device.type == "cpu" and not isinstance(self.network, Classifier):
            # Networks of ImageNet's size: a third to a half less time on CPUs, features equal to rounding.
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.batch_size = min(self.batch_size, CPU_BATCH)
        first, *_ = self._layers(torch.zeros(1, self.channels or 3, 32, 32, dtype=torch.uint8))
        self.dim = first.shape[1]
        """Length of a feature vector."""

    def __call__(self, images: Tensor) -> dict[str, Tensor | None]:
        """Features and logits of images.

        Args:
            images: uint8 [n, 1 or 3, h, w]; n may be 0.

        Returns:
            {"features": fp32 [n, dim], "logits": fp32 [n, k], or None without logits or images}, on the extractor's device.

        Raises:
            ValueError: another dtype or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be uint8 [n, 1 or 3, h, w], got {images.dtype} {tuple(images.shape)}")
        if not len(images):
            return {"features": torch.zeros(0, self.dim, device=self.device), "logits": None}
        if self.channels == 3 and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        batches = [self._layers(batch) for batch in images.split(self.batch_size)]
        features, *logits = (torch.cat(layer) for layer in zip(*batches, strict=True))
        return {"features": features, "logits": logits[0] if logits else None}

    def _layers(self, batch: Tensor) -> list[Tensor]:
        with torch.inference_mode(), full_precision(self.device):
            return [layer.float() for layer in self.network(batch.to(self.device))]


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


def open_extractor(settings: EvaluationSettings, output_dir: Path, device: torch.device | str = "cpu") -> Extractor:
    """The extractor that the settings name: `classifier`, or one of torch-fidelity's.

    Args:
        settings: `extractor`, `extractor_path` and `extractor_batch_size` count.
        output_dir: where the classifier lies if `extractor_path` is null.
        device: where it runs.

    Raises:
        UserError: an unknown name, missing weights that cannot be downloaded, a damaged file or a wrong sha256. Nothing is
            unpickled before its sha256 is checked.
    """
    if settings.extractor != CLASSIFIER:
        return _open_published(settings, device)
    network, sha256 = load_classifier(settings.extractor_path or Path(output_dir) / "features.safetensors")
    return Extractor(
        network=network,
        name=CLASSIFIER,
        sha256=sha256,
        feature_layer="features",
        channels=None,
        is_published_inception=False,
        device=torch.device(device),
        batch_size=settings.extractor_batch_size,
    )


def missing(settings: EvaluationSettings, output_dir: Path) -> str:
    """What a later scoring will lack, and what to do about it; empty if nothing. No network is opened, nothing downloaded."""
    if settings.extractor == CLASSIFIER:
        path = settings.extractor_path or Path(output_dir) / "features.safetensors"
        cure = "ddpm-ema features trains it where images have classes; else name another run's with evaluation.extractor_path"
        return "" if path.is_file() else f"scoring will need a feature classifier at {path}: {cure}"
    try:
        known = published()
    except ImportError:
        return "scoring will need torch-fidelity: pip install 'ddpm_ema[score]'"
    if settings.extractor not in known:
        raise UserError(
            f"evaluation.extractor: no extractor is called {settings.extractor!r}{nearest(settings.extractor, [CLASSIFIER, *known])}"
        )
    path = settings.extractor_path or hub_folder() / known[settings.extractor].file_name
    cure = "it is downloaded then, which needs a network" if settings.extractor_path is None else "put it there"
    return "" if path.is_file() else f"scoring will need {path}: {cure}; or use evaluation.extractor classifier"


def _open_published(settings: EvaluationSettings, device: torch.device | str) -> Extractor:
    """One of torch-fidelity's, from checked weights."""
    name = settings.extractor
    try:
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
    except ImportError:
        raise UserError("scoring needs torch-fidelity: pip install 'ddpm_ema[score]'") from None
    if name not in published():
        raise UserError(
            f"evaluation.extractor: no extractor is called {name!r}{nearest(name, [CLASSIFIER, *published()])}"
        )
    if name.startswith("dinov2") and settings.extractor_path is not None:
        raise UserError(
            f"evaluation.extractor_path: torch-fidelity takes no weights file for {name}; put it into "
            f"{hub_folder()} under its published name, {published()[name].file_name}"
        )
    extractor = FEATURE_EXTRACTORS_REGISTRY[name]
    feature_layer = extractor.get_default_feature_layer_for_metric("fid")
    layers = list(dict.fromkeys([feature_layer, extractor.get_default_feature_layer_for_metric("isc")]))
    weights = obtain(name, settings.extractor_path)
    file = None if name.startswith("dinov2") else weights.file
    try:
        network = extractor(name, layers, feature_extractor_weights_path=file, verbose=False)
    except Exception as error:  # whatever a state dict of another network, or a hub without network, raises
        reason = " ".join(str(error).split())
        brief = reason if len(reason) < 300 else f"{reason[:300]} ..."
        raise UserError(f"evaluation.extractor {name}: {weights.path} cannot be loaded: {brief}") from None
    return Extractor(
        network=network,
        name=name,
        sha256=weights.sha256,
        feature_layer=feature_layer,
        channels=3,
        is_published_inception=name == "inception-v3-compat" and weights.is_published,
        device=torch.device(device),
        batch_size=settings.extractor_batch_size,
    )
