"""What to know before trusting a number, in plain words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from zoscope.curvature.measure import DENSE_LIMIT
from zoscope.problem import Notice

if TYPE_CHECKING:
    from zoscope.analysis.optimizer_bounds import OptimizerBounds
    from zoscope.curvature.jumps import Jump
    from zoscope.curvature.kinks import Missed
    from zoscope.curvature.precondition import Preconditioner
    from zoscope.curvature.results import Curvature
    from zoscope.theory.spectrum import Estimate

INDEFINITE = 0.01
"""Negative mass, relative to the positive part, from which the Hessian is called indefinite."""

NOTICEABLE = 0.1
"""Curvature that only differences see, relative to that of second derivatives, from which it is worth a warning."""

_MISSED = (
    "kinks (ReLU, max-pooling, absolute values), which they cannot see, or an operation that hides its second "
    "derivative, as a custom autograd.Function can"
)

FEW_MODES = 5.0
"""Effective rank below which typical runs and the mean square part ways."""

PROVISIONAL = "provisional"
"""Code of the notice that reports show beside the step size itself."""

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


def missed_notices(curvature: Curvature, missed: Missed) -> Iterable[Notice]:
    """On curvature that the Hessian does not contain."""
    positive, trace, kinks = curvature.trace_positive.value, curvature.trace.value, missed.significant
    if abs(kinks) > NOTICEABLE * max(positive, 0.0):
        yield Notice(
            "kinks",
            f"Over steps of 1e-3 the loss bends with a trace of {_number(trace + kinks)}, while second derivatives "
            f"have {_number(trace)}: it has {_MISSED}. The descent threshold uses the former. The others know second "
            "derivatives only and can be wrong by as much: keep a wider margin, or probe.",
        )
    elif missed.disagreement > NOTICEABLE:
        yield Notice(
            "kinks",
            f"Along random directions the loss bends otherwise than its second derivatives say, by "
            f"{100 * missed.disagreement:.0f} % either way over steps of 1e-3: it has {_MISSED}. Compare with "
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
            "The recommended step size is provisional. Confirm it with `zoscope probe`, and measure again as training "
            "goes on.",
        )


def preconditioner_notices(preconditioner: Preconditioner, commutator: Estimate) -> Iterable[Notice]:
    """On Adam's frozen P."""
    if preconditioner.collapsed > COLLAPSED:
        yield Notice(
            "preconditioner-collapsed",
            f"On {100 * preconditioner.collapsed:.0f} % of the parameters ε is larger than √v: Adam's preconditioner "
            "has collapsed to ε there, and its thresholds with it. They hold for this point; away from it v grows and "
            "lifts them.",
        )
    if commutator.value > LARGE_COMMUTATOR:
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
    missed = {name: value for name, value in reached.items() if value > rtol}
    if missed:
        worst = max(missed.values())
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


def without_repeats(notices: Iterable[Notice]) -> tuple[Notice, ...]:
    """Each message once, in order."""
    return tuple(dict.fromkeys(notices))
