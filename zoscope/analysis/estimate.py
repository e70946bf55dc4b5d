"""What ``zoscope bounds`` would cost, by kind of curvature."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch

from zoscope._version import __version__
from zoscope.analysis.measurement import curvature_operator
from zoscope.analysis.request import Request, curvature_session
from zoscope.curvature.finite_difference import Stencil
from zoscope.curvature.forward import CHECKS, GROUP, LEAST_DIRECTIONS, LEAST_GROUPS, PILOTS
from zoscope.curvature.operators import LinearOperator, ShardOperator, room_for_graphs
from zoscope.curvature.slq import BLOCK, DENSE_LIMIT, MANY_STEPS
from zoscope.errors import NumericalError, SpecError, UsageError
from zoscope.options import CURVATURES, BoundsOptions, CurvatureKind
from zoscope.problem import OWN_DTYPE, Objective
from zoscope.result import JsonObject, RichResult, pick
from zoscope.runtime import available_memory, is_out_of_memory, peak_bytes, release_memory

if TYPE_CHECKING:
    from zoscope.problem import Problem

SHARE = 0.8
"""Part of the free memory that a recommendation may fill."""


@dataclass(frozen=True)
class KindCost(JsonObject):
    """Cost of one kind of curvature.

    Args:
        kind: ``hessian``, ``ggn`` or ``forward``.
        products: Hessian-vector products expected; directions of two forward passes for ``forward``.
        most: The most that there can be.
        seconds_each: Seconds of one over all data; ``None`` where the kind is not available.
        seconds: Seconds in all.
        fixed_bytes: Memory besides the model that does not depend on the batches.
        batch_bytes: Memory for the largest micro-batch.
        largest: Its examples.
        problem: Why the kind is not available.
        wanted: Products that the precision asked for takes, where that is known beforehand.
    """

    kind: str
    products: int
    most: int
    seconds_each: float | None
    seconds: float | None
    fixed_bytes: int | None
    batch_bytes: int | None
    largest: int
    problem: str | None = None
    wanted: float | None = None

    @classmethod
    def impossible(cls, kind: str, problem: str) -> KindCost:
        """A kind that is not available here."""
        return cls(kind, 0, 0, None, None, None, None, 1, problem)

    @property
    def total_bytes(self) -> int | None:
        """Memory besides the model."""
        if self.fixed_bytes is None or self.batch_bytes is None:
            return None
        return self.fixed_bytes + self.batch_bytes

    def fitting(self, room: float) -> int | None:
        """Examples at a time that fit into ``room`` bytes; ``None`` when not even one does."""
        if self.fixed_bytes is None or self.batch_bytes is None:
            return None
        each = self.batch_bytes / self.largest
        left = room - self.fixed_bytes
        if left < each:
            return None
        return self.largest if each == 0 else min(self.largest, int(left / each))

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        available = self.problem is None
        return {
            "available": available,
            "problem": self.problem,
            "num_hvps": self.products if available else None,
            "num_hvps_most": self.most if available else None,
            **pick(self, "seconds_per_hvp=seconds_each seconds"),
            **pick(self, "bytes=total_bytes bytes_fixed=fixed_bytes bytes_per_micro_batch=batch_bytes"),
        }


@dataclass(frozen=True)
class CostEstimate(RichResult):
    """What each kind of curvature would cost.

    Args:
        spec: What would be measured.
        device: Where.
        dtype: Floating-point type of the parameters.
        num_params: Number of parameters d.
        num_examples: Examples in all.
        timed_examples: Examples of the timed micro-batch.
        seconds_forward: Seconds of one evaluation over all data, about.
        available: Free bytes on the device.
        kinds: The costs.
        recommended: The kind to use.
        reason: Why, in one sentence.
    """

    spec: str | None
    device: str
    dtype: str
    num_params: int
    num_examples: int
    timed_examples: int
    seconds_forward: float | None
    available: int
    kinds: tuple[KindCost, ...]
    recommended: str
    reason: str

    @property
    def short(self) -> str | None:
        """Why the kind recommended cannot reach the precision asked for, where that is known beforehand."""
        cost = next((cost for cost in self.kinds if cost.kind == self.recommended), None)
        if cost is None or cost.wanted is None or cost.wanted <= cost.most:
            return None
        return (
            f"The precision asked for (--rtol) takes about {cost.wanted:,.0f} directions, and --max-hvps allows "
            f"{cost.most:,}. Raise one of them."
        )

    def to_dict(self) -> dict[str, Any]:
        """The document ``zoscope.estimate/1``."""
        return {
            "schema": "zoscope.estimate/1",
            "zoscope": __version__,
            **pick(self, "spec device dtype"),
            "problem": pick(self, "num_params num_examples"),
            **pick(self, "timed_examples seconds_per_evaluation=seconds_forward bytes_available=available"),
            "curvature": {cost.kind: cost.to_dict() for cost in self.kinds},
            "recommended": {"curvature": self.recommended, "reason": self.reason},
        }


def recommended(kinds: Sequence[KindCost], *, available: int) -> tuple[str, str]:
    """The kind to use and why: the one that tells most among those that fit."""
    costs = {cost.kind: cost for cost in kinds}
    spectral = costs.get("hessian", costs.get("ggn"))
    if spectral is None:
        return "forward", "it is what was asked for"
    if spectral.problem is not None:
        return "forward", "the loss has no second derivatives that could be had here"
    fitting = spectral.fitting(SHARE * available)
    if fitting is None:
        return "forward", "Hessian-vector products do not fit into the free memory, even for one example at a time"
    if fitting < spectral.largest:
        return spectral.kind, f"it fits with --micro-batch {fitting}, and only the spectrum gives η*(N) and λ_max"
    return spectral.kind, "it fits, and only the spectrum gives η*(N) and λ_max"


SAMPLED_PRODUCTS = 200
"""Products that the stochastic path usually takes for one operator; between 60 and ``max_hvps``."""

TIMED_ROWS = 64
"""Examples of the timed micro-batch at most."""

SAMPLE = 6
"""Directions that show how much ``uᵀHu`` scatters."""


def estimate(problem: Problem, **options: Unpack[BoundsOptions]) -> CostEstimate:
    """Products, seconds and bytes that ``zoscope.bounds`` would take with each kind of curvature.

    One micro-batch is evaluated and differentiated; the rest is proportion. The number of products depends on the
    spectrum: that of forward passes is taken from a small sample, that of the others is what networks usually need.

    Args:
        problem: Model, batches and loss.
        **options: As for ``zoscope.bounds``; with ``curvature`` only that kind is looked at.

    Returns:
        The costs, with a recommendation; prints itself.

    Raises:
        TypeError: For an option that there is not.
        ValueError: If an argument is outside of its range.
        SpecError, NumericalError: If not even the loss can be evaluated.
    """
    request = Request.of(**options)
    wanted = CURVATURES if "curvature" not in options else (request.curvature,)
    own = OWN_DTYPE if request.dtype == "auto" else None
    with curvature_session(problem, request, dtype=own, differentiable=False) as session:
        objective = session.objective
        with _one_micro_batch(objective) as scale:
            forward, evaluating = _forward(objective, scale, request)
        about = CostEstimate(
            spec=session.spec,
            device=str(objective.device),
            dtype=session.dtype,
            num_params=objective.num_params,
            num_examples=objective.num_examples,
            timed_examples=scale.timed,
            seconds_forward=0.5 * evaluating,
            available=available_memory(objective.device),
            kinds=(),
            recommended="forward",
            reason="",
        )

    def prepared(kind: CurvatureKind) -> KindCost:
        try:
            with (
                curvature_session(problem, request, check=False) as session,
                _one_micro_batch(session.objective) as scale,
            ):
                return _second_order(session.objective, scale, kind, request)
        except (SpecError, NumericalError, UsageError) as error:
            return KindCost.impossible(kind, str(error))
        except Exception as error:
            if not is_out_of_memory(error):
                return KindCost.impossible(kind, str(error).splitlines()[0] if str(error) else type(error).__name__)
            release_memory(torch.device(about.device))
            return KindCost.impossible(kind, f"out of memory with {about.timed_examples} examples at a time")

    kinds = [prepared(kind) for kind in wanted if kind == "hessian" or (kind == "ggn" and _has_ggn(problem, wanted))]
    if "forward" in wanted:
        kinds.append(forward)
    choice, reason = recommended(kinds, available=about.available)
    return replace(about, kinds=tuple(kinds), recommended=choice, reason=reason)


def _has_ggn(problem: Problem, wanted: Sequence[str]) -> bool:
    """Whether a Gauss-Newton matrix is looked at: of a problem that has none only where nothing else was asked for."""
    return problem.criterion is not None or len(wanted) == 1


class _Scale:
    """From the timed micro-batch to all data.

    Args:
        data: Examples in all over examples timed.
        largest: Examples of the largest shard over examples timed.
        timed: Examples timed.
        single: Whether all data is one shard, whose graph every product shares in any case.
    """

    def __init__(self, *, data: float, largest: float, timed: int, single: bool) -> None:
        self.data, self.largest, self.timed, self.single = data, largest, timed, single


@contextmanager
def _one_micro_batch(objective: Objective) -> Iterator[_Scale]:
    """Let the objective see one micro-batch."""
    everything = objective.shards
    largest = max(everything, key=lambda shard: shard.examples)
    if objective.indivisible is None and (largest.rows or 1) > TIMED_ROWS:
        objective.shards = (largest,)
        objective.split(TIMED_ROWS)
    else:
        objective.shards = (largest,)
    piece = objective.shards[0]
    objective.shards = (replace(piece, weight=1.0),)
    try:
        yield _Scale(
            data=1.0 / piece.weight,
            largest=largest.examples / piece.examples,
            timed=piece.rows or piece.examples,
            single=len(everything) == 1,
        )
    finally:
        objective.shards = everything


def _forward(objective: Objective, scale: _Scale, request: Request) -> tuple[KindCost, float]:
    """The cost, and the seconds that the two evaluations of a direction take over all data."""
    with torch.no_grad():
        activations = peak_bytes(objective.value, objective.device)
    stencil = Stencil(objective, seed=request.seed)
    h = stencil.typical_size * stencil.epsilon**0.25
    objective.value()  # warm
    started = time.perf_counter()
    x = np.array([stencil.along(stencil.direction(), h).curvature for _ in range(SAMPLE)])
    moving = _moving_seconds(stencil, h)
    evaluating = max((time.perf_counter() - started - moving) / SAMPLE - moving, 0.0)
    scatter = float(x.var(ddof=1) / x.mean() ** 2) if np.isfinite(x).all() and x.mean() != 0 else float("inf")
    group = (GROUP + CHECKS + 1) / GROUP
    wanted = 4 * PILOTS + group * max(scatter * (1.96 / request.rtol) ** 2, GROUP * LEAST_GROUPS)
    most = max(request.max_hvps, LEAST_DIRECTIONS)
    products = round(min(wanted, most))
    evaluating *= scale.data
    seconds_each = evaluating + moving
    cost = KindCost(
        kind="forward",
        products=products,
        most=most,
        seconds_each=seconds_each,
        seconds=products * seconds_each,
        fixed_bytes=stencil.held_bytes,
        batch_bytes=round(activations * scale.largest),
        largest=round(scale.timed * scale.largest),
        wanted=wanted,
    )
    return cost, evaluating


def _moving_seconds(stencil: Stencil, h: float) -> float:
    """Seconds that moving the parameters along one direction takes, whatever the data is."""
    started = time.perf_counter()
    stencil.move(stencil.direction(), h)
    return time.perf_counter() - started


def _second_order(objective: Objective, scale: _Scale, kind: CurvatureKind, request: Request) -> KindCost:
    request, max_hvps = replace(request, curvature=kind), request.max_hvps
    operators = len({rule.preconditioned for rule in request.rules.values()})
    d, itemsize = objective.num_params, torch.empty((), dtype=objective.dtype).element_size()
    vector = torch.ones(1, d, dtype=objective.dtype, device=objective.device)
    curvature_operator(objective, request).matmat(vector)  # settles on a method
    operator = curvature_operator(objective, request)
    graph = peak_bytes(lambda: operator.matmat(vector), objective.device)
    kept = _seconds(lambda: operator.matmat(vector))
    graphs = max(graph - d * itemsize, 0) * scale.data
    together = scale.single or graphs <= room_for_graphs(objective.device)
    if not together:  # a fresh graph for every shard and product
        kept = _seconds(lambda: _afresh(operator, vector))
    dense = request.method == "dense" or (request.method == "auto" and d <= min(DENSE_LIMIT, max_hvps))
    products = d if dense else min(max_hvps, SAMPLED_PRODUCTS) * operators
    rows = d if dense else min(MANY_STEPS, max(2, max_hvps // 3)) + 4 * BLOCK + 1
    each = kept * scale.data
    return KindCost(
        kind=kind,
        products=products,
        most=d if dense else max_hvps * operators,
        seconds_each=each,
        seconds=products * each,
        fixed_bytes=(rows + 2) * d * itemsize,  # two more: the parameters' own values, and the gradient
        batch_bytes=round(graphs if together else graphs / scale.data * scale.largest),
        largest=round(scale.timed * scale.largest),
    )


def _afresh(operator: LinearOperator, vector: torch.Tensor) -> torch.Tensor:
    if isinstance(operator, ShardOperator):
        operator.release()
    return operator.matmat(vector)


def _seconds(run: Callable[[], torch.Tensor]) -> float:
    best = float("inf")
    for _ in range(2):
        started = time.perf_counter()
        float(run().sum())  # waits for a device that works ahead
        best = min(best, time.perf_counter() - started)
    return best
