"""Checks of numbers that a user gives; each names the field, the value and the valid range."""

import math
import numbers

import numpy as np


def check_real(field: str, value: object, low: float, high: float, valid: str) -> float:
    """`value` as a float, if it is a real number in [low, high]; else a ValueError that names field, value and range."""
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_)) and low <= float(value) <= high:
        return float(value)
    raise ValueError(f"{field}: expected {valid}, got {value!r}")


def check_share(field: str, value: object) -> float:
    """`value` as a float, if it is in [0, 1]; raises as `check_real`."""
    return check_real(field, value, 0.0, 1.0, f"a number with 0 <= {field} <= 1")


def check_positive(field: str, value: object) -> float:
    """`value` as a float, if it is finite and above 0; raises as `check_real`."""
    return check_real(field, value, math.ulp(0.0), float(np.finfo(np.float64).max), "a finite number above 0")


def check_count(field: str, value: object, least: int = 1) -> int:
    """`value` as an int, if it is a whole number of at least `least`; raises as `check_real`."""
    if isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_)) and int(value) >= least:
        return int(value)
    raise ValueError(f"{field}: expected a whole number of steps of at least {least}, got {value!r}")


def check_steps(step: int, num_steps: int) -> None:
    """Refuse an update that stands for no step or for more steps than were completed. Raises: ValueError."""
    if not 1 <= num_steps <= step:
        raise ValueError(f"decay: expected 1 <= num_steps <= step, got step={step!r}, num_steps={num_steps!r}")
