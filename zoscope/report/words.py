"""Numbers in words, the same everywhere."""

from __future__ import annotations

import math
from decimal import ROUND_DOWN, Context
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoscope.theory.spectrum import Estimate

MISSING = "–"
INFINITE = "∞"
MOST_DIGITS = 4
NEGLIGIBLE = 5e-5
"""Relative error that does not reach the last of four digits: not worth a ±."""

POOR = 0.5
"""Relative error from which a number has one digit."""


OPERATOR_NAMES = {
    "hessian": "Hessian H",
    "preconditioned_hessian": "P^-½ H P^-½ (Adam)",
    "ggn": "Gauss-Newton G",
    "preconditioned_ggn": "P^-½ G P^-½ (Adam)",
}
"""Matrices that are measured, by their key in documents."""


def digits_for(value: float, half_width: float) -> int:
    """Significant digits that a value with this error deserves, 1 to 4."""
    relative = _relative(value, half_width)
    if relative < NEGLIGIBLE:
        return MOST_DIGITS
    if relative > POOR:
        return 1
    return min(max(math.ceil(-math.log10(relative)) + 1, 2), MOST_DIGITS)


def quantity(value: float | None, *, digits: int = MOST_DIGITS) -> str:
    """A number in plain notation where that is short: ``87.13``, ``-4.9``, ``1,440``, ``3.1e-7``."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return INFINITE if value > 0 else f"-{INFINITE}"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    exponent = math.floor(math.log10(abs(rounded)))
    if not -3 <= exponent < 5:
        return _scientific(value, digits)
    return f"{rounded:,.{max(digits - 1 - exponent, 0)}f}"


def step_size(value: float | None, *, digits: int = 3) -> str:
    """A step size, ready to be pasted: ``1.63e-2``, ``0.500``, ``12.3``."""
    if value is not None and math.isfinite(value) and 0 < value < 0.1:
        return _scientific(value, digits)
    return quantity(value, digits=digits)


def step_size_at_most(value: float, *, digits: int = 3) -> str:
    """A step size rounded down: whoever pastes it stays below it."""
    if not (math.isfinite(value) and value > 0):
        return step_size(value, digits=digits)
    return step_size(float(Context(prec=digits, rounding=ROUND_DOWN).create_decimal(value)), digits=digits)


def error(value: float, half_width: float) -> str:
    """`` ± 0.8 %``, rounded up; empty for an error that no digit shows, absolute where the value may be zero."""
    relative = _relative(value, half_width)
    if relative < NEGLIGIBLE:
        return ""
    if not math.isfinite(half_width):
        return f" ± {INFINITE}"
    if relative >= 1:
        return f" ± {quantity(half_width, digits=2)}"
    percent = relative * 100
    if percent > 9.9:
        return f" ± {math.ceil(percent - 1e-6)} %"
    return f" ± {math.ceil(percent * 10 - 1e-6) / 10:.1f} %"


def quantity_with_error(value: float, half_width: float) -> str:
    """A curvature and its error."""
    return quantity(value, digits=digits_for(value, half_width)) + error(value, half_width)


def step_size_with_error(value: float, half_width: float) -> str:
    """A step size and its error."""
    return step_size(value, digits=digits_for(value, half_width)) + error(value, half_width)


def curvature_of(estimate: Estimate) -> str:
    """An estimated curvature and its error."""
    return quantity_with_error(estimate.value, estimate.half_width)


def step_size_of(estimate: Estimate | None) -> str:
    """An estimated step size and its error."""
    return MISSING if estimate is None else step_size_with_error(estimate.value, estimate.half_width)


def step_range(low: float | None, high: float | None, *, digits: int = 3) -> str:
    """``1.44e-2 – 2.30e-2``; one number where both look the same."""
    ends = [step_size(end, digits=digits) for end in (low, high)]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} – {ends[1]}"


def count(value: float, noun: str = "", *, rough: bool = False) -> str:
    """A whole number with thousands separated, with a noun ``1 example``, ``1,797 examples``.

    Two digits, ``rough``, are enough for a number of steps that is only known roughly.
    """
    if rough and 100 <= value < math.inf:
        scale = 10 ** (math.floor(math.log10(value)) - 1)
        value = round(value / scale) * scale
    number = INFINITE if math.isinf(value) else f"{round(value):,}"
    return f"{number} {noun}{'' if value == 1 else 's'}" if noun else number


def percent(share: float | None) -> str:
    """A share of runs: ``< 0.1 %``, ``0.5 %``, ``12 %``."""
    if share is None:
        return MISSING
    if share < 0.001:
        return "< 0.1 %"
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def duration(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3 min 20 s``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _relative(value: float, half_width: float) -> float:
    if half_width == 0 or (math.isinf(value) and not math.isinf(half_width)):
        return 0.0
    return half_width / abs(value) if value != 0 and math.isfinite(value) else math.inf


def _scientific(value: float, digits: int) -> str:
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"
