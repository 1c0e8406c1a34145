"""Width and exponent of power functions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_ema.averaging import exponent_to_std, std_to_exponent


@given(st.floats(1e-6, 0.28867))
def test_width_and_exponent_are_inverse(std: float) -> None:
    assert exponent_to_std(std_to_exponent(std)) == pytest.approx(std, rel=1e-12)


# From the roots of (g + 2)^2 (g + 3) = (g + 1) / std^2, worked with numpy.roots; 6.94 and 16.97 are printed in the paper.
@pytest.mark.parametrize(("std", "exponent"), [(0.05, 16.97), (0.10, 6.94), (0.20, 1.826)])
def test_exponents_are_the_papers(std: float, exponent: float) -> None:
    assert std_to_exponent(std) == pytest.approx(exponent, abs=5e-3)
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    assert std_to_exponent(std) == pytest.approx(roots[np.isreal(roots)].real.max(), rel=1e-9)


@pytest.mark.parametrize("std", [0.0, 1e-200, -0.1, 1 / math.sqrt(12), 0.4, math.nan, math.inf, True, "0.1", None])
def test_a_width_that_no_power_function_has_is_refused(std) -> None:
    with pytest.raises(ValueError, match=r"std: expected a number with 0 < std < 0\.288675"):
        std_to_exponent(std)


@pytest.mark.parametrize("exponent", [-0.81, math.nan, math.inf, True, "1"])
def test_an_exponent_that_no_power_function_has_is_refused(exponent) -> None:
    with pytest.raises(ValueError, match="exponent: expected a finite number of at least 0"):
        exponent_to_std(exponent)
