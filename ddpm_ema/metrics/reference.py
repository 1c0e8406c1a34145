"""What samples are compared with: statistics of a whole data set, cached by content, or a published file of them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ddpm_ema.averaging.files import save_tensors
from ddpm_ema.errors import UserError
from ddpm_ema.messages import logger
from ddpm_ema.metrics.frechet import check_statistics
from ddpm_ema.metrics.neighbours import NEIGHBOURS, inside, neighbour_radii
from ddpm_ema.metrics.statistics import Statistics, statistics_of

SCHEMA = 2


@dataclass(frozen=True)
class Reference:
    """What samples are compared with. A file of statistics has neither features nor shares: no KID, precision or recall then."""

    statistics: Statistics
    origin: Mapping[str, Any]  # what it is, for results.json
    features: Tensor | None = None  # float32 [n, d]
    radii: Tensor | None = None  # float32 [n], of the features, for precision and recall
    warnings: tuple[str, ...] = ()  # sentences that belong beside every score
    saturated: float | None = None  # share of its channel values at 0 or 255
    precision_of_noise: float | None = None  # that images of pure noise reach: where it is high, precision says nothing


def content_key(*, fingerprint: str, split: str, resize: str, extractor: Mapping[str, str]) -> dict[str, Any]:
    """All that reference statistics depend on. A cache entry is used only where every entry is equal.

    `fingerprint`: of the data set, content and preprocessing; `resize`: how images were brought to size; `extractor`: its `identity`.
    """
    packages = ["torch", "torch-fidelity", "torchvision", "numpy"]
    packages += ["timm"] if extractor.get("extractor", "").startswith("timm:") else []  # how it prepares images
    return {
        "schema": SCHEMA,
        "data": fingerprint,
        "split": split,
        "resize": resize,
        **extractor,
        "versions": {name: installed_version(name) for name in packages},
    }


def installed_version(package: str) -> str:
    """`absent` for a package that is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def reference_of(features: Tensor, key: Mapping[str, Any], saturated: float | None = None) -> Reference:
    """The reference of all images of a set, each once, unflipped: their features, float32 `[n, d]`.

    `key` is of `content_key`. Raises UserError for fewer than 2 images.
    """
    count, dim = features.shape
    notes = (f"the reference has {count} images for {dim} feature dimensions",) if count <= dim else ()
    statistics = statistics_of(features, name="the reference")
    return Reference(statistics, dict(key), features.contiguous(), warnings=notes, saturated=saturated)


def with_radii(reference: Reference, noise: Tensor) -> Reference:
    """With what precision and recall need; `noise` are features of pure noise. Time: the square of the number of images."""
    features = reference.features
    if features is None or len(features) <= NEIGHBOURS:
        return reference
    radii = neighbour_radii(features)
    reached = float(inside(noise.cpu(), features, radii).double().mean())
    return replace(reference, radii=radii, precision_of_noise=reached)


def _cache_path(cache_dir: Path, key: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return Path(cache_dir).expanduser() / "reference" / f"{digest[:32]}.safetensors"


def load_cached(cache_dir: Path, key: Mapping[str, Any]) -> Reference | None:
    """The entry of exactly this key. A damaged or foreign entry counts as none, with a warning."""
    path = _cache_path(cache_dir, key)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if json.loads(metadata["key"]) != dict(key) or metadata["sha256"] != _digest(tensors):
            raise ValueError("its content is not what its name says")
        statistics = Statistics(tensors["mu"], tensors["sigma"], int(metadata["count"]))
        check_statistics(statistics, "the cached reference")
        notes = tuple(json.loads(metadata["warnings"]))
        shares = json.loads(metadata["saturated"]), json.loads(metadata["precision_of_noise"])
        return Reference(statistics, dict(key), tensors.get("features"), tensors.get("radii"), notes, *shares)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError, KeyError, UserError) as error:
        logger.warning(f"{path}: not used, made anew: {error}")
        return None


def keep(reference: Reference, cache_dir: Path) -> bool:
    """Writes a cache entry, and says whether it did. Where it cannot be written, that is a warning, and scoring goes on."""
    path = _cache_path(cache_dir, reference.origin)
    tensors = {"mu": reference.statistics.mu, "sigma": reference.statistics.sigma}
    tensors |= {name: tensor for name in ("features", "radii") if (tensor := getattr(reference, name)) is not None}
    metadata = {
        "key": json.dumps(dict(reference.origin), sort_keys=True),
        "count": str(reference.statistics.count),
        "warnings": json.dumps(list(reference.warnings)),
        "saturated": json.dumps(reference.saturated),
        "precision_of_noise": json.dumps(reference.precision_of_noise),
        "sha256": _digest(tensors),
    }
    try:
        save_tensors(path, tensors, metadata)
        return True
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        where = f"{path.parent}: {reason} (--data.cache-dir takes another folder)"
        logger.warning(f"reference statistics are not cached and will be computed again next time: {where}")
        return False


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def read_published(path: Path, dim: int) -> Reference:
    """Statistics from an .npz as EDM or torch-fidelity (mu, sigma) or ADM (mu, sigma and samples' mu_s, sigma_s) writes them.

    Its origin (layout, sha256, file name) is recorded. Such files do not say which extractor or resize made them: only the
    dimension can be checked. Raises UserError for another layout or dimension, or values that are not finite.
    """
    where = f"evaluation.reference: {path}"
    try:
        with open(path, "rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            arrays = {name: file[name] for name in ("mu", "sigma") if name in names}
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or "no .npz of plain arrays (pickled ones are not opened)"
        raise UserError(f"{where}: {reason}") from None
    except Exception as error:  # zipfile and zlib have errors of their own for damaged archives
        raise UserError(f"{where}: damaged .npz: {error}") from None
    if len(arrays) < 2:
        raise UserError(f"{where} holds {sorted(names)}; wanted mu and sigma (EDM, ADM and torch-fidelity layouts)")
    for name, array in arrays.items():
        if array.dtype.kind not in "fiu":
            raise UserError(f"{where}: {name} holds {array.dtype}, wanted real numbers")
    mu, sigma = (torch.from_numpy(arrays[name].astype(np.float64)) for name in ("mu", "sigma"))
    if mu.shape != (dim,) or sigma.shape != (dim, dim):
        shapes = f"mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)}"
        raise UserError(f"{where}: {shapes}, but the extractor gives {dim} features")
    symmetric = torch.allclose(sigma, sigma.T, rtol=1e-3, atol=1e-5 * float(sigma.abs().max()))
    if not symmetric or bool((sigma.diagonal() < 0).any()):
        raise UserError(f"{where}: sigma is no covariance: it is not symmetric, or a variance is negative")
    layout = "ADM" if {"mu_s", "sigma_s"} & names else "EDM or torch-fidelity"
    origin = {"file": path.name, "layout": layout, "sha256": sha256, "bytes": path.stat().st_size}
    statistics = Statistics(mu, (sigma + sigma.T) / 2, 0)
    check_statistics(statistics, f"{path}")
    note = f"reference statistics from {path.name}: no KID, precision or recall, and its extractor cannot be checked"
    return Reference(statistics, origin, warnings=(note,))
