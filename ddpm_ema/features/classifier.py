"""A small classifier trained on the data set itself: features for images unlike ImageNet's, without a download."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor, nn

from ddpm_ema.averaging.files import save_tensors
from ddpm_ema.errors import UserError
from ddpm_ema.messages import bar

FORMAT = "ddpm_ema feature classifier 1"
THUMBNAIL = 8
THUMBNAIL_WEIGHT = 4.0  # of its squared error against the cross-entropy: makes them similar in size


@dataclass(frozen=True)
class Architecture:
    """Shape of the network; stored in the weights file."""

    channels: int
    image_size: int
    num_classes: int
    width: int = 24
    dim: int = 64


class Classifier(nn.Module):
    """Convolutions at 16×16 pixels or fewer and at half of that, a linear layer to `dim` features, another to logits.

    Training also asks a linear map to rebuild an 8×8 thumbnail from the features. Without it, the features of a good classifier
    collapse to one point per class (Papyan et al. 2020, "neural collapse"), and a distance between them shows little but class
    proportions. Over the training set features have zero mean and unit variance, the scale that the kernel distance's cubic
    kernel is meant for.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        width = architecture.width
        self.stem = _stem(architecture)
        self.stages = nn.ModuleList([_stage(width, 2 * width), _stage(2 * width, 4 * width)])
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.features = nn.Linear(4 * width * 4, architecture.dim)
        self.standardize = nn.BatchNorm1d(architecture.dim, affine=False)
        self.logits = nn.Linear(architecture.dim, architecture.num_classes)
        self.thumbnail = nn.Linear(architecture.dim, architecture.channels * THUMBNAIL**2)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 or float [n, c, h, w] in 0..255 -> features fp32 [n, dim], logits fp32 [n, num_classes].

        A network for grey images takes the mean over colour channels; one for colour images repeats the grey channel.
        """
        x = images.to(self.logits.weight.dtype)
        if x.shape[1] != self.architecture.channels:
            x = x.mean(dim=1, keepdim=True).expand(-1, self.architecture.channels, -1, -1)
        x = self.stem(x / 127.5 - 1)  #                                                       [n, width, ≤16, ≤16]
        for stage in self.stages:
            x = F.max_pool2d(stage(x), 2)  #                                                  [n, 2·width, ≤8, ≤8], ...
        features = self.standardize(self.features(self.pool(x).flatten(1)))  #                [n, dim]
        return features, self.logits(F.relu(features))


def _stem(architecture: Architecture) -> nn.Sequential:
    """To `width` channels of at most 16×16 pixels, so that the cost per image does not grow with its size."""
    layers: list[nn.Module] = []
    channels, size = architecture.channels, architecture.image_size
    while size > 16:
        layers += [nn.Conv2d(channels, architecture.width, 3, stride=2, padding=1), nn.ReLU()]
        channels, size = architecture.width, (size + 1) // 2
    return nn.Sequential(*layers, nn.Conv2d(channels, architecture.width, 3, padding=1))


def _stage(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(channels_in),
        nn.ReLU(),
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
        nn.Conv2d(channels_out, channels_out, 3, padding=1),
    )


@dataclass(frozen=True)
class Trained:
    """A trained network (eval mode, CPU) and its accuracy on the tenth of the images that was held out."""

    network: Classifier
    accuracy: float


def train_classifier(
    images: Tensor,
    labels: Tensor | None,
    *,
    seed: int,
    num_classes: int | None = None,
    visits: int = 32_000,
    device: torch.device | str = "cpu",
) -> Trained:
    """Trains with AdamW under a one-cycle rate; shifts are the augmentation (no flips: a mirrored 2 is no digit). Shows a bar.

    Args:
        images: uint8 [n, c, h, w]; a tenth is held out. Fewer than 20, or than 2 classes, are a UserError.
        labels: int64 [n]; None: the network learns which way up an image is (Gidaris et al. 2018, arXiv 1803.07728).
        seed: of weights, order and shifts; torch's global generators are left as they are.
        num_classes: None means the largest label + 1.
        visits: images in all, within 3 to 40 passes.
        device: where it trains.
    """
    classes = 4 if labels is None else int(num_classes or int(labels.max()) + 1)
    if len(images) < 20 or classes < 2:
        needs, has = "20 images", f"{len(images)}"
        if labels is not None:
            needs, has = f"{needs} and 2 classes", f"{has} and {classes}"
        raise UserError(f"a feature classifier needs {needs} at least: {has} here")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    held_out, kept = order[: len(images) // 10], order[len(images) // 10 :]
    if labels is None:
        labels = torch.arange(4).repeat_interleave(len(images))
        held_out, kept = ((part + len(images) * torch.arange(4)[:, None]).flatten() for part in (held_out, kept))
        images = torch.cat([images.rot90(turns, (2, 3)) for turns in range(4)])
    dim = 64 if images.shape[2] <= 16 else 128
    architecture = Architecture(images.shape[1], images.shape[2], classes, dim=dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Classifier(architecture).to(device).to(memory_format=torch.channels_last)
    epochs = max(3, min(40, round(visits / len(kept))))
    _optimize(network, images, labels, _batches(kept, epochs, generator), generator)
    with torch.inference_mode():
        _standardize(network, images, kept)
        logits = torch.cat([network(images[part].to(device))[1].cpu() for part in held_out.split(512)])
    accuracy = float((logits.argmax(dim=1) == labels[held_out]).double().mean())
    return Trained(network.cpu().requires_grad_(False), accuracy)


def _optimize(
    network: Classifier,
    images: Tensor,
    labels: Tensor,
    batches: list[Tensor],
    generator: torch.Generator,
) -> None:
    """One step for each of `batches` (image indices), then evaluation mode."""
    device = network.logits.weight.device
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=len(batches), pct_start=0.2)
    network.train()
    with bar("feature classifier", len(batches), "steps") as progress:
        for batch in batches:
            loss = _loss(network, _shift(images[batch], generator).to(device), labels[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update()
    network.eval()


def _standardize(network: Classifier, images: Tensor, kept: Tensor) -> None:
    """Sets mean and variance of the features to those over the images `kept`, where training left moving averages."""
    norm, device = network.standardize, network.logits.weight.device
    norm.running_mean.zero_()  # type: ignore[union-attr]
    norm.running_var.fill_(1)  # type: ignore[union-attr]
    features = torch.cat([network(images[part].to(device))[0] for part in kept.split(512)]).double()
    norm.running_mean.copy_(features.mean(dim=0))  # type: ignore[union-attr]
    norm.running_var.copy_(features.var(dim=0))  # type: ignore[union-attr]


def _loss(network: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy plus the thumbnail's squared error, in units of the image's range."""
    features, logits = network(images)
    thumbnail = F.adaptive_avg_pool2d(images / 127.5 - 1, THUMBNAIL).flatten(1)
    return F.cross_entropy(logits, labels) + THUMBNAIL_WEIGHT * F.mse_loss(network.thumbnail(features), thumbnail)


def _batches(kept: Tensor, epochs: int, generator: torch.Generator) -> list[Tensor]:
    """Whole batches in a new order per epoch."""
    size = min(64, len(kept))
    orders = [kept[torch.randperm(len(kept), generator=generator)] for _ in range(epochs)]
    return [batch for order in orders for batch in order.split(size) if len(batch) == size]


def _shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """The batch shifted by one random offset of up to a tenth of its size, edges repeated."""
    size = images.shape[-1]
    most = max(1, size // 10)
    padded = F.pad(images.float(), (most,) * 4, mode="replicate")
    top, left = torch.randint(0, 2 * most + 1, (2,), generator=generator).tolist()
    return padded[..., top : top + images.shape[-2], left : left + size]


def save_classifier(path: Path, trained: Trained, *, fingerprint: str, seed: int) -> None:
    """Writes a safetensors file atomically; its metadata says what it was trained on."""
    metadata = {
        "format": FORMAT,
        "architecture": asdict(trained.network.architecture),
        "fingerprint": fingerprint,
        "seed": seed,
        "accuracy": trained.accuracy,
    }
    # One entry: safetensors writes several in an order that changes, and the file's sha256 names these features.
    save_tensors(path, trained.network.state_dict(), {"ddpm_ema": json.dumps(metadata, sort_keys=True)})


def read_metadata(path: Path) -> dict[str, Any]:
    """Format, architecture, fingerprint, seed and accuracy in a classifier's file. Raises UserError for a missing or another file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = json.loads((file.metadata() or {}).get("ddpm_ema", "{}"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(
            f"the feature classifier is not at {path}: make it with ddpm-ema features RUN, "
            "or name another file: --evaluation.extractors classifier=FILE"
        ) from None
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path} is no whole safetensors file ({error}); delete it and run ddpm-ema features") from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is no feature classifier of this program: make one with ddpm-ema features")
    return metadata


def load_classifier(path: Path) -> tuple[Classifier, str]:
    """A classifier (eval mode, CPU) and the sha256 of its file. Raises UserError that says what is wrong with the file."""
    metadata = read_metadata(path)
    content = path.read_bytes()
    try:
        network = Classifier(Architecture(**metadata["architecture"]))
        network.load_state_dict(load(content))
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run ddpm-ema features") from None
    return network.eval().requires_grad_(False), hashlib.sha256(content).hexdigest()
