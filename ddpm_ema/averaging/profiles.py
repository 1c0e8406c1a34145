"""Averaging profiles: which weights an average gives to the parameters after each step.

A profile is one pure function, `decay(step, num_steps)`: the share of the old average that survives an update at `step`
(completed optimizer steps, this one included) that stands for the last `num_steps` of them. The update of an average is then
`average.lerp_(parameter, 1 - decay)`. Decays compose,

    decay(t, a + b) == decay(t, b) * decay(t - b, a),

so an average updated once every N steps gives each block of N steps the same total weight as one updated at every step. More
rules: `half_life.py`, `cooldown.py`, `diffusers_decay.py`.
"""

from __future__ import annotations

import difflib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from ddpm_ema.averaging.checks import check_count, check_positive, check_real, check_share, check_steps
from ddpm_ema.averaging.sigma_rel import std_to_exponent

FloatArray = npt.NDArray[np.float64]
Lengths: TypeAlias = Mapping[str, type[int] | type[float]]
Checks: TypeAlias = Mapping[str, Callable[[str, object], object]]
PROFILES: dict[str, type[Profile]] = {}
"""Every rule by its `kind`."""


class Profile(ABC):
    """One rule of averaging: immutable, comparable, without tensors and state.

    A subclass defines `decay`; one that names its `kind` can be written in YAML and read back from files. Constructors raise
    ValueError for a value out of range.
    """

    kind: ClassVar[str]
    """Name of the rule in YAML and in stored files."""
    lengths: ClassVar[Lengths] = {}
    """Settings that are a number of steps: whole (int) or any (float). `resolve_lengths` accepts "5%" and "500kimg" for them."""
    checks: ClassVar[Checks] = {}
    """Checks and conversions of settings, by field."""

    def __init_subclass__(cls) -> None:
        if "kind" in cls.__dict__:
            PROFILES[cls.kind] = cls

    def __post_init__(self) -> None:
        for field, check in self.checks.items():
            object.__setattr__(self, field, check(field, getattr(self, field)))

    @abstractmethod
    def decay(self, step: int, num_steps: int = 1) -> float:
        """Share of the old average that survives the update at `step`, which stands for the last `num_steps` steps.

        Raises:
            ValueError: not 1 <= num_steps <= step.
        """

    def cumulative(self, step: int, t: FloatArray) -> FloatArray:
        """Cumulative weighting P(t) of the average after `step` steps: total weight of the parameters up to step t.

        It equals decay(step, step - t), the share that survives of the average after t steps. Exact at whole t (the initial
        parameters are step 0), monotonic between them, 1 from `step` on. `t` and the result: float64 of any one shape.
        """
        whole = np.unique(np.clip(np.concatenate([np.floor(t), np.ceil(t), [step]]), 0, step)).astype(np.int64).tolist()
        survived = np.ones(len(whole))
        for i in range(len(whole) - 2, -1, -1):
            survived[i] = survived[i + 1] * self.decay(whole[i + 1], whole[i + 1] - whole[i])
        return np.interp(t, whole, survived)

    def weighting(self, step: int) -> FloatArray:
        """Weights of the parameters after steps 1..`step` in the average then, float64 [step]; sum 1 - `initial_weight(step)`."""
        return np.diff(self.cumulative(step, np.arange(step + 1, dtype=np.float64)))

    # The argument and the method are both called `decay`, the field's word; so the dataclass field is `decay_per_step`.
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments by name, as plain values."""
        return {f.name.removesuffix("_per_step"): getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.settings().items())})"

    def initial_weight(self, step: int) -> float:
        """Weight of the initial parameters in the average after `step` steps, in [0, 1]."""
        return self.decay(step, step) if step > 0 else 1.0

    def centre(self, step: int) -> float:
        """Mean time of the weights as a share of `step`: 0 is the start of training, 1 is now."""
        return float(self.weighting(step) @ np.arange(1, step + 1, dtype=np.float64)) / step

    def sigma_rel(self, step: int) -> float:
        """Standard deviation of the time of the weights as a share of `step` (Karras et al. 2024, section 3.1)."""
        times = np.arange(1, step + 1, dtype=np.float64) / step
        centre = self.centre(step)
        variance = float(self.weighting(step) @ (times - centre) ** 2) + self.initial_weight(step) * centre**2
        return math.sqrt(max(0.0, variance))

    def effective_window(self, step: int) -> float:
        """Number of equally weighted steps whose mean reduces independent noise as much: sum(weight)^2 / sum(weight^2) (Kish).

        `step` for the uniform average, (1 + decay) / (1 - decay) in the long run for a constant decay, 1 for raw parameters.
        """
        weights = self.weighting(step)
        squares = float(weights @ weights)
        return float(weights.sum()) ** 2 / squares if squares > 0.0 else 0.0

    def time_constant(self, step: int) -> float | None:
        """1 / (1 - decay) of the update at `step`, in steps; None where this or the last update replaced or kept everything."""
        decays = [self.decay(t) for t in (step - 1, step) if t > 0]
        return 1.0 / (1.0 - decays[-1]) if all(0.0 < decay < 1.0 for decay in decays) else None

    def describe(self, step: int) -> str:
        """One line on the average after `step` steps: centre, width, window, and share of the initial weights."""
        initial = self.initial_weight(step)
        rest = f", {initial:.1%} still the initial weights" if initial >= 0.0005 else ""
        return (
            f"{self!r} after {step} steps: centred at {self.centre(step):.1%} of training, "
            f"sigma_rel {self.sigma_rel(step):.4f}, averaging {self.effective_window(step):.0f} steps{rest}"
        )


class ScheduledDecay(Profile):
    """A rule defined by its one-step decays."""

    @abstractmethod
    def decays(self, first: int, last: int) -> FloatArray:
        """The one-step decays of steps first..last, float64 [last - first + 1]."""

    def decay(self, step: int, num_steps: int = 1) -> float:
        check_steps(step, num_steps)
        return float(np.prod(self.decays(step - num_steps + 1, step)))

    def cumulative(self, step: int, t: FloatArray) -> FloatArray:
        survived = np.append(np.cumprod(self.decays(1, step)[::-1])[::-1], 1.0)
        return np.asarray(np.interp(t, np.arange(step + 1), survived))


class ClosedForm(Profile):
    """A rule that gives parameters a mass at their step; later steps change all masses by the same factor only."""

    @abstractmethod
    def log_mass(self, t: FloatArray) -> FloatArray:
        """log of the total mass up to each step t >= 0, plus any constant; minus infinity where the average is raw."""

    def cumulative(self, step: int, t: FloatArray) -> FloatArray:
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.exp(self.log_mass(t) - self.log_mass(np.asarray(step, dtype=np.float64)))
        return np.where(t < step, np.nan_to_num(share), 1.0)

    def decay(self, step: int, num_steps: int = 1) -> float:
        check_steps(step, num_steps)
        return float(self.cumulative(step, np.asarray(step - num_steps, dtype=np.float64)))


@dataclass(frozen=True, init=False, repr=False)
class ConstantDecay(Profile):
    """Exponential moving average: every step keeps the same share of the average.

    For its first 1 / (1 - decay) steps it holds much of the initial weights; `BiasCorrected` does not.

    Args:
        decay: share kept per step, in [0, 1]. 0 gives the raw parameters, 1 keeps the initial ones.
    """

    kind: ClassVar[str] = "constant"
    decay_per_step: float

    def __init__(self, decay: float) -> None:
        object.__setattr__(self, "decay_per_step", check_share("decay", decay))

    @classmethod
    def from_tau(cls, tau: float) -> ConstantDecay:
        """The convention of reinforcement learning: target = tau * parameter + (1 - tau) * target, tau in [0, 1]."""
        return cls(1.0 - check_share("tau", tau))

    def decay(self, step: int, num_steps: int = 1) -> float:
        check_steps(step, num_steps)
        return float(self.decay_per_step**num_steps)

    def cumulative(self, step: int, t: FloatArray) -> FloatArray:
        return np.power(self.decay_per_step, np.maximum(step - t, 0.0))


@dataclass(frozen=True, init=False, repr=False)
class BiasCorrected(Profile):
    """A constant decay without the initial weights: Adam's bias correction (Kingma & Ba 2015, section 3) in one pass.

    With constant decay d the debiased average after t steps is the mean of the parameters after steps 1..t with weights
    proportional to d^(t - i). Its own decay over n steps is d^n (1 - d^(t-n)) / (1 - d^t).

    Args:
        decay: share kept per step in the long run, in [0, 1).
    """

    kind: ClassVar[str] = "bias_corrected"
    decay_per_step: float

    def __init__(self, decay: float) -> None:
        valid = "a number with 0 <= decay < 1 (at 1 it would be the uniform average)"
        object.__setattr__(self, "decay_per_step", check_real("decay", decay, 0.0, math.nextafter(1.0, 0.0), valid))

    def _mass(self, steps: int) -> float:
        """1 - d^steps without cancellation."""
        if self.decay_per_step == 0.0:
            return 1.0 if steps > 0 else 0.0
        return -math.expm1(steps * math.log(self.decay_per_step))

    def decay(self, step: int, num_steps: int = 1) -> float:
        check_steps(step, num_steps)
        return self.decay_per_step**num_steps * self._mass(step - num_steps) / self._mass(step)

    def cumulative(self, step: int, t: FloatArray) -> FloatArray:
        if self.decay_per_step == 0.0:
            return np.where(t < step, 0.0, 1.0)
        mass = -np.expm1(np.minimum(t, step) * math.log(self.decay_per_step))
        return np.power(self.decay_per_step, np.maximum(step - t, 0.0)) * mass / self._mass(step)


@dataclass(frozen=True, init=False, repr=False)
class Warmup(ScheduledDecay):
    """A constant decay that is warmed up: min(decay, 1 - (1 + t / inv_gamma)^-power) at step t.

    With inv_gamma = 1, power 2/3 reaches 0.9999 after 1e6 steps, power 3/4 reaches 0.999 after 1e4. ema-pytorch and timm apply it one
    step later: `DiffusersDecay(use_ema_warmup=True)`. diffusers' (1 + s) / (10 + s) with s = t - 1 is inv_gamma = 9, power = 1 from
    the second step on.

    Args:
        decay: upper limit of the decay, in [0, 1].
        inv_gamma: length of the warm-up in steps, positive.
        power: exponent of the warm-up, positive.
    """

    kind: ClassVar[str] = "warmup"
    lengths: ClassVar[Lengths] = {"inv_gamma": float}
    decay_per_step: float
    inv_gamma: float
    power: float

    def __init__(self, decay: float, inv_gamma: float = 1.0, power: float = 2.0 / 3.0) -> None:
        object.__setattr__(self, "decay_per_step", check_share("decay", decay))
        object.__setattr__(self, "inv_gamma", check_positive("inv_gamma", inv_gamma))
        object.__setattr__(self, "power", check_positive("power", power))

    def decays(self, first: int, last: int) -> FloatArray:
        steps = np.arange(first, last + 1, dtype=np.float64)
        rising = -np.expm1(-self.power * np.log1p(steps / self.inv_gamma))
        return np.asarray(np.minimum(self.decay_per_step, rising))


@dataclass(frozen=True, repr=False)
class PowerFunction(Profile):
    """Weights proportional to t^gamma (Karras et al. 2024, eq. 1 and 2): the width is a constant share of training.

    It holds nothing of the initial weights and needs no warm-up.

    Args:
        std: sigma_rel, the width as a share of training, in (0, 0.2886...). The paper stores 0.05 and 0.10.
    """

    kind: ClassVar[str] = "power_function"
    std: float

    def __post_init__(self) -> None:
        std_to_exponent(self.std)
        object.__setattr__(self, "std", float(self.std))

    @property
    def exponent(self) -> float:
        """gamma (eq. 3 solved)."""
        return std_to_exponent(self.std)

    def decay(self, step: int, num_steps: int = 1) -> float:
        check_steps(step, num_steps)
        if num_steps == step:
            return 0.0
        return math.exp((self.exponent + 1.0) * math.log1p(-num_steps / step))

    def cumulative(self, step: int, t: FloatArray) -> FloatArray:
        return np.power(np.minimum(t / step, 1.0), self.exponent + 1.0)


@dataclass(frozen=True, repr=False)
class Uniform(Profile):
    """The mean of the parameters after every step so far (Polyak & Juditsky 1992)."""

    kind: ClassVar[str] = "uniform"

    def decay(self, step: int, num_steps: int = 1) -> float:
        check_steps(step, num_steps)
        return 1.0 - num_steps / step

    def cumulative(self, step: int, t: FloatArray) -> FloatArray:
        return np.minimum(t / step, 1.0)


@dataclass(frozen=True, repr=False)
class StochasticWeightAverage(ClosedForm):
    """The mean of the parameters after steps `start`, `start + every`, `start + 2 * every`, ... (Izmailov et al. 2018).

    Before `start` the average equals the parameters. Between these steps an update changes nothing and costs nothing.

    Args:
        start: the first of these steps, at least 1.
        every: steps between them, at least 1.
    """

    kind: ClassVar[str] = "swa"
    lengths: ClassVar[Lengths] = {"start": int, "every": int}
    checks: ClassVar[Checks] = {"start": check_count, "every": check_count}
    start: int
    every: int = 1

    def log_mass(self, t: FloatArray) -> FloatArray:
        return np.log(np.maximum(np.floor((t - self.start) / self.every) + 1.0, 0.0))


@dataclass(frozen=True, repr=False)
class HardCopy(Profile):
    """The parameters as of the last multiple of `every`, at least 1 (target networks: Mnih et al. 2015)."""

    kind: ClassVar[str] = "hard_copy"
    lengths: ClassVar[Lengths] = {"every": int}
    checks: ClassVar[Checks] = {"every": check_count}
    every: int

    def decay(self, step: int, num_steps: int = 1) -> float:
        check_steps(step, num_steps)
        return 0.0 if step // self.every > (step - num_steps) // self.every else 1.0

    def cumulative(self, step: int, t: FloatArray) -> FloatArray:
        return np.where(t < step // self.every * self.every, 0.0, 1.0)


@dataclass(frozen=True, repr=False)
class Delayed(Profile):
    """Any rule with a late start: the average equals the parameters until step `start`, and `start` + 1 is the rule's first step.

    In YAML every rule takes `start`. What the rule calls initial weights are the parameters after step `start`.

    Args:
        profile: the rule; `swa` and the cooldowns have a start of their own and are refused.
        start: the last step at which the average equals the parameters, at least 1.
    """

    checks: ClassVar[Checks] = {"start": check_count}
    profile: Profile
    start: int

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "kind", self.profile.kind)
        if own := {"start", "end"} & self.profile.settings().keys():
            raise ValueError(f"start: {self.profile!r} begins by its own {own.pop()!r} already")

    def settings(self) -> dict[str, Any]:
        return {**self.profile.settings(), "start": self.start}

    def __repr__(self) -> str:
        return f"Delayed({self.profile!r}, start={self.start})"

    def decay(self, step: int, num_steps: int = 1) -> float:
        check_steps(step, num_steps)
        return self.profile.decay(step - self.start, num_steps) if step - num_steps >= self.start else 0.0

    def cumulative(self, step: int, t: FloatArray) -> FloatArray:
        if step <= self.start:
            return np.where(t < step, 0.0, 1.0)
        inside = self.profile.cumulative(step - self.start, np.maximum(t - self.start, 0.0))
        return np.where(t < self.start, 0.0, inside)


def _known(word: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f"{f'did you mean {close[0]!r}? ' if close else ''}expected {', '.join(known) or 'no fields'}"


def profile_from_dict(settings: Mapping[str, Any]) -> Profile:
    """A profile from what YAML or a file's metadata holds: `{"kind": "constant", "decay": 0.999, "start": 1000}`.

    Raises:
        ValueError: no or an unknown kind, an unknown or missing field (the nearest name is in the message), or a value out of range.
    """
    if not isinstance(settings, Mapping) or "kind" not in settings:
        raise ValueError(f"profile: expected a mapping with a 'kind' (one of {', '.join(PROFILES)}), got {settings!r}")
    kind = settings["kind"]
    cls = PROFILES.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ValueError(f"kind: unknown profile {kind!r}: {_known(kind, PROFILES)}")
    parameters = inspect.signature(cls).parameters
    given = {name: value for name, value in settings.items() if name != "kind"}
    start = None if "start" in parameters else given.pop("start", None)
    for name in given:
        if name not in parameters:
            raise ValueError(f"{name}: unknown field of profile {kind!r}: {_known(name, parameters)}")
    for name, parameter in parameters.items():
        if name not in given and parameter.default is inspect.Parameter.empty:
            raise ValueError(f"{name}: missing field of profile {kind!r}")
    return Delayed(cls(**given), start) if start else cls(**given)


def profile_to_dict(profile: Profile) -> dict[str, Any]:
    """The profile as plain values that JSON can hold; `profile_from_dict` gives the profile back.

    Raises:
        ValueError: its class has no `kind` of its own, so that it could not be read back.
    """
    if PROFILES.get(getattr(profile, "kind", "")) is not type(getattr(profile, "profile", profile)):
        raise ValueError(f"{profile!r} could not be read back from a file: give its class a `kind` of its own")
    return {"kind": profile.kind, **profile.settings()}
