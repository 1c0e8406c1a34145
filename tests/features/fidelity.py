"""Our classifier as a torch-fidelity feature extractor. Imported where it is needed only: torch-fidelity takes a second to load."""

from pathlib import Path
from typing import Any

from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from ddpm_ema.features.classifier import load_classifier

NAME = "ddpm-ema-classifier"


class ClassifierExtractor(FeatureExtractorBase):
    """`calculate_metrics(feature_extractor=NAME, feature_extractor_weights_path=".../features.safetensors", ...)`."""

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(name, features_list)
        if feature_extractor_weights_path is None:
            raise ValueError(f"{name} needs feature_extractor_weights_path: the file scripts/train_features.py made")
        self.network, self.sha256 = load_classifier(Path(feature_extractor_weights_path))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """uint8 [n, c, h, w] -> the layers asked for."""
        features, logits = self.network(x)
        layers = {"features": features, "logits": logits}
        return tuple(layers[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return True


def register() -> str:
    """Makes the classifier known to torch-fidelity, once however often it is called; returns its name there."""
    if NAME not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(NAME, ClassifierExtractor)
    return NAME
