import numpy as np
import pytest

from zoscope.registry import DIRECTIONS
from zoscope.theory.quadratic import one_sided_mu
from zoscope.theory.rules import GAUSSIAN, EstimatorMoments, estimator_moments


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_constants_match_the_sampled_second_moment(directions, queries):
    d, samples, rng = 4, 200_000, np.random.default_rng(0)
    g = np.array([1.0, -0.5, 2.0, 0.3])
    u = rng.standard_normal((samples, queries, d))
    if directions == "sphere":
        u *= np.sqrt(d) / np.linalg.norm(u, axis=2, keepdims=True)
    if directions == "rademacher":
        u = np.sign(u)
    estimates = np.einsum("sqi,sqj,j->si", u, u, g) / queries
    products = estimates[:, :, None] * estimates[:, None, :]
    stderr = products.std(axis=0) / np.sqrt(samples)
    m = estimator_moments(directions, queries=queries, dimension=d)
    expected = m.a * np.outer(g, g) + m.b * (g @ g) * np.eye(d)
    if directions == "rademacher":  # what depends on the basis, and is left out of a and b
        expected -= 2 / queries * np.diag(g**2)
    assert (np.abs(products.mean(axis=0) - expected) <= 4.5 * stderr).all()


def test_one_gaussian_query_is_the_default():
    assert estimator_moments() == GAUSSIAN == EstimatorMoments(2.0, 1.0)


def test_sphere_in_one_dimension_has_no_noise():
    m = estimator_moments("sphere", dimension=1)
    assert m.a + m.b == pytest.approx(1.0, rel=1e-15)  # u = ±1: the estimate is the gradient


def test_sphere_tends_to_gaussian_in_high_dimension():
    m = estimator_moments("sphere", queries=3, dimension=10**9)
    reference = estimator_moments("gaussian", queries=3)
    assert (m.a, m.b) == pytest.approx((reference.a, reference.b), rel=1e-8)


@pytest.mark.parametrize(
    "arguments",
    [
        {"directions": "laplace"},
        {"queries": 0},
        {"queries": 1.5},
        {"directions": "sphere"},
        {"directions": "sphere", "dimension": 0},
    ],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=r"must be|need"):
        estimator_moments(**arguments)


@pytest.mark.parametrize(("a", "b"), [(0.0, 1.0), (np.nan, 1.0), (1.0, -0.1), (1.0, np.inf)])
def test_bad_constants_are_refused(a, b):
    with pytest.raises(ValueError, match="must be finite"):
        EstimatorMoments(a, b)


def test_the_noise_of_one_sided_differences_doubles_at_the_mu_that_is_told():
    """Along a coordinate without gradient, with many modes."""
    d, samples, rng = 50, 40_000, np.random.default_rng(1)
    eigenvalues, g = np.linspace(0.5, 1.5, d), np.zeros(d)
    g[0] = 3.0
    mu = one_sided_mu(3.0, eigenvalues.sum(), (eigenvalues**2).sum())
    u = rng.standard_normal((samples, d))
    estimate = (u @ g + 0.5 * mu * (u**2) @ eigenvalues) * u[:, -1]
    square = estimate**2
    last = eigenvalues[-1]
    rest = (4 * eigenvalues.sum() * last + 8 * last**2) * mu**2 / 4  # what depends on the mode
    stderr = square.std(ddof=1) / np.sqrt(samples)
    assert square.mean() == pytest.approx(2 * 9.0 + rest, abs=4 * stderr)
