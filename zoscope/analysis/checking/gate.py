"""The gate: is a step size inside the stable range, and which is the largest that would be?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import ROUND_DOWN, Context

from zoscope.analysis.checking.results import CheckStatus, Threshold

PHRASES = {
    "fo": "first-order threshold",
    "exact": "infinite-time threshold",
    "horizon": "horizon threshold",
    "descent": "descent threshold",
    "forward": "threshold from forward passes",
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


def decide(lr: float, threshold: Threshold, *, margin: float, on_warn: str, steps: int) -> Decision:
    """Hold a step size against the 95 % interval of a threshold.

    Pass: ``lr <= margin * low``. Fail: ``lr > high``. Between them: warn, which ``on_warn="fail"`` turns into a fail.

    Args:
        lr: Step size, param²/loss.
        threshold: The threshold.
        margin: In (0, 1].
        on_warn: ``pass`` or ``fail``.
        steps: Planned steps, for the message.
    """
    largest = round_down(margin * threshold.low)
    what = f"{PHRASES[threshold.name]} {_interval(threshold)}"
    if threshold.name == "horizon":
        what += f" for {steps} steps"
    if math.isinf(threshold.low):
        return Decision("pass", f"no positive curvature limits the step size: every lr is below the {what}.", None)
    advice = f"The largest lr that passes is {largest:g}." if largest else "No lr passes: the lower end is 0."
    if lr <= margin * threshold.low:
        message = f"lr {lr:g} is {lr / threshold.value:.2g} times the {what}. {advice}"
        return Decision("pass", message, largest)
    if lr > threshold.high:
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


def _interval(threshold: Threshold) -> str:
    if threshold.low == threshold.high:
        return f"{threshold.value:.3g}"
    high = "∞" if math.isinf(threshold.high) else f"{threshold.high:.3g}"
    return f"{threshold.value:.3g} [{threshold.low:.3g}, {high}]"
