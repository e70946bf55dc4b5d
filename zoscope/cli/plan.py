"""``zoscope plan``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import zoscope
from zoscope.cli.options import Given, takes_options
from zoscope.cli.output import aside, emit, illustrate, progress_line, visible


@takes_options("plan")
def command(given: Given) -> None:
    """Which step size for my run: looks ahead over its steps, batches and schedule; one answer with its risk."""
    asked = given.keywords("plan")
    notices: tuple[str, ...] = ()
    if given.hf_args is not None:
        from zoscope.config.training import plan_arguments

        found, notices = plan_arguments(given.hf_args)
        asked |= {name: value for name, value in found.items() if name not in given.said}
    loaded = given.load()
    with planning(quiet=given.quiet) as on_progress, aside():
        result = zoscope.plan(loaded.problem, spec=loaded.display, on_progress=on_progress, **asked)
    from zoscope.problem import Notice  # late, for a fast --help

    emit(result, given.out, [*(Notice("hf-args", text) for text in notices), *result.warnings])
    illustrate(result, given)


@contextmanager
def planning(*, quiet: bool) -> Iterator[Callable[[str, float, float], None] | None]:
    """A bar over the steps of the runs at a step size, with the time left.

    Yields:
        The callback of ``zoscope.plan``; ``None`` when nothing is shown.
    """
    if not visible(quiet=quiet):
        yield None
        return
    with progress_line("{task.completed:,.0f}/{task.total:,.0f} steps") as progress:
        task = progress.add_task("first guess", total=1)
        current = ""

        def report(what: str, done: float, total: float) -> None:
            nonlocal current
            if what != current:
                progress.reset(task)
                current = what
            progress.update(task, description=what, completed=done, total=total)

        yield report
