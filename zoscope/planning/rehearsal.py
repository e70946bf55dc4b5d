"""A zeroth-order run in few gradients: macro steps of K steps each, the stiff directions followed exactly.

A step of a zeroth-order optimizer moves along ``ĝ``, whose mean is the gradient and whose covariance is
``b N I + (a-1) g gᵀ + a Cov(g_B)`` with ``N = E‖g_B‖²`` over mini-batches B and (a, b) of the directions' law. Over K
steps these sums are nearly Gaussian. Within a macro step the gradient is linear along a few top directions Q of the
Hessian, ``QᵀHQ = Λ``, and constant across them, so that with ``m ← βm + ĝ; x ← x - ηm`` every direction of curvature λ
(0 across) is a linear recursion that K steps of which are a power of a small matrix:

    (δ, m, 1)     ← [[1-ηλ, -ηβ, -η], [λ, β, 1], [0, 0, 1]]ᴷ (0, m₀, g)
    (Eδ², Eδm, Em²) ← Aᴷ with the noise as source,   A as in theory/stability.py

A gradient a macro step gives g, a mini-batch or two N. Adam has η divided by ``√v + ε`` in every coordinate, v driven
by the mean of ``ĝ²``, ``bN + a g_i²``. Weight decay w adds ``w x`` to the gradient and w to λ in the mean. One-sided
differences add ``(μ/2) uᵀHu u`` to an estimate: ``(μ²/4) (E(uᵀHu)² I + 4 Tr(H) H + 8 H²)`` in its covariance with
Gaussian u. One u a macro step tells ``uᵀHu``.

The top directions turn while a run goes on. A further gradient each macro step, beside a point of the run, gives the
Hessian's product with one vector of Q, or with the part of the gradient that lies across Q, where an instability shows
first; Q and Λ follow (Rayleigh and Ritz). K is made so small that ``ηKλ`` stays small for what is left out of Q.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoscope.optim.directions import spawn_streams

Array = NDArray[np.float64]
Shape = Callable[[float], float]
"""Step size over its peak at a step."""

STIFF = 0.3
"""Most of ``ηKλ`` for curvature outside of the top space: explicit steps inflate the noise by half of it."""

RANK = 48
"""Most directions that are followed exactly."""

WORTH = 0.05
"""``ηKλ`` from which a direction is worth following exactly."""

TRUST = 0.1
"""Squared error of the linear gradient at the end of a macro step, over N, from which macro steps become shorter."""

PRODUCTS = 1
"""Products of the Hessian that go with the gradients of all runs."""

BEND = 4
"""Losses that a one-sided and a central slope take."""

LEAST = 0.05
"""Least share of N that is left by what fades, and of 1 by what noise feeds back."""

FINEST, SHORTEST = 8, 16
"""A stiff run takes at most so many times the macro steps asked for, or one in so many steps if that is more."""

BEGIN, FIRST, GROWTH = 0.25, 8, 1.5
"""First macro steps are shorter, as curvature, momentum and v settle: share of K and most steps of the first one, and
growth from one to the next."""


class Gradients(Protocol):
    """What a rehearsal sees of a loss."""

    def full(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients ``(R, d)`` over all examples and losses ``(R,)`` at the rows of ``theta`` ``(R, d)``."""

    def values(self, theta: Tensor) -> Tensor:
        """Losses ``(R,)``."""

    def batch(self, theta: Tensor, rows: list[int]) -> Tensor | None:
        """Gradients ``(R, d)`` over a new mini-batch for each of these rows; ``None`` where steps see all examples."""

    def bends(self, theta: Tensor, directions: Tensor, mu: float) -> Tensor:
        """One-sided slopes less central ones along ``directions`` ``(R, d)``, ``(R,)``; of the last mini-batches."""

    def begin(self, runs: Sequence[int]) -> None:
        """The rows are these runs, and their mini-batches start anew."""


@dataclass(frozen=True)
class Law:
    """An optimizer as a rehearsal sees it.

    Args:
        family: ``gd``, ``gdm`` or ``adam``.
        momentum: β of the heavy ball.
        scale: What of the estimate goes into the momentum: 1 less dampening.
        second: Adam's β₂.
        eps: Adam's ε.
        weight_decay: w of ``ĝ + w x``.
        a: Weight of the signal in the estimate's second moment.
        b: Weight of its isotropic noise.
        one_sided_mu: μ of one-sided differences; 0 for central ones.
    """

    family: str
    momentum: float = 0.0
    scale: float = 1.0
    second: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    a: float = 2.0
    b: float = 1.0
    one_sided_mu: float = 0.0


@dataclass(frozen=True)
class Coefficients:
    """What K steps do to a direction, per unit of what they start from; arrays of one shape.

    Args:
        x_m: Move per momentum at the start.
        x_g: Move per gradient.
        m_m: Momentum per momentum.
        m_g: Momentum per gradient.
        noise: Lower triangle ``(xx, mx, mm)`` of the noise in position and momentum, per √(variance of a step).
        fading: ``(gg, gm, mm)``: what the square of the mean gradient is on average over the steps, per g², g·m and m².
        feedback: What noise of variance 1 a step adds to the mean square of the gradient, on average.
    """

    x_m: Array
    x_g: Array
    m_m: Array
    m_g: Array
    noise: tuple[Array, Array, Array]
    fading: tuple[Array, Array, Array]
    feedback: Array


def coefficients(eta: Array, curvature: Array, *, steps: int, law: Law) -> Coefficients:
    """K steps along directions of given curvature.

    Args:
        eta: Step sizes along the momentum, of any shape.
        curvature: λ, of the same shape.
        steps: K.
        law: Momentum, weight decay and a.
    """
    eta, lam = np.broadcast_arrays(eta, curvature)
    beta, one, zero = law.momentum, np.ones_like(eta), np.zeros_like(eta)
    mean = lam + np.where(lam == 0, 0.0, law.weight_decay)  # across the top space decay is part of the gradient
    drift = _stacked([[1 - eta * mean, -eta * beta, -eta], [mean, beta * one, one], [zero, zero, one]])
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows leaves, and is seen to
        t = np.linalg.matrix_power(drift, steps)
        squares, spread = (
            np.linalg.matrix_power(_second(eta, mean, n, beta), steps) for n in (zero, lam**2 * (law.a - 1))
        )
        xx, xm, mm = np.maximum(spread[..., 0, 3], 0.0), spread[..., 1, 3], np.maximum(spread[..., 2, 3], 0.0)
        low = np.sqrt(xx)
        mx = np.divide(xm, low, out=np.zeros_like(low), where=low > 0)
        noise = low, mx, np.sqrt(np.maximum(mm - mx**2, 0.0))
        kept = squares[..., 4, :3] / steps
        fading = kept[..., 0], lam * kept[..., 1], lam**2 * kept[..., 2]
        feedback = lam**2 * spread[..., 4, 3] / steps
    return Coefficients(t[..., 0, 1], t[..., 0, 2], t[..., 1, 1], t[..., 1, 2], noise, fading, feedback)


def _second(eta: Array, mean: Array, scatter: Array, beta: float) -> Array:
    """One step of ``(Eδ², Eδm, Em², 1, Σ Eδ²)`` under noise of variance 1 that grows by ``scatter`` Eδ²."""
    one, zero = np.ones_like(eta), np.zeros_like(eta)
    square = (mean**2 + scatter, 2 * beta * mean, beta**2 * one, one, zero)
    cross = (mean, beta * one, zero, zero, zero)
    first = [(n == 0) - 2 * eta * c + eta**2 * s for n, (c, s) in enumerate(zip(cross, square, strict=True))]
    second = [c - eta * s for c, s in zip(cross, square, strict=True)]
    return _stacked([first, second, list(square), [zero, zero, zero, one, zero], [one, zero, zero, zero, one]])


def _stacked(rows: list[list[Array]]) -> Array:
    return np.stack([np.stack(np.broadcast_arrays(*row), axis=-1) for row in rows], axis=-2)


@dataclass
class TopSpace:
    """Directions of large curvature, and what is known of the curvature across them.

    Args:
        basis: ``(k, d)`` orthonormal rows Q.
        values: ``(k,)`` curvature along them.
        outside: Size of the curvature that is not in there, loss/param².
    """

    basis: Tensor
    values: Array
    outside: float
    ages: Array = field(init=False)
    pending: Tensor | None = None
    turn: int = 0

    def __post_init__(self) -> None:
        self.ages = np.zeros(len(self.values))

    def copy(self) -> TopSpace:
        """A space of its own to follow a run with."""
        return TopSpace(self.basis, self.values.copy(), self.outside)

    def choose(self, gradient: Tensor, count: int, *, scale: float) -> tuple[Tensor, list[int]]:
        """Orthonormal vectors ``(j, d)`` whose products with the Hessian are worth knowing, and their places.

        Those in the basis whose curvature was measured long ago, and one from outside: what the last products pointed
        to, or the gradient there, in which an instability shows. A vector from outside has the place that it would get.

        Args:
            gradient: ``(d,)`` gradient of a run.
            count: How many at most.
            scale: ``ηK``.
        """
        self.turn += 1
        worth = self.ages * np.minimum(scale * np.abs(self.values), 1.0)
        places = [int(place) for place in np.argsort(-worth, kind="stable")[:count] if worth[place] > 0]
        if count > 1 or not places or self.turn % 2:
            places = places[: count - 1]
        rows = self.basis[places]
        if len(places) < count:
            outside = self.pending if self.pending is not None and self.turn % 4 else gradient
            across = self._across(outside)
            if float(across.norm()) > 1e-4 * float(outside.norm()):  # below it is rounding
                rows = torch.cat([rows, _unit(across)[None]])
                places.append(len(self.values))
        return rows, places

    def _across(self, vectors: Tensor) -> Tensor:
        for _ in range(2):  # what is left may be a small part
            vectors = vectors - (vectors @ self.basis.T) @ self.basis
        return vectors

    def learn(self, vectors: Tensor, places: list[int], products: Tensor, *, scale: float) -> None:
        """Take in products of the Hessian.

        Args:
            vectors: ``(j, d)`` from ``choose``.
            places: From there.
            products: ``(j, d)``.
            scale: ``ηK``.
        """
        if not bool(torch.isfinite(products).all()):
            return
        size = len(self.values)
        outside = [n for n, place in enumerate(places) if place == size]
        self.basis = torch.cat([self.basis, vectors[outside]])
        known = np.diag(np.append(self.values, np.zeros(len(outside))))
        ages = np.append(self.ages, np.zeros(len(outside)))
        along = _numpy(products @ self.basis.T)
        for place, row in zip(places, along, strict=True):
            known[place], known[:, place] = row, row
            ages[place] = 0.0
        rest = self._across(products)
        sizes = _numpy(rest.norm(dim=1))
        if outside:
            self.outside = max(0.8 * self.outside, float(sizes[outside].max()))
        largest = int(np.argmax(sizes))
        self.pending = rest[largest] if scale * sizes[largest] > WORTH else None
        values, turned = np.linalg.eigh(known)
        kept = np.argsort(-np.abs(values))[:RANK]
        mix = turned[:, kept]
        self.values, self.ages = values[kept], (mix**2).T @ ages + 1.0
        self.basis = torch.as_tensor(mix.T, dtype=self.basis.dtype, device=self.basis.device) @ self.basis


def _unit(vector: Tensor) -> Tensor:
    length: Tensor = vector.norm().clamp_min(torch.finfo(vector.dtype).tiny)
    return vector / length


@dataclass(frozen=True, eq=False)
class Rehearsed:
    """What rehearsed runs did.

    Args:
        steps: ``(n,)`` steps at which they were looked at, 0 first and the last one last.
        losses: ``(n, R)``; infinite from where a run has left.
        left: For every run the step at which it had left, or ``None``.
        gradients: Gradients over all examples that were taken.
        batches: Gradients over mini-batches.
        losses_seen: Losses beside them that one-sided differences took, of a step's examples.
    """

    steps: Array
    losses: Array
    left: tuple[int | None, ...]
    gradients: int
    batches: int
    losses_seen: int


class Rehearsal:
    """Runs at one step size, rehearsed.

    Args:
        source: The loss.
        start: ``(d,)`` where they start.
        law: The optimizer.
        lr: Peak of the step size.
        steps: N.
        macro: Macro steps to take at least.
        runs: Numbers of the R runs to make; one has the same random numbers whatever the step size is.
        seed: Seed of them.
        ceiling: Loss above which a run has left.
        top: Directions of large curvature at the start.
        shape: The schedule.
        trust: Squared error of the linear gradient, over N, that is good enough.
    """

    def __init__(
        self,
        source: Gradients,
        start: Tensor,
        *,
        law: Law,
        lr: float,
        steps: int,
        macro: int,
        runs: Sequence[int],
        seed: int,
        ceiling: float,
        top: TopSpace,
        shape: Shape | None = None,
        trust: float = TRUST,
    ) -> None:
        self._source, self._law, self._lr, self._steps, self._macro = source, law, lr, steps, macro
        self._ceiling, self._top, self._shape, self._trust = ceiling, top.copy(), shape, trust
        self._runs = runs
        self._x = start.repeat(len(runs), 1)
        self._m = torch.zeros_like(self._x) if law.momentum else None
        self._v = torch.zeros_like(self._x) if law.family == "adam" else None
        self._index = list(range(len(runs)))
        streams = spawn_streams(seed, max(runs) + 1, start.device)
        self._streams = [streams[run] for run in runs]
        self._left: list[int | None] = [None] * len(runs)
        self._gradients = self._batches = self._losses_seen = self._looks = 0
        self._previous: Tensor | None = None
        self._inverse, self._width = 1.0, 0.0
        self._expected: tuple[Tensor, Tensor, Tensor] | None = None
        self._longest, self._last = math.inf, 1

    @torch.no_grad()
    def go(self, *, enough: int | None = None, on_step: Callable[[int], None] | None = None) -> Rehearsed:
        """Go through the steps, once.

        Args:
            enough: Stop where so many have left; the others then end nowhere, with an infinite loss.
            on_step: Called with the number of steps just done.
        """
        self._source.begin(self._runs)
        done, size = 0, min(max(1, int(BEGIN * self._steps / self._macro)), FIRST)
        if self._law.momentum or self._v is not None:
            size = 1
        looked: list[int] = []
        losses: list[Array] = []
        scale = 0.0
        fewest = len(self._index) - (enough or len(self._index))
        while done < self._steps and len(self._index) > fewest:
            gradients, values = self._look(scale)
            self._looks += 1
            looked.append(done)
            losses.append(self._record(values))
            gone = ~(values <= self._ceiling)
            if bool(gone.any()):
                gradients = self._drop(gone, gradients, done)
                if len(self._index) <= fewest:
                    break
            eta = self._lr * self._factor(done, size)
            size = self._size(done, size, eta)
            eta = self._lr * self._factor(done, size)
            self._step(gradients, eta=eta, count=size, done=done)
            scale = eta * size
            done += size
            if on_step is not None:
                on_step(size)
        if len(self._index) > fewest:
            values = self._source.values(self._x)
            looked.append(done)
            losses.append(self._record(values))
            gone = ~(values <= self._ceiling)
            self._drop(gone, self._x, done)
        elif self._index:
            losses[-1] = np.full(len(self._left), np.inf)
        spent = self._gradients, self._batches, self._losses_seen
        return Rehearsed(np.array(looked), np.array(losses), tuple(self._left), *spent)

    def _factor(self, done: int, size: int) -> float:
        if self._shape is None:
            return 1.0
        points = done + (np.arange(min(size, 16)) + 0.5) * size / min(size, 16) - 0.5
        return float(np.mean([self._shape(float(point)) for point in points]))

    def _size(self, done: int, last: int, eta: float) -> int:
        """K: no more than N/M, short at first, and shorter where the curvature outside of the top space is stiff."""
        longest = self._steps / self._macro
        stiff = self._scaled_outside() * eta
        wanted = min(longest, STIFF / stiff if stiff > 0 else math.inf, self._longest, GROWTH * last + 0.5)
        looks, most = self._looks, max(FINEST * self._macro, self._steps // SHORTEST)
        least = (self._steps - done) / max(most - looks, 1) if 2 * looks > most else 1.0
        return int(min(max(wanted, least, 1.0), self._steps - done))

    def _scaled_outside(self) -> float:
        """Curvature outside, per unit of step size: momentum and Adam's P make steps longer or shorter."""
        return 0.0 if self._previous is None else self._along(self._top.outside)

    def _record(self, values: Tensor) -> Array:
        row = np.full(len(self._left), np.inf)
        found = values.double().cpu().numpy()
        row[self._index] = np.where(found <= self._ceiling, found, np.inf)
        return row

    def _drop(self, gone: Tensor, gradients: Tensor, done: int) -> Tensor:
        stays = [n for n, out in enumerate(gone.tolist()) if not out]
        for n, out in enumerate(gone.tolist()):
            if out:
                self._left[self._index[n]] = done
        self._index = [self._index[n] for n in stays]
        self._streams = [self._streams[n] for n in stays]
        self._x = self._x[stays]
        self._m = None if self._m is None else self._m[stays]
        self._v = None if self._v is None else self._v[stays]
        return gradients[stays]

    def _look(self, scale: float) -> tuple[Tensor, Tensor]:
        """Gradients and losses of all runs, and beside one of them for a product of the Hessian."""
        points = self._x
        count = len(points)
        chosen = self._chosen(scale)
        if chosen is None:
            gradients, values = self._source.full(points)
        else:
            vectors, places, width, rows = chosen
            gradients, values = self._source.full(torch.cat([points, points[rows] + width * vectors]))
            products = (gradients[count:] - gradients[rows]) / width
            self._top.learn(vectors, places, products, scale=self._along(scale))
        self._gradients += len(gradients)
        gradients, values = gradients[:count], values[:count]
        self._compare(gradients)
        return gradients, values

    def _compare(self, gradients: Tensor) -> None:
        """Make macro steps as long as the gradient along the top directions is what the linear model says."""
        if self._expected is None:
            return
        basis, expected, power = self._expected
        off = ((gradients @ basis.T - expected).double().square().sum(dim=1) / power[:, 0]).mean()
        change = math.sqrt(self._trust / max(float(off), 1e-6)) if bool(torch.isfinite(off)) else 0.5
        self._longest = min(max(change, 0.5), GROWTH) * self._last + 0.5  # which lets one step become two

    def _along(self, scale: float) -> float:
        """A step size along the gradient: momentum makes it longer, Adam's P longer or shorter."""
        return scale * self._law.scale * self._inverse / (1.0 if self._v is not None else 1 - self._law.momentum)

    def _chosen(self, scale: float) -> tuple[Tensor, list[int], float, list[int]] | None:
        """Vectors for products, how far from a run to look, and from which one: of each as many as there are runs."""
        if self._previous is None or scale == 0:
            return None
        count = len(self._x)
        vectors, places = self._top.choose(self._previous, PRODUCTS, scale=self._along(scale))
        if not places or not bool(torch.isfinite(vectors).all()):
            return None
        rows = [(self._top.turn + n) % count for n in range(len(places))]
        # The width of the noise of a macro step, and no less than what rounding leaves visible.
        return vectors, places, max(self._width, 1e-4 * float(self._x[0].norm()), 1e-6), rows

    def _normal(self) -> Tensor:
        rows = torch.empty_like(self._x)
        for row, stream in zip(rows, self._streams, strict=True):
            row.normal_(generator=stream)
        return rows

    def _numbers(self, count: int) -> tuple[Tensor, ...]:
        """``(R, 1)`` columns of single random numbers: χ²/K about 1 for the power of K directions, and normal ones."""
        fluctuation = (self._law.a - 1 + self._law.b) / count
        drawn = torch.stack(
            [torch.randn(4, generator=s, device=self._x.device, dtype=torch.float64) for s in self._streams]
        )
        # Wilson and Hilferty: a χ² mean with this relative variance.
        third = fluctuation / 9
        power = (1 - third + math.sqrt(third) * drawn[:, :1]).clamp_min(0.0) ** 3
        return (power, *(drawn[:, n : n + 1] for n in (1, 2)))

    def _step(self, gradients: Tensor, *, eta: float, count: int, done: int) -> None:
        """K steps of all runs at once."""
        law, x = self._law, self._x
        squares = gradients.square()
        power = gradients.double().square().sum(dim=1, keepdim=True)
        fluctuating, along, across = self._numbers(count)
        extra = math.sqrt(max(law.a - 1, 0.0)) * along.to(x) * gradients
        batch = self._source.batch(x, self._index)
        if batch is not None:
            again = self._source.batch(x, self._index)
            assert again is not None
            self._batches += 2 * len(x)
            squares = 0.5 * (batch.square() + again.square())
            power = squares.double().sum(dim=1, keepdim=True)
            extra = extra + math.sqrt(law.a) * across.to(x) * (batch - gradients)
        bends = None
        if law.one_sided_mu:
            bends = self._source.bends(x, self._normal(), law.one_sided_mu)[:, None].to(power)
            self._losses_seen += BEND * len(x)
            power = power + bends.square()
        drift = gradients + law.weight_decay * x if law.weight_decay else gradients
        rate, inverse = self._rates(law.a * squares + law.b * power.to(x), eta=eta, count=count, done=done)
        exact, power = self._averaged(gradients, power, rate, count)
        variance = law.b * power * fluctuating
        noise = self._noise(variance, bends) + extra
        second = None if self._m is None else self._noise(variance, bends)
        size = 1.0 if inverse is None else float(inverse.mean())
        self._previous = drift[0]
        self._inverse = size
        self._width = eta * size * math.sqrt(count * float(variance.mean()))
        self._move(drift, noise, second, rate, exact, power, count)

    def _noise(self, variance: Tensor, bends: Tensor | None) -> Tensor:
        """``(R, d)`` noise of a step; that of one-sided differences is larger where curvature is."""
        noise = self._normal() * variance.sqrt().to(self._x)
        if bends is None or not len(self._top.basis):
            return noise
        law, mu = self._law, self._law.one_sided_mu
        values = torch.as_tensor(self._top.values, device=noise.device)
        more = law.b * (2 * mu * bends * values + 2 * (mu * values) ** 2).clamp_min(0.0)
        drawn = torch.stack([torch.randn(len(values), generator=s, device=noise.device) for s in self._streams])
        return noise + (drawn * more.sqrt()).to(noise) @ self._top.basis

    def _rates(self, square: Tensor, *, eta: float, count: int, done: int) -> tuple[float | Tensor, Tensor | None]:
        """Step sizes along the momentum, and for Adam ``1/(√v + ε)`` in the middle of the macro step."""
        law = self._law
        if self._v is None:
            return eta * law.scale, None
        half = max(1, count // 2)
        keep = law.second**half
        middle = keep * self._v + (1 - keep) * square
        self._v.lerp_(square, 1 - law.second**count)
        inverse = 1 / ((middle / (1 - law.second ** (done + half))).sqrt() + law.eps)
        times = np.arange(done + 1, done + count + 1) if count <= 64 else np.linspace(done + 1, done + count, 64)
        return eta * (1 - law.momentum) * float(np.mean(1 / (1 - law.momentum**times))) * inverse, inverse

    def _averaged(
        self, gradients: Tensor, power: Tensor, rate: float | Tensor, count: int
    ) -> tuple[Coefficients | None, Tensor]:
        """What the steps do along the top directions, and N on average over them.

        Along those the gradient fades within a macro step, and comes back as noise feeds it.
        """
        q = self._top.basis
        if not len(q):
            return None, power
        eta = np.full((len(gradients), 1), rate) if isinstance(rate, float) else _numpy(rate @ q.square().T)
        exact = coefficients(
            eta, np.broadcast_to(self._top.values, (len(gradients), len(q))), steps=count, law=self._law
        )
        g, total = _numpy(gradients @ q.T), _numpy(power)
        m = np.zeros_like(g) if self._m is None else _numpy(self._m @ q.T)
        gg, gm, mm = exact.fading
        with np.errstate(over="ignore", invalid="ignore"):
            change = ((gg - 1) * g**2 + gm * g * m + mm * m**2).sum(axis=1, keepdims=True)
            fed = self._law.b * exact.feedback.sum(axis=1, keepdims=True)
            mean = np.maximum(total + change, LEAST * total) / np.maximum(1 - fed, LEAST)
        return exact, torch.as_tensor(mean, device=power.device)

    def _move(
        self,
        drift: Tensor,
        noise: Tensor,
        second: Tensor | None,
        rate: float | Tensor,
        exact: Coefficients | None,
        power: Tensor,
        count: int,
    ) -> None:
        x, q = self._x, self._top.basis
        flat = coefficients(np.ones(1), np.zeros(1), steps=count, law=self._law)
        xx, mx, mm = (float(value[0]) for value in flat.noise)
        move = float(flat.x_g[0]) * drift + xx * noise
        momentum = self._m
        if momentum is not None and second is not None:
            move = move + float(flat.x_m[0]) * momentum
            new = float(flat.m_m[0]) * momentum + float(flat.m_g[0]) * drift + mx * noise + mm * second
        move = rate * move
        if exact is not None:

            def seen(array: Array) -> Tensor:
                return torch.as_tensor(array, device=x.device)

            g, n = ((t @ q.T).double() for t in (drift, noise))
            wanted = seen(exact.x_g) * g + seen(exact.noise[0]) * n
            if momentum is not None and second is not None:
                before, other = (momentum @ q.T).double(), (second @ q.T).double()
                wanted = wanted + seen(exact.x_m) * before
                held = seen(exact.m_m) * before + seen(exact.m_g) * g
                held = held + seen(exact.noise[1]) * n + seen(exact.noise[2]) * other
                new = new + (held - (new @ q.T).double()).to(x) @ q
            move = move + (wanted - (move @ q.T).double()).to(x) @ q
        self._x, self._last = x + move, count
        self._expected = None
        if exact is not None:
            values = torch.as_tensor(self._top.values, device=x.device)
            self._expected = q, (drift @ q.T) + values.to(x) * (move @ q.T), power
        if momentum is not None:
            self._m = new


def _numpy(tensor: Tensor) -> Array:
    return tensor.double().cpu().numpy()
