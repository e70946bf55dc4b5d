import itertools
import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import ortho_group

from zoscope.registry import DEFAULT_FAMILIES
from zoscope.theory import stability as mean_square
from zoscope.theory.quadratic import QuadraticModel
from zoscope.theory.rules import EstimatorMoments, estimator_moments, update_rule
from zoscope.theory.spectrum import SampledSpectrum, Spectrum
from zoscope.theory.stability import (
    StabilityCondition,
    estimates,
    fo_threshold,
    horizon_curve,
    horizon_feedback,
    thresholds,
)

from .second_moment_oracle import Quadratic, SecondMoments

TOLERANCE = 1e-10  # relative, the precision that thresholds promise
BETAS = [0.0, 0.5, 0.9, 0.99]
RULES = [update_rule("gd")] + [
    update_rule(name, beta=beta, betas=(beta, 0.999)) for name in ("gdm", "adam") for beta in BETAS
]
ESTIMATORS = [(directions, queries) for directions in ("gaussian", "sphere") for queries in (1, 4, 64)]

every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.name}-{rule.momentum}")
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
every_version = pytest.mark.parametrize("version", ["positive", "full"])


def case(rule, estimator, *, seed, signed=False):
    """A rotated quadratic of three to five modes over two decades, and the constants of the estimator there."""
    rng = np.random.default_rng(seed)
    d = int(rng.integers(3, 6))
    eigenvalues = 10 ** rng.uniform(-2, 0, d) * (rng.choice([-1, 1], d) if signed else 1)
    problem = Quadratic.random(eigenvalues, rng, preconditioned=rule.preconditioned)
    return problem, estimator_moments(estimator[0], queries=estimator[1], dimension=d)


def indefinite(seed=0, size=200):
    rng = np.random.default_rng(seed)
    return Spectrum.of(np.concatenate([[5.0, 2.0], rng.exponential(0.01, size), -rng.exponential(0.005, size)]))


@every_estimator
@every_rule
def test_threshold_is_where_the_second_moment_operator_reaches_radius_one(rule, estimator):
    for seed in range(3):
        problem, moments = case(rule, estimator, seed=seed)
        lr = StabilityCondition(rule, moments).threshold(problem.spectrum)
        at = [SecondMoments(problem, rule, moments, lr * (1 + offset)) for offset in (-TOLERANCE, TOLERANCE)]
        assert [oracle.distance_sign for oracle in at] == [1, -1]
        below, above = (SecondMoments(problem, rule, moments, lr * (1 + offset)).radius for offset in (-1e-5, 1e-5))
        assert below < 1 < above


@every_estimator
@every_rule
def test_horizon_feedback_is_the_summed_response_of_the_second_moment_recursion(rule, estimator):
    for seed, steps in enumerate([1, 2, 3, 30, 300]):
        problem, moments = case(rule, estimator, seed=seed, signed=True)
        condition = StabilityCondition(rule, moments, steps, "full")
        lr = condition.threshold(problem.spectrum)
        for scale in (0.5, 1.0):
            expected = SecondMoments(problem, rule, moments, scale * lr).response(steps).sum()
            assert condition.total_feedback(problem.spectrum, scale * lr) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("name", DEFAULT_FAMILIES)
def test_the_response_solves_the_renewal_equation_of_the_full_recursion(name):
    rule, steps = update_rule(name), 60
    problem, moments = case(rule, ("gaussian", 1), seed=5, signed=True)
    lr = StabilityCondition(rule, moments, steps, "full").threshold(problem.spectrum)
    oracle = SecondMoments(problem, rule, moments, lr)
    kernel, noise, state = oracle.response(steps), [], oracle.zero
    for step in range(steps):
        state = oracle.step(*state, source=float(step == 0))
        noise.append(moments.b * np.trace(problem.hessian @ state[0] @ problem.hessian))
    renewal = []
    for step in range(steps):
        renewal.append(kernel[step] + sum(kernel[lag] * renewal[step - 1 - lag] for lag in range(step)))
    np.testing.assert_allclose(renewal, noise, rtol=1e-10)


@every_version
@every_rule
def test_a_longer_horizon_lowers_the_threshold(rule, version):
    steps = [1, 2, 5, 30, 300, 3000, 10**5, 10**7]
    thresholds = [StabilityCondition(rule, steps=t, version=version).threshold(indefinite()) for t in steps]
    assert thresholds == sorted(thresholds, reverse=True)


@every_rule
def test_escape_directions_lower_the_threshold(rule):
    for steps in (1, 30, 1000, 10**5):
        full, positive = (
            StabilityCondition(rule, steps=steps, version=version).threshold(indefinite())
            for version in ("full", "positive")
        )
        assert 0 < full < positive


@every_rule
def test_the_positive_horizon_tends_to_infinite_time(rule):
    spectrum = Spectrum.of([3.0, 1.0, 0.2])
    infinite = StabilityCondition(rule).threshold(spectrum)
    assert StabilityCondition(rule, steps=10**6).threshold(spectrum) == pytest.approx(infinite, rel=1e-12)
    assert StabilityCondition(rule, steps=10**15).threshold(spectrum) == pytest.approx(infinite, rel=1e-12)


def test_momentum_zero_of_the_matrix_form_is_the_closed_form_of_gradient_descent():
    spectrum, almost = indefinite(), update_rule("gdm", beta=1e-14)
    for steps in (1, 7, 100, 10**5):
        plain, matrix = (
            StabilityCondition(rule, steps=steps, version="full").feedback(spectrum.nodes, 0.003)
            for rule in (update_rule("gd"), almost)
        )
        np.testing.assert_allclose(matrix, plain, rtol=1e-9)


def test_gradient_descent_feedback_is_its_closed_form():
    nodes, lr, steps, m = np.array([4.0, 0.5, 1e-3, -0.3]), 0.2, 50, estimator_moments(queries=3)
    z = lr * nodes
    expected = m.b * z * (1 - (1 - 2 * z + m.a * z**2) ** steps) / (2 - m.a * z)
    got = StabilityCondition(update_rule("gd"), m, steps, "full").feedback(nodes, lr)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@every_rule
def test_feedback_of_slow_modes_keeps_its_relative_precision(rule):
    nodes = np.array([1e-9, 1e-13, 1e-200, 0.0])
    gain = rule.lr_scale / (1 - rule.momentum)  # a slow mode moves by z·gain per step once the average has filled
    for steps in (10**4, 10**6):
        got = StabilityCondition(rule, steps=steps, version="full").feedback(nodes[:2], 1.0)
        ramp = (nodes[:2] * gain) ** 2 * steps
        assert (np.abs(got / ramp - 1) < 3e-2 + 3 / (steps * (1 - rule.momentum)) + gain * nodes[:2] * steps).all()
    assert (StabilityCondition(rule, steps=100, version="full").feedback(nodes[2:], 1.0) == 0).all()


@every_rule
def test_feedback_is_finite_and_increasing_through_the_pole(rule):
    lr = np.geomspace(1e-3, 10, 200)
    feedback = [StabilityCondition(rule, steps=100).total_feedback(Spectrum.of([1.0, 0.3]), x) for x in lr]
    assert np.isfinite(feedback).all()
    assert (np.diff(feedback) > 0).all()


def test_an_overflowing_mode_counts_as_infinite_feedback():
    for rule in RULES:
        feedback = StabilityCondition(rule, steps=10**6, version="full").feedback(np.array([-50.0, 40.0]), 10.0)
        assert (feedback == math.inf).all()


@every_rule
def test_infinite_time_feedback_is_infinite_from_the_pole_on(rule):
    condition = StabilityCondition(rule, EstimatorMoments(2.0, 1e-12))
    pole = condition.threshold(Spectrum.of([1.0]))
    assert condition.feedback(np.array([1.0]), 1.01 * pole) == math.inf


@every_rule
def test_eigenvalues_of_one_value_merge_into_weights(rule):
    for steps in (None, 100):
        condition = StabilityCondition(rule, steps=steps)
        merged = condition.threshold(Spectrum(np.array([2.0, 0.1, 7.0]), np.array([1.0, 3.0, 0.0])))
        assert merged == pytest.approx(condition.threshold(Spectrum.of([2.0, 0.1, 0.1, 0.1])), rel=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_the_sphere_in_one_dimension_gives_the_first_order_threshold(beta):
    rule = update_rule("gdm", beta=beta)
    threshold = StabilityCondition(rule, estimator_moments("sphere", dimension=1)).threshold(Spectrum.of([3.0]))
    assert threshold == pytest.approx(fo_threshold(3.0, rule=rule), rel=1e-9)


def test_without_feedback_a_single_mode_sets_the_limit():
    rule, noiseless = update_rule("gdm"), EstimatorMoments(1.0, 0.0)
    spectrum = Spectrum.of([3.0, 1.0])
    assert StabilityCondition(rule, noiseless).threshold(spectrum) == pytest.approx(fo_threshold(3.0, rule=rule))
    assert StabilityCondition(rule, noiseless, 100).threshold(spectrum) == math.inf


@pytest.mark.parametrize("eigenvalues", [[], [0.0, 0.0], [-1.0, -2.0]])
@every_rule
def test_a_spectrum_without_positive_part_never_blows_up_in_the_positive_version(rule, eigenvalues):
    spectrum = Spectrum.of(eigenvalues)
    assert StabilityCondition(rule).threshold(spectrum) == math.inf
    assert StabilityCondition(rule, steps=100).threshold(spectrum) == math.inf
    assert QuadraticModel(spectrum, rule).time_to_blow_up(1.0) == math.inf
    escapes = min(eigenvalues, default=0.0) < 0
    assert (StabilityCondition(rule, steps=100, version="full").threshold(spectrum) < math.inf) == escapes


@every_version
@every_rule
def test_time_to_blow_up_inverts_the_horizon_threshold(rule, version):
    spectrum, moments = indefinite(), estimator_moments(queries=2)
    for steps in (2, 17, 1000):
        lr = StabilityCondition(rule, moments, steps, version).threshold(spectrum)
        early = QuadraticModel(spectrum, rule, moments).time_to_blow_up(lr * (1 + 1e-09), version=version)
        late = QuadraticModel(spectrum, rule, moments).time_to_blow_up(lr * (1 - 1e-09), version=version)
        assert early <= steps
        assert late == steps + 1


def test_a_stable_step_size_never_blows_up_and_a_huge_one_at_once():
    spectrum, rule = indefinite(), update_rule("gdm")
    stable = 0.99 * StabilityCondition(rule).threshold(spectrum)
    assert QuadraticModel(spectrum, rule).time_to_blow_up(stable) == math.inf
    assert QuadraticModel(spectrum, rule).time_to_blow_up(stable, version="full") < math.inf
    assert QuadraticModel(spectrum, rule).time_to_blow_up(1000000.0) == 1


@pytest.mark.parametrize("steps", [None, 50])
def test_the_error_bar_is_the_spread_of_thresholds_over_probe_vectors(steps):
    d, probes, draws, rng = 80, 4, 400, np.random.default_rng(0)
    eigenvalues = rng.exponential(1.0, d)
    basis = ortho_group.rvs(d, random_state=rng)
    condition = StabilityCondition(update_rule("gdm"), steps=steps)
    values, stderrs = [], []
    for _ in range(draws):
        z = rng.standard_normal((probes, d))
        z *= np.sqrt(d) / np.linalg.norm(z, axis=1, keepdims=True)
        spectrum = Spectrum(eigenvalues, ((z @ basis) ** 2).mean(axis=0))
        estimate = condition.estimate(SampledSpectrum(spectrum, spectrum, num_probes=probes, dimension=d))
        values.append(estimate.value)
        stderrs.append(estimate.stderr)
    spread = np.std(values)
    assert np.mean(stderrs) == pytest.approx(spread, abs=4.5 * spread / math.sqrt(2 * draws))


@every_rule
def test_the_quadrature_error_is_how_far_the_error_of_the_sum_moves_the_threshold(rule):
    fine, size = indefinite(), 1e-4
    error = Spectrum(fine.nodes * 1.1, size * fine.weights)
    smaller = Spectrum(fine.nodes, 0.1 * size * fine.weights)
    moved = Spectrum(np.concatenate([fine.nodes, error.nodes]), np.concatenate([fine.weights, error.weights]))
    sampled = SampledSpectrum(fine, Spectrum.of([]), num_probes=3, dimension=500, errors=((smaller, error),))
    for condition in (StabilityCondition(rule), StabilityCondition(rule, steps=300, version="full")):
        estimate = condition.estimate(sampled)
        assert estimate.value == condition.threshold(fine)
        assert estimate.stderr == 0
        assert estimate.quadrature == pytest.approx(estimate.value - condition.threshold(moved), rel=20 * size)


@every_version
@every_rule
def test_signed_weights_that_correct_a_rule_give_the_threshold_of_their_sum(rule, version):
    corrected = Spectrum(np.array([2.0, 0.1, 0.1, -0.05, 1.0, 1.0]), np.array([1.0, 5.0, -2.0, 1.0, 3.0, -3.0]))
    merged = Spectrum(np.array([2.0, 0.1, -0.05]), np.array([1.0, 3.0, 1.0]))
    condition = StabilityCondition(rule, steps=40, version=version)
    assert condition.threshold(corrected) == pytest.approx(condition.threshold(merged), rel=1e-12)
    forever = StabilityCondition(rule)
    assert forever.threshold(corrected) == pytest.approx(forever.threshold(merged), rel=1e-12)


def test_a_correction_that_outweighs_its_rule_leaves_no_feedback_rather_than_a_nan():
    broken = Spectrum(np.array([1.0, 1.1]), np.array([1.0, -3.0]))
    for rule in RULES:
        assert StabilityCondition(rule).threshold(broken) == math.inf
        assert StabilityCondition(rule, steps=30, version="full").threshold(broken) == math.inf


def test_a_threshold_that_is_infinite_or_exact_has_no_error_bar():
    nothing = Spectrum.of([-1.0])
    condition = StabilityCondition(update_rule("gd"))
    assert condition.estimate(SampledSpectrum(nothing, nothing, num_probes=2, dimension=5)).half_width == 0
    assert condition.estimate(SampledSpectrum.exact([1.0])).half_width == 0


def test_the_horizon_curve_holds_both_versions_at_every_horizon():
    sampled, rule = SampledSpectrum.exact(indefinite().nodes), update_rule("adam")
    curve = horizon_curve(sampled, [30, 1000], rule=rule)
    assert [point.steps for point in curve] == [30, 1000]
    for point in curve:
        for found, version in ((point.lower, "full"), (point.upper, "positive")):
            alone = StabilityCondition(rule, steps=point.steps, version=version).threshold(indefinite())
            assert found.value == pytest.approx(alone, rel=1e-12)


def test_bad_arguments_are_refused():
    rule, spectrum = update_rule("gd"), Spectrum.of([1.0])
    for call in (
        lambda: StabilityCondition(rule, version="full"),
        lambda: StabilityCondition(rule, steps=0),
        lambda: StabilityCondition(rule, steps=10, version="negative"),
        lambda: StabilityCondition(rule).feedback(spectrum.nodes, -1.0),
        lambda: QuadraticModel(spectrum, rule).time_to_blow_up(math.nan),
        lambda: QuadraticModel(spectrum, rule).time_to_blow_up(0.0),
        lambda: horizon_curve(SampledSpectrum.exact([1.0]), [0], rule=rule),
    ):
        with pytest.raises(ValueError, match=r"must be|needs a finite"):
            call()


def test_a_signed_weight_of_an_escaping_mode_does_not_hide_the_threshold():
    # Extrapolated quadrature: where such a mode overflows, the sum has the wrong sign.
    spectrum = Spectrum(np.array([60.0, 1.0, -0.5, -0.55]), np.array([1.0, 100.0, 0.5, -0.05]))
    conditions = [StabilityCondition(update_rule("gd"), steps=10**k, version="full") for k in (3, 4, 5, 6)]
    found = [condition.threshold(spectrum) for condition in conditions]
    assert all(later < earlier for earlier, later in itertools.pairwise(found))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_conditions_side_by_side_give_the_numbers_of_each_alone(momentum):
    rng = np.random.default_rng(3)
    rule, fine = update_rule("gdm", beta=momentum), indefinite(seed=3)
    parts = [
        Spectrum(np.concatenate([fine.nodes[:5], rng.normal(0, 0.01, 6)]), rng.normal(0, 0.1, 11)) for _ in range(3)
    ]
    sampled = SampledSpectrum(fine, Spectrum(fine.nodes[2:], fine.weights[2:]), 4, 500, ((parts[0],), tuple(parts[1:])))
    steps = [1, 30, 64, 1000, 100_000]
    conditions = [StabilityCondition(rule, steps=t, version=v) for t in steps for v in ("full", "positive")]
    conditions += [StabilityCondition(rule)]
    for condition, found in zip(conditions, estimates(conditions, sampled), strict=True):

        def excess(log_lr, condition=condition):
            kept = fine.nodes[fine.nodes > 0] if condition.version == "positive" else fine.nodes
            return min(float(condition.feedback(kept, math.exp(log_lr)).sum()), 1e9) - 1

        edge = math.exp(brentq(excess, math.log(1e-7), math.log(10.0), xtol=1e-14, rtol=1e-14))
        assert found.value == pytest.approx(edge, rel=1e-11)
        slope = (excess(math.log(edge) + 1e-5) - excess(math.log(edge) - 1e-5)) / 2e-5

        def errors(rules, condition=condition, edge=edge):
            return [abs(float(part.weights @ condition.feedback(part.nodes, edge))) for part in rules]

        expected = edge / slope * (max(errors(parts[:1])) + max(errors(parts[1:])))
        assert found.quadrature == pytest.approx(expected, rel=1e-4)


def test_a_guess_from_a_similar_spectrum_leads_to_the_same_threshold():
    steps, spectrum = [30, None], indefinite()
    conditions = [StabilityCondition(rule, steps=t) for rule in RULES for t in steps]
    alone = thresholds(conditions, spectrum)
    for factor in (1e-3, 0.9, 1.1, 1e3):
        near = {condition: factor * value for condition, value in zip(conditions, alone, strict=True)}
        again = thresholds(conditions, indefinite(), near=near)
        np.testing.assert_allclose(again, alone, rtol=1e-12)


@every_rule
def test_a_curve_of_horizons_takes_as_many_evaluations_as_one_of_its_points(rule, monkeypatch):
    calls = []

    def counted(z, steps, **options):
        calls.append(z.shape)
        return horizon_feedback(z, steps, **options)

    monkeypatch.setattr(mean_square, "horizon_feedback", counted)
    spectrum = indefinite()
    sampled = SampledSpectrum(spectrum, spectrum, num_probes=4, dimension=200, errors=((spectrum,),))
    horizon_curve(sampled, [30, 100, 300, 1000, 3000, 10_000, 100_000], rule=rule)
    assert len(calls) <= (50 if rule.momentum else 25)
    calls.clear()
    horizon_curve(sampled, [1000], rule=rule)  # known by now: the errors alone are asked for
    assert len(calls) == 1
