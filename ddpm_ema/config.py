"""Every setting, on one page: what it means, its unit, what it may be, what must agree about it, and how it is read.

A configuration is YAML validated by pydantic: unknown keys are errors, values are frozen, and all errors come at once, each
with its key path. `load` is the one way in: the file, then dotted overrides, then one validation of the whole.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Flag, auto
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
    ValidationInfo,
    model_validator,
)

from ddpm_ema.averaging.lengths import resolve_lengths
from ddpm_ema.averaging.profiles import profile_from_dict, profile_to_dict
from ddpm_ema.errors import UserError
from ddpm_ema.weight_names import NAME, parse, profile_named

# What a file or a command line may hold: far more than settings need, and little enough for a message within a second.
MOST_VALUES, MOST_LEVELS, MOST_LINES, LONGEST_LINE = 10_000, 20, 40, 800

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class Effect(Flag):
    """What depends on a setting. Every setting carries one of these, and each list of settings that must agree is derived."""

    FREE = 0
    """May change at any time; where it moves the weights (steps, learning rate), they have another sha256."""
    RUN = auto()
    """Another value makes another training run: a resumed run must agree."""
    SAMPLES = auto()
    """Changes the images that given weights are sampled to, so it names the scoring. With RUN: scoring must agree with training."""
    SCORES = auto()
    """Changes the figures of given images, so it names the scoring."""
    CONTENT = auto()
    """Says where data or an extractor are found: they are compared by their fingerprint or sha256, not by this setting."""


FREE, RUN, SAMPLES, SCORES, CONTENT = Effect.FREE, Effect.RUN, Effect.SAMPLES, Effect.SCORES, Effect.CONTENT


def _profile(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, Mapping):
        return value
    training = info.data.get("training") or TrainingSettings()  # bad ones are told of by their own section
    return profile_from_dict(resolve_lengths(value, num_steps=training.steps, batch_size=training.batch_size))


AnyProfile = Annotated[Any, BeforeValidator(_profile), PlainSerializer(profile_to_dict)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class DataSettings(Section):
    """Where the images come from and how they are kept."""

    source: Annotated[Literal["digits", "torchvision", "folder", "hub"], CONTENT] = "digits"
    """digits (ships inside scikit-learn), a torchvision data set, a folder of images, or a Hugging Face Hub data set."""
    name: Annotated[str | None, CONTENT] = None
    """Name of the torchvision or Hub data set, such as CIFAR10."""
    path: Annotated[Path | None, CONTENT] = None
    """The folder of images; for torchvision, where the data set lies or is downloaded to."""
    split: Annotated[str, CONTENT] = "train"
    """Which split is trained on, where the source has splits."""
    image_size: Annotated[int, Field(ge=4), RUN | SAMPLES] = 8
    """Height and width in pixels after centre-crop and antialiased resize."""
    channels: Annotated[Literal[1, 3], RUN | SAMPLES] = 1
    """1 (grey) or 3 (RGB)."""
    horizontal_flip: Annotated[bool, RUN] = False
    """Mirror half of the training images, drawn anew at every visit. Never applied to reference statistics."""
    storage: Annotated[Literal["auto", "device", "memory", "mmap", "stream"], FREE] = "auto"
    """Where decoded uint8 images are kept: on the device, in memory, in a memory-mapped file, or nowhere (decoded by workers)."""
    num_workers: Annotated[NonNegative, FREE] = 2
    """Processes that decode images; used by storage: stream alone."""
    cache_dir: Annotated[Path | None, FREE] = None
    """Folder of memory-mapped images and reference statistics; none means ~/.cache/ddpm_ema."""
    max_bad_images: Annotated[NonNegative, CONTENT] = 0
    """How many unreadable images may be skipped (each is named) before it is an error."""
    background: Annotated[int, Field(ge=0, le=255), CONTENT] = 255
    """Grey level that transparent pixels are laid over."""


class ModelSettings(Section):
    """The U-Net (diffusers UNet2DModel). The defaults are the DDPM paper's CIFAR-10 network."""

    block_out_channels: Annotated[tuple[Positive, ...], RUN | SAMPLES] = (128, 256, 256, 256)
    """Channels of each resolution, from fine to coarse."""
    layers_per_block: Annotated[Positive, RUN | SAMPLES] = 2
    """Residual blocks a resolution."""
    attention: Annotated[tuple[bool, ...], RUN | SAMPLES] = (False, True, False, False)
    """Whether each resolution has self-attention, from fine to coarse."""
    attention_head_dim: Annotated[Positive | None, RUN | SAMPLES] = None
    """Channels an attention head; none means a single head."""
    norm_num_groups: Annotated[Positive, RUN | SAMPLES] = 32
    """Groups of the group normalisation; must divide every entry of block_out_channels."""
    dropout: Annotated[BelowOne, RUN] = 0.0
    """Dropout probability inside residual blocks."""
    layout: Annotated[Literal["ddpm", "diffusers"], RUN | SAMPLES] = "ddpm"
    """Time embedding, padding and epsilon of the normalisation: those of the DDPM paper, or diffusers' defaults."""
    class_conditional: Annotated[bool, RUN | SAMPLES] = False
    """Give the network the class label (and a "no label" class, for guidance)."""
    initialization: Annotated[Literal["ddpm", "pytorch"], RUN] = "ddpm"
    """First weights: ddpm as Ho et al. 2020 (near zero where a residual branch ends); pytorch as diffusers leaves them."""


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
    """Variance of the reverse process; the paper's CIFAR-10 figures use fixed_large; learned doubles the output channels."""
    min_snr_gamma: Annotated[PositiveFloat | None, RUN] = None
    """Clamp of the min-SNR loss weight (Hang et al. 2023); none means the paper's unweighted loss."""
    label_dropout: Annotated[float, Field(ge=0, le=1), RUN] = 0.1
    """Probability of training a class-conditional network without its label (Ho & Salimans 2022)."""


class TrainingSettings(Section):
    """The optimisation, and how it runs."""

    steps: Annotated[Positive, FREE] = 3000
    """Optimizer steps of the whole run."""
    batch_size: Annotated[Positive, RUN] = 64
    """Images a step over all processes together: the global batch."""
    micro_batch_size: Annotated[Positive | None, FREE] = None
    """Most images one process holds at once; none means its whole share of the batch. Changes memory, not the result."""
    learning_rate: Annotated[PositiveFloat, FREE] = 2e-4
    """Peak learning rate; means the same on any number of processes and micro-batches."""
    learning_rate_schedule: Annotated[Literal["constant", "linear", "cosine", "cyclical"], FREE] = "constant"
    """After warm-up: constant; linear or cosine decay to learning_rate_end at the last step; or SWA's cycles down to it."""
    learning_rate_end: Annotated[float, Field(ge=0), FREE] = 0.0
    """Learning rate that decaying and cyclical schedules come down to."""
    cycle_steps: Annotated[Positive, FREE] = 1000
    """Steps of one cycle of the cyclical schedule."""
    warmup_steps: Annotated[NonNegative, FREE] = 0
    """Steps over which the learning rate rises linearly from zero."""
    optimizer: Annotated[Literal["adam", "adamw"], RUN] = "adam"
    """Adam, or AdamW with weight_decay."""
    adam_betas: Annotated[tuple[BelowOne, BelowOne], RUN] = (0.9, 0.999)
    """Decay rates of Adam's two moments."""
    adam_epsilon: Annotated[PositiveFloat, RUN] = 1e-8
    """Added to the root of Adam's second moment."""
    weight_decay: Annotated[float, Field(ge=0), RUN] = 0.0
    """Decoupled weight decay; used by adamw alone."""
    gradient_clip: Annotated[PositiveFloat | None, RUN] = 1.0
    """Global gradient norm above which gradients are scaled down; none means no clipping."""
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], RUN] = "no"
    """Precision of the network's forward and backward pass. Noising, loss, weights and averages are fp32 always."""
    compile: Annotated[bool, FREE] = False
    """Compile the network with torch.compile: slower to start, faster afterwards; needs a C++ compiler on CPU."""
    channels_last: Annotated[bool, FREE] = True
    """Keep 4-d tensors in channels-last memory order, which convolutions prefer."""
    split_averages: Annotated[bool | None, FREE] = None
    """Keep 1/n of the averages on each of n processes; none means yes where there are several."""
    resume: Annotated[Literal["auto", "fresh", "never"], FREE] = "auto"
    """auto goes on where the folder stands; fresh moves what is there aside and starts over; never refuses a used folder."""
    allow_batch_size_change: Annotated[bool, FREE] = False
    """Let a resumed run go on with another global batch (its data stream then differs from an uninterrupted run's)."""
    allow_new_averages: Annotated[bool, FREE] = False
    """Let a resumed run add averages: they start at the raw weights of that step."""
    max_skipped: Annotated[Positive, FREE] = 50
    """fp16 steps skipped in a row (overflow) after which the run counts as diverged."""
    log_every: Annotated[Positive, FREE] = 50
    """Steps between rows of metrics.jsonl; figures are means over those steps."""
    trackers: Annotated[tuple[str, ...], FREE] = ()
    """Further loggers that accelerate knows: tensorboard, wandb, ...; a failing one is dropped with a warning."""
    sample_every: Annotated[NonNegative, FREE] = 0
    """Steps between sample grids (raw and every copy, same noise); 0 means none."""
    sample_images: Annotated[Positive, FREE] = 16
    """Images in each row of a sample grid."""

    def learning_rate_at(self, step: float) -> float:
        """Learning rate of the optimizer step that follows `step` completed ones: a pure function, so there is nothing to resume.

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
        """How far the step after `step` moves the weights, squared, in the unit of the peak: what post-hoc averages go by."""
        return (self.learning_rate_at(step) / self.learning_rate) ** 2


class MachineSettings(Section):
    """Where a stage runs. None of these changes what a run is."""

    device: Annotated[Literal["auto", "cpu", "cuda"], FREE] = "auto"
    """auto takes CUDA where there is one; cuda where there is none is an error."""
    tf32: Annotated[bool, FREE] = True
    """Allow TF32 in training's matrix products and convolutions on CUDA. Feature extraction never uses it."""
    world_size: Annotated[Positive | None, FREE] = None
    """Number of processes the run must have; a launch that gives another number is refused. None means any."""
    timeout: Annotated[PositiveFloat, FREE] = 600.0
    """Seconds after which a process that no longer answers is given up."""


class CheckpointSettings(Section):
    """What is kept of a run while it trains. The last step is always kept."""

    every: Annotated[Positive, FREE] = 1000
    """Steps between checkpoints."""
    keep: Annotated[int, Field(ge=2), FREE] = 2
    """How many of the newest checkpoints are kept; never fewer than two."""
    keep_every: Annotated[Positive | None, FREE] = None
    """Checkpoints at multiples of this many steps are kept for good; none means none are."""
    snapshots_every: Annotated[NonNegative, FREE] = 0
    """Steps between snapshots, for post-hoc reconstruction (reconstruct.py --plan); the last step and the initial weights are stored,
    too. 0 means none."""
    snapshots: Annotated[tuple[str, ...], FREE] = ()
    """What snapshots are taken of: names under averages, and raw. Empty means the power functions and uniform averages."""
    snapshot_dtype: Annotated[Literal["float32", "bfloat16"], FREE] = "float32"
    """Precision snapshots are stored in; docs/averaging.md says what bfloat16 costs."""


class SweepSettings(Section):
    """Reconstructed averages of other widths, scored one after another. Ranges are first:last:count."""

    stds: Annotated[str | None, FREE] = None
    """Power-function widths sigma_rel, evenly spaced, such as 0.02:0.25:12."""
    decays: Annotated[str | None, FREE] = None
    """Constant decays, evenly spaced in log(1 - decay), such as 0.99:0.99999:8."""
    cooldowns: Annotated[str | None, FREE] = None
    """Last steps over which a linear decay of the learning rate is emulated, evenly spaced, such as 150:1050:7."""
    search: Annotated[bool, FREE] = False
    """Find the best width by a bracketing search that spends few images on poor candidates, instead of scoring all."""
    num_images: Annotated[Positive | None, FREE] = None
    """Images a candidate; none means evaluation.num_images."""

    @model_validator(mode="after")
    def _ranges(self) -> SweepSettings:
        for field in ("stds", "decays", "cooldowns"):
            text = getattr(self, field)
            if text is not None and not re.fullmatch(r"[0-9.eE+-]+:[0-9.eE+-]+:[0-9]+", text):
                raise ValueError(f"{field}: {text!r} is not first:last:count, such as 0.02:0.25:12")
        return self


class EvaluationSettings(Section):
    """Sampling and scoring. The same for every copy, so that copies can be compared image by image."""

    weights: Annotated[tuple[str, ...], FREE] = ()
    """Which weights: raw, names under averages, a profile to reconstruct (power_0_075, bias_corrected_0_999), NAME@STEP, a
    diffusers folder, or A+B (prediction ensemble). Empty means raw and every average."""
    steps: Annotated[tuple[Positive, ...] | Literal["last", "all"], FREE] = "last"
    """Which checkpoints: the last, all that are kept, or a list of steps."""
    num_images: Annotated[int, Field(ge=2), SCORES] = 50_000
    """Images sampled from every copy."""
    batch_size: Annotated[Positive, FREE] = 256
    """Images one process samples at once. Changes memory and speed, not the images."""
    seed: Annotated[int, Field(ge=0, lt=2**32), SAMPLES] = 0
    """Image i's noise is a function of this seed, i and the sampling step."""
    sampler: Annotated[Literal["ddpm", "ddim", "dpm_solver++"], SAMPLES] = "ddpm"
    """Ancestral DDPM, DDIM, or DPM-Solver++ (2M)."""
    num_inference_steps: Annotated[Positive, SAMPLES] = 1000
    """Network evaluations an image."""
    eta: Annotated[float, Field(ge=0, le=1), SAMPLES] = 0.0
    """DDIM's noise: 0 is deterministic, 1 is ancestral-like."""
    clip_sample: Annotated[bool, SAMPLES] = True
    """Clip the predicted x_0 to [-1, 1] at every step, whatever the sampler."""
    guidance_scale: Annotated[float, Field(ge=0), SAMPLES] = 1.0
    """Classifier-free guidance of class-conditional networks; 1 means none."""
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], SAMPLES] = "no"
    """Precision of the network; the sampler's state is fp32 always."""
    compile: Annotated[bool, FREE] = False
    """Compile the sampling network once; weights are loaded into it by name."""
    extractor: Annotated[str, CONTENT] = "inception-v3-compat"
    """Feature extractor: a name torch-fidelity knows, or classifier (scripts/train_features.py)."""
    extractor_path: Annotated[Path | None, CONTENT] = None
    """Weights of the extractor; none means torch-fidelity's download, or <output_dir>/features.safetensors for classifier."""
    extractor_batch_size: Annotated[Positive, FREE] = 256
    """Images in one pass of the feature extractor."""
    reference: Annotated[str, CONTENT] = "train"
    """What samples are compared with: a split of the data (train, test), or a published .npz of statistics."""
    groups: Annotated[int, Field(ge=10), SCORES] = 20
    """Groups of images of the delete-a-group jackknife that gives standard errors and takes the bias away."""
    kid_subsets: Annotated[Positive, SCORES] = 100
    """Subsets of the kernel distance."""
    kid_subset_size: Annotated[int, Field(ge=2), SCORES] = 1000
    """Images in a subset; capped at the number there are."""
    precision_recall: Annotated[bool, SCORES] = True
    """Also compute precision and recall (k = 3 nearest neighbours)."""
    grid_images: Annotated[Positive, FREE] = 16
    """Images in each row of the grid."""
    sweep: SweepSettings = SweepSettings()
    """A sweep over widths of the average."""
    every: Annotated[NonNegative, FREE] = 0
    """Steps between quick scorings while training; 0 means none."""
    every_num_images: Annotated[int, Field(ge=2), FREE] = 1000
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

    output_dir: Annotated[Path, FREE] = Path("runs/ddpm")
    """The run directory: all that passes between train, score, report and export."""
    seed: Annotated[int, Field(ge=0, lt=2**32), RUN] = 0
    """Everything random in training is a function of this, the step and the position in the global batch."""
    data: DataSettings = DataSettings()
    """Images."""
    model: ModelSettings = ModelSettings()
    """Network."""
    diffusion: DiffusionSettings = DiffusionSettings()
    """Objective."""
    training: TrainingSettings = TrainingSettings()
    """Optimisation."""
    averages: Annotated[dict[str, AnyProfile], AfterValidator(_names), RUN] = Field(default_factory=dict)
    """Averaged copies to keep: name -> profile, such as ema_0_999: {kind: constant, decay: 0.999, start: 1000}. A length is
    a number of steps, a share of training.steps (5%) or images (500kimg); docs/averaging.md has every rule."""
    checkpoints: CheckpointSettings = CheckpointSettings()
    """Checkpoints."""
    machine: MachineSettings = MachineSettings()
    """Devices and processes."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Sampling and scoring."""

    @property
    def snapshot_names(self) -> tuple[str, ...]:
        """What snapshots are taken of."""
        chosen = (name for name, profile in self.averages.items() if profile.kind in ("power_function", "uniform"))
        return self.checkpoints.snapshots or tuple(chosen)

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
    yield from _unknown_weights(config)


def _unknown_weights(config: Config) -> Iterable[str]:
    known = ["raw", *config.averages]
    for name in config.checkpoints.snapshots:
        if name not in known:
            yield f"checkpoints.snapshots: {name!r} is neither raw nor under averages{_nearest(name, known)}"
    for text in config.evaluation.weights:
        try:
            names = parse(text, config.averages)
        except ValueError as error:
            yield f"evaluation.weights: {error}"
            continue
        for name in (found.name for found in names if not found.folder):
            if name not in known and profile_named(name) is None:
                yield f"evaluation.weights: {name!r} is neither raw nor under averages{_nearest(name, known)}"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but `1e-3` is a number, a date is a word, and a repeated key is an error.

    What would take long or not end is refused before it is built: aliases that multiply, deep nesting, endless numbers.
    """

    level = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.level > MOST_LEVELS:
            raise UserError(f"{self.name}, line {self.line + 1}: nested too deeply: more than {MOST_LEVELS} levels")
        self.level += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            values, levels = _extent(node, {})
            if values > MOST_VALUES:
                raise _refusal(node, f"more than {MOST_VALUES:,} values once its aliases are written out")
            if levels > MOST_LEVELS:
                raise _refusal(node, f"nested too deeply: more than {MOST_LEVELS} levels")
        return node


def _extent(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """(values, levels) of a node with every alias written out; a node inside itself has no end."""
    if id(node) not in known:
        known[id(node)] = (MOST_VALUES + 1, 1)
        inner = [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else node.value
        inner = [_extent(child, known) for child in inner] if isinstance(node, yaml.CollectionNode) else []
        known[id(node)] = 1 + sum(n for n, _ in inner), 1 + max((levels for _, levels in inner), default=0)
    return known[id(node)]


def _refusal(node: yaml.Node, what: str) -> UserError:
    return UserError(f"{node.start_mark.name}, line {node.start_mark.line + 1}: {what}")


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _refusal(key, "a key must be a word")
        if key.value in seen:
            raise _refusal(key, f"{key.value!r} stands there twice; keep one")
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    if len(node.value) > 64 or abs(value := int(loader.construct_yaml_int(node))) >= 2**63:
        raise _refusal(node, f"{_shown(node.value)} has more than 63 bits")
    return value


_Loader.yaml_implicit_resolvers = {
    first: [found for found in resolvers if found[0] != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*(?:[eE][-+]?[0-9]+)|\.[0-9_]+(?:[eE][-+]?[0-9]+)?)$"),
    list("-+0123456789."),
)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_repeats)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def _parse(text: Any, where: str) -> Any:
    """YAML (an open file or a string) -> plain objects; `where` names it in the message."""
    try:
        loader = _Loader(text)
        loader.name = where
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not YAML: {' '.join(str(error).split())[:LONGEST_LINE]}") from None
    except (ValueError, KeyError, AttributeError) as error:  # what PyYAML makes of an odd !!tag
        raise UserError(f"{where}: a value cannot be read ({_shown(error)})") from None


def _shown(value: Any) -> str:
    """`repr`, cut short whatever it holds."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    short.maxlevel, short.maxlist, short.maxtuple, short.maxdict = 3, 8, 8, 8
    return short.repr(value)


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
        shown = [line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..." for line in lines[:MOST_LINES]]
        more = [f"  and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
        raise UserError(
            "\n".join([f"{where}: {len(lines)} bad setting{'s' if len(lines) > 1 else ''}", *shown, *more])
        ) from None


def _explain(problem: Any) -> list[str]:
    """One pydantic error -> lines `  key.path: what was expected (got ...)`."""
    path = [str(part)[:80] for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        return [f"  {'.'.join(path)}: unknown setting{_nearest(path[-1], _siblings(path))}"]
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        prefix = f"{'.'.join(path)}: " if path else ""
        return [f"  {prefix}{line}" for line in message.split("\n")]
    got = problem["input"]
    nearest = _nearest(got, re.findall(r"'([^']+)'", message)) if problem["type"] == "literal_error" else ""
    return [f"  {'.'.join(path)}: {message[0].lower()}{message[1:]}{nearest} (got {_shown(got)})"]


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


def effects(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Effect]]:
    """Key path and mark of every setting, in the order of this page."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from effects(field.annotation, f"{prefix}{name}.")
        else:
            (mark,) = (found for found in field.metadata if isinstance(found, Effect))
            yield f"{prefix}{name}", mark


def chosen(settings: Mapping[str, Any], marks: Callable[[Effect], object]) -> dict[str, Any]:
    """Key path -> value of the settings whose mark is among `marks`, as far as these plain objects (of `to_dict`) have them."""
    found = {}
    for key in (key for key, mark in effects() if marks(mark)):
        value: Any = settings
        for name in key.split("."):
            value = value.get(name, _ABSENT) if isinstance(value, Mapping) else _ABSENT
        if value is not _ABSENT:
            found[key] = value
    return found


_ABSENT = object()


def differing(was: Mapping[str, Any], now: Mapping[str, Any], mark: Effect) -> list[tuple[str, Any, Any]]:
    """(key path, before, after) of the settings that carry `mark` and are in both, with different values."""
    before, after = (chosen(settings, lambda found: mark in found) for settings in (was, now))
    return [(key, before[key], after[key]) for key in after if key in before and before[key] != after[key]]


def to_dict(config: Config) -> dict[str, Any]:
    """Plain JSON- and YAML-able objects that `validate` takes back."""
    return config.model_dump(mode="json")


def to_yaml(config: Config) -> str:
    """The resolved settings as a file."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def digest(value: Any) -> str:
    """Twelve hex digits of the sha256 of plain objects, keys sorted: names a set of settings."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
