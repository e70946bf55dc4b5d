from dataclasses import replace

import numpy as np
import pytest
import torch

from zoscope.curvature.lanczos import Chain, Recurrences
from zoscope.curvature.operators import DenseOperator
from zoscope.curvature.slq import (
    Complement,
    Deflated,
    Deflation,
    averaged_rule,
    gauss_rule,
    joined,
    measure,
    plan,
    tilted,
)
from zoscope.theory.spectrum import SampledSpectrum, Spectrum

from .matrices import network_like, rotated

EIGENVALUES = network_like(negative=0.4)


def chain_of(eigenvalues, *, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(len(eigenvalues), generator=generator, dtype=torch.float64)
    chain = Chain(DenseOperator(rotated(eigenvalues, seed=1)), start, capacity=steps)
    chain.extend(steps)
    return chain, start / torch.linalg.vector_norm(start)


def moment(eigenvalues, start, power):
    matrix = rotated(eigenvalues, seed=1)
    vector = start
    for _ in range(power):
        vector = matrix @ vector
    return float(start @ vector)


@pytest.mark.parametrize("power", range(8))
def test_gauss_rules_integrate_polynomials_up_to_twice_the_steps(power):
    chain, start = chain_of(EIGENVALUES, steps=4)
    rule = gauss_rule(chain.jacobi)
    assert rule.trace_of(lambda x: x**power) == pytest.approx(moment(EIGENVALUES, start, power), rel=1e-9)


@pytest.mark.parametrize("ends", [None, (-0.5, 25.0), "its own"])
def test_averaged_rules_integrate_as_much_wherever_their_nodes_may_lie(ends):
    chain, start = chain_of(EIGENVALUES, steps=4)
    values = chain.jacobi.eigh()[0]
    ends = tuple(values[[0, -1]]) if ends == "its own" else ends
    rule = averaged_rule(chain.jacobi, ends)
    for power in range(8):
        wanted = moment(EIGENVALUES, start, power)
        assert rule.trace_of(lambda x, power=power: x**power) == pytest.approx(wanted, rel=1e-9)
    assert (rule.weights >= 0).all()
    if ends is not None:
        assert rule.nodes.min() >= ends[0] - 1e-9
        assert rule.nodes.max() <= ends[1] + 1e-9


def test_averaged_rules_are_as_far_from_gauss_rules_as_the_ends_allow():
    jacobi = chain_of(EIGENVALUES, steps=4)[0].jacobi
    values = jacobi.eigh()[0]
    free, held = averaged_rule(jacobi), averaged_rule(jacobi, (values[0] - 1e-3, 1e3))
    assert averaged_rule(jacobi, (free.nodes.min() - 1, free.nodes.max() + 1)).nodes == pytest.approx(free.nodes)
    assert held.nodes.min() == pytest.approx(values[0] - 1e-3)
    own = averaged_rule(jacobi, (values[0], values[-1]))
    assert own.nodes[own.weights > 1e-9] == pytest.approx(values)


def test_a_bulk_near_zero_is_not_moved_out_of_it():
    # Most of the mass of eigenvalues 1/k is near zero. Nodes that were moved in to the smallest Ritz value added to its
    # trace, and the tilt to the true moments took that from the larger eigenvalues: 0.9 % here, with any vector.
    values = 1.0 / np.arange(26, 2000)
    operator, errors = DenseOperator(torch.diag(torch.from_numpy(values))), []

    def bent(x):
        return x * -np.expm1(-500 * x)

    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randn(1, len(values), generator=generator, dtype=torch.float64)
        (jacobi,) = Recurrences(operator, starts, deflated=starts[:0]).extend(10).jacobis()
        rule = averaged_rule(jacobi, tuple(jacobi.eigh()[0][[0, -1]]))
        found, missing = tilted(rule, values.mean(), np.square(values).mean(), end=float(values.max()))
        errors.append(found.trace_of(bent) / bent(values).mean() - 1)
        assert np.abs(missing.weights).max() < 1e-9
    assert abs(np.mean(errors)) < 3 * np.std(errors, ddof=1) / np.sqrt(len(errors))
    assert np.std(errors) < 0.005


def test_averaged_rules_are_better_than_gauss_rules_at_a_kink():
    errors = []
    for seed in range(8):
        chain, start = chain_of(EIGENVALUES, steps=12, seed=seed)
        values, basis = torch.linalg.eigh(rotated(EIGENVALUES, seed=1))
        exact = float(((basis.T @ start) ** 2) @ values.clamp_min(0))
        rules = gauss_rule(chain.jacobi), averaged_rule(chain.jacobi)
        errors.append([abs(rule.trace_of(lambda x: np.maximum(x, 0)) - exact) for rule in rules])
    gauss, averaged = np.mean(errors, axis=0)
    assert averaged < 0.7 * gauss


def test_deflated_pairs_are_invariant_up_to_what_couples_them():
    chain, _ = chain_of(EIGENVALUES, steps=30)
    deflated = Deflated.of(chain.jacobi)
    assert 5 <= len(deflated.values) < 30
    matrix = rotated(EIGENVALUES, seed=1)
    deflation = Deflation(chain, deflated)
    vectors = torch.randn(3, len(EIGENVALUES), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    projector = torch.eye(len(EIGENVALUES)).double() - deflation.vectors.T @ deflation.vectors
    inside, products = deflation.beyond(vectors, vectors @ matrix)
    torch.testing.assert_close(inside, vectors @ projector, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(products, vectors @ projector @ matrix @ projector, rtol=1e-8, atol=1e-8)


def fresh(deflation, count, *, generator):
    normal = torch.randn(count, len(EIGENVALUES), generator=generator, dtype=torch.float64)
    return deflation.project(normal)


def estimate(seed, *, steps=30, length=8, shorts=8, firsts=0):
    chain, _ = chain_of(EIGENVALUES, steps=steps, seed=seed)
    deflated = Deflated.of(chain.jacobi)
    deflation = Deflation(chain, deflated)
    state = Complement.of(deflated, dim=len(EIGENVALUES), rounding=1e-12, precision=1e-14)
    generator = torch.Generator().manual_seed(1000 + seed)
    operator = DenseOperator(rotated(EIGENVALUES, seed=1))

    def recurrences(count, length):
        starts = fresh(deflation, count, generator=generator)
        return Recurrences(operator, starts, deflated=deflation.vectors).extend(length).jacobis()

    (state.fine,) = recurrences(1, 30)
    state.length, state.shorts = length, recurrences(shorts, length)
    state.firsts = recurrences(firsts, 1) if firsts else []
    return state.spectrum()


FUNCTIONS = {
    "trace": lambda x: x,
    "norm": np.square,
    "positive part": lambda x: np.maximum(x, 0.0),
    "horizon": lambda x: 1 - np.exp(-2.0 * x),
}


@pytest.fixture(scope="module")
def estimates():
    return [estimate(seed) for seed in range(40)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_intervals_cover_the_truth(estimates, name):
    f = FUNCTIONS[name]
    truth = f(EIGENVALUES.numpy()).sum()
    inside = sum(lo <= truth <= hi for lo, hi in (spectrum.trace_of(f).interval for spectrum in estimates))
    assert inside >= 34  # P(fewer of 40) < 1 % at a true coverage of 95 %


@pytest.mark.parametrize("name", FUNCTIONS)
def test_estimates_are_unbiased_within_their_error_bars(estimates, name):
    f = FUNCTIONS[name]
    found = [spectrum.trace_of(f) for spectrum in estimates]
    truth = f(EIGENVALUES.numpy()).sum()
    tolerance = 3 * np.mean([e.stderr for e in found]) / np.sqrt(len(found)) + np.mean([e.quadrature for e in found])
    assert abs(np.mean([e.value for e in found]) - truth) < tolerance + 1e-3 * abs(truth)


def test_standard_errors_are_the_scatter_between_seeds(estimates):
    f = FUNCTIONS["trace"]
    found = [spectrum.trace_of(f) for spectrum in estimates]
    scatter = np.std([e.value for e in found], ddof=1)
    # A standard deviation from 40 draws is known to 11 %; Student's factor widens the claim by up to a fifth.
    assert 0.7 * scatter < np.mean([e.stderr for e in found]) < 1.6 * scatter


def test_the_correction_removes_the_bias_of_short_chains():
    def f(x):
        return np.maximum(x, 0.0)

    truth = f(EIGENVALUES.numpy()).sum()
    corrected, plain = [], []
    for seed in range(12):
        spectrum = estimate(seed, length=5)
        corrected.append(spectrum.trace_of(f).value)
        exact = spectrum.fine.weights == 1.0
        plain.append(f(spectrum.fine.nodes[exact]).sum() + spectrum.sampled.trace_of(f))
    assert abs(np.mean(corrected) - truth) < 0.4 * abs(np.mean(plain) - truth)


def test_everything_is_exact_when_nothing_is_left_to_sample():
    chain, _ = chain_of(torch.tensor([1.0, 2.0, 3.0]).double(), steps=3)
    spectrum = Complement.of(Deflated.of(chain.jacobi), dim=3, rounding=0.0, precision=0.0).spectrum()
    assert spectrum.is_exact
    assert spectrum.fine.trace == pytest.approx(6.0)


@pytest.mark.parametrize("power", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_single_products_are_counted_in_the_first_two_moments(power):
    def value(firsts):
        return [estimate(seed, firsts=firsts).trace_of(lambda x: x**power) for seed in range(12)]

    few, many = value(0), value(60)
    truth = float((EIGENVALUES**power).sum())
    assert np.mean([e.stderr for e in many]) < 0.5 * np.mean([e.stderr for e in few])
    assert np.std([e.value for e in many]) < 0.7 * np.std([e.value for e in few])
    assert sum(lo <= truth <= hi for lo, hi in (e.interval for e in many)) >= 9  # P(fewer of 12) < 1 % at 95 %


@pytest.mark.parametrize("multiplicity", [2, 5, 30])
@pytest.mark.parametrize("spread", [0.0, pytest.param(1e-6, marks=pytest.mark.slow)])
def test_eigenvalues_that_a_chain_cannot_tell_apart_are_all_counted(multiplicity, spread):
    outliers = 100 + spread * torch.arange(multiplicity)
    bulk = torch.randn(800, generator=torch.Generator().manual_seed(2), dtype=torch.float64).exp()
    eigenvalues = torch.cat([outliers.double(), bulk])
    op = DenseOperator(torch.diag(eigenvalues))
    found = [measure(op, method="deflated-slq", max_hvps=200, seed=seed) for seed in range(12)]
    for name, power in (("trace", 1), ("frobenius_sq", 2)):
        truth = float((eigenvalues**power).sum())
        errors = [abs(getattr(f, name).value - truth) / getattr(f, name).half_width for f in found]
        assert sum(error <= 1 for error in errors) >= 9  # P(fewer of 12) < 1 % at 95 %
        assert max(errors) < 3


@pytest.mark.parametrize("rank", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_fewer_examples_than_parameters_leave_no_confident_error(rank):
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(rank, 2000, generator=generator, dtype=torch.float64)
    op = DenseOperator(2 / rank * features.T @ features)
    truth = float(op.dense().trace())
    found = [measure(op, method="deflated-slq", seed=seed) for seed in range(12)]
    errors = [abs(f.trace.value - truth) / f.trace.half_width for f in found]
    assert sum(error <= 1 for error in errors) >= 9  # P(fewer of 12) < 1 % at 95 %
    assert max(errors) < 3
    assert all(f.trace.half_width <= 0.05 * truth for f in found)


def tilt_of(mean, square):
    rule = averaged_rule(chain_of(EIGENVALUES, steps=12)[0].jacobi)
    own = rule.trace, rule.frobenius_sq
    return rule, tilted(rule, own[0] * mean, own[1] * square, end=30.0)


def test_a_tilted_rule_has_the_moments_wanted():
    rule, (found, missing) = tilt_of(1.1, 1.05)
    assert found.trace_of(np.ones_like) == pytest.approx(1.0)
    assert found.trace == pytest.approx(1.1 * rule.trace, rel=1e-9)
    assert found.frobenius_sq == pytest.approx(1.05 * rule.frobenius_sq, rel=1e-9)
    assert np.abs(missing.weights).max() < 1e-9


@pytest.mark.parametrize(("mean", "square"), [(50.0, 1.0), (1.0, 400.0), (-30.0, 2.0), (1e6, 1e12)])
def test_a_tilt_keeps_weights_positive_and_bounded_and_says_what_it_leaves_out(mean, square):
    rule, (found, missing) = tilt_of(mean, square)
    assert found.weights.min() >= -1e-15
    assert (found.weights <= 5.001 * rule.weights + 1e-15).all()
    total = found.trace + missing.trace
    assert total == pytest.approx(mean * rule.trace, rel=1e-6)


def test_the_plan_takes_single_products_for_moments_and_rules_for_a_kink():
    chain, _ = chain_of(EIGENVALUES, steps=20)
    deflated = Deflated.of(chain.jacobi)
    state = Complement.of(deflated, dim=len(EIGENVALUES), rounding=0.0, precision=0.0)
    start = torch.randn(1, len(EIGENVALUES), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    deflation, operator = Deflation(chain, deflated), DenseOperator(rotated(EIGENVALUES, seed=1))
    recurrence = Recurrences(operator, deflation.project(start), deflated=deflation.vectors)
    (state.fine,) = recurrence.extend(40).jacobis()

    def precision_of(f):
        def precision(spectrum):
            found = spectrum.trace_of(f)
            return found.half_width / found.value

        return precision

    smooth = plan(state, precision_of(lambda x: x), rtol=0.01, budget=5000)
    kinked = plan(state, precision_of(lambda x: np.maximum(x, 0.0)), rtol=0.006, budget=5000)
    assert smooth.shorts == 1 < smooth.vectors
    assert kinked.shorts > 1


@pytest.mark.parametrize(
    "eigenvalues", [torch.linspace(1, 2, 50), torch.linspace(1, 2, 300), torch.linspace(-1, 1, 300)]
)
def test_spectra_without_outliers_are_covered_too(eigenvalues):
    op = DenseOperator(rotated(eigenvalues, seed=1))
    truth = float(eigenvalues.double().clamp_min(0).sum())
    found = [measure(op, method="deflated-slq", max_hvps=400, seed=seed).trace_positive.interval for seed in range(12)]
    assert sum(lo <= truth <= hi for lo, hi in found) >= 9  # P(fewer of 12) < 1 % at a true coverage of 95 %


def zero_heavy(size: int = 1500) -> torch.Tensor:
    """Most eigenvalues in a peak at zero, as of rarely used embeddings, with tails on both sides."""
    generator = torch.Generator().manual_seed(3)
    peak = 2e-3 * torch.randn(size, generator=generator, dtype=torch.float64)
    tails = torch.randn(size // 12, generator=generator, dtype=torch.float64).exp() / 8
    tails[::3] *= -0.6
    peak[: len(tails)] = tails
    return peak


def positive_part(nodes):
    return np.maximum(nodes, 0.0)


@pytest.mark.slow
def test_a_kink_inside_a_peak_at_zero_is_covered():
    eigenvalues = zero_heavy()
    op = DenseOperator(torch.diag(eigenvalues))
    truth = float(eigenvalues.clamp_min(0).sum())
    found = [measure(op, method="deflated-slq", max_hvps=120, seed=seed).trace_positive for seed in range(20)]
    assert sum(lo <= truth <= hi for lo, hi in (estimate.interval for estimate in found)) >= 16
    assert np.median([estimate.half_width for estimate in found]) < 0.5 * truth


def test_rules_that_scatter_beyond_sampling_say_so():
    generator = np.random.default_rng(0)
    nodes = generator.standard_normal(400)
    parts = [Spectrum(nodes, np.full(400, 2.5)) for _ in range(6)]
    whole = SampledSpectrum(Spectrum(nodes, np.full(400, 2.5)), parts[0], 6, 1000, probes=tuple(parts))
    assert whole.quadrature_error_of(positive_part) == 0
    signs = (1, -1, 1, -1, 1, -1)  # each rule has its node at one side of the kink or the other
    moved = tuple(Spectrum(part.nodes + 0.4 * sign, part.weights) for part, sign in zip(parts, signs, strict=True))
    torn = replace(whole, sampled=joined([(1 / 6, part) for part in moved]), probes=moved)
    totals = [rule.trace_of(positive_part) for rule in moved]
    assert torn.quadrature_error_of(positive_part) > np.std(totals)
    assert torn.with_endless_sampling().quadrature_error_of(positive_part) > np.std(totals)


def test_a_parabola_is_known_by_all_probe_vectors_and_the_rest_by_one():
    nodes = np.linspace(-1, 2, 50)
    part = Spectrum(nodes, np.full(50, 20.0))
    one = SampledSpectrum(part, part, 1, 1000)
    many = SampledSpectrum(part, part, 1, 1000, num_moments=25)
    parabola = one.stderr_of(np.square)
    assert many.stderr_of(np.square) < parabola / 4
    assert one.stderr_of(np.abs) / 4 < many.stderr_of(np.abs) < one.stderr_of(np.abs)
