"""The quadratic of the examples, from the command line to the closed form."""

import json
import math
import subprocess
import sys

import pytest
from scipy.optimize import brentq

from .networks import EXAMPLES

pytestmark = pytest.mark.slow

EIGENVALUES = [5.0] * 4 + [0.5] * 40
TRACE, LARGEST, FROBENIUS_SQ, GRAD_SQ, GRAD_HESSIAN = 40.0, 5.0, 110.0, 110.0, 505.0
BETA = 0.9


@pytest.fixture(scope="module")
def document() -> dict:
    options = ["--json", "--method", "dense", "--beta", str(BETA), "--optimizer", "gd", "--optimizer", "gdm"]
    finished = subprocess.run(
        [sys.executable, "-m", "zoscope", "bounds", "examples/quadratic.py", *options],
        cwd=EXAMPLES.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict = json.loads(finished.stdout)
    return found


def near(value: float) -> object:
    return pytest.approx(value, rel=1e-8)


def test_curvature_is_that_of_the_list_of_eigenvalues(document: dict) -> None:
    curvature = document["curvature"]["hessian"]
    assert curvature["method"] == "dense"
    assert curvature["trace"]["value"] == near(TRACE)
    assert curvature["frobenius_sq"]["value"] == near(FROBENIUS_SQ)
    assert curvature["lambda_max"]["value"] == near(LARGEST)
    assert curvature["lambda_min"]["value"] == near(0.5)
    assert curvature["effective_rank"] == near(TRACE**2 / FROBENIUS_SQ)
    assert document["problem"]["grad_norm"] == near(math.sqrt(GRAD_SQ))


def test_thresholds_of_gradient_descent_are_those_worked_out_by_hand(document: dict) -> None:
    row = document["optimizers"]["gd"]
    assert row["fo"] == near(0.4)
    assert row["zo"]["lower"] == near(0.04)
    assert row["zo"]["upper"] == near(0.05)
    assert row["zo"]["upper_tight"] == near(2 / (TRACE + 2 * FROBENIUS_SQ / TRACE))
    assert row["zo"]["lower_tight"] == near(_chord_root())
    assert row["zo"]["exact"] == near(1 / 23)
    assert row["zo"]["descent"] == near(2 / (TRACE + 2 * GRAD_HESSIAN / GRAD_SQ))


def test_thresholds_with_momentum_are_roots_of_the_papers_equation(document: dict) -> None:
    row = document["optimizers"]["gdm"]
    own = 2 / (1 + BETA)  # Gaussian directions: a = 2, b = 1
    assert row["fo"] == near(2 * (1 + BETA) / LARGEST)
    assert row["zo"]["lower"] == near(2 * (1 - BETA) / (TRACE + own * LARGEST))
    assert row["zo"]["upper"] == near(2 * (1 - BETA) / TRACE)

    def feedback(lr: float) -> float:
        return sum(lr * x / (2 * (1 - BETA) - own * lr * x) for x in EIGENVALUES) - 1

    assert row["zo"]["exact"] == near(brentq(feedback, 1e-6, 0.0049, xtol=1e-16, rtol=1e-15))


@pytest.mark.parametrize("steps", [30, 100, 300, 1000])
def test_the_horizon_is_the_root_of_its_sum_over_modes(document: dict, steps: int) -> None:
    def feedback(lr: float) -> float:
        rates = [1 - 2 * lr * x + 2 * (lr * x) ** 2 for x in EIGENVALUES]
        terms = zip(EIGENVALUES, rates, strict=True)
        return sum(lr * x * (1 - r**steps) / (2 * (1 - lr * x)) for x, r in terms) - 1

    root = brentq(feedback, 1e-3, 0.15, xtol=1e-16, rtol=1e-15)
    (point,) = (p for p in document["optimizers"]["gd"]["zo"]["horizon"]["curve"] if p["steps"] == steps)
    assert point["lower"] == near(root)
    assert point["upper"] == near(root)


def _chord_root() -> float:
    """Root of ``η p₁/2 + η² p₂ / (2 - 2 η λ_max) = 1``: the chord bound for gradient descent."""

    def excess(lr: float) -> float:
        return lr * TRACE / 2 + lr**2 * FROBENIUS_SQ / (2 - 2 * lr * LARGEST) - 1

    return float(brentq(excess, 1e-6, 0.199, xtol=1e-16, rtol=1e-15))
