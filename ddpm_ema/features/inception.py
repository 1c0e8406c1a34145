"""The Inception network of the FID, through torch-fidelity, from weights whose sha256 is checked before anything is unpickled.

The published file is a pickle, and torch-fidelity opens it without restriction. So it is read once, its sha256 is checked, and
those bytes are handed over. Other weights are taken only as safetensors, which hold no code.
"""

import hashlib
import io
import urllib.error
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import nn

from ddpm_ema.errors import UserError, one_line

INCEPTION = "inception-v3-compat"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of the published file; its first eight digits are in the file's name."""


def open_inception(path: Path | None) -> tuple[nn.Module, str, str, bool]:
    """The network, the sha256 of its file, its layer, and whether its weights are the published ones.

    A `path` of None means the published file in torch's hub folder, which is downloaded once. Raises UserError where torch-fidelity
    is not installed, or the file is missing, of another network, or neither safetensors nor the published one.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Inception
    except ImportError:
        raise UserError("scoring needs torch-fidelity: pip install 'ddpm_ema[score]'") from None
    if path is None:
        path = where_inception_lies()
        if not path.exists():
            _download(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"evaluation.extractors: {INCEPTION}: {path}: {error.strerror}. {_how_to_get()}") from None
    sha256 = hashlib.sha256(content).hexdigest()
    layer = Inception.get_default_feature_layer_for_metric("fid")
    file = _checked(content, sha256, path)
    try:
        network = Inception(INCEPTION, [layer], feature_extractor_weights_path=file, verbose=False)
    except Exception as error:  # whatever a state dict of another network raises
        raise UserError(f"evaluation.extractors: {INCEPTION}: {path} cannot be loaded: {one_line(error)}") from None
    return network, sha256, layer, sha256 == SHA256


def where_inception_lies() -> Path:
    """The published file in torch's hub folder."""
    return Path(torch.hub.get_dir()) / "checkpoints" / _url().rpartition("/")[2]


def _url() -> str:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return str(URL_INCEPTION_V3)


def _checked(content: bytes, sha256: str, path: Path) -> io.BytesIO:
    """The published bytes as they are, safetensors in the form that torch-fidelity reads; raises UserError for others."""
    if sha256 == SHA256:
        return io.BytesIO(content)
    if path.suffix != ".safetensors":
        raise UserError(
            f"evaluation.extractors: {INCEPTION}: {path} has sha256 {sha256}, not the published {SHA256}: a broken download, or "
            f"other weights. It was not opened. {_how_to_get()}. For weights of your own, save them as .safetensors and "
            f"give that file as {INCEPTION}=FILE"
        )
    try:
        tensors = load_safetensors(content)
    except SafetensorError as error:
        raise UserError(f"evaluation.extractors: {path} is no safetensors file: {error}") from None
    stream = io.BytesIO()
    torch.save(tensors, stream)
    stream.seek(0)
    return stream


def _how_to_get() -> str:
    """The sentence that ends every message about missing weights."""
    return (
        f"Published file: {_url()} (sha256 {SHA256}). Fetch it on a machine with a network and put it at {where_inception_lies()}, or "
        f"name it: --evaluation.extractors {INCEPTION}=FILE; or use --evaluation.extractors classifier (ddpm-ema features), which "
        "needs no download"
    )


def _download(path: Path) -> None:
    """Into `path`, which appears only with the right sha256."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(_url(), str(path), hash_prefix=SHA256, progress=False)
    except (OSError, urllib.error.URLError, RuntimeError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"evaluation.extractors: {INCEPTION}: its weights are not at {path} and could not be downloaded ({reason}). "
            f"{_how_to_get()}"
        ) from None
