"""How many products each estimator of a peer needs: the smallest budget whose error meets the target.

A target of ±r is met where 95 % of the draws are within r, that is RMSE ≤ r/1.96, which is what zoscope's own intervals
promise. Budgets are found on a stand-in (see `standin`), from numbers of draws that are fixed beforehand.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from zoscope.theory.spectrum import Spectrum

from .sketches import DRAWS, hutchpp_rmse, xtrace_rmse
from .standin import Array, Diagonal, lanczos_rules, mean_rule, thresholds

LAMBDA_MAX, TRACE, FROBENIUS = 0.01, 0.01, 0.03
THRESHOLD = 0.02
WITHIN = 1.96
ALL_SIZES = sorted({math.ceil(1.04**i) for i in range(400)})
"""Numbers of probes tried: all small ones, then steps of 4 %."""
FIRST_SIZES = 32
"""Up to how many at first; up to twice as many for as long as the target is not met well within them."""

SLQ_STEPS = (10, 20, 40, 80, 160, 320, 640)
SLQ_RUNS = 100


@dataclass(frozen=True)
class Budget:
    """What reaches a target.

    Args:
        method: Estimator.
        products: Hessian-vector products.
        size: The argument of the estimator that decides: probe vectors, matrix-vector products or Lanczos steps.
        rmse: Relative error at that budget on the stand-in.
    """

    method: str
    products: int
    size: int
    rmse: float

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def smallest(
    method: str,
    rmse: Callable[[Sequence[int]], Array],
    *,
    target: float,
    products: Callable[[int], int],
    most: int,
) -> Budget | None:
    """The first size at which the RMSE meets the target (see `crossing`); ``None`` within ``most`` products."""
    largest = max((n for n in ALL_SIZES if products(n) <= most), default=0)
    smallest_tried, limit = 1, FIRST_SIZES
    while largest:
        limit = min(limit, largest)
        sizes = [n for n in ALL_SIZES if smallest_tried <= n <= limit]
        errors = rmse(sizes)
        place = crossing(errors, target / WITHIN)
        if place < len(sizes) and (sizes[place] <= 0.8 * limit or limit == largest):
            return Budget(method, products(sizes[place]), sizes[place], float(errors[place]))
        if limit == largest:
            return None
        smallest_tried, limit = limit // 2, 2 * limit
    return None


def crossing(errors: Sequence[float] | Array, level: float) -> int:
    """Where errors that decrease, but are known with noise, fall to ``level``: a place, or their number if nowhere.

    The monotone least-squares fit of log errors is above the level before that place and not above it from there on;
    the first error below the level would be a lucky one.
    """
    above = np.log(np.maximum(errors, np.finfo(float).tiny)) - math.log(level)
    return int(np.argmax(np.concatenate([[0.0], np.cumsum(above)])))


def xtrace(diagonal: Diagonal, *, power: int, target: float, most: int) -> Budget | None:
    """XTrace on ``H^power``: two products of it a probe."""
    return smallest(
        "xtrace",
        lambda sizes: xtrace_rmse(diagonal, power, sizes),
        target=target,
        products=lambda size: 2 * power * size,
        most=min(most, power * (diagonal.dim - 1)),
    )


def hutchpp(diagonal: Diagonal, *, power: int, target: float, most: int) -> Budget | None:
    """Hutch++ on ``H^power``: a third of its products each for sketch, its trace and the remainder."""
    return smallest(
        "hutch++",
        lambda sizes: hutchpp_rmse(diagonal, power, sizes),
        target=target,
        products=lambda size: 3 * power * size,
        most=min(most, power * (diagonal.dim - 1)),
    )


def hutchinson(diagonal: Diagonal, *, power: int, target: float, cost: int) -> Budget:
    """Plain averages of ``zᵀMz``, ``M = H^power``, whose variance is known: ``2 Tr M²``. ``cost`` products a probe."""
    single = math.sqrt(2 * diagonal.moment(2 * power)) / abs(diagonal.moment(power))
    probes = max(1, math.ceil((single * WITHIN / target) ** 2))
    return Budget("hutchinson", cost * probes, probes, single / math.sqrt(probes))


def dense(diagonal: Diagonal) -> Budget:
    """All eigenvalues from d products: what is cheaper than sampling on small problems."""
    return Budget("dense", diagonal.dim, diagonal.dim, 0.0)


def power_iteration(diagonal: Diagonal, *, seed: int = 0) -> Budget:
    """Steps until the Rayleigh quotient is within the target, in 95 % of the starts."""
    values, longest = diagonal.distinct[0], 2000
    scaled = (values / np.abs(values).max()) ** 2
    weights = diagonal.starts(DRAWS, np.random.default_rng(seed)) ** 2
    for count in range(1, longest + 1):
        errors = np.abs((weights @ values) / weights.sum(axis=1) / values.max() - 1)
        worst = float(np.quantile(errors, 0.95))
        if worst <= LAMBDA_MAX:
            return Budget("power iteration", count, count, worst / WITHIN)
        weights *= scaled
    return Budget("power iteration", longest, longest, math.nan)


def lanczos(diagonal: Diagonal, *, seed: int = 0) -> Budget:
    """Lanczos steps until the largest Ritz value is within the target, in 95 % of the starts."""
    top, longest = diagonal.values.max(), 40
    starts = diagonal.starts(DRAWS, np.random.default_rng(seed))
    rules = lanczos_rules(diagonal, starts, steps=range(2, longest + 1))
    for length, found in rules.items():
        worst = float(np.quantile([abs(rule.nodes.max() / top - 1) for rule in found], 0.95))
        if worst <= LAMBDA_MAX:
            return Budget("lanczos", length, length, worst / WITHIN)
    return Budget("lanczos", longest, longest, math.nan)


def slq(diagonal: Diagonal, *, seed: int = 0) -> Budget:
    """Products of plain SLQ until every threshold is known: the cheapest length of its chains, and the runs that takes.

    What a length misses is told from the thresholds of the same starts with chains that never end; what their scatter
    adds, from the jackknife over runs. All eigenvalues where they take fewer products.
    """
    starts = diagonal.starts(SLQ_RUNS, np.random.default_rng(seed))
    nodes, shares = diagonal.distinct[0], starts**2 / (starts**2).sum(axis=1, keepdims=True)
    endless = [
        thresholds(Spectrum(nodes, diagonal.dim * np.delete(shares, run, axis=0).mean(axis=0)))
        for run in range(SLQ_RUNS)
    ]
    best, least = dense(diagonal), _runs(endless, endless)
    lengths = [length for length in SLQ_STEPS if least * length < best.products]  # no length takes fewer runs
    for length, rules in lanczos_rules(diagonal, starts, steps=lengths).items():
        found = [thresholds(mean_rule(rules[:i] + rules[i + 1 :], diagonal.dim)) for i in range(SLQ_RUNS)]
        runs = _runs(found, endless)
        if runs * length < best.products:
            best = Budget("slq", math.ceil(runs) * length, length, THRESHOLD / WITHIN)
    return best


def _runs(found: Sequence[dict[str, float]], endless: Sequence[dict[str, float]]) -> float:
    """Runs until all thresholds are known, from those with finite and endless chains, each of many runs left out."""
    others, needed = len(found) - 1, 1.0
    for name in endless[0]:
        values = np.array([x[name] for x in found])
        if not np.isfinite(values).all():
            return math.inf
        ratios = values / np.array([x[name] for x in endless])
        bias_sq = max(float((ratios.mean() - 1) ** 2 - others * ratios.var()), 0.0)
        room = (THRESHOLD / WITHIN) ** 2 - bias_sq
        if room <= 0:
            return math.inf
        single = len(found) * others * float(values.var() / values.mean() ** 2)
        needed = max(needed, single / room)
    return needed


def cheapest(budgets: Sequence[Budget]) -> Budget:
    """The one with the fewest products."""
    return min(budgets, key=lambda budget: budget.products)
