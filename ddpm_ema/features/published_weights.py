"""Weights files of published extractors, and their sha256, which is checked before anything is unpickled.

A published file is a pickle, and torch-fidelity opens it without restriction. So it is read once, its sha256 is checked, and
those bytes are handed over. Other weights are taken only as safetensors, which hold no code.
"""

from __future__ import annotations

import hashlib
import io
import urllib.error
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from ddpm_ema.errors import UserError


@dataclass(frozen=True)
class Published:
    """One published file: its name in torch's hub folder, where it is downloaded from, and its sha256."""

    file_name: str
    url: str
    sha256: str


# The first eight digits of Inception's and VGG's sha256 are in their file names, CLIP's sha256 are in torch-fidelity's source;
# the rest of VGG's and DINOv2's are those that several projects pin for these files.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
VGG16_SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
DINOV2 = {
    "dinov2-vit-s-14": ("vits14", "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
    "dinov2-vit-b-14": ("vitb14", "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"),
    "dinov2-vit-l-14": ("vitl14", "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"),
    "dinov2-vit-g-14": ("vitg14", "baf8467e50af277596bbbafa06887c177ee899ab46033649c383577d7e9309d3"),
}


def published() -> dict[str, Published]:
    """Every extractor with published weights: name -> file. Addresses come from the libraries that use them."""
    from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torchvision.models import VGG16_Weights

    vgg16 = VGG16_Weights.IMAGENET1K_V1.url
    files = {
        "inception-v3-compat": Published(URL_INCEPTION_V3.rpartition("/")[2], URL_INCEPTION_V3, INCEPTION_SHA256),
        "vgg16": Published(vgg16.rpartition("/")[2], vgg16, VGG16_SHA256),
    }
    for name, model in MODEL_METADATA.items():
        files[name] = Published(f"{name}-{model['hash']}.pt", MODEL_URLS[name], model["hash"])
    for name, (short, sha256) in DINOV2.items():
        file_name = f"dinov2_{short}_pretrain.pth"
        files[name] = Published(file_name, f"https://dl.fbaipublicfiles.com/dinov2/dinov2_{short}/{file_name}", sha256)
    return files


def hub_folder() -> Path:
    """Where torch keeps downloaded weights."""
    return Path(torch.hub.get_dir()) / "checkpoints"


@dataclass(frozen=True)
class Weights:
    """Checked weights: a `file` to load from, the sha256 of the bytes on disk, and whether they are the published ones."""

    file: io.BytesIO
    sha256: str
    is_published: bool
    path: Path


def obtain(name: str, path: Path | None) -> Weights:
    """The weights of extractor `name`.

    Args:
        name: one of `published()`.
        path: a weights file; None means the published one in torch's hub folder, which is downloaded once.

    Raises:
        UserError: the file is missing and cannot be downloaded, or is no safetensors file and its sha256 is not the published one.
    """
    file = published()[name]
    if path is None:
        path = hub_folder() / file.file_name
        if not path.exists():
            _download(name, file, path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"evaluation.extractor {name}: {path}: {error.strerror}. {_how_to_get(file)}") from None
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 == file.sha256:
        return Weights(io.BytesIO(content), sha256, True, path)
    if path.suffix == ".safetensors":
        return Weights(_as_pickle(content, path), sha256, False, path)
    raise UserError(
        f"evaluation.extractor {name}: {path} has sha256 {sha256}, not the published {file.sha256}: a broken download, or "
        f"other weights. It was not opened. {_how_to_get(file)}. For weights of your own, save them as .safetensors and "
        "give that file as --evaluation.extractor-path"
    )


def _how_to_get(file: Published) -> str:
    """The sentence that ends every message about missing weights."""
    return (
        f"Published file: {file.url} (sha256 {file.sha256}). Fetch it on a machine with a network and put it at "
        f"{hub_folder() / file.file_name}, or name it with --evaluation.extractor-path; or use --evaluation.extractor classifier "
        "(ddpm-ema features), which needs no download"
    )


def _download(name: str, file: Published, path: Path) -> None:
    """Into `path`, which appears only with the right sha256."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(file.url, str(path), hash_prefix=file.sha256, progress=False)
    except (OSError, urllib.error.URLError, RuntimeError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"evaluation.extractor {name}: its weights are not at {path} and could not be downloaded ({reason}). "
            f"{_how_to_get(file)}"
        ) from None


def _as_pickle(content: bytes, path: Path) -> io.BytesIO:
    """Tensors of a safetensors file in the form torch-fidelity reads."""
    try:
        tensors = load_safetensors(content)
    except SafetensorError as error:
        raise UserError(f"evaluation.extractor_path: {path} is no safetensors file: {error}") from None
    stream = io.BytesIO()
    torch.save(tensors, stream)
    stream.seek(0)
    return stream
