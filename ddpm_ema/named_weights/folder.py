"""Other people's weights: a diffusers folder, with the U-Net and the noise schedule that its own config files describe.

Nothing in such a folder is trusted: the files that count are named, a pickle is never opened, and a network is built only
once its size is known to be that of the weights beside it.
"""

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from ddpm_ema.averaging.files import open_safetensors, read_json, weight_files
from ddpm_ema.config import Config
from ddpm_ema.errors import UserError, explained, one_line
from ddpm_ema.rundir import file_sha256

UNET2D: Any = diffusers.UNet2DModel  # diffusers is not typed
DDPM_SCHEDULER: Any = diffusers.DDPMScheduler
SCHEDULER = "scheduler_config.json"
MOST_TIMESTEPS = 100_000
PREDICTIONS = ("epsilon", "v_prediction", "sample")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")


@dataclass(frozen=True)
class PipelineConfig:
    """What weights are sampled with, as plain values that can be compared."""

    unet: Mapping[str, Any]  # arguments of UNet2DModel
    schedule: Mapping[str, Any] | None  # of DDPMScheduler; None where the folder has none (the settings' counts)


def unet_config_of(unet: Any) -> dict[str, Any]:
    """The arguments of a `UNet2DModel`, without dropout, which sampling does not use. Raises UserError for another network."""
    if not isinstance(unet, UNET2D):
        raise UserError("weights: a network of model.factory makes no ensemble with a diffusers folder")
    return json.loads(json.dumps({name: unet.config[name] for name in _arguments(UNET2D)} | {"dropout": 0.0}))


def build_unet(config: Mapping[str, Any]) -> Any:
    """An untrained `UNet2DModel` of these arguments; no random generator moves."""
    with torch.random.fork_rng(devices=[]):
        return UNET2D.from_config(dict(config))


def schedule_of(scheduler: Any) -> dict[str, Any]:
    """The noise schedule of any diffusers scheduler with betas, as arguments of `DDPMScheduler`."""
    return {
        "num_train_timesteps": len(scheduler.betas),
        "trained_betas": scheduler.betas.tolist(),
        "prediction_type": scheduler.config.prediction_type,
        "variance_type": scheduler.config.get("variance_type") or "fixed_small",  # diffusers' own default
    }


def build_scheduler(schedule: Mapping[str, Any]) -> Any:
    """The `DDPMScheduler` of a `schedule_of`."""
    return DDPM_SCHEDULER(**schedule, timestep_spacing="trailing")


@dataclass(frozen=True)
class PipelineFolder:
    """The folder of a pipeline, of a U-Net alone, or of a checkpoint of diffusers' train_unconditional.py."""

    path: Path

    @cached_property
    def unet_path(self) -> Path:
        """Where the U-Net lies. Raises UserError where that is not one folder."""
        if not self.path.is_dir():
            raise UserError(f"weights {str(self.path)!r}: no diffusers folder, and no weights of the run are called so")
        if (self.path / "unet").is_dir() and (self.path / "unet_ema").is_dir():
            raise UserError(
                f"weights {str(self.path)!r}: holds two networks; name {self.path / 'unet'} (raw) or "
                f"{self.path / 'unet_ema'} (averaged)"
            )
        return self.path / "unet" if (self.path / "unet").is_dir() else self.path

    @cached_property
    def files(self) -> list[Path]:
        """The .safetensors files that diffusers loads: one, or the shards of an index. Raises UserError for anything else."""
        unet = self.unet_path
        with explained("", ValueError, OSError):
            files = weight_files(unet)
        missing = [file.name for file in files if not file.is_file()]
        if missing or not (unet / "config.json").is_file():
            raise UserError(
                f"weights {str(self.path)!r}: no diffusers folder with config.json and {(missing or [files[0].name])[0]} "
                "(a pickle, .bin, is never opened: convert it to safetensors first)"
            )
        return files

    @cached_property
    def config(self) -> PipelineConfig:
        return PipelineConfig(self._unet(), self.schedule())

    def _unet(self) -> dict[str, Any]:
        """Its U-Net's arguments, built without memory. Raises UserError where config.json and the weights do not fit."""
        file, (tensors, elements) = self.unet_path / "config.json", self._sizes()
        given = _json(file)
        if given.get("_class_name") != "UNet2DModel":
            raise UserError(f"{file}: is of a {given.get('_class_name')!s:.80}; only a UNet2DModel can be scored")
        if "quantization_config" in given:
            raise UserError(f"{file}: has a quantization_config; save the weights unquantized")
        levels, layers = given.get("block_out_channels", ()), given.get("layers_per_block", 0)
        if isinstance(levels, list) and isinstance(layers, int) and len(levels) * (layers + 1) > tensors:
            raise UserError(f"{file}: describes more layers than there are tensors ({tensors}) in {self.files[0].name}")
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            unet = _built(UNET2D, given, file)
        described = sum(tensor.numel() for tensor in unet.state_dict().values())
        if described != elements:
            raise UserError(
                f"{file}: describes a network of {described:,} weights, the files beside it hold {elements:,}"
            )
        return unet_config_of(unet)

    def _sizes(self) -> tuple[int, int]:
        """How many tensors and elements the files hold, from their headers."""
        shapes = [shape for file in self.files for shape in _shapes(file)]
        return len(shapes), sum(shape.numel() for shape in shapes)

    def schedule(self) -> dict[str, Any] | None:
        """Its noise schedule as `schedule_of` gives it; None where there is none. Raises UserError for one of another kind."""
        places = [self.path / "scheduler", self.path]
        if (self.path.parent / "model_index.json").is_file():  # the unet folder of a pipeline was named
            places.append(self.path.parent / "scheduler")
        file = next((place / SCHEDULER for place in places if (place / SCHEDULER).is_file()), None)
        if file is None:
            return None
        given = _json(file)
        kinds = {kind.__name__: kind for kind in DDPM_SCHEDULER().compatibles}
        timesteps = given.get("num_train_timesteps", 1000)
        kind = str(given.get("_class_name"))
        if kind not in kinds:
            raise UserError(f"{file}: is of a {kind:.80}, whose noise is no schedule of betas")
        if not isinstance(timesteps, int) or not 2 <= timesteps <= MOST_TIMESTEPS:
            raise UserError(f"{file}: num_train_timesteps: expected 2 to {MOST_TIMESTEPS:,}, got {timesteps!s:.80}")
        scheduler = _built(kinds[kind], given, file)
        betas = getattr(scheduler, "betas", torch.zeros(0))
        fits = betas.ndim == 1 and len(betas) > 1 and bool(((betas >= 0) & (betas <= 1)).all())
        schedule = schedule_of(scheduler) if fits else {}
        if not fits or schedule["prediction_type"] not in PREDICTIONS or schedule["variance_type"] not in VARIANCES:
            raise UserError(
                f"{file}: needs betas from 0 to 1, a prediction_type of {', '.join(PREDICTIONS)}, and a variance_type "
                f"of {', '.join(VARIANCES)}"
            )
        return schedule

    @property
    def key(self) -> str:
        """sha256 over the files that are loaded and what the config files say: 64 hex digits."""
        files = {file.name: sha256_of(file) for file in self.files}
        described = {"files": files, "unet": self.config.unet, "schedule": self.config.schedule}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def read(self, key: str) -> dict[str, Tensor]:
        """fp32 tensors by diffusers' present names. Raises UserError where they are not those of `key`, or not whole."""
        if self.key != key:
            raise UserError(f"weights {str(self.path)!r}: changed while they were being scored; start again")
        options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
        try:
            unet, found = UNET2D.from_pretrained(self.unet_path, **options)
        except Exception as error:  # whatever a strange file makes of diffusers
            raise UserError(f"weights {str(self.path)!r}: cannot be loaded: {one_line(error)}") from None
        wrong = [str(name) for names in found.values() for name in names]
        if wrong:
            raise UserError(f"weights {str(self.path)!r}: do not fit their config.json: {', '.join(wrong[:5])}")
        return {name: tensor.float() for name, tensor in unet.state_dict().items()}

    def check(self, config: Config, num_classes: int | None) -> None:
        """Raises UserError that lists why samples of this pipeline cannot be compared with these data."""
        problems = list(_problems(self.config, config, num_classes))
        if problems:
            raise UserError(f"weights {str(self.path)!r}: cannot be compared here: {'; '.join(problems)}")


def _problems(pipeline: PipelineConfig, config: Config, num_classes: int | None) -> Iterator[str]:
    unet, schedule, data = pipeline.unet, pipeline.schedule, config.data
    size, classes = unet["sample_size"], unet["num_class_embeds"]
    if size is not None and (size if isinstance(size, list) else [size, size]) != [data.image_size] * 2:
        yield f"its images are of size {size}, data.image_size is {data.image_size}"
    if unet["in_channels"] != data.channels:
        yield f"its images have {unet['in_channels']} channels, data.channels is {data.channels}"
    variance = schedule["variance_type"] if schedule is not None else config.diffusion.variance
    outputs = unet["in_channels"] * (2 if variance.startswith("learned") else 1)
    if unet["out_channels"] != outputs:
        yield f"it predicts {unet['out_channels']} channels, and variance {variance} needs {outputs}"
    if unet["class_embed_type"] is not None:
        yield f"its class_embed_type is {unet['class_embed_type']!r}, and only class labels can be given"
    if classes is None and config.model.class_conditional:
        yield "it takes no class labels, and model.class_conditional is true"
    elif classes is not None and not config.model.class_conditional:
        yield "it takes class labels, and model.class_conditional is false"
    elif classes is not None and num_classes is not None and classes not in _allowed(num_classes, config):
        yield f"it has {classes} class embeddings, the data {num_classes} classes (and one more for guidance)"


def _allowed(num_classes: int, config: Config) -> tuple[int, ...]:
    """Class embeddings that labels of the data may index: a last one means "no label", which guidance needs."""
    guided = config.evaluation.guidance_scale != 1
    return (num_classes + 1,) if guided else (num_classes, num_classes + 1)


def _built(kind: Any, given: Mapping[str, Any], file: Path) -> Any:
    """`kind.from_config` of what a stranger's file says; anything that goes wrong there is one message."""
    try:
        return kind.from_config({name: given[name] for name in _arguments(kind) if name in given})
    except Exception as error:
        raise UserError(f"{file}: describes no {kind.__name__}: {one_line(error)}") from None


def _arguments(kind: Any) -> list[str]:
    return [name for name in inspect.signature(kind.__init__).parameters if name not in ("self", "kwargs")]


def _json(file: Path) -> dict[str, Any]:
    with explained("", ValueError, OSError):
        return read_json(file)


def _shapes(file: Path) -> list[torch.Size]:
    with explained("", ValueError, OSError), open_safetensors(file) as opened:
        return [torch.Size(opened.get_slice(name).get_shape()) for name in opened.keys()]  # noqa: SIM118


def sha256_of(path: Path) -> str:
    """Of a file's content; a sweep asks for the same snapshots again and again."""
    return _sha256(path, path.stat().st_mtime_ns)


@cache  # with fewer entries than a run has snapshots, a sweep would find none of them
def _sha256(path: Path, modified: int) -> str:
    return file_sha256(path)
