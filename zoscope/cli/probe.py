"""``zoscope probe``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

import zoscope
from zoscope.cli.options import Given, takes_options
from zoscope.cli.output import aside, emit, illustrate, progress_line, visible
from zoscope.errors import UsageError
from zoscope.registry import is_zeroth_order

if TYPE_CHECKING:
    from zoscope.analysis.probe_results import ProbeResult

EXIT_CODES = {"confirmed": 0, "refuted": 1, "inconclusive": 3}


@takes_options("probe")
def command(given: Given) -> None:
    """Short training runs on each side of the threshold: confirmed (exit 0), refuted (1) or inconclusive (3)."""
    names = given.optimizer or ["zo-gd"]
    if len(names) > 1:
        raise UsageError(f"--optimizer: got {', '.join(names)}. Expected one; probe them one at a time.")
    if given.batch_size is not None and (given.linearized or not is_zeroth_order(names[0])):
        raise UsageError("--batch-size is for zeroth-order runs on the loss itself. Leave it out here.")
    loaded = given.load()
    from zoscope.analysis.probe_results import ProbeInterruptedError  # late, for a fast --help

    interrupted = False
    with running(quiet=given.quiet) as (on_progress, on_run), aside():
        try:
            result = zoscope.probe(
                loaded.problem,
                optimizer=names[0],
                spec=loaded.display,
                on_progress=on_progress,
                on_run=on_run,
                **given.keywords("probe", "optimizer"),
            )
        except ProbeInterruptedError as error:
            result, interrupted = error.result, True
    _show(result, given)
    if interrupted:
        raise KeyboardInterrupt
    raise typer.Exit(EXIT_CODES[result.outcome])


def _show(result: ProbeResult, given: Given) -> None:
    emit(result, given.out)
    illustrate(result, given)


@contextmanager
def running(*, quiet: bool) -> Iterator[tuple[Callable[..., None] | None, Callable[[str, int, int], None] | None]]:
    """Progress of the measurement, then of every run: replica steps, steps per second, time left.

    Yields:
        The two callbacks of ``zoscope.probe``; ``None`` when nothing is shown.
    """
    if not visible(quiet=quiet):
        yield None, None
        return
    with progress_line("{task.completed:.0f}/{task.total:.0f}", "{task.fields[pace]}") as progress:
        task = progress.add_task("measuring", total=1, pace="HVPs")
        began, current = time.perf_counter(), ""

        def measured(stage: str, num_hvps: int, precision: float | None = None) -> None:
            progress.update(task, description=stage, completed=num_hvps, total=max(num_hvps, 1), pace="HVPs")

        def ran(what: str, done: int, total: int) -> None:
            nonlocal began, current
            if what != current:
                began, current = time.perf_counter(), what
                progress.reset(task)
            pace = done / max(time.perf_counter() - began, 1e-9)
            progress.update(task, description=what, completed=done, total=total, pace=f"{pace:,.0f} steps/s")

        yield measured, ran
