"""Hugging Face Hub image sets, through `datasets` (the extra `hub`): by name, a local folder, or one saved to disk."""

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ddpm_ema.data.source import Source
from ddpm_ema.errors import UserError, one_line


def open_hub(name: str, split: str) -> Source:
    """Opens a Hub data set: its first column of images, and its first ClassLabel column as labels.

    `name` is `owner/set`, `owner/set:subset`, or a local folder that `datasets` reads. Raises UserError where the extra `hub` is
    not installed, or the set, the split or an image column is missing.
    """
    try:
        import datasets
    except ImportError:
        raise UserError("data.source hub needs the datasets library: pip install 'ddpm_ema[hub]'") from None
    data = _load(datasets, name, split)
    column = next((key for key, kind in data.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise UserError(f"data.name: {name} has no column of images; its columns are {', '.join(data.features)}")
    if len(data) == 0:
        raise UserError(f"data.name: split {split!r} of {name} holds no images")
    label = next((key for key, kind in data.features.items() if isinstance(kind, datasets.ClassLabel)), None)
    labels, num_classes = None, None
    if label is not None:
        labels = torch.tensor(data.with_format(None)[label][:], dtype=torch.int64)
        num_classes = data.features[label].num_classes
        if int(labels.min()) < 0:
            labels, num_classes = None, None  # hidden labels of a test split
    # Undecoded, so that damaged images and every mode are ours to handle.
    images = data.select_columns([column]).cast_column(column, datasets.Image(decode=False))

    def read(index: int) -> Image.Image:
        cell = images[index][column]
        with Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]) as image:
            image.load()
        return image

    stamp = [name, split, column, str(data.info.version), getattr(data, "_fingerprint", "")]
    return Source(name, len(data), read, lambda index: f"{name}[{index}]", stamp, labels, num_classes)


def _load(datasets: Any, name: str, split: str) -> Any:
    try:
        if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            data = datasets.load_from_disk(name)
            if not isinstance(data, datasets.DatasetDict):
                return data
            if split not in data:
                raise UserError(f"data.split: {name} has no split {split!r}, only {', '.join(data)}")
            return data[split]
        place, _, subset = (name, "", "") if Path(name).exists() else name.partition(":")
        return datasets.load_dataset(place, subset or None, split=split)
    except UserError:
        raise
    except Exception as error:  # the library and the network beneath it raise what they like
        raise UserError(
            f"Hub data set {name!r}, split {split!r}, could not be loaded ({one_line(error)}): check its name and the "
            "network, or set data.name to a folder that holds it"
        ) from None
