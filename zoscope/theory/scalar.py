"""Root and minimum of a function of one number.

``scipy.optimize`` has both, but takes longer to import than the measurement of a small problem. A search asks for
values one at a time, so that many searches can go side by side, with one vectorised evaluation for all of them.
"""

import math
from collections.abc import Callable, Generator, Sequence

Function = Callable[[float], float]
Search = Generator[float, float, float]
"""Yields where it wants a value, is sent that value, and returns what it was looking for."""


def searched(f: Function, search: Search) -> float:
    """What a search of ``f`` finds."""
    (found,) = searched_together(lambda _, places: [f(places[0])], [search])
    return found


def searched_together(
    values: Callable[[list[int], list[float]], Sequence[float]], searches: Sequence[Search]
) -> list[float]:
    """What several searches find, each of a function of its own.

    Args:
        values: ``values(which, places)``: of each search named in ``which`` the value at its place.
        searches: The searches.
    """
    found = [math.nan] * len(searches)
    waiting = {which: next(search) for which, search in enumerate(searches)}
    while waiting:
        told = values(list(waiting), list(waiting.values()))
        for which, value in zip(list(waiting), told, strict=True):
            try:
                waiting[which] = searches[which].send(value)
            except StopIteration as done:
                found[which] = done.value
                del waiting[which]
    return found


def root(f: Function, low: float, high: float, *, xtol: float) -> float:
    """Where ``f`` changes its sign between ``low`` and ``high``, to ``xtol`` or to rounding.

    Args:
        f: Continuous, of opposite signs at the two ends; ``±inf`` is a value.
        low: One end of the bracket.
        high: The other end.
        xtol: Absolute error allowed.

    Raises:
        ValueError: If both signs are the same.
    """
    return searched(f, root_search(low, high, xtol=xtol))


def root_search(low: float, high: float, *, xtol: float) -> Search:
    """The search of ``root``: inverse quadratic interpolation where the last three points make it safe, else bisection.

    Source: Chandrupatla, A new hybrid quadratic/bisection algorithm, Adv. Eng. Software 28 (1997).
    """
    a, b = high, low
    fa, fb = (yield a), (yield b)
    if fa == 0 or fb == 0:
        return a if fa == 0 else b
    if (fa > 0) == (fb > 0):
        raise ValueError(f"f must change its sign between {low} and {high}")
    part = 0.5
    while True:
        x = a + part * (b - a)
        fx = yield x
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


CAP = 50.0
"""Largest logarithm of a feedback: it overflows far above the root, and a ceiling keeps secant slopes sane."""


def first_crossing(total: Function, *, guess: float) -> float:
    """Root of ``total(lr) = 1``, from a guess; ``inf`` when there is none below the largest float."""
    return searched(total, crossing_search(guess))


def crossing_search(guess: float) -> Search:
    """The search of ``first_crossing``, to a relative error of about 1e-14.

    Secant steps on ``log total`` in ``log lr``, kept inside the bracket seen so far. That curve is nearly a straight
    line: its slope lies between 1 (every mode in its steady state) and 2 (none yet), more where a mode is unstable.
    """
    x = math.log(guess)
    slope, reach, last = 1.5, 1.0, 1.0
    low, high = -math.inf, math.inf
    value = _log_excess((yield math.exp(x)))
    for _ in range(40):
        low, high = (x, high) if value < 0 else (low, x)
        step = min(max(-value / slope, -reach), reach)
        if not low <= x + step <= high:
            step = 0.5 * (low + high) - x
        if abs(step * last) < 1e-15 or abs(step) < 2e-14:  # a secant step errs by about the product of the last two
            return math.exp(x + step)
        x, last, reach = x + step, step, 2 * reach
        if abs(x) > 700:
            return math.inf if x > 0 else 0.0
        previous, value = value, _log_excess((yield math.exp(x)))
        slope = max((value - previous) / step, 1e-2)
    rest = root_search(low, high, xtol=2e-14)
    place = next(rest)
    while True:
        try:
            place = rest.send(_log_excess((yield math.exp(place))))
        except StopIteration as done:
            return math.exp(done.value)


def _log_excess(total: float) -> float:
    if total < -1.0:  # far above the root, where a signed quadrature weight of an unstable mode takes over
        return CAP
    return min(max(math.log(total), -CAP), CAP) if total > 0 else -CAP


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
