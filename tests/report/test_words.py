import math

import pytest

from zoscope.report import words


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.01629, "1.63e-2"),
        (0.4999, "0.500"),
        (12.34, "12.3"),
        (4.5e-12, "4.50e-12"),
        (0, "0"),
        (math.inf, "∞"),
        (None, "–"),
        (math.nan, "–"),
    ],
)
def test_a_step_size_reads_back_as_itself(value: float | None, shown: str) -> None:
    assert words.step_size(value) == shown
    if value and math.isfinite(value):
        assert float(shown) == pytest.approx(value, rel=5e-3)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (87.13, "87.13"),
        (-4.9, "-4.900"),
        (1440, "1,440"),
        (99999.6, "1.000e5"),
        (3.1e-7, "3.100e-7"),
        (0.00999996, "0.01000"),
    ],
)
def test_a_quantity_has_four_digits_in_the_shorter_notation(value: float, shown: str) -> None:
    assert words.quantity(value) == shown


@pytest.mark.parametrize(
    ("half_width", "shown"),
    [
        (0.0, "1.629e-2"),
        (1e-9, "1.629e-2"),
        (0.008 * 0.01629, "1.629e-2 ± 0.8 %"),
        (0.02 * 0.01629, "1.63e-2 ± 2.0 %"),
        (0.30 * 0.01629, "1.6e-2 ± 30 %"),
        (0.51 * 0.01629, "2e-2 ± 51 %"),
        (math.inf, "2e-2 ± ∞"),
    ],
)
def test_digits_end_where_the_error_begins(half_width: float, shown: str) -> None:
    assert words.step_size_with_error(0.01629, half_width) == shown


def test_an_error_is_never_rounded_down() -> None:
    for relative in (0.0101, 0.0999, 0.1001, 0.5, 0.99):
        shown = words.error(1.0, relative)
        assert float(shown.split()[1]) >= 100 * relative - 1e-4


def test_a_value_that_may_be_zero_carries_an_absolute_error() -> None:
    assert words.quantity_with_error(1e-9, 3e-9) == "1e-9 ± 3.0e-9"
    assert words.quantity_with_error(0.0, 2e-3) == "0 ± 0.0020"


def test_equal_ends_are_shown_once() -> None:
    assert words.step_range(1.0e-2, 1.0001e-2) == "1.00e-2"
    assert words.step_range(1.0e-2, math.inf) == "1.00e-2 – ∞"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.44, "0.4 s"), (9.97, "10 s"), (200, "3 min 20 s"), (7300, "2 h 1 min")]
)
def test_durations_are_short(seconds: float, shown: str) -> None:
    assert words.duration(seconds) == shown


def test_rough_counts_have_two_digits() -> None:
    assert [words.count(x, rough=True) for x in (7, 214, 12_345, math.inf)] == ["7", "210", "12,000", "∞"]


@pytest.mark.parametrize(("digits", "shown"), [(1, "1e-2"), (2, "1.1e-2"), (3, "1.15e-2")])
def test_a_step_size_to_stay_below_is_rounded_down(digits: int, shown: str) -> None:
    assert words.step_size_at_most(0.0115999, digits=digits) == shown
