"""The gate: is a step size inside the stable range, and which is the largest that would be?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_DOWN, Context

from zoscope.analysis.checking.results import CheckStatus
from zoscope.analysis.recommend import DOUBTS, GATE, SHORT, Limit, joined, stand

PHRASES = {
    "fo": "first-order threshold",
    "exact": "infinite-time threshold",
    "horizon": "horizon threshold",
    "descent": "descent threshold",
    "forward": "threshold from forward passes",
    "short-horizon": "threshold of all eigenvalues",
}


@dataclass(frozen=True)
class Decision:
    """What the gate says.

    Args:
        status: ``pass``, ``warn`` or ``fail``.
        message: One paragraph, with the largest step size that passes.
        largest_lr: That step size; ``None`` when every one passes, or none does.
    """

    status: CheckStatus
    message: str
    largest_lr: float | None


def decide(
    lr: float, limit: Limit, *, margin: float = GATE, on_warn: str, steps: int, doubts: Sequence[str] = ()
) -> Decision:
    """Hold a step size against the 95 % interval of a limit.

    Pass: ``lr <= margin * low``. Fail: ``lr > high``. Between them: warn, which ``on_warn="fail"`` turns into a fail.

    Args:
        lr: Step size, param²/loss.
        limit: The limit.
        margin: In (0, 1].
        on_warn: ``pass`` or ``fail``.
        steps: Planned steps, for the message.
        doubts: Why the threshold is provisional.
    """
    largest = round_down(margin * limit.low)
    what = f"{PHRASES[limit.name]} {_interval(limit)}"
    if limit.name in ("horizon", "short-horizon"):
        what += f" for {steps if limit.name == 'horizon' else min(steps, SHORT)} steps"
    if math.isinf(limit.low):
        return Decision("pass", f"no positive curvature limits the step size: every lr is below the {what}.", None)
    advice = f"The largest lr that passes is {largest:g}." if largest else "No lr passes: the lower end is 0."
    if doubts:
        advice += f" That is provisional: {joined([DOUBTS[code] for code in doubts])}. Confirm it with zoscope probe."
    outlook = stand(lr, limit, margin=margin)
    if outlook == "stable":
        return Decision("pass", f"lr {lr:g} is {limit.ratio(lr):.2g} times the {what}. {advice}", largest)
    if outlook == "unstable":
        message = f"lr {lr:g} is above the {what}: training is expected to become unstable. {advice}"
        return Decision("fail", message, largest)
    message = f"lr {lr:g} is above {margin:g} of the lower end of the {what}, but not above its upper end. {advice}"
    if on_warn == "fail":
        return Decision("fail", f"{message} (on_warn: fail)", largest)
    return Decision("warn", message, largest)


def round_down(value: float) -> float | None:
    """The value rounded down to two significant digits; ``None`` for 0 and for infinity."""
    if not math.isfinite(value) or value <= 0:
        return None
    return float(Context(prec=2, rounding=ROUND_DOWN).create_decimal(value))


def _interval(limit: Limit) -> str:
    if limit.low == limit.high:
        return f"{limit.value:.3g}"
    high = "∞" if math.isinf(limit.high) else f"{limit.high:.3g}"
    return f"{limit.value:.3g} [{limit.low:.3g}, {high}]"
