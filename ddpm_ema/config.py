"""Every setting, on one page: what it means, its unit, what it may be, and what a file or a command line may say.

A configuration is YAML validated by pydantic: unknown keys are errors, values are frozen, and all errors come at once, each
with its key path. `load` is the one way in: the file, then dotted overrides, then one validation of the whole.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from ddpm_ema.averaging.profiles import Profile, profile_from_dict, profile_to_dict
from ddpm_ema.errors import UserError

NAME = re.compile(r"[A-Za-z0-9_-]+")
RECONSTRUCTED = re.compile(r"power_0_\d+")
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]


def _profile(value: Any) -> Profile:
    return profile_from_dict(value) if isinstance(value, Mapping) else value


AnyProfile = Annotated[Any, BeforeValidator(_profile), PlainSerializer(profile_to_dict)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class DataSettings(Section):
    """Where the images come from and how they are kept."""

    source: Literal["digits", "torchvision", "folder", "hub"] = "digits"
    """digits (ships inside scikit-learn), a torchvision data set, a folder of images, or a Hugging Face Hub data set."""
    name: str | None = None
    """Name of the torchvision or Hub data set, such as CIFAR10."""
    path: Path | None = None
    """The folder of images; for torchvision, where the data set lies or is downloaded to."""
    split: str = "train"
    """Which split is trained on, where the source has splits."""
    image_size: Annotated[int, Field(ge=4)] = 8
    """Height and width in pixels after centre-crop and antialiased resize."""
    channels: Literal[1, 3] = 1
    """1 (grey) or 3 (RGB)."""
    horizontal_flip: bool = False
    """Mirror half of the training images, drawn anew at every visit. Never applied to reference statistics."""
    storage: Literal["auto", "device", "memory", "mmap", "stream"] = "auto"
    """Where decoded uint8 images are kept: on the device, in memory, in a memory-mapped file, or nowhere (decoded by workers)."""
    num_workers: NonNegative = 2
    """Processes that decode images; used by storage: stream alone."""
    cache_dir: Path | None = None
    """Folder of memory-mapped images and reference statistics; none means ~/.cache/ddpm_ema."""
    max_bad_images: NonNegative = 0
    """How many unreadable images may be skipped (each is named) before it is an error."""
    background: Annotated[int, Field(ge=0, le=255)] = 255
    """Grey level that transparent pixels are laid over."""


class ModelSettings(Section):
    """The U-Net (diffusers UNet2DModel). The defaults are the DDPM paper's CIFAR-10 network."""

    block_out_channels: tuple[Positive, ...] = (128, 256, 256, 256)
    """Channels of each resolution, from fine to coarse."""
    layers_per_block: Positive = 2
    """Residual blocks a resolution."""
    attention: tuple[bool, ...] = (False, True, False, False)
    """Whether each resolution has self-attention, from fine to coarse."""
    attention_head_dim: Positive | None = None
    """Channels an attention head; none means a single head."""
    norm_num_groups: Positive = 32
    """Groups of the group normalisation; must divide every entry of block_out_channels."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability inside residual blocks."""
    class_conditional: bool = False
    """Give the network the class label (and a "no label" class, for guidance)."""
    initialization: Literal["ddpm", "pytorch"] = "ddpm"
    """First weights: ddpm as Ho et al. 2020 (near zero where a residual branch ends); pytorch as diffusers leaves them."""


class DiffusionSettings(Section):
    """The forward process and the objective (Ho et al. 2020; Nichol & Dhariwal 2021)."""

    num_train_timesteps: Annotated[int, Field(ge=2)] = 1000
    """Number of noise levels T."""
    schedule: Literal["linear", "cosine", "sigmoid"] = "linear"
    """Noise schedule of the betas."""
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """First beta of the linear and sigmoid schedules."""
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Last beta of the linear and sigmoid schedules."""
    prediction: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """What the network predicts: the noise, the velocity v (Salimans & Ho 2022), or x_0."""
    variance: Literal["fixed_small", "fixed_large", "learned"] = "fixed_large"
    """Variance of the reverse process; the paper's CIFAR-10 figures use fixed_large; learned doubles the output channels."""
    min_snr_gamma: Annotated[float, Field(gt=0)] | None = None
    """Clamp of the min-SNR loss weight (Hang et al. 2023); none means the paper's unweighted loss."""
    label_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Probability of training a class-conditional network without its label (Ho & Salimans 2022)."""


class TrainingSettings(Section):
    """The optimisation, and how it runs."""

    steps: Positive = 3000
    """Optimizer steps of the whole run."""
    batch_size: Positive = 64
    """Images a step over all processes together: the global batch."""
    micro_batch_size: Positive | None = None
    """Most images one process holds at once; none means its whole share of the batch. Changes memory, not the result."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate; means the same on any number of processes and micro-batches."""
    learning_rate_schedule: Literal["constant", "linear", "cosine", "cyclical"] = "constant"
    """After warm-up: constant; linear or cosine decay to learning_rate_end at the last step; or SWA's cycles down to it."""
    learning_rate_end: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate that decaying and cyclical schedules come down to."""
    cycle_steps: Positive = 1000
    """Steps of one cycle of the cyclical schedule."""
    warmup_steps: NonNegative = 0
    """Steps over which the learning rate rises linearly from zero."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """Adam, or AdamW with weight_decay."""
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of Adam's two moments."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of Adam's second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay; used by adamw alone."""
    gradient_clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Global gradient norm above which gradients are scaled down; none means no clipping."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the network's forward and backward pass. Noising, loss, weights and averages are fp32 always."""
    compile: bool = False
    """Compile the network with torch.compile: slower to start, faster afterwards; needs a C++ compiler on CPU."""
    channels_last: bool = True
    """Keep 4-d tensors in channels-last memory order, which convolutions prefer."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one; cuda where there is none is an error."""
    tf32: bool = True
    """Allow TF32 in training's matrix products and convolutions on CUDA. Feature extraction never uses it."""
    split_averages: bool | None = None
    """Keep 1/n of the averages on each of n processes; none means yes where there are several."""
    resume: Literal["auto", "fresh", "never"] = "auto"
    """auto goes on where the folder stands; fresh moves what is there aside and starts over; never refuses a used folder."""
    allow_batch_size_change: bool = False
    """Let a resumed run go on with another global batch (its data stream then differs from an uninterrupted run's)."""
    allow_new_averages: bool = False
    """Let a resumed run add averages: they start at the raw weights of that step."""
    world_size: Positive | None = None
    """Number of processes the run must have; a launch that gives another number is refused. None means any."""
    timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds after which a process that no longer answers is given up."""
    max_skipped: Positive = 50
    """fp16 steps skipped in a row (overflow) after which the run counts as diverged."""
    log_every: Positive = 50
    """Steps between rows of metrics.jsonl; figures are means over those steps."""
    trackers: tuple[str, ...] = ()
    """Further loggers that accelerate knows: tensorboard, wandb, ...; a failing one is dropped with a warning."""
    sample_every: NonNegative = 0
    """Steps between sample grids (raw and every copy, same noise); 0 means none."""
    sample_images: Positive = 16
    """Images in each row of a sample grid."""


class CheckpointSettings(Section):
    """What is kept of a run while it trains. The last step is always kept."""

    every: Positive = 1000
    """Steps between checkpoints."""
    keep: Annotated[int, Field(ge=2)] = 2
    """How many of the newest checkpoints are kept; never fewer than two."""
    keep_every: Positive | None = None
    """Checkpoints at multiples of this many steps are kept for good; none means none are."""
    snapshots_every: NonNegative = 0
    """Steps between snapshots of the power-function averages, for post-hoc reconstruction; 0 means none."""
    snapshot_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision snapshots are stored in; docs/averaging.md says what bfloat16 costs."""


class SweepSettings(Section):
    """Reconstructed averages of other widths, scored one after another. Ranges are first:last:count."""

    stds: str | None = None
    """Power-function widths sigma_rel, evenly spaced, such as 0.02:0.25:12."""
    decays: str | None = None
    """Constant decays, evenly spaced in log(1 - decay), such as 0.99:0.99999:8."""
    search: bool = False
    """Find the best width by a bracketing search that spends few images on poor candidates, instead of scoring all."""
    num_images: Positive | None = None
    """Images a candidate; none means evaluation.num_images."""

    @model_validator(mode="after")
    def _ranges(self) -> SweepSettings:
        for field in ("stds", "decays"):
            text = getattr(self, field)
            if text is not None and not re.fullmatch(r"[0-9.eE+-]+:[0-9.eE+-]+:[0-9]+", text):
                raise ValueError(f"{field}: {text!r} is not first:last:count, such as 0.02:0.25:12")
        return self


class EvaluationSettings(Section):
    """Sampling and scoring. The same for every copy, so that copies can be compared image by image."""

    weights: tuple[str, ...] = ()
    """Which weights: raw, names under averages, power_0_075 (reconstructed), NAME@STEP, a diffusers folder, or A+B
    (prediction ensemble). Empty means raw and every average."""
    steps: tuple[Positive, ...] | Literal["last", "all"] = "last"
    """Which checkpoints: the last, all that are kept, or a list of steps."""
    num_images: Annotated[int, Field(ge=2)] = 50_000
    """Images sampled from every copy."""
    batch_size: Positive = 256
    """Images one process samples at once. Changes memory and speed, not the images."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Image i's noise is a function of this seed, i and the sampling step."""
    sampler: Literal["ddpm", "ddim", "dpm_solver++"] = "ddpm"
    """Ancestral DDPM, DDIM, or DPM-Solver++ (2M)."""
    num_inference_steps: Positive = 1000
    """Network evaluations an image."""
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """DDIM's noise: 0 is deterministic, 1 is ancestral-like."""
    clip_sample: bool = True
    """Clip the predicted x_0 to [-1, 1] at every step (ddpm and ddim)."""
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    """Classifier-free guidance of class-conditional networks; 1 means none."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the network; the sampler's state is fp32 always."""
    compile: bool = False
    """Compile the sampling network once; weights are loaded into it by name."""
    extractor: str = "inception-v3-compat"
    """Feature extractor: a name torch-fidelity knows, or classifier (scripts/train_features.py)."""
    extractor_path: Path | None = None
    """Weights of the extractor; none means torch-fidelity's download, or <output_dir>/features.safetensors for classifier."""
    extractor_batch_size: Positive = 256
    """Images in one pass of the feature extractor."""
    reference: str = "train"
    """What samples are compared with: a split of the data (train, test), or a published .npz of statistics."""
    groups: Annotated[int, Field(ge=10)] = 20
    """Groups of images of the delete-a-group jackknife that gives standard errors and takes the bias away."""
    kid_subsets: Positive = 100
    """Subsets of the kernel distance."""
    kid_subset_size: Annotated[int, Field(ge=2)] = 1000
    """Images in a subset; capped at the number there are."""
    precision_recall: bool = True
    """Also compute precision and recall (k = 3 nearest neighbours)."""
    grid_images: Positive = 16
    """Images in each row of the grid."""
    sweep: SweepSettings = SweepSettings()
    """A sweep over widths of the average."""
    every: NonNegative = 0
    """Steps between quick scorings while training; 0 means none."""
    every_num_images: Annotated[int, Field(ge=2)] = 1000
    """Images a copy of a quick scoring."""


def _names(averages: dict[str, Any]) -> dict[str, Any]:
    for name in averages:
        if not NAME.fullmatch(str(name)):
            raise ValueError(f"{name!r} is no name: use letters, digits, _ and - (a dot breaks diffusers' variant=)")
        if name == "raw":
            raise ValueError("'raw' names the weights that are not averaged; call this average otherwise")
    return averages


class Config(Section):
    """All settings of a run."""

    output_dir: Path = Path("runs/ddpm")
    """The run directory: all that passes between train, score, report and export."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Everything random in training is a function of this, the step and the position in the global batch."""
    data: DataSettings = DataSettings()
    """Images."""
    model: ModelSettings = ModelSettings()
    """Network."""
    diffusion: DiffusionSettings = DiffusionSettings()
    """Objective."""
    training: TrainingSettings = TrainingSettings()
    """Optimisation."""
    averages: Annotated[dict[str, AnyProfile], AfterValidator(_names)] = Field(default_factory=dict)
    """Averaged copies to keep: name -> profile, such as ema_0_999: {kind: constant, decay: 0.999}."""
    checkpoints: CheckpointSettings = CheckpointSettings()
    """Checkpoints."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Sampling and scoring."""

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        problems = list(_disagreements(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _disagreements(config: Config) -> Iterable[str]:
    """Yields `key.path: message` for what only several sections together can show."""
    data, training = config.data, config.training
    if data.source in ("torchvision", "hub") and data.name is None:
        yield f"data.name: a {data.source} source needs the name of a data set"
    if data.source == "folder" and data.path is None:
        yield "data.path: a folder source needs the folder"
    if training.micro_batch_size is not None and training.micro_batch_size > training.batch_size:
        yield f"training.micro_batch_size: {training.micro_batch_size} is more than the global batch, {training.batch_size}"
    if len(config.model.attention) != len(config.model.block_out_channels):
        yield "model.attention: needs one entry for each of model.block_out_channels"
    known = ["raw", *config.averages]
    for text in config.evaluation.weights:
        for name in text.split("+"):
            name, _, step = name.partition("@")
            if step and not step.isdigit():
                yield f"evaluation.weights: {text!r}: the part after @ must be a step"
            if (
                NAME.fullmatch(name)
                and name not in known
                and not RECONSTRUCTED.fullmatch(name)
                and not Path(name).is_dir()
            ):
                yield f"evaluation.weights: {name!r} is neither raw nor under averages{_nearest(name, known)}"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but `1e-3` is a number and a repeated key is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*(?:[eE][-+]?[0-9]+)|\.[0-9_]+(?:[eE][-+]?[0-9]+)?)$"),
    list("-+0123456789."),
)


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.value in seen:
            raise UserError(
                f"{key.start_mark.name}, line {key.start_mark.line + 1}: {key.value!r} stands there twice; keep one"
            )
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_repeats)


def _parse(text: Any, where: str) -> Any:
    """YAML (an open file or a string) -> plain objects; `where` names it in the message."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not YAML: {' '.join(str(error).split())}") from None


def load(path: Path | str | None, overrides: Mapping[str, list[str]] | None = None) -> Config:
    """The file at `path` (none: the defaults) with dotted `overrides` ({"training.steps": ["500"]}) laid over it.

    Several tokens make a list. A value is read as YAML reads it, so `1e-3` is a number and `null` is none.
    Raises UserError that lists every error with its key path and the nearest name.
    """
    tree: Any = {}
    if path is not None:
        try:
            with open(path, encoding="utf-8") as file:
                tree = _parse(file, str(path)) or {}
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--config {path}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
        if not isinstance(tree, dict):
            raise UserError(f"{path}: must be a mapping of sections, not {type(tree).__name__}")
    for key, tokens in (overrides or {}).items():
        _set(tree, key, [_parse(token, f"--{key}") for token in tokens])
    return validate(tree, where=str(path) if path is not None else "settings")


def _is_list(key: str) -> bool:
    """Whether the setting at this key path takes several values."""
    section: Any = Config
    *parents, leaf = key.split(".")
    for name in parents:
        field = getattr(section, "model_fields", {}).get(name)
        section = field.annotation if field else None
    field = getattr(section, "model_fields", {}).get(leaf)
    return field is not None and "tuple" in str(field.annotation)


def _set(tree: dict[str, Any], key: str, values: list[Any]) -> None:
    """Lays one override into the tree, in place."""
    *parents, leaf = key.split(".")
    node = tree
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise UserError(f"--{key}: {name} is a value, not a section")
    single = len(values) == 1 and not (_is_list(key) and values[0] not in ("last", "all"))
    node[leaf] = (values[0] if single else values) if values else True


def validate(tree: Mapping[str, Any], where: str = "settings") -> Config:
    """Plain objects -> Config, or one UserError with every problem."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [line for problem in error.errors() for line in _explain(problem)]
        raise UserError(
            "\n".join([f"{where}: {len(lines)} bad setting{'s' if len(lines) > 1 else ''}", *lines])
        ) from None


def _explain(problem: Any) -> list[str]:
    """One pydantic error -> lines `  key.path: what was expected (got ...)`."""
    path = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        return [f"  {'.'.join(path)}: unknown setting{_nearest(path[-1], _siblings(path))}"]
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        prefix = f"{'.'.join(path)}: " if path else ""
        return [f"  {prefix}{line}" for line in message.split("\n")]
    got = problem["input"]
    nearest = _nearest(got, re.findall(r"'([^']+)'", message)) if problem["type"] == "literal_error" else ""
    return [f"  {'.'.join(path)}: {message[0].lower()}{message[1:]}{nearest} (got {got!r})"]


def _siblings(path: list[str]) -> list[str]:
    """Names that are allowed where `path` ends, and as dotted paths those of every section."""
    section: Any = Config
    for name in path[:-1]:
        field = getattr(section, "model_fields", {}).get(name)
        section = field.annotation if field else None
    here = list(getattr(section, "model_fields", {}))
    elsewhere = [
        f"{name}.{leaf}"
        for name, field in Config.model_fields.items()
        for leaf in getattr(field.annotation, "model_fields", {})
        if leaf == path[-1]
    ]
    return elsewhere or here


def _nearest(name: Any, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` or, with nothing near, the names there are."""
    known = list(known)
    exact = [k for k in known if k.rpartition(".")[2] == name]
    near = exact or difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known here: {', '.join(known)}" if known else ""


def to_dict(config: Config) -> dict[str, Any]:
    """Plain JSON- and YAML-able objects that `validate` takes back."""
    return config.model_dump(mode="json")


def to_yaml(config: Config) -> str:
    """The resolved settings as a file."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def digest(value: Any) -> str:
    """Twelve hex digits of the sha256 of plain objects, keys sorted: names a set of settings."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
