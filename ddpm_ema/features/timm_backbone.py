"""Any backbone of timm (the extra `timm`) from safetensors: DINOv2, CLIP, ConvNeXt, MAE and a thousand others.

The file is read once: its sha256 is that of the very bytes that become the network. No code is fetched from anywhere.
"""

import difflib
import hashlib
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from ddpm_ema.errors import UserError, one_line

TIMM = "timm:"


class Backbone(nn.Module):
    """uint8 RGB [n, 3, h, w] -> (features fp32 [n, d],), each image prepared as timm prepares a Pillow image for this network."""

    def __init__(self, model: nn.Module, prepare: Any) -> None:
        super().__init__()
        self.model, self.prepare = model, prepare

    def forward(self, images: Tensor) -> tuple[Tensor]:
        prepared = torch.stack([self.prepare(to_pil_image(image)) for image in images.cpu()])  # [n, 3, size, size]
        return (self.model(prepared.to(images.device)),)  #                                      [n, d]


def is_installed() -> bool:
    return find_spec("timm") is not None


def open_timm(name: str, file: Path | None) -> tuple[Backbone, str, str]:
    """The network of `name` without its classifier, the sha256 of its weights file, and what its features are.

    The name has the tag of its weights (`vit_large_patch14_dinov2.lvd142m`); `@224` behind it gives the images another size than the
    one it was trained with. Without a file, those of timm's repository on the Hugging Face Hub are downloaded once. Raises UserError
    where timm is not installed or knows no such model, or the file cannot be read or downloaded, or does not fit.
    """
    if not is_installed():
        raise UserError("evaluation.extractors: timm is not installed: pip install 'ddpm_ema[timm]'")
    import timm

    name, _, size = name.partition("@")
    where = f"evaluation.extractors: {TIMM}{name}"
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UserError(f"{where}: {one_line(error)}") from None
    if cfg is None:
        near = difflib.get_close_matches(name, timm.list_models(include_tags=True), n=3)
        raise UserError(f"{where}: timm has no such model" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    path = file or _from_hub(cfg, where)
    try:
        content = path.read_bytes()
        overlay = {"state_dict": load_safetensors(content)}
    except OSError as error:
        raise UserError(f"{where}: {path}: {error.strerror}") from None
    except SafetensorError as error:
        raise UserError(f"{where}: {path} is no whole safetensors file: {error}") from None
    sha256 = hashlib.sha256(content).hexdigest()
    if (
        re.fullmatch("[0-9a-f]{64}", blob := path.resolve().name) and blob != sha256
    ):  # the Hub's cache: named by content
        raise UserError(
            f"{where}: {path.resolve()} is damaged: its sha256 is {sha256}; delete it, and it is downloaded again"
        )
    if size and not size.isdecimal():
        raise UserError(f"{where}@{size}: the size behind @ is a number of pixels")
    sizes: dict[str, Any] = {"img_size": int(size)} if size else {}
    try:
        # With its own classifier, which goes afterwards: timm then insists that the file has every weight.
        model: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **sizes)
        model.reset_classifier(0)
    except Exception as error:  # whatever a state dict of another network raises
        raise UserError(f"{where}: {path} cannot be loaded: {one_line(error)}") from None
    model.pretrained_cfg.pop("state_dict")  # it would hold all weights once more
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model, sizes), is_training=False)
    return Backbone(model, prepare), sha256, "pre_logits"


def _from_hub(cfg: Any, where: str) -> Path:
    """The safetensors of timm's repository, in the Hub's cache."""
    from huggingface_hub import hf_hub_download

    name = cfg.hf_hub_filename or "model.safetensors"
    if not cfg.hf_hub_id or not name.endswith(".safetensors"):
        raise UserError(
            f"{where}: timm has no safetensors of it: name a model with a tag, or give a file: {where[23:]}=FILE"
        )
    repository, _, revision = cfg.hf_hub_id.partition("@")
    try:
        return Path(hf_hub_download(repository, name, revision=revision or None))
    except Exception as error:  # the library and the network beneath it raise what they like
        raise UserError(
            f"{where}: its weights could not be downloaded ({one_line(error)}): fetch {name} of huggingface.co/{repository} on a "
            f"machine with a network, and name it: {where[23:]}=FILE"
        ) from None
