"""Which μ: where two-point slopes do not depend on it, and what the rounding of weights leaves of a training step."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from statistics import NormalDist
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoscope.curvature.finite_difference import Difference
from zoscope.curvature.forward import DirectionSampler, exploring
from zoscope.errors import SpecError, UsageError
from zoscope.optim.directions import new_generator
from zoscope.problem import Notice, Objective, Problem
from zoscope.problem.objective import Examples
from zoscope.result import JsonObject, RichResult, pick
from zoscope.runtime.devices import HALF
from zoscope.theory.spectrum import Estimate, widening

GRID = tuple(10.0 ** (k / 2) for k in range(-12, 1))
"""Values of μ that may be tried, 1e-6 to 1, two to a decade."""

START = GRID.index(1e-3)
"""Where the search begins: what is used most."""

RATIO = math.sqrt(10.0)
"""Of neighbours on the grid."""

GROWTH = 1.5
"""Of the disagreement of neighbours from one pair to the next, where an error dominates; really it is 3 to 10 times."""

FEWEST = 4
"""Directions from which an error bar can be had."""

KEPT = 0.9
"""Share of the movement that rounding should leave."""

_Array = NDArray[np.float64]


@dataclass(frozen=True)
class UpdateRounding(JsonObject):
    """What is left of ZO-GD's steps ``lr·c·u`` once every weight is rounded to its dtype, c and u being Gaussian.

    Args:
        dtype: Coarsest dtype among the weights.
        lr: Step size.
        vanishing: Share of the entries of all updates that are below half a last place of their weight and change
            nothing.
        kept: ``E⟨applied, intended⟩ / E‖intended‖²``. Entries that survive are rounded up more than down, so that this
            stays near 1 while half of the entries vanish, and falls quickly after that. An upper end: it is about
            writing the update alone, not about weights that were rounded when they were perturbed and put back, and
            not about the loss that rounding adds; bfloat16 runs have kept 0.67 to 0.78 where it says 0.98.
        least_lr: Step size from which on 90 % is kept. Below it weights should be kept in float32 besides (master
            weights) and rounded for the forward passes alone.
    """

    dtype: str
    lr: float
    vanishing: float
    kept: float
    least_lr: float

    @property
    def matters(self) -> bool:
        """Whether rounding takes a tenth of the movement or more."""
        return self.kept < KEPT


@dataclass(frozen=True)
class PerturbationScale(RichResult):
    """The values of μ at which slopes along random directions are right to ``tolerance``.

    Args:
        lower: Smallest such μ: below it the difference of two losses drowns in rounding. ``None`` where even the
            smallest of ``tried`` is usable, or none is.
        upper: Largest such μ: above it the loss is no quadratic on the way. ``None`` where even the largest is usable,
            or none is.
        best: The one of ``tried`` at which slopes depend on μ least; ``None`` where none is usable.
        tolerance: Root mean square error of a slope, relative to the root mean square of slopes.
        tried: Values of μ, ascending.
        slope_errors: Error at each, relative as above; infinite where losses are not finite.
        loss_rises: How much higher the loss is at ``θ ± μu`` than at θ on average, relative to the loss.
        slope: Root mean square of the slopes ``uᵀg``, which is ‖g‖ of the batch, loss/param.
        rounding: Error of a loss by its own last place alone, standard deviation.
        batch_size: Examples of the losses; ``None`` for all of them.
        one_sided: Whether slopes are ``(f(θ+μu) − f(θ))/μ``.
        dtype: Coarsest dtype among the weights that were perturbed.
        updates: What rounding of the weights leaves of a step; ``None`` where no step size was given.
        num_evaluations: Losses computed, of all examples or of a mini-batch, by all ranks.
        seconds: Wall-clock time.
    """

    lower: Estimate | None
    upper: Estimate | None
    best: float | None
    tolerance: float
    tried: tuple[float, ...]
    slope_errors: tuple[float, ...]
    loss_rises: tuple[float, ...]
    slope: Estimate
    rounding: float
    batch_size: int | None
    one_sided: bool
    dtype: str
    updates: UpdateRounding | None
    num_evaluations: int
    seconds: float

    schema: ClassVar[str] = "zoscope.mu/1"

    def to_dict(self) -> dict[str, Any]:
        """The document: JSON numbers, strings and null only."""
        return {"schema": self.schema} | pick(self, " ".join(entry.name for entry in fields(self)))

    @property
    def range(self) -> str:
        """Where slopes are right, in words."""
        low, high = (None if end is None else f"{end.value:.2g}" for end in (self.lower, self.upper))
        if not self.usable:
            return "no μ"
        if low is None and high is None:
            return f"every μ from {self.tried[0]:.2g} to {self.tried[-1]:.2g}"
        return f"μ up to {high}" if low is None else f"μ from {low} on" if high is None else f"μ from {low} to {high}"

    @property
    def usable(self) -> bool:
        """Whether any μ is."""
        return self.best is not None

    def allows(self, mu: float) -> bool:
        """Whether a μ lies in the range; beyond what was tried only where no end was found on that side."""
        above = self.lower is None or mu >= self.lower.value
        return self.usable and above and (self.upper is None or mu <= self.upper.value)


def perturbation_scale(
    problem: Problem,
    *,
    batch_size: int | None = None,
    lr: float | None = None,
    one_sided: bool = False,
    tolerance: float = 0.1,
    directions: int = 12,
    device: str = "auto",
    dtype: str = "own",
    seed: int = 0,
) -> PerturbationScale:
    """Which μ (MeZO's ε): the range in which slopes along random directions are right to ``tolerance``.

    The problem comes back as it was. Only losses are computed: it does without gradients.

    Args:
        problem: Model, batches and loss.
        batch_size: Examples of a training step; ``None`` for all of them.
        lr: Step size of ZO-GD for which to say what rounding of the weights leaves of a step.
        one_sided: Whether training takes ``(f(θ+μu) − f(θ))/μ``.
        tolerance: Relative error of a slope that is good enough.
        directions: How many.
        device: Where.
        dtype: The one that trains; ``own`` is the model's.
        seed: Of directions and mini-batches.

    Raises:
        UsageError: For too few directions.
        SpecError: If the problem cannot be evaluated.
        NumericalError: If memory runs out.
    """
    with problem.prepare(device=device, dtype=dtype, differentiable=False) as objective:
        return measure_scale(
            objective,
            batch_size=batch_size,
            lr=lr,
            one_sided=one_sided,
            tolerance=tolerance,
            directions=directions,
            seed=seed,
        )


def measure_trained_scale(
    subject: Problem, objective: Objective, where: Mapping[str, Any], **how: Any
) -> PerturbationScale:
    """Measure the range of μ in the weights' own dtype, if no other is asked for.

    Args:
        subject: The problem that is prepared.
        objective: What it is prepared as, perhaps in a wider dtype.
        where: Options ``dtype``, ``device``, ``micro_batch`` and ``max_memory`` of the command.
        **how: Keyword arguments of `measure_scale`.
    """
    if where["dtype"] == "auto" and any(param.dtype in HALF for param in subject.model.parameters()):
        options = {name: where[name] for name in ("device", "micro_batch", "max_memory")}
        # Batches of another dtype than the weights, which a training would convert, are refused.
        with suppress(SpecError), subject.prepare(dtype="own", differentiable=False, **options) as trained:
            return measure_scale(trained, **how)
    return measure_scale(objective, **how)


def measure_scale(
    objective: Objective,
    *,
    batch_size: int | None = None,
    lr: float | None = None,
    one_sided: bool = False,
    tolerance: float = 0.1,
    directions: int = 12,
    seed: int = 0,
) -> PerturbationScale:
    """Measure in which range of μ two-point slopes are right, along the same random directions for every μ.

    From 1e-3 the search goes both ways, until neighbours on the grid disagree more and more: rounding adds an error
    that grows as 1/μ towards small μ, the third derivative one that grows as μ², kinks and one-sided differences one
    that grows as μ. The truth is taken from where neighbours agree best; its own error, told by how much
    they do, is part of all others. Ends are interpolated between values of the grid; their standard errors are those of
    a jackknife over directions.

    Args:
        objective: Prepared in the dtype that trains, with ``differentiable=False``; the parameters come back.
        batch_size: Examples of a training step: every direction then has a random mini-batch of its own. ``None``, or
            a model that is sharded over ranks, takes all examples.
        lr: Step size of ZO-GD for which to say what rounding leaves of a step.
        one_sided: Whether training takes ``(f(θ+μu) − f(θ))/μ``.
        tolerance: Relative error of a slope that is good enough.
        directions: How many.
        seed: Of directions and mini-batches.

    Raises:
        UsageError: For too few directions.
        NumericalError: If memory runs out.
    """
    if directions < FEWEST:
        raise UsageError(f"The range of μ needs at least {FEWEST} directions for its error bars, got {directions}.")
    started = time.perf_counter()
    with exploring(objective, seed=seed) as sampler:
        stencil = sampler.stencil
        minibatch = batch_size is not None and batch_size < objective.num_examples and not objective.mirrored
        if minibatch and batch_size is not None:
            measure = _on_batches(objective, sampler, batch_size, directions, seed)
        else:
            measure = sampler.pilots(directions)
        tried, slopes, curvatures = _sweep(measure, tolerance)
        last_place = stencil.resolution / 2 / math.sqrt(12)
        loss, evaluations = stencil.loss, stencil.centres + directions * (2 * len(tried) + minibatch)
    estimates = slopes + 0.5 * tried * curvatures if one_sided else slopes
    floor = last_place * (math.sqrt(2.0) if one_sided else math.sqrt(0.5)) / tried
    errors = _errors(slopes, estimates, floor)
    best = int(np.argmin(errors))
    usable = bool(errors[best] <= tolerance)
    ends = _ends(tried, errors, best, tolerance)
    fewer = [(np.delete(slopes, k, axis=0), np.delete(estimates, k, axis=0)) for k in range(directions)]
    left_out = [_ends(tried, _errors(*two, floor), best, tolerance) for two in fewer]
    size = float(np.sqrt(np.mean(slopes[:, best] ** 2)))
    return PerturbationScale(
        lower=_jackknife(ends[0], [lower for lower, _ in left_out]),
        upper=_jackknife(ends[1], [upper for _, upper in left_out]),
        best=float(tried[best]) if usable else None,
        tolerance=tolerance,
        tried=tuple(tried.tolist()),
        slope_errors=tuple(errors.tolist()),
        loss_rises=tuple((0.5 * tried**2 * curvatures.mean(axis=0) / (abs(loss) or math.nan)).tolist()),
        slope=Estimate(size, size / math.sqrt(2 * directions)),  # slopes are Gaussian
        rounding=last_place,
        batch_size=batch_size if minibatch else None,
        one_sided=one_sided,
        dtype=_coarsest(objective.params),
        updates=update_rounding(objective.params, lr=lr, slope=size) if usable and lr is not None else None,
        num_evaluations=evaluations,
        seconds=time.perf_counter() - started,
    )


def perturbation_notices(scale: PerturbationScale, mu: float) -> Iterator[Notice]:
    """What to know before training with μ."""
    within = f"right within {scale.tolerance:.0%}"
    if not scale.usable:
        yield Notice("mu", f"Slopes along random directions are {within} at none of the μ tried, 1e-6 to 1.")
    elif not scale.allows(mu):
        yield Notice(
            "mu",
            f"At μ = {mu:.3g} slopes along random directions are not {within}: they are with {scale.range}. "
            f"Use --mu {scale.best:.2g}.",
        )
    if scale.updates is not None and scale.updates.matters:
        found = scale.updates
        yield Notice(
            "rounding",
            f"Rounding to {found.dtype} leaves {found.kept:.0%} of a step at {found.lr:.2g}, and "
            f"{found.vanishing:.0%} of its entries vanish. Keep the weights in float32 besides (master weights), or "
            f"take a step size of {found.least_lr:.2g} or more.",
        )


def _coarsest(params: Sequence[Tensor]) -> str:
    """Name of the dtype with the fewest digits."""
    return str(max((p.dtype for p in params), key=lambda dtype: torch.finfo(dtype).eps)).removeprefix("torch.")


def _on_batches(
    objective: Objective, sampler: DirectionSampler, batch_size: int, count: int, seed: int
) -> Callable[[float], list[Difference]]:
    """What tells the differences along ``count`` directions for any μ, each on a mini-batch of its own."""
    examples = Examples(objective)
    generator = new_generator(np.random.SeedSequence(seed, spawn_key=(0, 0, 1)))
    batches = [examples.draw(batch_size, generator) for _ in range(count)]
    centres = [objective.value_of(batch) for batch in batches]

    def along(number: int, h: float) -> Difference:
        everything, objective.shards = objective.shards, batches[number]
        try:
            found = sampler.pilot(number, h)
        finally:
            objective.shards = everything
        # The curvature was taken with the loss of all examples in the middle.
        return replace(found, curvature=found.curvature + 2 * (sampler.stencil.loss - centres[number]) / h**2)

    def measure(h: float) -> list[Difference]:
        sampler.stencil.reach(h)  # now, as it may look at the loss of all examples
        return [along(number, h) for number in range(count)]

    return measure


def _sweep(measure: Callable[[float], Sequence[Difference]], tolerance: float) -> tuple[_Array, _Array, _Array]:
    """Slopes and curvatures ``(k, m)`` along k directions at the m values of μ that are worth a look, ascending.

    It goes down first: large models move to a grid for every μ, and a coarser one contains rounding of the weights.
    """

    def at(mu: float) -> _Array:
        return np.array([[d.slope, d.curvature] for d in measure(mu)])

    found = {START: at(GRID[START])}
    for direction in (-1, 1):
        index, before = START, math.inf
        while 0 <= index + direction < len(GRID):
            found[index + direction] = at(GRID[index + direction])
            here, there = found[index][:, 0], found[index + direction][:, 0]
            apart, size = _root_mean_square(there - here), _root_mean_square(here)
            growing = apart > 2 * tolerance * size and apart > GROWTH * before
            if not math.isfinite(apart) or growing or _hidden(there):
                break
            index, before = index + direction, apart
    order = sorted(found)
    every = np.stack([found[index] for index in order], axis=1)
    return np.array([GRID[index] for index in order]), every[..., 0], every[..., 1]


def _hidden(slopes: _Array) -> bool:
    """Whether most slopes are zero, since the loss or the weights do not change: neighbours agree on that, too."""
    return bool(np.mean(slopes == 0) > 0.5)


def _root_mean_square(values: _Array) -> float:
    with np.errstate(all="ignore"):
        return float(np.sqrt(np.mean(values**2)))


def _errors(slopes: _Array, estimates: _Array, floor: _Array) -> _Array:
    """Errors ``(m,)`` of estimates of slopes, relative to the size of slopes, infinite where losses are not finite.

    Args:
        slopes: Two-sided ones along k directions at m values of μ, ``(k, m)``; the truth is where neighbours agree.
        estimates: What training uses, ``(k, m)``.
        floor: Error from the last place of the loss, ``(m,)``, loss/param.
    """
    with np.errstate(all="ignore"):
        steps = np.sqrt(np.mean(np.diff(slopes, axis=1) ** 2, axis=0))
        both = np.where([_hidden(column) for column in slopes.T[1:-1]], math.nan, steps[:-1] + steps[1:])
        if not np.isfinite(both).any():
            return np.full(len(floor), math.inf)
        at = int(np.nanargmin(both)) + 1
        truth = slopes[:, at, None]
        # What is left of an error that grows as μ² after a step of the grid, and of one that falls as 1/μ.
        own = math.hypot(steps[at] / (RATIO**2 - 1), steps[at - 1] / math.hypot(RATIO, 1))
        apart = np.sqrt(np.mean((estimates - truth) ** 2, axis=0))
        errors = np.maximum(np.hypot(apart, own), floor) / np.sqrt(np.mean(truth**2))
    return np.where(np.isfinite(errors), errors, math.inf)


def _ends(tried: _Array, errors: _Array, best: int, tolerance: float) -> tuple[float | None, float | None]:
    """Where errors pass the tolerance on both sides of the best value; ``None`` where they do not."""
    errors = np.maximum(errors, 1e-12)  # of a linear loss there may be none

    def end(indices: Sequence[int]) -> float | None:
        for inside, outside in itertools.pairwise(indices):
            if errors[outside] > tolerance:
                share = math.log(tolerance / errors[inside]) / math.log(errors[outside] / errors[inside])
                return float(tried[inside] * (tried[outside] / tried[inside]) ** share)
        return None

    if errors[best] > tolerance:
        return None, None
    return end(range(best, -1, -1)), end(range(best, len(tried)))


def _jackknife(value: float | None, left_out: Sequence[float | None]) -> Estimate | None:
    """An end with its standard error, from the same without each direction in turn; 1.96 of it make a 95 % interval."""
    if value is None:
        return None
    logs = np.log([other or value for other in left_out])
    freedom = len(logs) - 1
    return Estimate(value, value * math.sqrt(freedom * float(logs.var())) * widening(freedom))


QUANTILES = 200
"""Values of |c| that stand for its law."""


def update_rounding(params: Sequence[Tensor], *, lr: float, slope: float) -> UpdateRounding:
    """What rounding of the weights leaves of ZO-GD's updates ``lr·c·u``.

    A weight is a multiple of its last place, so that an update is rounded to one as well: to nothing where it is below
    half of it. With ``s = lr·|c|`` in last places, ``E u·round(su) / s = (2/s) Σ_n φ((n + ½)/s)`` is what is kept.

    Args:
        params: The weights, in the dtype that trains.
        lr: Step size.
        slope: Root mean square of c, which is Gaussian.
    """
    spacings, shares = _last_places(params)
    c = slope * np.array([NormalDist().inv_cdf(0.5 + (k + 0.5) / (2 * QUANTILES)) for k in range(QUANTILES)])

    def kept(rate: float) -> float:
        with np.errstate(over="ignore"):  # far above the last place all is kept
            return float(c**2 @ _kept(rate * c[:, None] / spacings) @ shares / (c @ c))

    half = 0.5 * spacings / (lr * c[:, None])
    vanishing = float(np.mean(np.vectorize(lambda x: math.erf(x / math.sqrt(2)))(half) @ shares))
    low, high = lr * 1e-12, lr * 1e12
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if kept(middle) >= KEPT else (middle, high)
    return UpdateRounding(_coarsest(params), lr, vanishing, kept(lr), high)


def _kept(s: _Array) -> _Array:
    """``E u·round(su) / s`` for Gaussian u."""
    few = np.minimum(s, 2.0)[..., None]  # beyond, the sum is the integral to rounding
    places = (np.arange(20) + 0.5) / np.maximum(few, 1e-9)
    kept = 2 / np.maximum(few[..., 0], 1e-9) * np.sum(np.exp(-0.5 * places**2), axis=-1) / math.sqrt(2 * math.pi)
    return np.where(s < 2.0, kept, 1.0)


CHUNK = 1 << 22
"""Weights that are looked at at once."""


@torch.no_grad()
def _last_places(params: Sequence[Tensor]) -> tuple[_Array, _Array]:
    """Different last places of the weights, in their unit, and the share of weights that has each."""
    counts: dict[float, int] = {}
    for p in params:
        limits = torch.finfo(p.dtype)
        for part in torch.split(p.detach().reshape(-1), CHUNK):
            exponents = torch.frexp(part.to(torch.float64).abs().clamp(min=limits.tiny)).exponent
            found = torch.unique(exponents, return_counts=True)
            for exponent, count in zip(found[0].tolist(), found[1].tolist(), strict=True):
                place = math.ldexp(limits.eps, exponent - 1)
                counts[place] = counts.get(place, 0) + count
    total = sum(counts.values())
    return np.array(list(counts)), np.array(list(counts.values())) / total
