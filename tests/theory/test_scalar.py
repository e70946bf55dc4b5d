import math

import pytest
from scipy.optimize import brentq

from zoscope.theory.spectrum import lowest, root, root_search, searched_together

FUNCTIONS = {
    "cubic": (lambda x: x**3 - 2 * x - 5, 0.0, 5.0),
    "exponential": (lambda x: math.exp(x) - 1e5, -3.0, 40.0),
    "pole": (lambda x: math.inf if x >= 1 else 0.5 * x / (1 - x) - 3, 0.0, 2.0),
    "step": (lambda x: -1.0 if x < 0.7 else 1.0, 0.0, 1.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_root_is_where_the_sign_changes(name: str) -> None:
    f, low, high = FUNCTIONS[name]
    found = root(f, low, high, xtol=1e-14)
    assert f(found - 1e-12) <= 0 <= f(found + 1e-12)


@pytest.mark.parametrize("name", ["cubic", "exponential"])
def test_root_agrees_with_scipy(name: str) -> None:
    f, low, high = FUNCTIONS[name]
    assert root(f, low, high, xtol=1e-14) == pytest.approx(brentq(f, low, high, xtol=1e-14), abs=1e-12)


def test_a_root_of_high_order_is_found_where_the_function_is_flat() -> None:
    assert root(lambda x: (x - 0.3) ** 9, -1.0, 2.0, xtol=1e-14) == pytest.approx(0.3, abs=1e-2)


def test_root_takes_about_as_few_evaluations_as_brentq() -> None:
    calls = []

    def f(x: float) -> float:
        calls.append(x)
        return math.exp(-x) - x

    root(f, 0.0, 1.0, xtol=1e-14)
    assert len(calls) <= 12


def test_without_a_change_of_sign_root_says_so() -> None:
    with pytest.raises(ValueError, match="change its sign"):
        root(lambda x: x * x + 1, -1.0, 1.0, xtol=1e-9)


def test_lowest_finds_the_minimum_and_its_value() -> None:
    place, value = lowest(lambda x: (x - 0.3) ** 2 + 7, -1.0, 2.0, xtol=1e-4)
    assert place == pytest.approx(0.3, abs=1e-4)
    assert value == pytest.approx(7, abs=1e-7)


def test_lowest_at_an_end_of_the_interval() -> None:
    assert lowest(lambda x: x, 0.0, 1.0, xtol=1e-3)[0] == pytest.approx(0.0, abs=1e-3)


def test_searches_side_by_side_find_what_each_finds_alone() -> None:
    functions = [lambda x, c=c: x**3 - c for c in (0.001, 1.0, 8.0, 0.0)]

    def values(which: list[int], places: list[float]) -> list[float]:
        return [functions[number](place) for number, place in zip(which, places, strict=True)]

    together = searched_together(values, [root_search(0.0, 3.0, xtol=1e-13) for _ in functions])
    assert together == [root(f, 0.0, 3.0, xtol=1e-13) for f in functions]
