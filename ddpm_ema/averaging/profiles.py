"""Averaging profiles: how much of the past each average keeps.

A profile is one pure function, `decay(step, num_steps)`: the share of the old average that survives an update at `step`
(completed optimizer steps, this one included) that stands for the last `num_steps` of them. Keeping an average is then
`average.lerp_(parameter, 1 - decay)`. All profiles compose,

    decay(t, a + b) == decay(t, b) * decay(t - b, a),

so an average updated once every N steps has the same total weight on every block of N steps as one updated at each. Further
rules: `half_life.py`, `cooldown.py`, `interop.py`.
"""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from ddpm_ema.averaging.power_function import power_function_weighting, std_to_exponent

FloatArray = npt.NDArray[np.float64]
Lengths: TypeAlias = Mapping[str, type[int] | type[float]]


def check_real(field: str, value: object, low: float, high: float, valid: str) -> float:
    """`value` as a float, if it is a real number in [low, high]; else a ValueError that names field, value and range."""
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_)) and low <= float(value) <= high:
        return float(value)
    raise ValueError(f"{field}: expected {valid}, got {value!r}")


def check_share(field: str, value: object) -> float:
    """`value` as a float, if it is in [0, 1]; else a ValueError that names field, value and range."""
    return check_real(field, value, 0.0, 1.0, f"a number with 0 <= {field} <= 1")


def check_positive(field: str, value: object) -> float:
    """`value` as a float, if it is finite and above 0; else a ValueError that names field, value and range."""
    return check_real(field, value, math.ulp(0.0), float(np.finfo(np.float64).max), "a finite number above 0")


def check_count(field: str, value: object) -> int:
    """`value` as an int, if it is a whole number of at least 1; else a ValueError that names field, value and range."""
    if isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_)) and int(value) >= 1:
        return int(value)
    raise ValueError(f"{field}: expected a whole number of steps of at least 1, got {value!r}")


def check_steps(step: int, num_steps: int) -> None:
    """Refuse an update that stands for no step or for more steps than there were. Raises: ValueError."""
    if not 1 <= num_steps <= step:
        raise ValueError(f"decay: expected 1 <= num_steps <= step, got step={step!r}, num_steps={num_steps!r}")


_JUST_BELOW_1 = math.nextafter(1.0, 0.0)

PROFILES: dict[str, type[Profile]] = {}
"""Every rule by its `kind`."""


class Profile(ABC):
    """One rule of averaging. Immutable, comparable, and cheap: no tensors, no state.

    A subclass that names its `kind` can be written in YAML and read back from files.
    """

    kind: ClassVar[str]
    """Name of the rule in YAML and in stored files."""
    lengths: ClassVar[Lengths] = {}
    """Settings that are a number of steps: whole (int) or any (float). `resolve_lengths` reads "5%" and "500kimg" there."""

    def __init_subclass__(cls) -> None:
        if "kind" in cls.__dict__:
            PROFILES[cls.kind] = cls

    @abstractmethod
    def decay(self, step: int, num_steps: int = 1) -> float:
        """Share of the old average that survives the update at `step`, which stands for the last `num_steps` steps.

        Raises:
            ValueError: not 1 <= num_steps <= step.
        """

    @abstractmethod
    def weighting(self, step: int) -> FloatArray:
        """The average after `step` steps written out: float64 [step], entry i = weight of the parameters after step i + 1.

        What the entries lack to 1 is the weight of the initial parameters, see `initial_weight`.
        """

    def cumulative(self, step: int, t: FloatArray) -> FloatArray:
        """Share of the average after `step` steps that lies on the parameters up to each step t: float64 like `t`.

        The average after t steps holds those parameters alone, so it is what survives of that average: decay(step, step - t).
        Exact at whole t, the initial parameters being step 0; linear or smooth between them; 1 from `step` on.
        """
        whole = np.unique(np.clip(np.concatenate([np.floor(t), np.ceil(t), [step]]), 0, step)).astype(np.int64).tolist()
        survived = np.ones(len(whole))
        for i in range(len(whole) - 2, -1, -1):
            survived[i] = survived[i + 1] * self.decay(whole[i + 1], whole[i + 1] - whole[i])
        return np.interp(t, whole, survived)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments by name: plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.settings().items())})"

    def initial_weight(self, step: int) -> float:
        """Weight that the average after `step` steps still gives to the parameters it started from, in [0, 1]."""
        return self.decay(step, step) if step > 0 else 1.0

    def centre(self, step: int) -> float:
        """Where in training the average sits: mean time of its weights as a share of `step`, 0 = start, 1 = now."""
        return float(self.weighting(step) @ np.arange(1, step + 1, dtype=np.float64)) / step

    def sigma_rel(self, step: int) -> float:
        """How wide the average is: standard deviation of the time of its weights as a share of `step`.

        For a power function it is `std`, up to O(1/step); section 3.1 of Karras et al. 2024 defines it.
        """
        times = np.arange(1, step + 1, dtype=np.float64) / step
        centre = self.centre(step)
        variance = float(self.weighting(step) @ (times - centre) ** 2) + self.initial_weight(step) * centre**2
        return math.sqrt(max(0.0, variance))

    def effective_window(self, step: int) -> float:
        """How many steps are averaged, in steps: the equal-weight average that reduces independent noise as much.

        sum(weight)^2 / sum(weight^2) over steps 1..`step`, Kish's effective sample size: `step` for the uniform average,
        (1 + decay) / (1 - decay) in the long run for a constant decay, 1 for a copy, 0 while only initial weights are held.
        """
        weights = self.weighting(step)
        squares = float(weights @ weights)
        return float(weights.sum()) ** 2 / squares if squares > 0.0 else 0.0

    def time_constant(self, step: int) -> float | None:
        """1 / (1 - decay) of the update at `step`, in steps; None for a rule that copies or stands still now and then."""
        decays = [self.decay(t) for t in (step - 1, step) if t > 0]
        return 1.0 / (1.0 - decays[-1]) if all(0.0 < decay < 1.0 for decay in decays) else None

    def describe(self, step: int) -> str:
        """One line for a person: where the average sits after `step` steps and how wide it is."""
        initial = self.initial_weight(step)
        rest = f", {initial:.1%} still the initial weights" if initial >= 0.0005 else ""
        return (
            f"{self!r} after {step} steps: centred at {self.centre(step):.1%} of training, "
            f"sigma_rel {self.sigma_rel(step):.4f}, averaging {self.effective_window(step):.0f} steps{rest}"
        )


class ScheduledDecay(Profile):
    """A rule given by its one-step decays."""

    @abstractmethod
    def decays(self, first: int, last: int) -> FloatArray:
        """The one-step decays of steps first..last, float64 [last - first + 1]."""

    def decay(self, step: int, num_steps: int = 1) -> float:
        check_steps(step, num_steps)
        return float(np.prod(self.decays(step - num_steps + 1, step)))

    def cumulative(self, step: int, t: FloatArray) -> FloatArray:
        """Share of the average after `step` steps that lies on the parameters up to each step t: float64 like `t`."""
        survived = np.append(np.cumprod(self.decays(1, step)[::-1])[::-1], 1.0)
        return np.asarray(np.interp(t, np.arange(step + 1), survived))

    def weighting(self, step: int) -> FloatArray:
        return np.diff(self.cumulative(step, np.arange(step + 1, dtype=np.float64)))


class ClosedForm(Profile):
    """A rule given by the weight of all parameters up to a step, which later steps only scale down."""

    @abstractmethod
    def log_mass(self, t: FloatArray) -> FloatArray:
        """Logarithm of that weight at each t, at least 0, up to a constant; minus infinity while the average is a copy."""

    def cumulative(self, step: int, t: FloatArray) -> FloatArray:
        """Share of the average after `step` steps that lies on the parameters up to each step t: float64 like `t`."""
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.exp(self.log_mass(t) - self.log_mass(np.asarray(step, dtype=np.float64)))
        return np.where(t < step, np.nan_to_num(share), 1.0)

    def decay(self, step: int, num_steps: int = 1) -> float:
        check_steps(step, num_steps)
        return float(self.cumulative(step, np.asarray(step - num_steps, dtype=np.float64)))

    def weighting(self, step: int) -> FloatArray:
        return np.diff(self.cumulative(step, np.arange(step + 1, dtype=np.float64)))


# The argument is called `decay`, as everybody calls it, and so is the method; the field therefore has a longer name.
@dataclass(frozen=True, init=False, repr=False)
class ConstantDecay(Profile):
    """The usual exponential moving average: every step keeps the same share, `decay`.

    0 follows the parameters; 1 keeps the initial ones for ever (a frozen copy). For its first 1 / (1 - decay) steps it holds
    much of the initial weights; `BiasCorrected` does not.
    """

    kind: ClassVar[str] = "constant"
    decay_per_step: float

    def __init__(self, decay: float) -> None:
        """Args: decay: share kept by every step, in [0, 1]. Raises: ValueError: it is not."""
        object.__setattr__(self, "decay_per_step", check_share("decay", decay))

    @classmethod
    def from_tau(cls, tau: float) -> ConstantDecay:
        """The convention of reinforcement learning: target = tau * parameter + (1 - tau) * target, tau in [0, 1]."""
        return cls(1.0 - check_share("tau", tau))

    def settings(self) -> dict[str, float | int]:
        return {"decay": self.decay_per_step}

    def decay(self, step: int, num_steps: int = 1) -> float:
        check_steps(step, num_steps)
        return float(self.decay_per_step**num_steps)

    def weighting(self, step: int) -> FloatArray:
        age = np.arange(step - 1, -1, -1, dtype=np.float64)
        return np.asarray((1.0 - self.decay_per_step) * np.power(self.decay_per_step, age))

    def cumulative(self, step: int, t: FloatArray) -> FloatArray:
        return np.power(self.decay_per_step, np.maximum(step - t, 0.0))


@dataclass(frozen=True, init=False, repr=False)
class BiasCorrected(Profile):
    """A constant decay without the initial weights: the weighted mean of the parameters after steps 1..t alone.

    Adam's debiasing (Kingma & Ba 2015, section 3) as a decay: d^n (1 - d^(t-n)) / (1 - d^t). It is exact and needs no
    second pass and no second copy. Early on it is nearly the uniform average, later the constant decay.
    """

    kind: ClassVar[str] = "bias_corrected"
    decay_per_step: float

    def __init__(self, decay: float) -> None:
        """Args: decay: share kept by every step in the long run, in [0, 1). Raises: ValueError: it is not."""
        valid = "a number with 0 <= decay < 1 (at 1 it would be the uniform average)"
        object.__setattr__(self, "decay_per_step", check_real("decay", decay, 0.0, _JUST_BELOW_1, valid))

    def settings(self) -> dict[str, float | int]:
        return {"decay": self.decay_per_step}

    def _mass(self, steps: int) -> float:
        """1 - d^steps without cancellation."""
        if self.decay_per_step == 0.0:
            return 1.0 if steps > 0 else 0.0
        return -math.expm1(steps * math.log(self.decay_per_step))

    def decay(self, step: int, num_steps: int = 1) -> float:
        check_steps(step, num_steps)
        return self.decay_per_step**num_steps * self._mass(step - num_steps) / self._mass(step)

    def weighting(self, step: int) -> FloatArray:
        age = np.arange(step - 1, -1, -1, dtype=np.float64)
        scale = (1.0 - self.decay_per_step) / self._mass(step) if step > 0 else 1.0
        return np.asarray(scale * np.power(self.decay_per_step, age))

    def cumulative(self, step: int, t: FloatArray) -> FloatArray:
        if self.decay_per_step == 0.0:
            return np.where(t < step, 0.0, 1.0)
        mass = -np.expm1(np.minimum(t, step) * math.log(self.decay_per_step))
        return np.power(self.decay_per_step, np.maximum(step - t, 0.0)) * mass / self._mass(step)


@dataclass(frozen=True, init=False, repr=False)
class Warmup(ScheduledDecay):
    """A constant decay that is approached from below: min(decay, 1 - (1 + t / inv_gamma)^-power) at step t.

    With inv_gamma = 1, power 2/3 reaches 0.9999 after 1e6 steps, power 3/4 reaches 0.999 after 1e4. diffusers' built-in
    (1 + s) / (10 + s), s = t - 1, is inv_gamma = 9, power = 1 from the second step on.
    """

    kind: ClassVar[str] = "warmup"
    lengths: ClassVar[Lengths] = {"inv_gamma": float}
    decay_per_step: float
    inv_gamma: float
    power: float

    def __init__(self, decay: float, inv_gamma: float = 1.0, power: float = 2.0 / 3.0) -> None:
        """Make one.

        Args:
            decay: the limit, in [0, 1].
            inv_gamma: length of the warm-up in steps, positive.
            power: how fast the limit is approached, positive.

        Raises:
            ValueError: one of them is out of its range.
        """
        object.__setattr__(self, "decay_per_step", check_share("decay", decay))
        object.__setattr__(self, "inv_gamma", check_positive("inv_gamma", inv_gamma))
        object.__setattr__(self, "power", check_positive("power", power))

    def settings(self) -> dict[str, float | int]:
        return {"decay": self.decay_per_step, "inv_gamma": self.inv_gamma, "power": self.power}

    def decays(self, first: int, last: int) -> FloatArray:
        steps = np.arange(first, last + 1, dtype=np.float64)
        rising = -np.expm1(-self.power * np.log1p(steps / self.inv_gamma))
        return np.asarray(np.minimum(self.decay_per_step, rising))


@dataclass(frozen=True, repr=False)
class PowerFunction(Profile):
    """An average whose width stays the same *share* of training: weights grow like t^gamma.

    Karras et al. 2024, eq. 2. It has no memory of the initial weights, needs no warm-up, and two widths kept during training give
    any other afterwards (`ddpm_ema.averaging.posthoc`).

    Args:
        std: sigma_rel, the width as a share of training, in (0, 0.2886...). 0.05 and 0.10 are the paper's choice.
    """

    kind: ClassVar[str] = "power_function"
    std: float

    def __post_init__(self) -> None:
        std_to_exponent(self.std)
        object.__setattr__(self, "std", float(self.std))

    @property
    def exponent(self) -> float:
        """gamma of the weights' t^gamma (eq. 3 solved)."""
        return std_to_exponent(self.std)

    def decay(self, step: int, num_steps: int = 1) -> float:
        check_steps(step, num_steps)
        if num_steps == step:
            return 0.0
        return math.exp((self.exponent + 1.0) * math.log1p(-num_steps / step))

    def weighting(self, step: int) -> FloatArray:
        return power_function_weighting(self.exponent, step)

    def cumulative(self, step: int, t: FloatArray) -> FloatArray:
        return np.power(np.minimum(t / step, 1.0), self.exponent + 1.0)


@dataclass(frozen=True, repr=False)
class Uniform(Profile):
    """The mean of the parameters after every step so far (Polyak & Juditsky 1992)."""

    kind: ClassVar[str] = "uniform"

    def decay(self, step: int, num_steps: int = 1) -> float:
        check_steps(step, num_steps)
        return 1.0 - num_steps / step

    def weighting(self, step: int) -> FloatArray:
        return np.full(step, 1.0 / max(step, 1))

    def cumulative(self, step: int, t: FloatArray) -> FloatArray:
        return np.minimum(t / step, 1.0)


@dataclass(frozen=True, repr=False)
class StochasticWeightAverage(Profile):
    """The mean of snapshots taken at steps `start`, `start + every`, `start + 2 * every`, ... (Izmailov et al. 2018).

    Between snapshots nothing moves and an update costs nothing. Before `start` the average is a copy of the parameters.

    Args:
        start: the step of the first snapshot, at least 1.
        every: steps between snapshots, at least 1.
    """

    kind: ClassVar[str] = "swa"
    lengths: ClassVar[Lengths] = {"start": int, "every": int}
    start: int
    every: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", check_count("start", self.start))
        object.__setattr__(self, "every", check_count("every", self.every))

    def num_snapshots(self, step: int) -> int:
        """Snapshots taken until and at `step`."""
        return (step - self.start) // self.every + 1 if step >= self.start else 0

    def decay(self, step: int, num_steps: int = 1) -> float:
        check_steps(step, num_steps)
        now, before = self.num_snapshots(step), self.num_snapshots(step - num_steps)
        return before / now if now else 0.0

    def weighting(self, step: int) -> FloatArray:
        weights = np.zeros(step)
        weights[min(self.start, step) - 1 :: self.every] = 1.0 / max(self.num_snapshots(step), 1)
        return weights


@dataclass(frozen=True, repr=False)
class HardCopy(Profile):
    """A copy of the parameters taken at every multiple of `every` (target networks: Mnih et al. 2015).

    Args:
        every: steps between copies, at least 1.
    """

    kind: ClassVar[str] = "hard_copy"
    lengths: ClassVar[Lengths] = {"every": int}
    every: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "every", check_count("every", self.every))

    def decay(self, step: int, num_steps: int = 1) -> float:
        check_steps(step, num_steps)
        return 0.0 if step // self.every > (step - num_steps) // self.every else 1.0

    def weighting(self, step: int) -> FloatArray:
        weights = np.zeros(step)
        last = step // self.every * self.every
        if last:
            weights[last - 1] = 1.0
        return weights

    def cumulative(self, step: int, t: FloatArray) -> FloatArray:
        return np.where(t < step // self.every * self.every, 0.0, 1.0)


@dataclass(frozen=True, repr=False)
class Delayed(Profile):
    """Any rule, begun late: a copy of the parameters until step `start`, then the rule, whose first step is `start` + 1.

    In YAML every rule takes `start`. What the rule calls initial weights are the parameters after step `start`.

    Args:
        profile: the rule; one that says itself when it begins (`swa`, `window`, cooldowns) is refused.
        start: the last step that is copied, at least 1.
    """

    profile: Profile
    start: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", check_count("start", self.start))
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

    def weighting(self, step: int) -> FloatArray:
        begun, weights = max(step - self.start, 0), np.zeros(step)
        weights[step - begun :] = self.profile.weighting(begun)
        weights[step - begun - 1 : step - begun] = self.profile.initial_weight(begun)
        return weights


def _nearest(word: object, known: list[str]) -> str:
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else ""


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
        raise ValueError(
            f"kind: unknown profile {kind!r}: {_nearest(kind, list(PROFILES))}expected one of {', '.join(PROFILES)}"
        )
    parameters = inspect.signature(cls).parameters
    given = {name: value for name, value in settings.items() if name != "kind"}
    start = None if "start" in parameters else given.pop("start", None)
    for name in given:
        if name not in parameters:
            expected = ", ".join(parameters) or "no fields"
            raise ValueError(
                f"{name}: unknown field of profile {kind!r}: {_nearest(name, list(parameters))}expected {expected}"
            )
    for name, parameter in parameters.items():
        if name not in given and parameter.default is inspect.Parameter.empty:
            raise ValueError(f"{name}: missing field of profile {kind!r}")
    return Delayed(cls(**given), start) if start else cls(**given)


def profile_to_dict(profile: Profile) -> dict[str, Any]:
    """The profile as plain values that JSON can hold; `profile_from_dict` gives the profile back."""
    return {"kind": profile.kind, **profile.settings()}
