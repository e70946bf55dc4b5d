"""Progress on stderr, and only where someone can see it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING

from rich.console import Console

from zoscope.errors import ZoscopeError

if TYPE_CHECKING:
    from rich.progress import Progress

Report = Callable[..., None]


def visible(*, quiet: bool) -> bool:
    """Whether progress may be shown: stderr is a terminal and nobody asked for silence."""
    return not quiet and Console(stderr=True).is_terminal


@contextmanager
def loading(*, quiet: bool) -> Iterator[None]:
    """A sign of life while a spec loads, which may well train a model; what it prints appears above."""
    if not visible(quiet=quiet):
        yield
        return
    with Console(stderr=True).status("loading the problem"):
        yield


@contextmanager
def measuring(*, max_hvps: int, rtol: float, quiet: bool) -> Iterator[Report | None]:
    """A bar over Hessian-vector products, with the precision so far and the time left.

    Args:
        max_hvps: Most products that a stage may spend.
        rtol: The precision wanted, shown beside the one reached.
        quiet: Show nothing.

    Yields:
        A callback ``(stage, num_hvps, precision)`` for the measurement, or ``None`` when nothing is shown. Precision
        means the relative 95 % half-width reached so far, or ``None``.
    """
    if not visible(quiet=quiet):
        with aside():
            yield None
        return
    with _bar() as progress, aside():
        task = progress.add_task("first products", total=max_hvps, precision="")
        spent = 0

        def report(stage: str, num_hvps: int, precision: float | None = None) -> None:
            nonlocal spent
            if num_hvps < spent:  # another operator
                progress.reset(task)
            spent = num_hvps
            reached = "" if precision is None else f"±{precision:.1%} (want {rtol:.1%})"
            total = products_needed(num_hvps, precision, max_hvps=max_hvps, rtol=rtol)
            progress.update(task, description=stage, completed=num_hvps, total=max(total, num_hvps), precision=reached)

        yield report


@contextmanager
def aside() -> Iterator[None]:
    """Send what the user's own code prints to stderr: stdout is for the result."""
    with redirect_stdout(sys.stderr):
        yield


@contextmanager
def about(spec: str) -> Iterator[None]:
    """Name the spec in an error that does not say what it is about."""
    try:
        yield
    except ZoscopeError as error:
        message = str(error)
        if spec.partition(":")[0] not in message and not message.startswith("--"):
            error.args = (f"{spec}: {message}",)
        raise


def products_needed(num_hvps: int, precision: float | None, *, max_hvps: int, rtol: float) -> int:
    """About how many products the precision wanted takes: the error of a mean falls with the square root of them."""
    if precision is None or not math.isfinite(precision):
        return max_hvps
    return min(max_hvps, math.ceil(num_hvps * max(precision / rtol, 1.0) ** 2))


def _bar() -> Progress:
    # Late: only a terminal needs it.
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f} HVPs"),
        TextColumn("{task.fields[precision]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
