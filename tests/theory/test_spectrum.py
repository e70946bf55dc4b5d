import numpy as np
import pytest

from zoscope import Estimate
from zoscope.theory.spectrum import SampledSpectrum, Spectrum


def test_moments_are_those_of_the_matrix():
    eigenvalues = np.array([3.0, -1.0, 0.5, 0.5])
    spectrum = Spectrum.of(eigenvalues)
    assert spectrum.trace == pytest.approx(3.0)
    assert spectrum.frobenius_sq == pytest.approx(10.5)
    assert spectrum.lambda_max == 3.0
    assert spectrum.positive.trace == pytest.approx(4.0)


def test_weights_are_multiplicities():
    merged = Spectrum(np.array([2.0, 0.5]), np.array([1.0, 3.0]))
    assert merged.trace_of(np.exp) == pytest.approx(Spectrum.of([2.0, 0.5, 0.5, 0.5]).trace_of(np.exp), rel=1e-15)


def test_a_node_without_weight_is_not_the_largest_eigenvalue():
    assert Spectrum(np.array([9.0, 1.0]), np.array([0.0, 1.0])).lambda_max == 1.0


def test_the_empty_spectrum_is_zero():
    empty = Spectrum.of([])
    assert (empty.trace, empty.frobenius_sq, empty.lambda_max) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [([1.0, 2.0], [1.0]), ([np.nan], [1.0]), ([1.0], [np.inf]), ([[1.0]], [[1.0]])],
)
def test_bad_spectra_are_refused(nodes, weights):
    with pytest.raises(ValueError, match="nodes and weights"):
        Spectrum(np.array(nodes), np.array(weights))


def test_half_width_adds_sampling_and_quadrature():
    estimate = Estimate(10.0, stderr=1.0, quadrature=0.5)
    assert estimate.half_width == pytest.approx(2.46)
    assert estimate.interval == pytest.approx((7.54, 12.46))


def test_an_exact_spectrum_has_no_error():
    sampled = SampledSpectrum.exact([1.0, 2.0])
    assert sampled.is_exact
    assert sampled.trace_of(np.square) == Estimate(5.0)


def test_standard_error_is_the_spread_of_probe_vectors_on_the_sphere():
    d, probes, draws, rng = 60, 4, 4000, np.random.default_rng(0)
    eigenvalues = np.exp(rng.normal(size=d))
    z = rng.standard_normal((draws, probes, d))
    z *= np.sqrt(d) / np.linalg.norm(z, axis=2, keepdims=True)
    estimates = (z**2 @ eigenvalues**2).mean(axis=1)
    exact = Spectrum.of(eigenvalues)
    sampled = SampledSpectrum(fine=exact, sampled=exact, num_probes=probes, dimension=d)
    spread = estimates.std()
    assert sampled.stderr_of(np.square) == pytest.approx(spread, abs=4.5 * spread / np.sqrt(2 * draws) * 1.5)


def test_quadrature_errors_are_the_largest_of_each_kind_added_up():
    fine = Spectrum.of([1.0, 2.0])
    errors = tuple(Spectrum(np.array([2.5, 2.0]), scale * np.array([1.0, -1.0])) for scale in (0.2, -1.0))
    other = (Spectrum.of([0.25]),)
    sampled = SampledSpectrum(fine=fine, sampled=fine, num_probes=1, dimension=2, errors=(errors, other))
    assert sampled.trace_of(lambda x: x).quadrature == pytest.approx(0.75)


def test_endless_sampling_leaves_the_quadrature_error():
    fine = Spectrum.of([1.0, 2.0])
    sampled = SampledSpectrum(fine=fine, sampled=fine, num_probes=1, dimension=2, errors=((fine,),))
    assert sampled.stderr_of(np.square) > 0
    endless = sampled.with_endless_sampling().trace_of(np.square)
    assert (endless.value, endless.quadrature) == (5.0, 5.0)
    assert endless.stderr < 1e-8 * sampled.stderr_of(np.square)


def test_errors_of_functions_that_nearly_overflow_are_finite():
    exact = Spectrum.of([1.0, 2.0, 3.0])
    sampled = SampledSpectrum(fine=exact, sampled=exact, num_probes=2, dimension=30)
    assert sampled.stderr_of(lambda x: 1e200 * x) == pytest.approx(1e200 * sampled.stderr_of(lambda x: x))
    assert sampled.stderr_of(lambda x: np.inf * x) == np.inf
