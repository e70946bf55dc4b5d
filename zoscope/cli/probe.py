"""``zoscope probe``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer import Option

import zoscope
from zoscope.cli import validate
from zoscope.cli.options import THRESHOLDS, MeasureOptions, OutputOptions, ProblemOptions, RuleOptions, flatten
from zoscope.cli.output import aside, check_picture, emit, loading, visible, warn
from zoscope.errors import UsageError

if TYPE_CHECKING:
    from zoscope.analysis.probe_results import ProbeResult

PANEL = "Runs"
EXIT_CODES = {"confirmed": 0, "refuted": 1, "inconclusive": 3}


@dataclass(frozen=True)
class ProbedOptions(RuleOptions):
    """The optimizer, with steps that default to what a run needs."""

    steps: Annotated[
        str,
        Option(metavar="auto|N", help="Steps of a run; auto is what the growth takes.", rich_help_panel="Optimizer"),
    ] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kwargs()

    @property
    def planned(self) -> int | None:
        """The number of steps; ``None`` for auto."""
        if self.steps == "auto":
            return None
        try:
            return validate.at_least("--steps", int(self.steps), 1)
        except ValueError:
            raise UsageError(f"--steps: got '{self.steps}'. Expected 'auto' or a whole number of at least 1.") from None

    @property
    def name(self) -> str:
        """The one optimizer asked for."""
        names = self.optimizer or ["zo-gd"]
        if len(names) > 1:
            raise UsageError(f"--optimizer: got {', '.join(names)}. Expected one; probe them one at a time.")
        return names[0]

    def kwargs(self) -> dict[str, Any]:
        """As keyword arguments of ``zoscope.probe``."""
        return {"optimizer": self.name, "steps": self.planned, **super().kwargs()}


@dataclass(frozen=True)
class RunOptions:
    """Which runs, and how long."""

    threshold: Annotated[
        str,
        Option(
            metavar=" | ".join(THRESHOLDS),
            help="Which threshold is probed; 'binding' is the smaller one of horizon and descent.",
            rich_help_panel=PANEL,
        ),
    ] = "binding"
    ratios: Annotated[
        str | None,
        Option(
            metavar="R1,R2,…",
            help="Step sizes as multiples of the threshold (default 0.8,1.25).",
            rich_help_panel=PANEL,
            show_default=False,
        ),
    ] = None
    lr: Annotated[
        list[float] | None,
        Option("--lr", metavar="LR", help="An absolute step size; repeatable.", rich_help_panel=PANEL),
    ] = None
    growth: Annotated[
        float, Option(help="Factor by which the mean square should grow above the threshold.", rich_help_panel=PANEL)
    ] = 1e3
    max_steps: Annotated[int, Option(help="Most steps of a run.", rich_help_panel=PANEL)] = 20_000
    max_seconds: Annotated[float, Option(help="Time for all runs.", rich_help_panel=PANEL)] = 600.0
    replicas: Annotated[int, Option(help="Independent direction streams.", rich_help_panel=PANEL)] = 8
    mu: Annotated[float, Option(help="Smoothing radius μ of the estimate.", rich_help_panel=PANEL)] = 1e-3
    batch_size: Annotated[
        int | None,
        Option(
            metavar="B",
            help="Random batches of B examples (default: all examples).",
            rich_help_panel=PANEL,
            show_default=False,
        ),
    ] = None
    edge: Annotated[bool, Option("--edge", help="Bisect for the empirical edge.", rich_help_panel=PANEL)] = False
    edge_rtol: Annotated[float, Option(help="Width of its bracket.", rich_help_panel=PANEL)] = 0.05
    linearized: Annotated[
        bool, Option("--linearized", help="Run on the quadratic model at the start.", rich_help_panel=PANEL)
    ] = False
    assume_threshold: Annotated[
        float | None,
        Option(
            metavar="LR",
            help="Test this threshold instead of the predicted one.",
            rich_help_panel=PANEL,
            show_default=False,
        ),
    ] = None
    plot: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="Loss and distance over steps, as a picture (needs matplotlib).",
            rich_help_panel=PANEL,
            show_default=False,
        ),
    ] = None

    def __post_init__(self) -> None:
        validate.choice("--threshold", self.threshold, THRESHOLDS)
        for lr in self.lr or ():
            validate.positive("--lr", lr)
        if validate.positive("--growth", self.growth) <= 1:
            raise UsageError(f"--growth: got {self.growth:g}. Expected a number above 1, such as 1000.")
        validate.at_least("--max-steps", self.max_steps, 1)
        validate.positive("--max-seconds", self.max_seconds)
        validate.at_least("--replicas", self.replicas, 1)
        validate.positive("--mu", self.mu)
        if self.batch_size is not None:
            validate.at_least("--batch-size", self.batch_size, 1)
        validate.relative("--edge-rtol", self.edge_rtol)
        if self.assume_threshold is not None:
            validate.positive("--assume-threshold", self.assume_threshold)
        if self.plot is not None:
            check_picture(self.plot)
        self.kwargs()

    def kwargs(self) -> dict[str, Any]:
        """As keyword arguments of ``zoscope.probe``."""
        return {
            "threshold": self.threshold,
            "ratios": None if self.ratios is None else _numbers("--ratios", self.ratios),
            "lr": self.lr or None,
            "growth": self.growth,
            "max_steps": self.max_steps,
            "max_seconds": self.max_seconds,
            "replicas": self.replicas,
            "mu": self.mu,
            "batch_size": self.batch_size,
            "edge": self.edge,
            "edge_rtol": self.edge_rtol,
            "linearized": self.linearized,
            "assume_threshold": self.assume_threshold,
        }


@flatten
def command(
    problem: ProblemOptions,
    optimizer: ProbedOptions,
    runs: RunOptions,
    measure: MeasureOptions,
    output: OutputOptions,
) -> None:
    """Short training runs on each side of the threshold: confirmed (exit 0), refuted (1) or inconclusive (3)."""
    if runs.batch_size is not None and (runs.linearized or not optimizer.name.startswith("zo-")):
        raise UsageError("--batch-size is for zeroth-order runs on the loss itself. Leave it out here.")
    with loading(quiet=output.quiet):
        loaded = problem.load()
    from zoscope.analysis.probe_results import ProbeInterruptedError  # late, for a fast --help

    interrupted = False
    with running(quiet=output.quiet) as (on_progress, on_run), aside():
        try:
            result = zoscope.probe(
                loaded.problem,
                spec=loaded.display,
                on_progress=on_progress,
                on_run=on_run,
                **runs.kwargs(),
                **optimizer.kwargs(),
                strict=measure.strict,
                **measure.kwargs(),
            )
        except ProbeInterruptedError as error:
            result, interrupted = error.result, True
    _show(result, output, plot=runs.plot)
    if interrupted:
        raise KeyboardInterrupt
    raise typer.Exit(EXIT_CODES[result.outcome])


def _show(result: ProbeResult, output: OutputOptions, *, plot: Path | None) -> None:
    from zoscope.report.probe import render

    emit(result, output, shown=render(result, warnings=False))
    warn(result.warnings, quiet=output.quiet)
    if plot is not None:
        from zoscope.report.probe import draw

        draw(result, plot)


@contextmanager
def running(*, quiet: bool) -> Iterator[tuple[Callable[..., None] | None, Callable[[str, int, int], None] | None]]:
    """Progress of the measurement, then of every run: replica steps, steps per second, time left.

    Yields:
        The two callbacks of ``zoscope.probe``; ``None`` when nothing is shown.
    """
    if not visible(quiet=quiet):
        yield None, None
        return
    # Late: only a terminal needs it.
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[pace]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
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


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(validate.positive(option, float(part)) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"{option}: got '{text}'. Expected numbers above 0 with commas between them, such as 0.8,1.25."
        ) from None
