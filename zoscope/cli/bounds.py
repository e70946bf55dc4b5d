"""``zoscope bounds``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

import zoscope
from zoscope.cli import validate
from zoscope.cli.options import (
    THRESHOLDS,
    MeasureOptions,
    OptimizerOptions,
    OutputOptions,
    ProblemOptions,
    Threshold,
    flatten,
)
from zoscope.cli.output import about, emit, loading, measuring, warn
from zoscope.errors import NumericalError

if TYPE_CHECKING:
    from zoscope.analysis.estimate import CostEstimate
    from zoscope.spec import LoadedSpec

PRECISION = "precision"  # code of the notice that --rtol was not reached

StepSize = Annotated[
    float | None,
    typer.Option(
        "--lr", help="Also judge this step size.", rich_help_panel="Optimizer", metavar="LR", show_default=False
    ),
]

BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        help="Examples per training step, where that is fewer than the data: adds the thresholds with mini-batches.",
        rich_help_panel="Optimizer",
        metavar="B",
        show_default=False,
    ),
]

Estimate = Annotated[
    bool,
    typer.Option(
        "--estimate",
        help="Only say what each kind of curvature would cost, from one timed micro-batch.",
        rich_help_panel="Measurement",
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
    batch_size: BatchSize = None,
    estimate: Estimate = False,
) -> None:
    """Curvature and step-size bounds for GD, GDM and Adam, first- and zeroth-order."""
    chosen = validate.choice("--threshold", threshold, THRESHOLDS)
    if lr is not None:
        validate.positive("--lr", lr)
    if batch_size is not None:
        validate.at_least("--batch-size", batch_size, 1)
    with loading(quiet=output.quiet):
        loaded = problem.load()
    if estimate:
        emit(_estimate(loaded, optimizer, measure), output)
        return
    progress = measuring(max_hvps=measure.max_hvps, rtol=measure.rtol, quiet=output.quiet)
    with about(loaded.display), progress as on_progress:
        result = zoscope.bounds(
            loaded.problem,
            optimizers=optimizer.families,
            threshold=chosen,
            lr=lr,
            batch_size=batch_size,
            spec=loaded.display,
            on_progress=on_progress,
            **optimizer.kwargs(),
            **measure.kwargs(),
        )
    from zoscope.analysis.notices import PROVISIONAL  # late, for a fast --help
    from zoscope.report.bounds import render

    emit(result, output, shown=render(result, warnings=False))
    nonsmooth = [notice for notice in result.warnings if notice.code == PRECISION and measure.strict]
    elsewhere = (PROVISIONAL,) if not output.json else ()  # the report shows it beside the step size
    told = [notice for notice in result.warnings if notice not in nonsmooth and notice.code not in elsewhere]
    warn(told, quiet=output.quiet)
    if nonsmooth:  # after the result, which is honest all the same
        raise NumericalError(nonsmooth[0].message)


def _estimate(loaded: LoadedSpec, optimizer: OptimizerOptions, measure: MeasureOptions) -> CostEstimate:
    from zoscope.analysis.estimate import estimate  # late, for a fast --help

    options = measure.kwargs()
    del options["curvature"]  # every kind is compared
    return estimate(loaded.problem, optimizers=optimizer.families, spec=loaded.display, **options)
