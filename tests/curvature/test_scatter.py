"""Error bars of few and skewed samples."""

import math

import numpy as np

from zoscope.curvature.forward import mean_of, ratio_of, variance_of


def test_a_ratio_of_few_skewed_groups_is_covered():
    """Groups as they come: a squared norm of 16 slopes as denominator, about its square as numerator."""
    rng = np.random.default_rng(0)
    hits, widths, ratios = 0, [], []
    for _ in range(2000):
        norms = rng.chisquare(16, size=14) / 16
        found = ratio_of(norms * (norms + 0.1 * rng.chisquare(1, size=14)), norms)
        hits += abs(found.value - (1 + 2 / 16 + 0.1)) <= found.half_width
        widths.append(found.half_width)
        ratios.append(found.value)
    assert 0.935 <= hits / 2000 <= 0.98, hits / 2000
    assert np.median(widths) < 1.5 * 1.96 * np.std(ratios)


def test_samples_without_scatter_or_of_one_have_the_errors_that_follow():
    assert (ratio_of([2.0, 4.0], [1.0, 2.0]).value, ratio_of([2.0, 4.0], [1.0, 2.0]).stderr) == (2.0, 0.0)
    assert math.isinf(ratio_of([1.0], [1.0]).stderr)
    assert math.isinf(mean_of([1.0]).stderr)
    assert math.isinf(variance_of([1.0]).stderr)
