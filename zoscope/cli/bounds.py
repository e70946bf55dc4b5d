"""``zoscope bounds``."""

from __future__ import annotations

from typing import Annotated

import typer

import zoscope
from zoscope.cli import validate
from zoscope.cli.flatten import flatten
from zoscope.cli.options import (
    THRESHOLDS,
    MeasureOptions,
    OptimizerOptions,
    OutputOptions,
    ProblemOptions,
    Threshold,
)
from zoscope.cli.output import emit, warn
from zoscope.cli.progress import loading, measuring
from zoscope.errors import NumericalError

PRECISION = "precision"  # code of the notice that --rtol was not reached

StepSize = Annotated[
    float | None,
    typer.Option(
        "--lr", help="Also judge this step size.", rich_help_panel="Optimizer", metavar="LR", show_default=False
    ),
]


@flatten
def command(
    problem: ProblemOptions,
    optimizer: OptimizerOptions,
    measure: MeasureOptions,
    output: OutputOptions,
    threshold: Threshold = "binding",
    lr: StepSize = None,
) -> None:
    """Curvature and step-size bounds for GD, GDM and Adam, first- and zeroth-order."""
    chosen = validate.choice("--threshold", threshold, THRESHOLDS)
    if lr is not None:
        validate.positive("--lr", lr)
    with loading(quiet=output.quiet):
        loaded = problem.load()
    with measuring(max_hvps=measure.max_hvps, rtol=measure.rtol, quiet=output.quiet) as on_progress:
        result = zoscope.bounds(
            loaded.problem,
            optimizers=optimizer.families,
            threshold=chosen,
            lr=lr,
            spec=loaded.display,
            on_progress=on_progress,
            **optimizer.kwargs(),
            **measure.kwargs(),
        )
    from zoscope.report.bounds import render  # late, for a fast --help

    emit(result, output, shown=render(result, warnings=False))
    missed = [notice for notice in result.warnings if notice.code == PRECISION and measure.strict]
    warn((notice for notice in result.warnings if notice not in missed), quiet=output.quiet)
    if missed:  # after the result, which is honest all the same
        raise NumericalError(missed[0].message)
