"""The power-function average: its width, its exponent and the weights it gives.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv 2312.02696. Equation
numbers below are that paper's. `exponent` is the paper's gamma and `std` its sigma_rel: the standard deviation of the
profile as a share of the training so far. Everything here is float64.
"""

from __future__ import annotations

import functools
import math
import numbers

import numpy as np
import numpy.typing as npt

MAX_STD = 1.0 / math.sqrt(12.0)
"""Width of the uniform average (exponent 0): no power function with a positive exponent is as wide."""


def exponent_to_std(exponent: float) -> float:
    """Width `sigma_rel` of the power function with this exponent (eq. 3).

    Args:
        exponent: gamma, at least 0; 0 is the uniform average.

    Raises:
        ValueError: the exponent is negative or not a finite number.
    """
    if isinstance(exponent, bool) or not isinstance(exponent, numbers.Real) or not 0.0 <= float(exponent) < math.inf:
        raise ValueError(f"exponent: expected a finite number of at least 0, got {exponent!r}")
    gamma = float(exponent)
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def std_to_exponent(std: float) -> float:
    """Exponent gamma of the power function of this width: eq. 3 solved for gamma.

    Args:
        std: sigma_rel, in (0, 0.2886...). From 1/sqrt(12) on the equation has no root of at least 0: the cubic's largest
            real root is negative there, a profile that rises towards the *start* of training, or does not exist.

    Raises:
        ValueError: std is outside that range, or not a number.
    """
    if isinstance(std, bool) or not isinstance(std, numbers.Real) or not 0.0 < float(std) < MAX_STD:
        raise ValueError(
            f"std: expected a number with 0 < std < {MAX_STD:.6f} (1/sqrt(12), the uniform average), got {std!r}"
        )
    return _solve_exponent(float(std))


@functools.lru_cache(maxsize=4096)
def _solve_exponent(std: float) -> float:
    # With x = gamma + 1, eq. 3 reads (x + 1)^2 (x + 2) / x = 1 / std^2. Divided out, x^2 + 4x + 5 + 2/x: convex and
    # increasing for x >= 1, so Newton from a point to the right of the root falls onto it monotonically.
    target = std**-2
    x = max(1.0, math.sqrt(target))
    for _ in range(64):
        step = (x * x + 4 * x + 5 + 2 / x - target) / (2 * x + 4 - 2 / (x * x))
        x = max(1.0, x - step)
        if abs(step) <= 1e-15 * x:
            break
    return x - 1.0


def power_function_weighting(
    exponent: float, step: int, first: int = 1, last: int | None = None
) -> npt.NDArray[np.float64]:
    """Weights that the power-function average of `step` steps gives to the parameters after steps `first`..`last`.

    The recursion with decay (1 - 1/t)^(gamma + 1) (eq. 2) gives the parameters after step i exactly the integral of the
    continuous profile (eq. 1) over (i - 1, i], so the discrete average needs no approximation:
    ((i)^(gamma + 1) - (i - 1)^(gamma + 1)) / step^(gamma + 1).

    Returns:
        float64 [last - first + 1]; steps beyond `step` have weight 0.
    """
    last = step if last is None else last
    i = np.arange(first, last + 1, dtype=np.float64)
    with np.errstate(divide="ignore"):  # log1p(-1) = -inf at i = 1 is wanted: the whole of (0, 1] belongs to step 1
        share = -np.expm1((exponent + 1.0) * np.log1p(-1.0 / i))
    weights = np.power(np.minimum(i / step, 1.0), exponent + 1.0) * share
    weights[i > step] = 0.0
    return weights


def power_function_inner_product(step_a: float, exponent_a: float, step_b: float, exponent_b: float) -> float:
    """Inner product of two continuous power-function profiles over training time (appendix C.3).

    The closed form that the discrete inner products approach as 1/step. Exponents may differ and so may the steps.

    Raises:
        ValueError: a step is not positive, or an exponent is negative.
    """
    if not (step_a > 0 and step_b > 0):
        raise ValueError(f"steps: expected positive numbers, got {step_a!r} and {step_b!r}")
    if not (exponent_a >= 0 and exponent_b >= 0):
        raise ValueError(f"exponents: expected numbers of at least 0, got {exponent_a!r} and {exponent_b!r}")
    shorter = min(step_a, step_b)
    ratio = (shorter / step_a) ** exponent_a * (shorter / step_b) ** exponent_b  # in [0, 1]: cannot overflow
    scale = (exponent_a + 1) * (exponent_b + 1) / (exponent_a + exponent_b + 1)
    return float(scale * ratio / max(step_a, step_b))
