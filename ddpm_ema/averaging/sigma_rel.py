"""Width and exponent of the power-function average.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv 2312.02696, with its equation
numbers. `exponent` is the paper's gamma and `std` its sigma_rel: the standard deviation of the weighting as a share of training.
"""

import functools
import math
import sys

from ddpm_ema.averaging.checks import check_real

MAX_STD = 1.0 / math.sqrt(12.0)
"""Width of the uniform average (exponent 0): no power function with a positive exponent is as wide."""


def exponent_to_std(exponent: float) -> float:
    """Width `sigma_rel` of the power function with this exponent (eq. 3).

    Args:
        exponent: gamma, at least 0; 0 is the uniform average.

    Raises:
        ValueError: the exponent is negative or not a finite number.
    """
    gamma = check_real("exponent", exponent, 0.0, sys.float_info.max, "a finite number of at least 0")
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def std_to_exponent(std: float) -> float:
    """Exponent gamma of the power function of this width (eq. 3 solved for gamma).

    Args:
        std: sigma_rel, in (0, 1/sqrt(12) = 0.2886...): wider power functions have a negative exponent or do not exist.

    Raises:
        ValueError: std is outside that range, or not a number.
    """
    valid = f"a number with 0 < std < {MAX_STD:.6f} (1/sqrt(12), the uniform average)"
    return _solve_exponent(check_real("std", std, 1e-100, math.nextafter(MAX_STD, 0.0), valid))


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
