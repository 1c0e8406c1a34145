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


def power_function_weighting(exponent: float, step: int) -> npt.NDArray[np.float64]:
    """Weights that the power-function average of `step` steps gives to the parameters after steps 1..`step`.

    The recursion with decay (1 - 1/t)^(gamma + 1) (eq. 2) gives the parameters after step i exactly the integral of the
    continuous profile (eq. 1) over (i - 1, i], so the discrete average needs no approximation:
    ((i)^(gamma + 1) - (i - 1)^(gamma + 1)) / step^(gamma + 1).

    Returns:
        float64 [step].
    """
    i = np.arange(1, step + 1, dtype=np.float64)
    with np.errstate(divide="ignore"):  # log1p(-1) = -inf at i = 1 is wanted: the whole of (0, 1] belongs to step 1
        share = -np.expm1((exponent + 1.0) * np.log1p(-1.0 / i))
    return np.asarray(np.power(i / step, exponent + 1.0) * share)
