"""Every setting on one page: what it means, its unit, what it may be, and what depends on it (`Effect`)."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from enum import Flag, auto
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from ddpm_ema.averaging.lengths import in_steps, resolve_lengths
from ddpm_ema.averaging.profiles import Profile, profile_from_dict, profile_to_dict
from ddpm_ema.errors import nearest
from ddpm_ema.weight_names import NAME, parse, profile_named

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class Effect(Flag):
    """What depends on a setting. Every setting carries one mark; each list of settings that must agree is derived from the marks."""

    FREE = 0
    """May change at any time. Where it changes the weights (steps, learning rate), their sha256 says so."""
    RUN = auto()
    """Defines the training run: a resumed run must agree."""
    SAMPLES = auto()
    """Changes the images sampled from given weights: part of the scoring's identity. With RUN: scoring must agree with training."""
    SCORES = auto()
    """Changes the figures of given images: part of the scoring's identity."""
    CONTENT = auto()
    """Says where data or an extractor are found. They are compared by fingerprint or sha256, not by this setting."""


FREE, RUN, SAMPLES, SCORES, CONTENT = Effect.FREE, Effect.RUN, Effect.SAMPLES, Effect.SCORES, Effect.CONTENT


def _profile(value: Any, info: ValidationInfo) -> Profile:
    if isinstance(value, Mapping):
        training = info.data.get("training") or TrainingSettings()  # a bad section is reported by itself
        value = resolve_lengths(value, num_steps=training.steps, batch_size=training.batch_size)
    return value if isinstance(value, Profile) else profile_from_dict(value)


def _name(name: Any) -> Any:
    if not NAME.fullmatch(str(name)):
        raise ValueError(f"{name!r} is no name: use letters, digits, _ and - (a dot breaks diffusers' variant=)")
    if name == "raw":
        raise ValueError("'raw' names the weights that are not averaged; call this average otherwise")
    return name


def _range(text: str) -> str:
    if not re.fullmatch(r"[0-9.eE+-]+:[0-9.eE+-]+:[0-9]+", text):
        raise ValueError(f"{text!r} is not first:last:count, such as 0.02:0.25:12")
    return text


AverageName = Annotated[str, AfterValidator(_name)]
AnyProfile = Annotated[Profile, PlainValidator(_profile), PlainSerializer(profile_to_dict)]
Range = Annotated[str, AfterValidator(_range)]


INTERVAL = "a number of steps, or a share of training.steps such as 5%"
"""Marks a setting that `Config` takes as such a share, too."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _not_true(cls, value: Any, info: ValidationInfo) -> Any:
        if value is True and "bool" not in str(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("needs a value, not true")  # which pydantic would take for 1
        return value


class DataSettings(Section):
    """Where the images come from and how they are kept."""

    source: Annotated[Literal["digits", "torchvision", "folder", "hub"], CONTENT] = "digits"
    """digits (comes with scikit-learn), a torchvision data set, a folder of images, or a Hugging Face Hub data set."""
    name: Annotated[str | None, CONTENT] = None
    """Name of the torchvision or Hub data set, such as CIFAR10."""
    path: Annotated[Path | None, CONTENT] = None
    """The folder of images; for torchvision, the folder the data set is read from or downloaded to."""
    split: Annotated[str, CONTENT] = "train"
    """The split that is trained on, if the source has splits."""
    held_out: Annotated[BelowOne, RUN | SAMPLES] = 0.0
    """Share of that split that is never trained on, chosen by the images' pixels: copies of an image lie on one side."""
    image_size: Annotated[int, Field(ge=4), RUN | SAMPLES] = 8
    """Height and width in pixels, after a centre crop and an antialiased resize."""
    channels: Annotated[Literal[1, 3], RUN | SAMPLES] = 1
    """1 (grey) or 3 (RGB)."""
    horizontal_flip: Annotated[bool, RUN] = False
    """Mirror each training image with probability 1/2, drawn at every visit. Never applied to reference statistics."""
    storage: Annotated[Literal["auto", "device", "memory", "mmap"], FREE] = "auto"
    """Where decoded uint8 images are kept: on the device, in memory, or in a memory-mapped file. auto: up to 1 GiB on the device."""
    cache_dir: Annotated[Path | None, FREE] = None
    """Folder of memory-mapped images and reference statistics; null means $XDG_CACHE_HOME/ddpm_ema, by default ~/.cache/ddpm_ema."""
    max_bad_images: Annotated[NonNegative, CONTENT] = 0
    """Number of unreadable images that may be skipped; each is named, and one more is an error."""
    background: Annotated[int, Field(ge=0, le=255), CONTENT] = 255
    """Grey level behind transparent pixels."""

    @property
    def cache_folder(self) -> Path:
        """`cache_dir`, or the default for every kind of cached data."""
        return self.cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ddpm_ema"


class ModelSettings(Section):
    """The U-Net (diffusers UNet2DModel), or your own network. The defaults are the DDPM paper's CIFAR-10 network."""

    factory: Annotated[str | None, Field(pattern=r"^[\w.]+:\w+$"), RUN | SAMPLES] = None
    """package.module:function, which makes the network in place of the U-Net (docs/extending.md); of the other settings here only
    class_conditional then counts. It is code that runs: a run directory's is taken only if it is named again on the command line."""
    block_out_channels: Annotated[tuple[Positive, ...], Field(min_length=1), RUN | SAMPLES] = (128, 256, 256, 256)
    """Channels at each resolution, from fine to coarse."""
    layers_per_block: Annotated[Positive, RUN | SAMPLES] = 2
    """Residual blocks per resolution."""
    attention: Annotated[tuple[bool, ...], RUN | SAMPLES] = (False, True, False, False)
    """Whether each resolution has self-attention, from fine to coarse."""
    attention_head_dim: Annotated[Positive | None, RUN | SAMPLES] = None
    """Channels per attention head; null means a single head."""
    norm_num_groups: Annotated[Positive, RUN | SAMPLES] = 32
    """Groups of the group normalisation; divides every entry of block_out_channels."""
    dropout: Annotated[BelowOne, RUN] = 0.0
    """Dropout probability inside residual blocks."""
    layout: Annotated[Literal["ddpm", "diffusers"], RUN | SAMPLES] = "ddpm"
    """Time embedding, padding and normalisation epsilon: those of the DDPM paper, or diffusers' defaults."""
    class_conditional: Annotated[bool, RUN | SAMPLES] = False
    """Give the network the class label, and a "no label" class for guidance."""
    initialization: Annotated[Literal["ddpm", "pytorch"], RUN] = "ddpm"
    """Initial weights: of Ho et al. 2020 (near zero where a residual branch ends), or PyTorch's."""


class DiffusionSettings(Section):
    """The forward process and the objective (Ho et al. 2020; Nichol & Dhariwal 2021)."""

    num_train_timesteps: Annotated[int, Field(ge=2), RUN | SAMPLES] = 1000
    """Number of noise levels T."""
    schedule: Annotated[Literal["linear", "cosine", "sigmoid"], RUN | SAMPLES] = "linear"
    """Noise schedule of the betas."""
    beta_start: Annotated[float, Field(gt=0, lt=1), RUN | SAMPLES] = 1e-4
    """First beta of the linear and sigmoid schedules."""
    beta_end: Annotated[float, Field(gt=0, lt=1), RUN | SAMPLES] = 0.02
    """Last beta of the linear and sigmoid schedules."""
    prediction: Annotated[Literal["epsilon", "v_prediction", "sample"], RUN | SAMPLES] = "epsilon"
    """What the network predicts: the noise, the velocity v (Salimans & Ho 2022), or x_0."""
    variance: Annotated[Literal["fixed_small", "fixed_large", "learned"], RUN | SAMPLES] = "fixed_large"
    """Variance of the reverse process. The paper's CIFAR-10 figures use fixed_large; learned doubles the output channels."""
    min_snr_gamma: Annotated[PositiveFloat | None, RUN] = None
    """Clamp of the min-SNR loss weight (Hang et al. 2023); null means the paper's unweighted loss."""
    label_dropout: Annotated[float, Field(ge=0, le=1), RUN] = 0.1
    """Probability of training a class-conditional network without its label (Ho & Salimans 2022)."""


class TrainingSettings(Section):
    """The optimisation and how it runs."""

    steps: Annotated[Positive, FREE] = 3000
    """Optimizer steps of the whole run."""
    batch_size: Annotated[Positive, RUN] = 64
    """Global batch: images per step, over all processes."""
    micro_batch_size: Annotated[Positive | None, FREE] = None
    """Most images that one process holds at once; null means its whole part of the batch. Changes memory, not the result."""
    learning_rate: Annotated[PositiveFloat, FREE] = 2e-4
    """Peak learning rate. It does not depend on the number of processes or micro-batches."""
    learning_rate_schedule: Annotated[Literal["constant", "linear", "cosine", "cyclical"], FREE] = "constant"
    """After warm-up: constant, a linear or cosine decay to learning_rate_end at the last step, or SWA's cycles down to it."""
    learning_rate_end: Annotated[float, Field(ge=0), FREE] = 0.0
    """Final learning rate of the decays and of each cycle."""
    cycle_steps: Annotated[Positive, INTERVAL, FREE] = 1000
    """Steps of one cycle of the cyclical schedule."""
    warmup_steps: Annotated[NonNegative, INTERVAL, FREE] = 0
    """Steps over which the learning rate rises linearly from zero."""
    optimizer: Annotated[Literal["adam", "adamw"], RUN] = "adam"
    """Adam, or AdamW with weight_decay."""
    adam_betas: Annotated[tuple[BelowOne, BelowOne], RUN] = (0.9, 0.999)
    """Decay rates of Adam's two moments."""
    adam_epsilon: Annotated[PositiveFloat, RUN] = 1e-8
    """Added to the root of Adam's second moment."""
    weight_decay: Annotated[float, Field(ge=0), RUN] = 0.0
    """Decoupled weight decay; used only by adamw."""
    gradient_clip: Annotated[PositiveFloat | None, RUN] = 1.0
    """Largest global gradient norm; above it, gradients are scaled down. null means no clipping."""
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], RUN] = "no"
    """Precision of the network's forward and backward pass. Noising, loss, weights and averages are always fp32."""
    compile: Annotated[bool, FREE] = False
    """Compile the network with torch.compile: slow start, faster steps; needs a C++ compiler on CPU."""
    channels_last: Annotated[bool, FREE] = True
    """Keep 4-d tensors in channels-last memory order, which is faster for convolutions."""
    split_averages: Annotated[bool | None, FREE] = None
    """Keep 1/n of the averages on each of n processes; null means yes with several processes."""
    resume: Annotated[Literal["auto", "fresh", "never"], FREE] = "auto"
    """auto resumes from the newest checkpoint; fresh moves the old files aside and starts at step 0; never refuses a used folder."""
    allow_batch_size_change: Annotated[bool, FREE] = False
    """Let a resumed run use another global batch; its data order then differs from that of an uninterrupted run."""
    allow_new_averages: Annotated[bool, FREE] = False
    """Let a resumed run add averages; they start at the raw weights of that step."""
    max_skipped: Annotated[Positive, FREE] = 50
    """Consecutive fp16 steps skipped by overflow after which the run counts as diverged."""
    log_every: Annotated[Positive, INTERVAL, FREE] = 50
    """Steps between rows of metrics.jsonl; figures are means over those steps."""
    trackers: Annotated[tuple[str, ...], FREE] = ()
    """Loggers of accelerate to use as well (tensorboard, wandb, ...); one that fails is dropped with a warning."""
    sample_every: Annotated[NonNegative, INTERVAL, FREE] = 0
    """Steps between sample grids (raw and every average, same noise); 0 means none."""
    sample_images: Annotated[Positive, FREE] = 16
    """Images per row of a sample grid."""

    def learning_rate_at(self, step: float) -> float:
        """Learning rate of the optimizer step after `step` completed ones: a pure function, so it has no state to resume.

        Linear warm-up (Goyal et al. 2017), then constant, linear or cosine decay (Loshchilov & Hutter 2017) that reaches
        `learning_rate_end` at the last step, or the saw-tooth cycles of SWA (Izmailov et al. 2018, eq. 2).
        """
        peak, end = self.learning_rate, self.learning_rate_end
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        match self.learning_rate_schedule:
            case "constant":
                return peak
            case "linear":
                return peak + (end - peak) * min(1.0, done)
            case "cosine":
                return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
            case "cyclical":
                phase = (step - self.warmup_steps) % self.cycle_steps / max(1, self.cycle_steps - 1)
                return peak + (end - peak) * phase

    def step_variance(self, step: float) -> float:
        """Squared size of the step after `step`, relative to a step at the peak learning rate: the weight of post-hoc solutions."""
        return (self.learning_rate_at(step) / self.learning_rate) ** 2


class MachineSettings(Section):
    """Devices and processes of a stage. None of these settings changes a run."""

    device: Annotated[Literal["auto", "cpu", "cuda"], FREE] = "auto"
    """auto uses CUDA if there is a device; cuda without one is an error."""
    tf32: Annotated[bool, FREE] = True
    """Allow TF32 in training's matrix products and convolutions on CUDA. Feature extraction never uses it."""
    world_size: Annotated[Positive | None, FREE] = None
    """Number of processes that the run must have; another number is refused. null means any."""
    timeout: Annotated[PositiveFloat, FREE] = 600.0
    """Seconds after which a process that does not answer counts as lost."""


class CheckpointSettings(Section):
    """What is stored of a run while it trains. The last step is always stored."""

    every: Annotated[Positive, INTERVAL, FREE] = 1000
    """Steps between checkpoints."""
    keep: Annotated[int, Field(ge=2), FREE] = 2
    """Number of newest checkpoints that are kept, at least two."""
    keep_every: Annotated[Positive | None, INTERVAL, FREE] = None
    """Checkpoints at multiples of this number of steps are never deleted; null means that all but the newest are."""
    snapshots_every: Annotated[NonNegative, INTERVAL, FREE] = 0
    """Steps between snapshots for post-hoc reconstruction (ddpm-ema reconstruct --plan); the initial weights and the last step
    are also stored. 0 means none."""
    snapshots: Annotated[tuple[str, ...], FREE] = ()
    """Weights that snapshots are taken of: names under averages, and raw. Empty means the power functions and uniform averages."""
    snapshot_dtype: Annotated[Literal["float32", "bfloat16"], FREE] = "float32"
    """Precision of stored snapshots; docs/averaging.md says what bfloat16 costs."""


class SweepSettings(Section):
    """Reconstructed averages of other widths, scored in turn. A range is first:last:count."""

    stds: Annotated[Range | None, FREE] = None
    """Power-function widths sigma_rel, evenly spaced, such as 0.02:0.25:12."""
    decays: Annotated[Range | None, FREE] = None
    """Constant decays, evenly spaced in log(1 - decay), such as 0.99:0.99999:8."""
    cooldowns: Annotated[Range | None, FREE] = None
    """Numbers of last steps over which a linear decay of the learning rate is emulated, evenly spaced, such as 150:1050:7."""
    search: Annotated[bool, FREE] = False
    """Find the best width by a bracketing search, which spends few images on poor candidates, instead of scoring all."""
    num_images: Annotated[Positive | None, FREE] = None
    """Images per candidate; null means evaluation.num_images."""


class EvaluationSettings(Section):
    """Sampling and scoring: the same for all weights, so that they can be compared image by image."""

    weights: Annotated[tuple[str, ...], FREE] = ()
    """Weights to score: raw, names under averages, a profile to reconstruct (power_0_075, bias_corrected_0_999), NAME@STEP, a
    diffusers folder, or A+B (an ensemble: the mean prediction). Empty means raw and every average."""
    steps: Annotated[tuple[Positive, ...] | Literal["last", "all"], FREE] = "last"
    """Checkpoints to score: the last, all, or a list of steps."""
    num_images: Annotated[int, Field(ge=2), SCORES] = 50_000
    """Images sampled per set of weights."""
    batch_size: Annotated[Positive, FREE] = 256
    """Images that one process samples at once. Changes memory and speed, not the images."""
    seed: Annotated[int, Field(ge=0, lt=2**32), SAMPLES] = 0
    """The noise of image i is a function of this seed, i and the sampling step."""
    sampler: Annotated[Literal["ddpm", "ddim", "dpm_solver++"], SAMPLES] = "ddpm"
    """Ancestral DDPM, DDIM, or DPM-Solver++ (2M)."""
    num_inference_steps: Annotated[Positive, SAMPLES] = 1000
    """Network evaluations per image."""
    eta: Annotated[float, Field(ge=0, le=1), SAMPLES] = 0.0
    """DDIM's noise: 0 is deterministic, 1 is ancestral-like."""
    clip_sample: Annotated[bool, SAMPLES] = True
    """Clip the predicted x_0 to [-1, 1] at every sampling step, with any sampler."""
    guidance_scale: Annotated[float, Field(ge=0), SAMPLES] = 1.0
    """Classifier-free guidance of class-conditional networks; 1 means none."""
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], SAMPLES] = "no"
    """Precision of the network; the sampler's state is always fp32."""
    compile: Annotated[bool, FREE] = False
    """Compile the sampling network, once for all weights."""
    extractors: Annotated[tuple[str, ...], Field(min_length=1), CONTENT] = ("inception-v3-compat",)
    """Feature extractors, each with a table of its own from one sampling: inception-v3-compat (FID), classifier (of ddpm-ema
    features) or timm:MODEL, such as timm:vit_large_patch14_dinov2.lvd142m; NAME=FILE takes another weights file."""
    extractor_batch_size: Annotated[Positive, FREE] = 256
    """Images per pass of the feature extractor."""
    reference: Annotated[str, CONTENT] = "train"
    """What samples are compared with: a split of the data (train, test), held_out (data.held_out), or an .npz file of statistics."""
    groups: Annotated[int, Field(ge=10), SCORES] = 20
    """Groups of the delete-a-group jackknife, which gives standard errors and removes the bias."""
    precision_recall: Annotated[bool, SCORES] = True
    """Also compute precision and recall (k = 3 nearest neighbours)."""
    output: Annotated[Path | None, FREE] = None
    """Folder that takes the scores/ of a run directory that is read-only; null means the run directory."""
    grid_images: Annotated[Positive, FREE] = 16
    """Images per row of the grid."""
    sweep: SweepSettings = SweepSettings()
    """Sweep over widths of the average."""
    every: Annotated[NonNegative, INTERVAL, FREE] = 0
    """Steps between quick scorings while training; 0 means none."""
    every_num_images: Annotated[int, Field(ge=2), FREE] = 1000
    """Images per set of weights in a quick scoring."""


class Config(Section):
    """The run directory, the seed and the averages; every other subject has a section."""

    output_dir: Annotated[Path, FREE] = Path("runs/ddpm")
    """The run directory, the only thing that passes between the stages."""
    seed: Annotated[int, Field(ge=0, lt=2**32), RUN] = 0
    """Everything random in training is a function of this seed, the step and the position in the global batch."""
    data: DataSettings = DataSettings()
    """Images."""
    model: ModelSettings = ModelSettings()
    """Network."""
    diffusion: DiffusionSettings = DiffusionSettings()
    """Objective."""
    training: TrainingSettings = TrainingSettings()
    """Optimisation."""
    averages: Annotated[dict[AverageName, AnyProfile], RUN] = Field(default_factory=dict)
    """Averages to keep, by name: a profile, such as ema_0_999: {kind: constant, decay: 0.999, start: 1000}. A length is a number
    of steps, a share of training.steps (5%) or images (500kimg); docs/averaging.md lists the profiles."""
    checkpoints: CheckpointSettings = CheckpointSettings()
    """Checkpoints."""
    machine: MachineSettings = MachineSettings()
    """Devices and processes."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Sampling and scoring."""

    @property
    def snapshot_names(self) -> tuple[str, ...]:
        """Names of the weights that snapshots are taken of."""
        chosen = (name for name, profile in self.averages.items() if profile.kind in ("power_function", "uniform"))
        return self.checkpoints.snapshots or tuple(chosen)

    @model_validator(mode="before")
    @classmethod
    def _resolve_shares(cls, tree: Any) -> Any:
        """Intervals that are shares of the run, in steps: at least one, where the share is not 0%."""
        if not isinstance(tree, Mapping):
            return tree
        tree = {key: dict(value) if isinstance(value, Mapping) else value for key, value in tree.items()}
        training = tree.get("training")
        only = {"steps": training["steps"]} if isinstance(training, dict) and "steps" in training else {}
        try:
            steps = TrainingSettings.model_validate(only).steps
        except ValidationError:
            steps = TrainingSettings().steps  # told by the field itself
        for section, name in (key.split(".") for key, field in SETTINGS.items() if INTERVAL in field.metadata):
            values = tree.get(section)
            given = values.get(name) if isinstance(values, dict) else None
            if isinstance(given, str) and given.endswith("%"):
                share = in_steps(given, num_steps=steps, batch_size=1)
                values[name] = given if share is None else max(int(share > 0), round(share))
        return tree

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        problems = list(_disagreements(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _disagreements(config: Config) -> Iterable[str]:
    """Yields `key.path: message` for values that contradict each other."""
    data, training = config.data, config.training
    if data.source in ("torchvision", "hub") and data.name is None:
        yield f"data.name: a {data.source} source needs the name of a data set"
    if data.source == "folder" and data.path is None:
        yield "data.path: a folder source needs the folder"
    if data.source in ("digits", "hub") and data.path is not None:
        yield f"data.path: the source {data.source} reads no folder; for a folder of images set data.source to folder"
    if config.evaluation.reference == "held_out" and not data.held_out:
        yield "evaluation.reference: held_out needs data.held_out, such as 0.1, from the start of training"
    if training.micro_batch_size is not None and training.micro_batch_size > training.batch_size:
        yield f"training.micro_batch_size: {training.micro_batch_size} is more than the global batch, {training.batch_size}"
    if len(config.model.attention) != len(config.model.block_out_channels):
        yield "model.attention: needs one entry for each of model.block_out_channels"
    yield from _unknown_weights(config)


def _unknown_weights(config: Config) -> Iterable[str]:
    known = ["raw", *config.averages]
    for name in config.checkpoints.snapshots:
        if name not in known:
            yield f"checkpoints.snapshots: {name!r} is neither raw nor under averages{nearest(name, known)}"
    for text in config.evaluation.weights:
        try:
            names = parse(text, config.averages)
        except ValueError as error:
            yield f"evaluation.weights: {error}"
            continue
        for name in (found.name for found in names if not found.folder):
            if name not in known and profile_named(name) is None:
                yield f"evaluation.weights: {name!r} is neither raw nor under averages{nearest(name, known)}"


def sections(section: type[Section] = Config, path: str = "") -> Iterator[tuple[str, str, dict[str, FieldInfo]]]:
    """(key path, description, settings by key path) of every section; the path of `Config` is empty."""
    own: dict[str, FieldInfo] = {}
    inner: dict[str, type[Section]] = {}
    for name, field in section.model_fields.items():
        key = f"{path}.{name}".lstrip(".")
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            inner[key] = field.annotation
        else:
            own[key] = field
    yield path, section.__doc__ or "", own
    for key, annotation in inner.items():
        yield from sections(annotation, key)


SETTINGS = {key: field for _, _, own in sections() for key, field in own.items()}
"""Definition of every setting by key path."""
