import numpy as np
import pytest
from scipy.integrate import trapezoid

from zoscope.theory.density import Known, decades, density, finest_density, position_of, value_at
from zoscope.theory.spectrum import SampledSpectrum, Spectrum

VALUES = np.concatenate([np.geomspace(1e-4, 20, 60), -np.geomspace(1e-4, 0.3, 20), np.zeros(10)])
EXACT = SampledSpectrum.exact(VALUES)


def sampled(values: np.ndarray) -> SampledSpectrum:
    spectrum = Spectrum.of(values)
    error = Spectrum([0.01, 0.02], [2.0, -2.0])
    return SampledSpectrum(fine=spectrum, sampled=spectrum, num_probes=5, dimension=len(values), errors=((error,),))


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 100.0])
def test_a_density_integrates_to_the_number_of_eigenvalues(scale):
    found = density(EXACT, scale=scale)
    assert trapezoid(found.values, found.positions) == pytest.approx(len(VALUES), rel=1e-5)
    assert found.error == 0


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_the_axis_is_linear_near_zero_and_in_decades_far_away(scale):
    assert position_of(np.array([1e3 * scale]), scale=scale) == pytest.approx(3, abs=1e-6)
    assert position_of(np.array([-1e3 * scale]), scale=scale) == pytest.approx(-3, abs=1e-6)
    near = position_of(np.array([0.05, 0.1]) * scale, scale=scale)
    assert near[1] == pytest.approx(2 * near[0], rel=2e-3)
    assert value_at(position_of(VALUES, scale=scale), scale=scale) == pytest.approx(VALUES, rel=1e-9, abs=1e-15)


def test_the_finest_axis_is_coarse_where_errors_forbid_a_finer_one():
    exact, uncertain = finest_density(EXACT, tolerance=0.1), finest_density(sampled(VALUES), tolerance=0.5)
    assert exact.scale <= 1e-3
    assert uncertain.scale > exact.scale
    assert uncertain.error <= 0.5


def test_noise_is_not_resolved():
    assert finest_density(EXACT, tolerance=0.1, noise=0.05).scale >= 0.15


def test_no_axis_is_finer_than_the_eigenvalues():
    assert 0.1 <= finest_density(SampledSpectrum.exact([5.0] * 4 + [0.5] * 40), tolerance=0.1).scale <= 1


@pytest.mark.parametrize("values", [[0.0, 0.0], [3.0], [-2.0, -2.0], [1e-9, 1e9], [1e-30, -1e-30]])
def test_degenerate_spectra_have_a_density_and_decades(values):
    spectrum = SampledSpectrum.exact(values)
    found = finest_density(spectrum, tolerance=0.1)
    assert trapezoid(found.values, found.positions) == pytest.approx(len(values), rel=1e-5)
    assert sum(part.count.value for part in decades(spectrum, scale=found.scale)) == len(values)


def test_residuals_widen_the_band_where_their_eigenvalues_are():
    known = Known(np.array([20.0, -0.3]), np.array([1.0, 0.0]))
    found = density(EXACT, scale=1e-2, known=known)
    wide = found.half_widths > 1e-6
    assert np.all(np.abs(np.log10(found.eigenvalues[wide] / 20)) < 1)
    assert wide.any()


def test_decades_partition_the_spectrum():
    parts = decades(EXACT, scale=1e-3)
    assert [part.upper for part in parts[:-1]] == [part.lower for part in parts[1:]]
    assert sum(part.count.value for part in parts) == len(VALUES)
    assert sum(part.total.value for part in parts) == pytest.approx(VALUES.sum())
    for part in parts:
        inside = (part.lower <= VALUES) & (part.upper > VALUES)
        assert part.count.value == inside.sum()
        assert part.count.half_width == 0


def test_there_are_no_decades_beyond_the_spectrum():
    parts = decades(EXACT, scale=1e-3)
    assert parts[-1].upper == 100
    assert parts[0].lower == -1
    assert (parts[1].lower, parts[2].lower) == (-0.1, -0.01)


def test_a_spectrum_of_one_sign_has_decades_of_that_sign():
    parts = decades(SampledSpectrum.exact(np.geomspace(0.01, 5, 20)), scale=0.1)
    assert all(part.upper > 0 for part in parts)
    assert parts[0].lower == -parts[0].upper


def test_counts_of_a_sampled_spectrum_have_errors():
    parts = decades(sampled(VALUES), scale=1e-3)
    assert sum(part.count.value for part in parts) == pytest.approx(len(VALUES))
    assert all(part.count.half_width > 0 for part in parts)
