"""Numbers and tables as people read them: digits that the error supports, true minus signs, aligned columns."""

import pytest

from ddpm_ema.numbers import aligned, figure, listed, saturation, with_error


def test_names_are_listed_as_people_do() -> None:
    assert [listed(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
    assert listed(["a", "b", "c"], "or") == "a, b or c"


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (12.23, 0.94, "12.23 ± 0.94"),
        (24.7, 2.04, "24.7 ± 2.0"),
        (0.412, 0.056, "0.412 ± 0.056"),
        (-3.2, 0.5, "\u22123.20 ± 0.50"),
        (123.4, 45.6, "123 ± 46"),
        (1.5, None, "1.50"),
        (None, 0.5, "\u2013"),
        (1.5, float("inf"), "1.50 ± inf"),  # of figures that a damaged file holds
    ],
)
def test_figures_have_as_many_digits_as_their_error_supports(
    value: float | None, error: float | None, text: str
) -> None:
    assert with_error(value, error) == text


def test_a_rounded_zero_has_no_sign() -> None:
    assert (figure(-0.001, 1), figure(0.001, 1, signed=True)) == ("0.0", "0.0")


def test_the_columns_of_a_text_table_are_aligned_without_trailing_spaces() -> None:
    assert aligned([("name", "value", "of"), ("a", "12.5", "b"), ("long name", "1", "")], left=(0, 2)) == [
        "name       value  of",
        "a           12.5  b",
        "long name      1",
    ]


def test_saturation_is_told_of_weights_whose_share_is_more_than_ten_points_from_the_references() -> None:
    text = saturation({"raw": 0.15, "ema": 0.02, "power": 0.11, "unknown": None}, 0.02)
    assert text.startswith("Channel values at 0 or 255: 15% of raw, but 2% of the reference.")
    assert saturation({"raw": 0.0}, 0.4).startswith("Channel values at 0 or 255: 0% of raw, but 40%")
    assert saturation({"raw": 0.11}, 0.02) == saturation({"raw": 0.9}, None) == ""
