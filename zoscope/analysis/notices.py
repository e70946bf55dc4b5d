"""Notices: what a reader has to know before trusting a threshold, each with its measurement where it needs one.

How far the model reaches: a step of size η along ``u ~ N(0, I)`` moves every parameter by about ``η‖g‖/√q``, so N of
them by √N as much, in random directions: the run is where a random direction leads, at a distance that is known
beforehand. Two more evaluations there say how far the loss rises; two nearer ones, along the same direction, what its
curvature promised.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zoscope.analysis.explanations import PROVISIONAL
from zoscope.curvature.nonsmooth import NOTICEABLE
from zoscope.curvature.slq import DENSE_LIMIT
from zoscope.problem import Notice
from zoscope.runtime import spawn_generators
from zoscope.theory.quadratic import FEW_MODES
from zoscope.theory.spectrum import Estimate, widening

if TYPE_CHECKING:
    from torch import Tensor

    from zoscope.analysis.thresholds import OptimizerBounds
    from zoscope.curvature.nonsmooth import Jump, Nonsmooth
    from zoscope.curvature.preconditioner import Preconditioner
    from zoscope.curvature.slq import Curvature
    from zoscope.problem import Objective
    from zoscope.theory.rules import UpdateRule

DIRECTIONS = 3
"""Random directions: twelve evaluations of the loss in all."""

NEAR = 0.25
"""Where curvature is read off, as a part of the distance asked about."""

LEFT_BEHIND = 0.5
"""Excess of the rise over the quadratic one, as a part of it, from which the quadratic model is called left."""

ROUNDING = 100.0
"""Units in the last place of the loss that a rise near by has to have to be known."""


@dataclass(frozen=True)
class Reach:
    """What N steps of noise do to the loss.

    Args:
        steps: N.
        distance: Root mean square move of a parameter.
        ratio: Mean rise of the loss at that distance, in units of what the curvature near by promises.
    """

    steps: int
    distance: float
    ratio: float

    @property
    def quadratic_steps(self) -> float:
        """Steps after which the excess is ``LEFT_BEHIND``: it grows as the square of the distance, so as the steps."""
        return self.steps * LEFT_BEHIND / (self.ratio - 1.0) if self.ratio > 1.0 else math.inf


def noise_distance(lr: float, *, steps: int, grad_norm: float, queries: int, rule: UpdateRule) -> float:
    """Root mean square move of a parameter by the noise of N steps at a gradient that stays what it is."""
    per_step = rule.lr_scale * lr / (1.0 - rule.momentum)
    return per_step * grad_norm * math.sqrt(steps / queries)


@torch.no_grad()
def measure_reach(objective: Objective, *, loss: float, distance: float, steps: int, seed: int) -> Reach | None:
    """Look at the loss at a distance along random directions; ``None`` where rounding hides its rise.

    Args:
        objective: The prepared problem; its parameters come back.
        loss: Loss where it stands.
        distance: As from ``noise_distance``, in units of a parameter.
        steps: The steps that lead there.
        seed: Of the directions.
    """
    origin = objective.read()
    *_, generator = spawn_generators(seed, 9, origin.device)  # a stream of its own
    far = near = 0.0
    try:
        for _ in range(DIRECTIONS):
            u = torch.randn(len(origin), generator=generator, dtype=origin.dtype, device=origin.device)
            far += _rise(objective, origin, u, distance) - 2.0 * loss
            near += _rise(objective, origin, u, NEAR * distance) - 2.0 * loss
    finally:
        objective.write(origin)
    floor = ROUNDING * torch.finfo(origin.dtype).eps * abs(loss) * DIRECTIONS
    if not near > floor:
        return None  # no curvature to speak of, or none that can be told from rounding
    return Reach(steps, distance, NEAR**2 * far / near if math.isfinite(far) else math.inf)


def _rise(objective: Objective, origin: Tensor, u: Tensor, distance: float) -> float:
    total = 0.0
    for sign in (1.0, -1.0):
        objective.write(torch.add(origin, u, alpha=sign * distance))
        total += objective.value()
    return total


def reach_notices(found: Reach | None, *, lr: float) -> Iterable[Notice]:
    """On a run whose own noise leaves the quadratic model on the way."""
    if found is None or found.ratio <= 1.0 + LEFT_BEHIND:
        return
    ratio = f"{found.ratio:.3g} times" if math.isfinite(found.ratio) else "infinitely"
    yield Notice(
        "leaves-quadratic",
        f"The noise of {found.steps:,} steps of {lr:.3g} moves every parameter by about {found.distance:.1g}; that far "
        f"away along random directions the loss has risen {ratio} as much as the curvature here promises. After some "
        f"{max(found.quadratic_steps, 1):,.0f} steps runs are where the loss is steeper than its quadratic model: "
        "they can blow up earlier than predicted. A smaller lr, or more queries, keeps them within it.",
    )


FALL = 0.3
"""Part of the loss that descent is to take off, to first order, or as much of it as the planned run does."""

LEAST_FALL = 0.05
"""Part of the loss below which a run stays where it starts, and nothing is looked at."""

PACE, STEPS = 4, 6
"""Steps of descent that are to do, and that may: a new head moves in the first, and what it uncovers in the next."""

SUFFICIENT = 0.3
"""Part of the decrease promised to first order that a step has to keep, or it is too long."""

ATTEMPTS = 6
"""Step sizes tried, each half of the one before, until the loss falls enough."""

GROWN = 3.0
"""Growth of the trace from which the start says nothing of the run."""

FEWEST, MOST = 3, 24
"""Random directions of the trace: the first number where it is plain that it has not grown."""

PLAIN = 2.0
"""Growth up to which that is plain."""

STEP = 1e-3
"""Step of the differences along a direction of unit entries, where rounding does not ask for a longer one."""

CLEAR_OF_ROUNDING = 100.0
"""Second difference of the loss in units of its rounding error; the step is longer where it would be less."""


@dataclass(frozen=True)
class Growth:
    """The trace before and after a few steps of descent.

    Args:
        before: Upper end of the trace at the start, with what kinks add to it.
        after: The trace where the steps end; its stderr holds Student's factor, its quadrature the rounding.
        fall: Part of the loss that the steps took off.
        num_hvps: Cost in Hessian-vector products: six evaluations of the loss, or two gradients, are one.
    """

    before: float
    after: Estimate
    fall: float
    num_hvps: int

    @property
    def significant(self) -> bool:
        """Whether the trace has grown by more than ``GROWN``, beyond the error bars of both."""
        return self.after.interval[0] > GROWN * max(self.before, 0.0)


@dataclass
class _Walk:
    """Counts what it does to an objective."""

    objective: Objective
    evaluations: int = 0
    gradients: int = 0

    def value(self, x: Tensor) -> float:
        self.objective.write(x)
        self.evaluations += 1
        return self.objective.value()

    def gradient(self, x: Tensor) -> Tensor:
        self.objective.write(x)
        self.gradients += 1
        return self.objective.gradient()[1]

    @property
    def num_hvps(self) -> int:
        return math.ceil(self.evaluations / 6 + self.gradients / 2)


def measure_growth(
    objective: Objective, *, loss: float, before: float, share: float, seed: int, weights: Tensor | None = None
) -> Growth | None:
    """Take a few steps of gradient descent, look at the trace there, and come back.

    Args:
        objective: The prepared problem; its parameters come back.
        loss: Loss where it stands.
        before: Upper end of the trace there, loss/param².
        share: Part of the loss that the planned run gains on the quadratic model.
        seed: Of the directions.
        weights: ``(d,)`` factors of the directions' entries, for a preconditioned trace; of root mean square 1.

    Returns:
        ``None`` where the run goes nowhere, the loss does not fall, or a value is not finite.
    """
    fall = min(share, FALL)
    if loss == 0 or not fall >= LEAST_FALL:
        return None
    walk, origin = _Walk(objective), objective.read()
    try:
        x, value, end = origin, loss, loss - fall * abs(loss)
        for done in range(STEPS):
            found = _descended(walk, x, value, (value - end) / max(PACE - done, 1))
            if found is None:
                break
            x, value = found
            if value <= end:
                break
        if x is origin:
            return None
        after = _trace(walk, x, value, before=before, distance=_rms(x - origin), seed=seed, weights=weights)
    finally:
        objective.write(origin)
    return None if after is None else Growth(before, after, (loss - value) / abs(loss), walk.num_hvps)


def _descended(walk: _Walk, x: Tensor, value: float, decrease: float) -> tuple[Tensor, float] | None:
    """Where a step leads that takes a decrease off to first order, or a shorter one if the loss falls by too little."""
    g = walk.gradient(x)
    square = float(g.double().square().sum())
    if not (math.isfinite(square) and square > 0):
        return None
    step = decrease / square
    for _ in range(ATTEMPTS):
        there = torch.add(x, g, alpha=-step)
        found = walk.value(there)
        if found <= value - SUFFICIENT * step * square:
            return there, found
        step /= 2
    return None


def _rms(vector: Tensor) -> float:
    return float(vector.double().square().mean().sqrt())


def _trace(
    walk: _Walk, x: Tensor, value: float, *, before: float, distance: float, seed: int, weights: Tensor | None
) -> Estimate | None:
    """By second differences along random directions, as many as it takes to see whether it has grown."""
    noise = 4 * torch.finfo(x.dtype).eps * max(abs(value), 1e-30)
    h = STEP
    if before > 0:  # longer steps than those of the descent itself would look at another place
        h = max(STEP, min(math.sqrt(CLEAR_OF_ROUNDING * noise / before), distance))
    *_, generator = spawn_generators(seed, 10, x.device)  # a stream of its own
    samples: list[float] = []
    after = Estimate(math.nan)
    while len(samples) < MOST:
        for _ in range(FEWEST):
            z = torch.randn(len(x), generator=generator, dtype=x.dtype, device=x.device)
            z = z if weights is None else z * weights
            ends = walk.value(torch.add(x, z, alpha=h)) + walk.value(torch.add(x, z, alpha=-h))
            samples.append((ends - 2 * value) / h**2)
        found = torch.tensor(samples, dtype=torch.float64)
        if not bool(torch.isfinite(found).all()):
            return None
        error = widening(len(samples) - 1) * float(found.std()) / math.sqrt(len(samples))
        after = Estimate(float(found.mean()), error, noise / h**2)
        if after.value <= PLAIN * max(before, 0.0) or after.interval[0] > GROWN * max(before, 0.0):
            break
    return after


def growth_notices(found: Growth | None) -> Iterable[Notice]:
    """On a start that says nothing of the run."""
    if found is None or not found.significant:
        return
    yield Notice(
        "little-curvature",
        "There is little curvature here, and more soon. A few steps of gradient descent take "
        f"{100 * found.fall:.0f} % off the loss, and raise the trace from at most {found.before:.1g} to about "
        f"{found.after.value:.1g}. A new head on a trained network starts like this. No step size from here holds for "
        "a long run. Start with a smaller one, and measure again after warm-up.",
    )


INDEFINITE = 0.01
"""Negative mass, relative to the positive part, from which the Hessian is called indefinite."""

_MISSED = (
    "kinks (ReLU, max-pooling, absolute values), which they cannot see, a curvature that changes within such steps, or "
    "an operation that hides its second derivative, as a custom autograd.Function can"
)

LARGE_COMMUTATOR = 0.05
"""Relative commutator up to which P and H count as commuting: the largest seen in the paper's training runs."""

COLLAPSED = 0.1
"""Share of the parameters with ε above √v from which the preconditioner is called collapsed."""


def curvature_notices(curvature: Curvature, bounds: OptimizerBounds, *, jump: Jump | None = None) -> Iterable[Notice]:
    """On the spectrum and what it does to the bounds derived from it."""
    positive, negative = curvature.trace_positive.value, curvature.negative_mass
    if jump is not None:
        yield jump_notice(jump)
    elif positive <= 0:
        yield Notice(
            "zero-curvature",
            "No positive curvature was found, so every mean-square threshold is infinite: on its quadratic model this "
            "loss is linear or concave here and limits no step size. Far from this point it may.",
        )
    elif negative > INDEFINITE * positive:
        yield Notice("indefinite-hessian", _indefinite(curvature, bounds))
    if 0 < curvature.effective_rank < FEW_MODES:
        yield Notice(
            "few-modes",
            f"About {curvature.effective_rank:.1f} modes carry the curvature. With so few, rare directions dominate "
            "the mean square, and a typical run survives somewhat above the thresholds.",
        )
    if positive > 0 and not curvature.lambda_max.converged:
        yield Notice(
            "lambda-max",
            f"λ_max = {curvature.lambda_max.value:.3g} has not converged "
            f"(residual {curvature.lambda_max.residual:.1g}): the first-order bound and the paper's lower bound are "
            "too high by that much. Raise --max-hvps.",
        )


def jump_notice(jump: Jump) -> Notice:
    """On a loss that changes by jumps alone."""
    return Notice(
        "piecewise-constant",
        f"The loss is piecewise constant: small steps do not change it at all, and over {100 * jump.distance:.2g} % of "
        f"the parameters' size it goes from {_number(jump.before)} to {_number(jump.after)}. It has floor, round, "
        "argmax or a threshold on the way, is an accuracy or a count, or is quantised. It has no curvature, and no "
        "number here says which step size is stable. Measure the smooth loss that stands for it, or look for the edge "
        "with runs.",
    )


def nonsmooth_notices(nonsmooth: Nonsmooth, *, trace: float, positive: float) -> Iterable[Notice]:
    """On curvature that the Hessian does not contain, beside its trace and the positive part of it."""
    kinks = nonsmooth.significant
    if abs(kinks) > NOTICEABLE * max(positive, 0.0):
        yield Notice(
            "kinks",
            f"Over steps of {_number(nonsmooth.step)} the loss bends with a trace of {_number(trace + kinks)}, while "
            f"second derivatives have {_number(trace)}: it has {_MISSED}. The descent threshold uses the former. The "
            "others know second derivatives only and can be wrong by as much: keep a wider margin, or probe.",
        )
    elif nonsmooth.disagreement > NOTICEABLE:
        yield Notice(
            "kinks",
            f"Along random directions the loss bends otherwise than its second derivatives say, by "
            f"{100 * nonsmooth.disagreement:.0f} % either way over steps of 1e-3: it has {_MISSED}. Compare with "
            "--curvature forward, which takes no derivatives, or probe.",
        )


def _indefinite(curvature: Curvature, bounds: OptimizerBounds) -> str:
    positive, negative = curvature.trace_positive.value, curvature.negative_mass
    text = (
        f"The Hessian is indefinite: its eigenvalues below 0 sum to {_number(-negative)}, "
        f"{100 * negative / positive:.0f} % of the positive part ({_number(positive)}). The paper's interval assumes "
        "there are none and uses Tr = "
        f"{_number(curvature.trace.value)}"
    )
    exact, lower = bounds.exact, bounds.zo_lower
    if exact is not None and lower is not None and lower > exact.value:
        text += "; here it lies wholly above the threshold of the positive part"
    return text + ". η*(N) brackets what escape along negative curvature does: [all eigenvalues, positive ones]."


def gradient_notices(rows: Iterable[OptimizerBounds]) -> Iterable[Notice]:
    """Whether a run of the planned length stays where the curvature was measured; one of an optimizer is enough."""
    for bounds in rows:
        if "gradient-not-small" in bounds.doubts and bounds.horizon is not None:
            yield Notice(
                "gradient-not-small",
                f"The gradient is not small. On the quadratic model {bounds.horizon.steps:,} steps below the binding "
                "threshold would lower the loss by more than all of its value. The run leaves the neighbourhood where "
                "this curvature holds. Measure again as it goes on.",
            )
            return


def provisional_notices(rows: Iterable[OptimizerBounds]) -> Iterable[Notice]:
    """On recommendations that are less sure than their numbers look; each row's reason says why."""
    if any(bounds.doubts for bounds in rows):
        yield Notice(
            PROVISIONAL,
            "The recommended step size is provisional. Run `zoscope plan` for an answer about your run.",
        )


def preconditioner_notices(
    preconditioner: Preconditioner, commutator: Estimate, row: OptimizerBounds | None = None
) -> Iterable[Notice]:
    """On Adam's frozen P."""
    if preconditioner.collapsed > COLLAPSED:
        yield Notice(
            "preconditioner-collapsed",
            f"On {100 * preconditioner.collapsed:.0f} % of the parameters ε is larger than √v: Adam's preconditioner "
            "has collapsed to ε there, and its thresholds with it. They hold for this point; away from it v grows and "
            "lifts them.",
        )
    if row is not None and row.exact_if_commuting is not None and row.exact is not None:
        higher = 100 * (row.exact_if_commuting / row.exact.value - 1)
        yield Notice(
            "commutator",
            f"P and H do not commute: ‖PH−HP‖/‖PH‖ = {100 * commutator.value:.0f} %. The infinite-time threshold takes "
            f"that in, exactly; as if they did it would be {higher:.2g} % higher. η*(N) and the intervals assume that "
            "they do, and may be too high by as much.",
        )
    elif commutator.value > LARGE_COMMUTATOR:
        yield Notice(
            "commutator",
            f"P and H do not commute: ‖PH−HP‖/‖PH‖ = {100 * commutator.value:.0f} %. The thresholds of Adam assume "
            "that they nearly do (up to about 5 % in published runs); take them as a guide.",
        )
    for remark in preconditioner.remarks:
        yield Notice("preconditioner", remark)


def precision_notices(
    reached: Mapping[str, float], *, rtol: float, max_hvps: int, dimension: int | None
) -> Iterable[Notice]:
    """On operators whose thresholds are less precise than asked for; ``dimension`` where the dense path is open."""
    nonsmooth = {name: value for name, value in reached.items() if value > rtol}
    if nonsmooth:
        worst = max(nonsmooth.values())
        value = f"± {100 * worst:.3g} %" if math.isfinite(worst) else "no finite error bar"
        exact = (
            f", or use --method dense ({dimension:,} products)"
            if dimension is not None and dimension <= DENSE_LIMIT
            else ""
        )
        yield Notice(
            "precision",
            f"The precision asked for (--rtol {rtol:g}) was not reached: {value} within the {max_hvps} Hessian-vector "
            "products of --max-hvps, or where more probe vectors no longer help. The intervals shown are honest, only "
            f"wider; raise --max-hvps or --rtol{exact}.",
        )


def _number(value: float) -> str:
    return f"{float(f'{value:.3g}'):,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
