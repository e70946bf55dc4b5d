"""Eigenvalue densities and counts of a spectrum, with error bands.

Eigenvalues of networks span many decades on both sides of zero, so the axis is ``x = asinh(λ/2s)/ln 10``: decades of
``|λ|/s`` far from zero, linear within ``±s``. A quadrature rule knows a density only after smoothing, and not at every
scale; s is the resolution near zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import ClassVar

import numpy as np
from scipy.ndimage import maximum_filter1d

from zoscope.theory.spectrum import Array, Estimate, SampledSpectrum

BANDWIDTH = 0.15
"""Standard deviation of the Gaussian that smooths a density, decades."""

POINTS_PER_BANDWIDTH = 5
MARGIN = 5 * BANDWIDTH
"""How far a density is followed beyond the outermost nodes, decades."""

SMALLEST_SCALE = 1e-6
"""Finest resolution near zero, in units of the spectral radius."""

UNRESOLVED_SHARE = 0.05
"""Share of the eigenvalues that may lie within the linear part of the axis before a finer one is looked for."""


@dataclass(frozen=True)
class Known:
    """Eigenvalues known one by one, which are nodes of weight 1 in their spectrum.

    Args:
        values: ``(q,)`` eigenvalues.
        residuals: ``(q,)`` how far each may be off.
    """

    values: Array
    residuals: Array


@dataclass(frozen=True)
class Density:
    """Eigenvalues per decade, smoothed; the integral over ``positions`` is the dimension.

    Args:
        scale: s, where the axis changes from linear to decades.
        positions: ``(n,)`` equally spaced points of the axis, decades.
        values: ``(n,)`` eigenvalues per decade.
        half_widths: ``(n,)`` half-widths of the 95 % band.
    """

    bandwidth: ClassVar[float] = BANDWIDTH
    """Standard deviation of the Gaussian that smoothed it, decades."""

    scale: float
    positions: Array
    values: Array
    half_widths: Array

    @property
    def eigenvalues(self) -> Array:
        """``(n,)`` the points in units of an eigenvalue."""
        return value_at(self.positions, scale=self.scale)

    @property
    def error(self) -> float:
        """Mean half-width of the band over the mean density."""
        total = float(self.values.sum())
        return float(self.half_widths.sum()) / total if total > 0 else 0.0


def position_of(eigenvalues: Array, *, scale: float) -> Array:
    """Place on the axis, decades."""
    return np.arcsinh(eigenvalues / (2 * scale)) / math.log(10)


def value_at(positions: Array, *, scale: float) -> Array:
    """The eigenvalue at a place on the axis."""
    return 2 * scale * np.sinh(positions * math.log(10))


def density(
    sampled: SampledSpectrum, *, scale: float, known: Known | None = None, points: int = POINTS_PER_BANDWIDTH
) -> Density:
    """Density of a spectrum on the axis of a given scale.

    The band at a point is the widest within one bandwidth of it: differences between quadrature rules change their
    sign along the axis, and say nothing where they happen to vanish.

    Args:
        sampled: The spectrum.
        scale: s, in the unit of an eigenvalue.
        known: Widens the band by what the residuals of these eigenvalues may move them.
        points: Points per bandwidth; 2 are enough for its error.
    """
    places = position_of(sampled.fine.nodes, scale=scale)
    step = BANDWIDTH / points
    first, last = (places.min() - MARGIN) / step, (places.max() + MARGIN) / step
    grid = step * np.arange(math.floor(first), math.ceil(last) + 1)  # multiples of the step: zero is among them

    values = _kernel(grid[:, None] - places) @ sampled.fine.weights
    error_places = position_of(sampled.error_nodes, scale=scale)

    def half_width(x: float) -> float:
        bumps = _kernel(x - error_places)
        return Estimate(0.0, sampled.stderr_at(bumps), sampled.quadrature_error_at(bumps)).half_width

    widths = np.array([half_width(float(x)) for x in grid])
    widths = maximum_filter1d(widths, size=2 * points + 1)
    if known is not None:
        widths = widths + _displacement(known, grid, scale=scale)
    return Density(scale, grid, values, widths)


def finest_density(
    sampled: SampledSpectrum, *, tolerance: float, noise: float = 0.0, known: Known | None = None
) -> Density:
    """Density on the finest axis on which its error stays below a tolerance.

    Args:
        sampled: The spectrum.
        tolerance: Largest error of the density, as in ``Density.error``.
        noise: Eigenvalues below this are rounding.
        known: As for ``density``.
    """
    best: Density | None = None
    for scale in _scales(sampled, noise=noise):
        found = density(sampled, scale=scale, known=known)
        if best is not None and found.error > tolerance:
            break
        best = found
    assert best is not None
    return best


@dataclass(frozen=True)
class Decade:
    """The eigenvalues in an interval ``[lower, upper)``.

    Args:
        lower: Its lower end.
        upper: Its upper end.
        count: How many there are.
        total: Their sum.
    """

    lower: float
    upper: float
    count: Estimate
    total: Estimate


def decades(sampled: SampledSpectrum, *, scale: float) -> tuple[Decade, ...]:
    """Counts and sums by powers of ten, from the most negative to the largest; what lies near zero is one interval.

    Args:
        sampled: The spectrum.
        scale: Resolution near zero; intervals end at three times of it or further away.
    """
    nodes = sampled.fine.nodes
    edges = [*(-end for end in reversed(_ends(-nodes.min(), scale=scale))), *_ends(nodes.max(), scale=scale)]
    return tuple(
        Decade(
            lower,
            upper,
            _within(sampled, lower, upper, power=0, scale=scale),
            _within(sampled, lower, upper, power=1, scale=scale),
        )
        for lower, upper in pairwise(edges)
    )


def _ends(largest: float, *, scale: float) -> list[float]:
    """1 or 3 times a power of ten next to zero, then powers of ten to the first above ``largest``."""
    innermost = min(end for end in _tidy(scale) if end >= 2.9 * scale)
    powers = (10.0**k for k in range(_power_above(innermost), _power_above(largest) + 1))
    return [innermost, *powers] if largest >= innermost else [innermost]


def _within(sampled: SampledSpectrum, lower: float, upper: float, *, power: int, scale: float) -> Estimate:
    """``sum λ^power`` over the nodes in an interval; the error is the largest with its ends moved by a bandwidth."""

    def between(low: float, high: float) -> Estimate:
        return sampled.trace_of(lambda nodes: np.where((low <= nodes) & (nodes < high), nodes**power, 0.0))

    if sampled.is_exact:
        return between(lower, upper)
    moved = [list(_moved(end, scale=scale)) for end in (lower, upper)]
    widest = max((between(low, high) for low, high in product(*moved)), key=lambda estimate: estimate.half_width)
    return replace(widest, value=between(lower, upper).value)


def _moved(end: float, *, scale: float) -> Iterator[float]:
    place = position_of(np.array([end]), scale=scale)
    for shift in (0.0, -BANDWIDTH, BANDWIDTH):
        yield float(value_at(place + shift, scale=scale)[0])


def _scales(sampled: SampledSpectrum, *, noise: float) -> Iterator[float]:
    """1, 3, 10, 30, … from the spectral radius downwards, as far as the eigenvalues go."""
    sizes = np.abs(sampled.fine.nodes)
    radius = float(sizes.max(initial=0.0))
    if radius == 0:
        yield 1.0
        return
    order = np.argsort(sizes)
    reached = np.flatnonzero(np.cumsum(sampled.fine.weights[order]) > UNRESOLVED_SHARE * sampled.fine.weights.sum())
    smallest = float(sizes[order][reached[0]]) / 10
    least = max(SMALLEST_SCALE * radius, 3 * noise, smallest)
    below = [scale for scale in _tidy(radius) if scale <= radius]
    yield below[0]
    yield from (scale for scale in below[1:] if scale >= least)


def _tidy(value: float) -> list[float]:
    """1 and 3 times powers of ten, descending, from above a value to far below it."""
    power = _power_above(value)
    return [factor * 10.0**k for k in range(power + 1, power - 9, -1) for factor in (3, 1)]


def _kernel(distances: Array) -> Array:
    return np.exp(-0.5 * (distances / BANDWIDTH) ** 2) / (BANDWIDTH * math.sqrt(2 * math.pi))


def _displacement(known: Known, grid: Array, *, scale: float) -> Array:
    """Most that eigenvalues moved by their residuals change the density at each point."""

    def bumps(values: Array) -> Array:
        return _kernel(grid[:, None] - position_of(values, scale=scale))

    here = bumps(known.values)
    moved = [np.abs(bumps(known.values + sign * known.residuals) - here) for sign in (-1, 1)]
    summed: Array = np.maximum(*moved).sum(axis=1)
    return summed


def _power_above(value: float) -> int:
    """The smallest k with ``10^k > value``."""
    return math.floor(math.log10(value)) + 1 if value > 0 else 0
