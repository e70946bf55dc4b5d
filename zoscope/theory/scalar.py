"""Root and minimum of a function of one number.

``scipy.optimize`` has both, but takes longer to import than the measurement of a small problem.
"""

import math
from collections.abc import Callable

Function = Callable[[float], float]


def root(f: Function, low: float, high: float, *, xtol: float) -> float:
    """Where ``f`` changes its sign between ``low`` and ``high``, to ``xtol`` or to rounding.

    Inverse quadratic interpolation where the last three points make it safe, bisection elsewhere.

    Args:
        f: Continuous, of opposite signs at the two ends; ``±inf`` is a value.
        low: One end of the bracket.
        high: The other end.
        xtol: Absolute error allowed.

    Raises:
        ValueError: If both signs are the same.

    Source: Chandrupatla, A new hybrid quadratic/bisection algorithm, Adv. Eng. Software 28 (1997).
    """
    a, b, fa, fb = high, low, f(high), f(low)
    if fa == 0 or fb == 0:
        return a if fa == 0 else b
    if (fa > 0) == (fb > 0):
        raise ValueError(f"f must change its sign between {low} and {high}")
    part = 0.5
    while True:
        x = a + part * (b - a)
        fx = f(x)
        if (fx > 0) == (fa > 0):
            c, fc, a, fa = a, fa, x, fx
        else:
            c, fc, b, fb, a, fa = b, fb, a, fa, x, fx
        best, value = (a, fa) if abs(fa) < abs(fb) else (b, fb)
        room = (2 * math.ulp(abs(best)) + 0.5 * xtol) / abs(b - a)
        if value == 0 or room > 0.5:
            return best
        part = min(max(_interpolated(a, b, c, fa, fb, fc), room), 1 - room)


def _interpolated(a: float, b: float, c: float, fa: float, fb: float, fc: float) -> float:
    """Part of the way from a to b at which to look next."""
    if not all(map(math.isfinite, (fa, fb, fc))) or fb == fc or b == c:
        return 0.5
    xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
    if not (phi**2 < xi and (1 - phi) ** 2 < 1 - xi):
        return 0.5
    return fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)


def lowest(f: Function, low: float, high: float, *, xtol: float) -> tuple[float, float]:
    """Where a function with one minimum in an interval has it, to ``xtol``, and its value there; by golden section."""
    golden = 0.5 * (math.sqrt(5) - 1)
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = f(left), f(right)
    while high - low > xtol:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = f(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = f(right)
    return (left, at_left) if at_left < at_right else (right, at_right)
