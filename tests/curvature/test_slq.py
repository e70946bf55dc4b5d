from dataclasses import replace

import numpy as np
import pytest
import torch

from zoscope.curvature.complement import SHORT_LENGTHS, Deflated, plan
from zoscope.curvature.lanczos import Chain
from zoscope.curvature.measure import measure
from zoscope.curvature.operators import DenseOperator
from zoscope.curvature.slq import (
    averaged_rule,
    gauss_rule,
    jacobi_of,
    joined,
    probe_block,
    reshaped,
    split,
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


@pytest.mark.parametrize("power", range(6))
def test_averaged_rules_integrate_what_both_of_their_parts_do(power):
    chain, start = chain_of(EIGENVALUES, steps=4)
    rule = averaged_rule(chain.jacobi)
    assert rule.trace_of(lambda x: x**power) == pytest.approx(moment(EIGENVALUES, start, power), rel=1e-9)


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


def test_the_jacobi_matrix_of_a_rule_gives_the_rule_back():
    rule = Spectrum([-1.0, 0.5, 2.0, 7.0], [0.1, 0.4, 0.3, 0.2])
    back = gauss_rule(jacobi_of(rule))
    np.testing.assert_allclose(back.nodes, rule.nodes, atol=1e-12)
    np.testing.assert_allclose(back.weights, rule.weights, atol=1e-12)


def test_a_split_keeps_the_measure_of_the_start_vector():
    chain, start = chain_of(EIGENVALUES, steps=30)
    parts = split(chain.jacobi, dim=len(EIGENVALUES))
    assert 5 <= len(parts.values) < 30
    deflated = chain.combine(parts.vectors)
    rest = start - deflated.T @ (deflated @ start)
    matrix = rotated(EIGENVALUES, seed=1)
    rule = gauss_rule(parts.rest)
    mean = float(rest @ matrix @ rest / (rest @ rest))
    assert rule.trace_of(lambda x: x) == pytest.approx(mean, rel=1e-6)


def estimate(seed, *, steps=30, length=8, blocks=2):
    chain, _ = chain_of(EIGENVALUES, steps=steps, seed=seed)
    parts = split(chain.jacobi, dim=len(EIGENVALUES))
    state = Deflated.of(parts, dim=len(EIGENVALUES))
    state.length = length
    basis = chain.combine(parts.vectors)
    generator = torch.Generator().manual_seed(1000 + seed)
    for _ in range(blocks):
        operator = DenseOperator(rotated(EIGENVALUES, seed=1))
        state.shorts += probe_block(operator, basis, probes=4, length=length, generator=generator)
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
        spectrum = estimate(seed, length=5, blocks=2)
        corrected.append(spectrum.trace_of(f).value)
        exact = spectrum.fine.weights == 1.0
        plain.append(f(spectrum.fine.nodes[exact]).sum() + spectrum.sampled.trace_of(f))
    assert abs(np.mean(corrected) - truth) < 0.4 * abs(np.mean(plain) - truth)


def test_everything_is_exact_when_nothing_is_left_to_sample():
    eigenvalues = torch.tensor([1.0, 2.0, 3.0]).double()
    chain, _ = chain_of(eigenvalues, steps=3)
    spectrum = Deflated.of(split(chain.jacobi, dim=3), dim=3).spectrum()
    assert spectrum.is_exact
    assert spectrum.fine.trace == pytest.approx(6.0)


def test_chains_are_short_where_the_function_is_smooth_and_long_where_it_has_a_kink():
    chain, _ = chain_of(EIGENVALUES, steps=40)
    state = Deflated.of(split(chain.jacobi, dim=len(EIGENVALUES)), dim=len(EIGENVALUES))

    def precision_of(f):
        def precision(spectrum):
            found = spectrum.trace_of(f)
            return found.quadrature / found.value

        return precision

    smooth = plan(state, precision_of(np.square), rtol=0.0015, budget=5000)
    kinked = plan(state, precision_of(lambda x: np.maximum(x, 0.0)), rtol=0.0015, budget=5000)
    assert smooth.length == SHORT_LENGTHS[0] < kinked.length


@pytest.mark.parametrize(
    "eigenvalues", [torch.linspace(1, 2, 50), torch.linspace(1, 2, 300), torch.linspace(-1, 1, 300)]
)
def test_spectra_without_outliers_are_covered_too(eigenvalues):
    op = DenseOperator(rotated(eigenvalues, seed=1))
    truth = float(eigenvalues.double().clamp_min(0).sum())
    found = [measure(op, method="deflated-slq", max_hvps=400, seed=seed).trace_positive.interval for seed in range(20)]
    assert sum(lo <= truth <= hi for lo, hi in found) >= 16  # P(fewer of 20) < 0.3 % at a true coverage of 95 %


def test_two_moments_are_exact_in_a_rule_of_one_step():
    chain, start = chain_of(EIGENVALUES, steps=12)
    _, start = chain_of(EIGENVALUES, steps=1, seed=5)
    rule = reshaped(averaged_rule(chain.jacobi), *(moment(EIGENVALUES, start, power) for power in (1, 2)))
    for power in range(3):
        assert rule.trace_of(lambda x, p=power: x**p) == pytest.approx(moment(EIGENVALUES, start, power), rel=1e-9)


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
