"""``zoscope plan``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import zoscope
from zoscope.cli.options import Given, takes_options
from zoscope.cli.output import aside, emit, illustrate, progress_line, visible
from zoscope.errors import UsageError


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
    from zoscope.problem import Notice  # late, for a fast --help

    told = [Notice("hf-args", text) for text in notices]
    if given.only == "mu":
        from zoscope.planning.mu import perturbation_notices

        for name in ("plot", "compare_schedules", "max_cost", "cache", "method", "replicas"):
            if name in given.said:
                raise UsageError(
                    f"--{name.replace('_', '-')} is about runs, which --only mu does not make. Leave it out."
                )
        chosen = {name: asked[name] for name in ("batch_size", "device", "seed")}
        if asked["dtype"] != "auto":
            chosen["dtype"] = asked["dtype"]
        problem = loaded.problem if given.params is None else loaded.problem.with_params(given.params)
        with aside():
            scale = zoscope.perturbation_scale(problem, one_sided=given.differences == "one-sided", **chosen)
        if "mu" in given.said or not scale.usable:
            told += perturbation_notices(scale, given.mu)
        emit(scale, given.out, told)
        illustrate(scale, given)
        return
    from zoscope.analysis.plan import PlanInterruptedError

    interrupted = False
    with planning(quiet=given.quiet) as on_progress, aside():
        try:
            result = zoscope.plan(loaded.problem, spec=loaded.display, on_progress=on_progress, **asked)
        except PlanInterruptedError as error:
            result, interrupted = error.result, True
    emit(result, given.out, [*told, *result.warnings])
    illustrate(result, given)
    if interrupted:
        raise KeyboardInterrupt


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
