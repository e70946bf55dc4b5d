"""How many products each estimator of a peer needs: the smallest budget whose error meets the target.

A target of ±r is met where 95 % of the draws are within r, that is RMSE ≤ r/1.96, which is what zoscope's own intervals
promise. Budgets are found on a stand-in (see `standin`), with the peer's own code where it takes a matrix.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from .standin import Diagonal, conditions, lanczos_rules, mean_rule, thresholds

LAMBDA_MAX, TRACE, FROBENIUS = 0.01, 0.01, 0.03
THRESHOLD = 0.02
WITHIN = 1.96
DRAWS = 10
GRID = sorted({round(2 * 1.15**i) for i in range(42)})
"""Numbers of probe vectors tried."""

SLQ_STEPS = (10, 20, 40)
SLQ_RUNS = 10


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


Estimator = Callable[[int], float]
"""One draw of an estimate of relative error, at a size."""


def smallest(
    method: str, draw: Estimator, *, target: float, products: Callable[[int], int], most: int
) -> Budget | None:
    """The first size of the grid at which the RMSE over several draws meets the target; ``None`` if none does."""
    sizes = [size for size in GRID if products(size) <= most]
    tried: dict[int, float] = {}

    def meets(place: int) -> bool:
        tried[place] = math.sqrt(float(np.mean([draw(sizes[place]) ** 2 for _ in range(DRAWS)])))
        return tried[place] <= target / WITHIN

    high = next((place for place in range(4, len(sizes), 5) if meets(place)), None)  # large sizes are slow to try
    if high is None:
        return None
    low = high - 4
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle + 1, high)
    return Budget(method, products(sizes[high]), sizes[high], tried[high])


def hutchinson(diagonal: Diagonal, *, power: int, target: float, cost: int) -> Budget:
    """Plain averages of ``zᵀMz``, ``M = H^power``, whose variance is known: ``2 Tr M²``. ``cost`` products a probe."""
    single = math.sqrt(2 * diagonal.moment(2 * power)) / abs(diagonal.moment(power))
    probes = max(1, math.ceil((single * WITHIN / target) ** 2))
    return Budget("hutchinson", cost * probes, probes, single / math.sqrt(probes))


def dense(diagonal: Diagonal) -> Budget:
    """All eigenvalues from d products: what is cheaper than sampling on small problems."""
    return Budget("dense", diagonal.dim, diagonal.dim, 0.0)


def power_iteration(diagonal: Diagonal, *, seed: int = 0) -> Budget:
    """Steps until the Rayleigh quotient is within the target, in 95 % of the starts; by moments of a random start."""
    values, generator = diagonal.values, np.random.default_rng(seed)
    top = values.max()
    needed = []
    for _ in range(DRAWS):
        weights, steps = generator.standard_normal(len(values)) ** 2, 0
        scaled = (values / np.abs(values).max()) ** 2
        while steps < 2000:
            steps += 1
            if abs((weights @ values) / weights.sum() / top - 1) <= LAMBDA_MAX:
                break
            weights = weights * scaled
        needed.append(steps)
    count = int(np.ceil(np.quantile(needed, 0.95)))
    return Budget("power iteration", count, count, LAMBDA_MAX / WITHIN)


def lanczos(diagonal: Diagonal, *, seed: int = 0) -> Budget:
    """Lanczos steps until the largest Ritz value is within the target in every draw."""
    top, longest = diagonal.values.max(), 40
    rules = lanczos_rules(diagonal.values, steps=range(3, longest + 1), runs=6, seed=seed)
    for length, found in rules.items():
        worst = max(abs(rule.nodes.max() / top - 1) for rule in found)
        if worst <= LAMBDA_MAX:
            return Budget("lanczos", length, length, float(worst))
    return Budget("lanczos", longest, longest, math.nan)


def slq(diagonal: Diagonal, *, seed: int = 0) -> Budget:
    """Products of plain SLQ until every threshold is known: the cheapest length of its chains, and the runs that takes.

    The bias of a length is that of the average of all runs, less what their scatter explains; the scatter comes from
    the jackknife over runs. Both are scaled to the number of runs needed.
    """
    truth = thresholds(diagonal.spectrum)
    rules = lanczos_rules(diagonal.values, steps=SLQ_STEPS, runs=SLQ_RUNS, seed=seed)
    best: Budget | None = None
    for length, found in rules.items():
        runs = 1.0
        for name, condition in conditions().items():
            value = condition.threshold(mean_rule(found, diagonal.dim))
            left_out = [
                condition.threshold(mean_rule(found[:i] + found[i + 1 :], diagonal.dim)) for i in range(len(found))
            ]
            finite = [x for x in (value, *left_out) if math.isfinite(x)]
            if len(finite) < len(left_out) + 1:
                runs = math.inf
                break
            variance = (len(found) - 1) * float(np.var(left_out)) / truth[name] ** 2  # of the mean of all runs
            bias_sq = max((value / truth[name] - 1) ** 2 - variance, 0.0)
            room = (THRESHOLD / WITHIN) ** 2 - bias_sq
            runs = max(runs, math.inf if room <= 0 else variance * len(found) / room)
        if math.isfinite(runs):
            count = math.ceil(runs)
            budget = Budget("slq", count * length, length, THRESHOLD / WITHIN)
            if best is None or budget.products < best.products:
                best = budget
    whole = dense(diagonal)
    return whole if best is None or best.products > whole.products else best


def cheapest(budgets: list[Budget | None]) -> Budget:
    """The one with the fewest products."""
    return min((budget for budget in budgets if budget is not None), key=lambda budget: budget.products)
