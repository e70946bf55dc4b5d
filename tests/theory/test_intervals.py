import math

import numpy as np
import pytest
from scipy.stats import ortho_group

from zoscope.theory.rules import update_rule
from zoscope.theory.spectrum import SampledSpectrum, Spectrum
from zoscope.theory.stability import Interval, MomentBounds, interval_ci95

RULE = update_rule("gdm")


def paper(trace, square, largest):
    return MomentBounds(RULE).paper(trace, largest)


def tight(trace, square, largest):
    return MomentBounds(RULE).tight(trace, square, largest)


@pytest.mark.parametrize(("bounds", "positive"), [(paper, False), (tight, True)])
def test_the_error_of_both_ends_is_their_spread_over_probe_vectors(bounds, positive):
    d, probes, draws, rng = 80, 4, 400, np.random.default_rng(0)
    eigenvalues = np.concatenate([rng.exponential(1.0, d - 10), -rng.exponential(0.3, 10)])
    basis = ortho_group.rvs(d, random_state=rng)
    top = float(eigenvalues.max())
    ends, widths = [], []
    for _ in range(draws):
        z = rng.standard_normal((probes, d))
        z *= np.sqrt(d) / np.linalg.norm(z, axis=1, keepdims=True)
        fine = Spectrum(eigenvalues, ((z @ basis) ** 2).mean(axis=0))
        part = fine.positive if positive else fine
        found = bounds(part.trace, part.frobenius_sq, top)
        sampled = SampledSpectrum(fine, fine, num_probes=probes, dimension=d)
        low, high = interval_ci95(bounds, sampled, largest=top, residual=0.0, positive=positive)
        ends.append((found.lower, found.upper))
        widths.append((found.lower - low, high - found.upper))
    spread = 1.96 * np.std(ends, axis=0)
    np.testing.assert_allclose(np.mean(widths, axis=0), spread, rtol=4.5 / math.sqrt(2 * draws))


def test_without_sampling_only_the_residual_of_the_largest_eigenvalue_is_left():
    sampled = SampledSpectrum.exact([3.0, 1.0, 0.5])
    found = paper(4.5, 10.25, 3.0)
    assert interval_ci95(paper, sampled, largest=3.0, residual=0.0, positive=False) == (found.lower, found.upper)
    low, high = interval_ci95(paper, sampled, largest=3.0, residual=0.01, positive=False)
    assert low == pytest.approx(paper(4.5, 10.25, 3.01).lower, rel=1e-4)
    assert high == found.upper  # Tr H alone


def test_an_infinite_end_stays_infinite():
    sampled = SampledSpectrum.exact([-1.0])
    assert interval_ci95(tight, sampled, largest=0.0, residual=0.0, positive=True) == (math.inf, math.inf)
    assert interval_ci95(lambda *_: Interval(1.0, math.inf), sampled, largest=0.0, residual=0.0, positive=True) == (
        1.0,
        math.inf,
    )
