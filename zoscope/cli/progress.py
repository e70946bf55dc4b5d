"""Progress on stderr, and only where someone can see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Report = Callable[..., None]


def visible(*, quiet: bool) -> bool:
    """Whether progress may be shown: stderr is a terminal and nobody asked for silence."""
    return not quiet and Console(stderr=True).is_terminal


@contextmanager
def measuring(*, max_hvps: int, rtol: float, quiet: bool) -> Iterator[Report | None]:
    """A bar over Hessian-vector products, with the precision so far and the time left.

    Args:
        max_hvps: The length of the bar.
        rtol: The precision wanted, shown beside the one reached.
        quiet: Show nothing.

    Yields:
        A callback ``(stage, num_hvps, precision)`` for the measurement, or ``None`` when nothing is shown; the precision
        is the relative 95 % half-width reached, ``None`` while there is none.
    """
    if not visible(quiet=quiet):
        yield None
        return
    with _bar() as progress:
        task = progress.add_task("measuring", total=max_hvps, precision="")

        def report(stage: str, num_hvps: int, precision: float | None = None) -> None:
            reached = "" if precision is None else f"±{precision:.1%} (want {rtol:.1%})"
            progress.update(task, description=stage, completed=min(num_hvps, max_hvps), precision=reached)

        yield report


def _bar() -> Progress:
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
