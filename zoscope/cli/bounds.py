"""``zoscope bounds``."""

from __future__ import annotations

from typing import Annotated

import typer

import zoscope
from zoscope.cli import validate
from zoscope.cli.flatten import flatten
from zoscope.cli.options import MeasureOptions, OptimizerOptions, OutputOptions, ProblemOptions
from zoscope.cli.output import emit, warn
from zoscope.cli.progress import measuring

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
    lr: StepSize = None,
) -> None:
    """Curvature and step-size bounds for GD, GDM and Adam, first- and zeroth-order."""
    if lr is not None:
        validate.positive("--lr", lr)
    loaded = problem.load()
    with measuring(max_hvps=measure.max_hvps, rtol=measure.rtol, quiet=output.quiet) as on_progress:
        result = zoscope.bounds(
            loaded.problem,
            optimizers=optimizer.families,
            lr=lr,
            on_progress=on_progress,
            **optimizer.kwargs(),
            **measure.kwargs(),
        )
    emit(result, output)
    warn(result.warnings, quiet=output.quiet)
