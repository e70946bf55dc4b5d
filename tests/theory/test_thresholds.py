import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ortho_group

from zoscope.registry import DEFAULT_FAMILIES
from zoscope.theory.rules import estimator_moments, update_rule
from zoscope.theory.spectrum import Spectrum
from zoscope.theory.stability import Interval, MomentBounds, StabilityCondition, fo_threshold

ROUNDING = 1e-12  # relative; a spectrum of one eigenvalue makes all bounds equal

rules = st.builds(
    lambda name, beta: update_rule(name, beta=beta, betas=(beta, 0.999)),
    st.sampled_from(DEFAULT_FAMILIES),
    st.sampled_from([0.0, 0.5, 0.9, 0.99]),
)
estimators = st.builds(
    lambda directions, queries: (directions, queries),
    st.sampled_from(["gaussian", "sphere"]),
    st.sampled_from([1, 4, 64]),
)
magnitudes = st.floats(-6, 3).map(lambda x: 10.0**x)
positive_eigenvalues = st.lists(magnitudes, min_size=1, max_size=12).map(np.array)
signed_eigenvalues = st.lists(st.builds(np.copysign, magnitudes, st.sampled_from([-1, 1])), min_size=1, max_size=12)


def moments_for(estimator, dimension):
    """The sphere in one dimension has no noise (η* is the first-order threshold) and is left to its own test."""
    directions, queries = estimator
    return estimator_moments(directions, queries=queries, dimension=max(dimension, 2))


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(eigenvalues=positive_eigenvalues, rule=rules, estimator=estimators)
def test_bounds_are_ordered_around_the_exact_threshold(eigenvalues, rule, estimator):
    s, moments = Spectrum.of(eigenvalues), moments_for(estimator, len(eigenvalues))
    outer = MomentBounds(rule, moments).paper(s.trace, s.lambda_max)
    inner = MomentBounds(rule, moments).tight(s.trace, s.frobenius_sq, s.lambda_max)
    exact = StabilityCondition(rule, moments).threshold(s)
    chain = [outer.lower, inner.lower, exact, inner.upper, outer.upper]
    assert all(left <= right * (1 + ROUNDING) for left, right in itertools.pairwise(chain)), chain


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(eigenvalues=positive_eigenvalues, rule=rules, estimator=estimators)
def test_forward_passes_alone_bracket_the_threshold_of_a_positive_spectrum(eigenvalues, rule, estimator):
    s, moments = Spectrum.of(eigenvalues), moments_for(estimator, len(eigenvalues))
    bounds = MomentBounds(rule, moments).forward_only(s.trace, s.frobenius_sq)
    exact = StabilityCondition(rule, moments).threshold(s)
    assert bounds.lower <= exact * (1 + ROUNDING)
    assert exact <= bounds.upper * (1 + ROUNDING)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(eigenvalues=signed_eigenvalues, rule=rules, estimator=estimators)
def test_the_forward_only_upper_bound_needs_no_positivity(eigenvalues, rule, estimator):
    s, moments = Spectrum.of(eigenvalues), moments_for(estimator, len(eigenvalues))
    bounds = MomentBounds(rule, moments).forward_only(s.trace, s.frobenius_sq)
    assert StabilityCondition(rule, moments).threshold(s) <= bounds.upper * (1 + ROUNDING)


def test_the_two_moment_upper_bound_does_need_it():
    s = Spectrum.of([1.0, -0.9])
    rule = update_rule("gd")
    assert MomentBounds(rule).tight(s.trace, s.frobenius_sq, 1.0).upper < StabilityCondition(rule).threshold(s)


@pytest.mark.parametrize(
    ("name", "numerator", "own"),
    [("gd", 2.0, 2.0), ("gdm", 2 * (1 - 0.8), 2 / 1.8), ("adam", 2.0, 2 / 1.8)],
)
def test_gaussian_bounds_are_those_of_the_paper(name, numerator, own):
    bounds = MomentBounds(update_rule(name, beta=0.8, betas=(0.8, 0.999))).paper(10.0, 3.0)
    assert bounds.lower == pytest.approx(numerator / (10 + own * 3), rel=1e-14)
    assert bounds.upper == pytest.approx(numerator / 10, rel=1e-14)


@pytest.mark.parametrize(("name", "expected"), [("gd", 2.0), ("gdm", 3.6), ("adam", 2 * 1.8 / 0.2)])
def test_first_order_threshold(name, expected):
    assert fo_threshold(4.0, rule=update_rule(name, beta=0.8, betas=(0.8, 0.999))) == pytest.approx(expected / 4)


@pytest.mark.parametrize("name", DEFAULT_FAMILIES)
def test_many_queries_lead_to_the_first_order_threshold(name):
    rule, moments = update_rule(name), estimator_moments(queries=10**9)
    expected = pytest.approx(fo_threshold(2.0, rule=rule), rel=1e-6)
    assert StabilityCondition(rule, moments).threshold(Spectrum.of([2.0, 1.0, 0.1])) == expected


def test_without_positive_curvature_nothing_is_bounded():
    nothing = Interval(math.inf, math.inf)
    for rule in map(update_rule, DEFAULT_FAMILIES):
        assert fo_threshold(-1.0, rule=rule) == math.inf
        assert MomentBounds(rule).paper(-1.0, 0.0) == nothing
        assert MomentBounds(rule).tight(0.0, 0.0, 0.0) == nothing
        assert MomentBounds(rule).forward_only(-1.0, 4.0) == nothing


def test_a_negative_trace_leaves_the_lower_end_alone():
    bounds = MomentBounds(update_rule("gd")).paper(-1.0, 5.0)
    assert bounds == Interval(2 / 9, math.inf)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(bad):
    rule = update_rule("gd")
    for call in (
        lambda: fo_threshold(bad, rule=rule),
        lambda: MomentBounds(rule).paper(bad, 1.0),
        lambda: MomentBounds(rule).tight(1.0, bad, 1.0),
        lambda: MomentBounds(rule).forward_only(1.0, bad),
    ):
        with pytest.raises(ValueError, match="must be finite"):
            call()


def test_with_entries_of_one_size_the_threshold_lies_between_that_of_gaussian_ones_and_twice_the_inverse_trace():
    rng = np.random.default_rng(3)
    eigenvalues = np.array([3.0, 1.0, 0.5, 0.2])
    basis = ortho_group.rvs(4, random_state=rng)
    hessian = (basis * eigenvalues) @ basis.T
    pairs = [(i, j) for i in range(4) for j in range(i, 4)]

    def radius(lr):
        columns = []
        for i, j in pairs:
            moment = np.zeros((4, 4))
            moment[i, j] = moment[j, i] = 1.0
            signal = hessian @ moment @ hessian
            noise = 2 * signal + np.trace(signal) * np.eye(4) - 2 * np.diag(np.diag(signal))
            image = moment - lr * (hessian @ moment + moment @ hessian) + lr**2 * noise
            columns.append([image[k, m] for k, m in pairs])
        return np.abs(np.linalg.eigvals(np.array(columns))).max()

    rule, moments = update_rule("gd"), estimator_moments("rademacher")
    printed, most = StabilityCondition(rule, moments).threshold(Spectrum.of(eigenvalues)), 2 / eigenvalues.sum()
    assert radius(printed) < 1 < radius(most)
