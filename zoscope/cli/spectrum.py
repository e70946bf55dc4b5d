"""``zoscope spectrum``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

import zoscope
from zoscope.cli import validate
from zoscope.cli.options import MeasureOptions, OutputOptions, ProblemOptions, flatten
from zoscope.cli.output import about, check_picture, emit, loading, measuring, warn
from zoscope.errors import NumericalError, UsageError

if TYPE_CHECKING:
    from zoscope.analysis.spectrum import MomentsResult, SpectrumResult

PANEL = "Spectrum"
PRECISION = "precision"  # code of the notice that --rtol was not reached
MATRICES = ("hessian", "ggn")


@dataclass(frozen=True)
class SpectrumMeasureOptions(MeasureOptions):
    """How the curvature is measured; what is wanted precisely is a sum over all eigenvalues."""

    rtol: Annotated[
        float,
        Option(help="95 % half-width wanted for the trace, relative to Σ|λ|.", rich_help_panel="Measurement"),
    ] = 0.02
    curvature: Annotated[
        str,
        Option(metavar=" | ".join(MATRICES), help="Hessian or Gauss-Newton matrix.", rich_help_panel="Measurement"),
    ] = "hessian"

    def __post_init__(self) -> None:
        validate.choice("--curvature", self.curvature, MATRICES)  # forward passes tell no eigenvalues
        super().__post_init__()


@dataclass(frozen=True)
class SpectrumOptions:
    """What to show of the spectrum."""

    top: Annotated[
        int, Option("--top", metavar="K", help="Largest and smallest eigenvalues to list.", rich_help_panel=PANEL)
    ] = 10
    by_layer: Annotated[
        bool, Option("--by-layer", help="Split the trace by layer, at no further cost.", rich_help_panel=PANEL)
    ] = False
    moments: Annotated[
        bool,
        Option(
            "--moments",
            help="Trace, ‖·‖_F² and λ_max alone, at a fraction of the products; --rtol is relative to the trace.",
            rich_help_panel=PANEL,
        ),
    ] = False
    plot: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="Eigenvalue density as a picture: .png, .svg or .pdf (needs matplotlib).",
            rich_help_panel=PANEL,
            show_default=False,
        ),
    ] = None

    def __post_init__(self) -> None:
        validate.at_least("--top", self.top, 1)
        if self.plot is not None:
            check_picture(self.plot)
        unwanted = [name for name, given in (("--by-layer", self.by_layer), ("--plot", self.plot)) if given]
        if self.moments and unwanted:
            raise UsageError(
                f"--moments with {unwanted[0]}: trace, norm and λ_max alone are measured without the spectrum behind "
                f"them. Leave out one of the two."
            )


@flatten
def command(
    problem: ProblemOptions,
    shown: SpectrumOptions,
    measure: SpectrumMeasureOptions,
    output: OutputOptions,
) -> None:
    """Eigenvalue density, largest and smallest eigenvalues, and the trace by layer."""
    with loading(quiet=output.quiet):
        loaded = problem.load()
    progress = measuring(max_hvps=measure.max_hvps, rtol=measure.rtol, quiet=output.quiet)
    with about(loaded.display), progress as on_progress:
        common = {**measure.kwargs(), "spec": loaded.display, "on_progress": on_progress}
        result: SpectrumResult | MomentsResult
        if shown.moments:
            common.pop("method")
            result = zoscope.moments(loaded.problem, **common)
        else:
            result = zoscope.spectrum(loaded.problem, top=shown.top, by_layer=shown.by_layer, **common)
    _show(result, output, plot=shown.plot)
    nonsmooth = [notice for notice in result.warnings if notice.code == PRECISION and measure.strict]
    warn((notice for notice in result.warnings if notice not in nonsmooth), quiet=output.quiet)
    if nonsmooth:  # after the result, which is honest all the same
        raise NumericalError(nonsmooth[0].message)


def _show(result: SpectrumResult | MomentsResult, output: OutputOptions, *, plot: Path | None) -> None:
    from zoscope.analysis.spectrum import MomentsResult  # late, for a fast --help
    from zoscope.report.spectrum import render, render_moments

    if isinstance(result, MomentsResult):
        emit(result, output, shown=render_moments(result, warnings=False))
        return
    emit(result, output, shown=render(result, warnings=False))
    if plot is not None:
        from zoscope.report.spectrum import draw

        draw(result, plot)
