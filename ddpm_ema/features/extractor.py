"""Images → features: one object for torch-fidelity's extractors and our own classifier."""

from __future__ import annotations

import contextlib
import difflib
import io
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ddpm_ema.config import EvaluationSettings
from ddpm_ema.errors import UserError
from ddpm_ema.features.classifier import load_classifier
from ddpm_ema.features.weights import obtain, published

CLASSIFIER = "classifier"


CPU_BATCH = 16
"""Images of 299 × 299 pixels and the like that a CPU is given at once: activations of more of them fall out of its caches."""


class Extractor:
    """`extractor(images uint8 [n, c, h, w]) -> {"features": fp32 [n, dim], "logits": fp32 [n, k] | None}`, on its device.

    `name`, `sha256` of the weights file, `feature_layer`, `dim`, and `is_published_inception`: only then is the Fréchet
    distance a FID. Evaluation mode, no gradients, no autocast, no TF32. At most `batch_size` images a pass.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        sha256: str,
        layers: tuple[str, str | None],
        channels: int | None,
        is_published_inception: bool,
        device: torch.device | str,
        batch_size: int,
    ) -> None:
        self.network = network.eval().requires_grad_(False).to(device)
        if torch.device(device).type == "cpu" and not hasattr(network, "architecture"):
            # Networks of ImageNet's size: a third to a half less time on CPUs, features equal to rounding.
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            batch_size = min(batch_size, CPU_BATCH)
        self.name, self.sha256 = name, sha256
        self.feature_layer, self.logits_layer = layers
        self.channels = channels
        self.is_published_inception = is_published_inception
        self.device, self.batch_size = torch.device(device), batch_size
        self.dim = self._measure_dim()

    def _measure_dim(self) -> int:
        architecture = getattr(self.network, "architecture", None)
        size = architecture.image_size if architecture is not None else 32
        features = self(torch.zeros(1, self.channels or 3, size, size, dtype=torch.uint8))["features"]
        assert features is not None
        return features.shape[1]

    def __call__(self, images: Tensor) -> dict[str, Tensor | None]:
        """Features and logits of uint8 images of any number. Raises ValueError for another dtype or shape."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be uint8 [n, 1 or 3, h, w], got {images.dtype} {tuple(images.shape)}")
        if self.channels == 3 and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        features: list[Tensor] = []
        logits: list[Tensor] = []
        with torch.inference_mode(), full_precision(self.device):
            for batch in images.split(self.batch_size):
                first, *rest = self.network(batch.to(self.device))
                features.append(first.float())
                logits.extend(layer.float() for layer in rest)
        return {
            "features": torch.cat(features) if features else torch.zeros(0, self.dim, device=self.device),
            "logits": torch.cat(logits) if logits else None,
        }


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
    """The extractor that the settings name: `classifier`, or one torch-fidelity knows.

    Raises UserError for an unknown name (the nearest is named), missing weights and no network, or a wrong sha256;
    nothing is unpickled before its sha256 is checked.
    """
    if settings.extractor == CLASSIFIER:
        path = settings.extractor_path or Path(output_dir) / "features.safetensors"
        network, sha256 = load_classifier(path)
        return Extractor(
            network,
            name=CLASSIFIER,
            sha256=sha256,
            layers=("features", "logits"),
            channels=None,
            is_published_inception=False,
            device=device,
            batch_size=settings.extractor_batch_size,
        )
    return _open_published(settings, device)


def _open_published(settings: EvaluationSettings, device: torch.device | str) -> Extractor:
    """One of torch-fidelity's, from checked weights."""
    name = settings.extractor
    try:
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
    except ImportError:
        raise UserError("scoring needs torch-fidelity: pip install 'ddpm_ema[score]'") from None
    known = [CLASSIFIER, *published()]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise UserError(f"evaluation.extractor: no extractor is called {name!r}; {hint}")
    cls = FEATURE_EXTRACTORS_REGISTRY[name]
    feature_layer = cls.get_default_feature_layer_for_metric("fid")
    logits_layer = cls.get_default_feature_layer_for_metric("isc")
    layers = [feature_layer] if logits_layer == feature_layer else [feature_layer, logits_layer]
    if name.startswith("dinov2") and settings.extractor_path is not None:
        raise UserError(
            f"evaluation.extractor_path: torch-fidelity takes no weights file for {name}; put it into "
            f"{Path(torch.hub.get_dir()) / 'checkpoints'} under its published name, {published()[name].file_name}"
        )
    weights = obtain(name, settings.extractor_path)
    file: io.BytesIO | None = None if name.startswith("dinov2") else weights.file
    try:
        network = cls(name, layers, feature_extractor_weights_path=file, verbose=False)
    except Exception as error:  # whatever a state dict of another network, or a hub without network, raises
        reason = " ".join(str(error).split())
        brief = reason if len(reason) < 300 else f"{reason[:300]} ..."
        raise UserError(f"evaluation.extractor {name}: {weights.path} cannot be loaded: {brief}") from None
    return Extractor(
        network,
        name=name,
        sha256=weights.sha256,
        layers=(feature_layer, logits_layer if len(layers) == 2 else None),
        channels=3,
        is_published_inception=name == "inception-v3-compat" and weights.is_published,
        device=device,
        batch_size=settings.extractor_batch_size,
    )
