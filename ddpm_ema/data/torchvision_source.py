"""torchvision's image sets by name. Importing this imports torchvision, which takes seconds."""

import contextlib
import inspect
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor

from ddpm_ema.data.decode import readable
from ddpm_ema.data.source import Source
from ddpm_ema.errors import UserError, nearest, one_line


def open_torchvision(name: str, split: str, root: Path) -> Source:
    """Opens a torchvision image set under `root`; downloads it if it is missing.

    `name` is the class, with further arguments of its constructor in brackets: `CIFAR10`, `EMNIST(split=letters)`. Raises UserError
    for an unknown name, argument or split, or a set that is missing and cannot be downloaded.
    """
    kind, arguments = _parse(name)
    parameters = _parameters(kind)
    unknown = sorted(set(arguments) - set(parameters))
    if unknown:
        raise UserError(f"data.name: {kind.__name__} takes no {', '.join(unknown)}; known: {', '.join(parameters)}")
    arguments |= _split_argument(kind.__name__, parameters, arguments, split)
    data = _construct(kind, parameters, root, arguments)
    _check_images(name, data)
    labels, num_classes = _labels(data)
    stamp = [name, split, str(len(data)), str(root.resolve())]
    return Source(
        name, len(data), lambda index: data[index][0], lambda index: f"{name}[{index}]", stamp, labels, num_classes
    )


def _parse(name: str) -> tuple[Any, dict[str, Any]]:
    match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", name)
    word = match[1] if match else name
    sets = [known for known in torchvision.datasets.__all__ if known not in ("VisionDataset", "DatasetFolder")]
    if match is None or word not in sets:
        raise UserError(f"data.name: torchvision has no data set {name!r}{nearest(word, sets, or_all=False)}")
    pairs = [pair.partition("=") for pair in (match[2] or "").split(",") if pair.strip()]
    return getattr(torchvision.datasets, word), {key.strip(): _value(text.strip()) for key, _, text in pairs}


def _value(text: str) -> Any:
    if text in ("True", "true", "False", "false"):
        return text in ("True", "true")
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _parameters(kind: Any) -> dict[str, inspect.Parameter]:
    """Parameters of the constructor, and of its bases' where it passes keywords on."""
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if "__init__" in vars(base):
            own = dict(list(inspect.signature(base.__init__).parameters.items())[1:])
            found = {**own, **found}
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
                break
    return {key: one for key, one in found.items() if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)}


def _split_argument(
    name: str, parameters: dict[str, inspect.Parameter], given: dict[str, Any], split: str
) -> dict[str, Any]:
    """The keyword that selects the split in this class: `train=`, Omniglot's `background=`, or `split=`."""
    for key in ("train", "background"):
        if key in parameters and key not in given:
            if split not in ("train", "test"):
                raise UserError(f"data.split: {name} has the splits train and test, and no {split!r}")
            return {key: split == "train"}
    if "split" in parameters and "split" not in given:
        return {"split": split}
    if split != "train" and "split" not in given:
        raise UserError(f"data.split: {name} has one split, train, and no {split!r}")
    return {}


def _construct(kind: Any, parameters: dict[str, inspect.Parameter], root: Path, arguments: dict[str, Any]) -> Any:
    given = ("root", *arguments)
    if missing := [key for key, one in parameters.items() if one.default is one.empty and key not in given]:
        raise UserError(f"data.name: {kind.__name__} also needs {missing[0]}: {kind.__name__}({missing[0]}=...)")
    if "root" in parameters:
        arguments = {"root": str(root), **arguments}
    attempts = [{}, {"download": True}] if "download" in parameters and "download" not in arguments else [{}]
    failures: list[Exception] = []
    for attempt in attempts:
        try:
            data = kind(**arguments, **attempt)
            if len(data) == 0:
                raise UserError(f"data.name: {kind.__name__} holds no images under {root}")
            return data
        except (ValueError, TypeError) as error:  # torchvision's own check of an argument, or the lack of one
            raise UserError(f"data.name, data.split: {kind.__name__}: {one_line(error)}") from None
        except (OSError, RuntimeError, ImportError) as error:  # not there; no network; a reading library is missing
            failures.append(error)
    how = "downloading it failed" if len(attempts) > 1 else "it has no download"
    raise UserError(
        f"torchvision's {kind.__name__} is not under {root} and {how} ({one_line(failures[-1])}): copy the set there from a "
        "machine that has it (data.path names the folder), or connect this one"
    )


def _check_images(name: str, data: Any) -> None:
    for _, item in islice(readable(data.__getitem__, range(len(data))), 1):
        image = item[0] if isinstance(item, tuple) else None
        if not isinstance(image, Image.Image) and not (isinstance(image, np.ndarray) and image.ndim in (2, 3)):
            raise UserError(f"data.name: {name} gives {type(image).__name__} and not images; choose a set of images")


def _labels(data: Any) -> tuple[Tensor | None, int | None]:
    """The class of every image if the targets are classes; taken from an attribute if one holds the same targets."""
    size = len(data)
    probes = islice(readable(data.__getitem__, chain((0, size // 3, size // 2, size - 1), range(size))), 4)
    seen = {index: item[1] for index, item in probes}
    if {isinstance(target, (int, np.integer)) and not isinstance(target, bool) for target in seen.values()} != {True}:
        return None, None
    right = (found for found in _candidates(data) if len(found) == size and all(found[i] == seen[i] for i in seen))
    labels = next(right, None)
    if labels is None:
        labels = torch.zeros(size, dtype=torch.int64)
        for index, item in readable(data.__getitem__, range(size)):
            labels[index] = int(item[1])
    if int(labels.min()) < 0:
        return None, None  # STL10 marks images without a label by -1
    num_classes = max(len(getattr(data, "classes", ())), int(labels.max()) + 1)
    return labels, num_classes


def _candidates(data: Any) -> Iterator[Tensor]:
    """Attributes in which torchvision's classes keep their targets, as int64 `[N]`."""
    for name in ("targets", "labels", "_labels", "y", "_samples"):
        value = getattr(data, name, ())
        with contextlib.suppress(TypeError, ValueError):
            found = np.asarray([target for _, target in value] if name == "_samples" else value)
            if found.ndim == 1 and found.dtype.kind in "iu":
                yield torch.from_numpy(found.astype(np.int64))
