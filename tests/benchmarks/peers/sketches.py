"""The error of XTrace and Hutch++ at every size, from draws on a stand-in.

Both sketch ``M = H^power`` with Gaussian probes and sample what the sketch leaves out. The first columns of one draw
are a draw of a smaller size, so a single factorisation tells about all sizes at once, in double precision and without
a matrix of d rows (see `Diagonal.probes`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from .standin import Array, Diagonal

DRAWS = 200
XTRACE_DRAWS = 1000
"""An RMSE is then known to 2 % where errors are normal; that of Hutch++, from variances, with fewer draws."""


@dataclass(frozen=True)
class Sketch:
    """``MW = QR`` of n probes W, in the coordinates of Q; cut to the first k columns it is the sketch of k probes.

    Args:
        factor: R, ``(n, n)``.
        inner: ``QᵀMQ``, ``(n, n)``.
        probes: ``QᵀW``, ``(n, n)``.
        image_sq: ``‖M qᵢ‖²`` of the columns of Q, ``(n,)``.
    """

    factor: Array
    inner: Array
    probes: Array
    image_sq: Array

    @classmethod
    def of(cls, values: Array, probes: Array) -> Self:
        """Sketch of the diagonal matrix of ``values``, ``(d,)``, with the columns of ``probes``, ``(d, n)``."""
        basis, factor = np.linalg.qr(values[:, None] * probes)
        image = values[:, None] * basis
        return cls(factor, basis.T @ image, basis.T @ probes, (image**2).sum(axis=0))

    def xtrace(self, size: int) -> float:
        """The estimate of Tr M by XTrace with the first ``size`` probes.

        Each probe w estimates what the others' sketch leaves out: with P the projector orthogonal to that sketch and a
        the coordinates of the projection of w on it, ``Tr (I − P)M + wᵀPMPw``. Removing a probe from the sketch takes
        one direction s out of it, which R tells (Epperly, Tropp & Webber, arXiv:2301.07825).
        """
        r, inner, w = (part[:size, :size] for part in (self.factor, self.inner, self.probes))
        s = np.linalg.inv(r).T
        s /= np.linalg.norm(s, axis=0)
        a = w - s * (s * w).sum(axis=0)
        sketched = np.trace(inner) - (s * (inner @ s)).sum(axis=0)
        left = ((w - 2 * a) * r).sum(axis=0) + (a * (inner @ a)).sum(axis=0)
        return float((sketched + left).mean())

    def hutchpp_variance(self, size: int, norm_sq: float) -> float:
        """Variance of Hutch++ with ``size`` probes each for sketch and remainder, given the sketch, which has no bias.

        That is ``2‖PMP‖²/size``; ``norm_sq`` is ``‖M‖²``.
        """
        left = norm_sq - 2 * self.image_sq[:size].sum() + (self.inner[:size, :size] ** 2).sum()
        return 2 * max(float(left), 0.0) / size


def xtrace_rmse(diagonal: Diagonal, power: int, sizes: Sequence[int], *, seed: int = 0) -> Array:
    """Relative RMSE of XTrace for ``Tr H^power``, at numbers of probes that ascend."""
    truth = diagonal.moment(power)
    sketches = _sketches(diagonal, power, sizes[-1], draws=XTRACE_DRAWS, seed=seed)
    errors = [[sketch.xtrace(n) / truth - 1 for n in sizes] for sketch in sketches]
    return np.sqrt(np.square(errors).mean(axis=0))


def hutchpp_rmse(diagonal: Diagonal, power: int, sizes: Sequence[int], *, seed: int = 0) -> Array:
    """Relative RMSE of Hutch++ for ``Tr H^power``, at numbers of probes that ascend, by averaging its variance."""
    truth, norm_sq = diagonal.moment(power), diagonal.moment(2 * power)
    sketches = _sketches(diagonal, power, sizes[-1], draws=DRAWS, seed=seed)
    variances = [[sketch.hutchpp_variance(n, norm_sq) for n in sizes] for sketch in sketches]
    return np.sqrt(np.mean(variances, axis=0)) / abs(truth)


def _sketches(diagonal: Diagonal, power: int, size: int, *, draws: int, seed: int) -> Iterator[Sketch]:
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        values, probes = diagonal.probes(size, generator)
        yield Sketch.of(values**power, probes)
