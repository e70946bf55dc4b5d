"""``zoscope spectrum``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import zoscope
from zoscope.cli.options import Given, takes_options
from zoscope.cli.output import about, emit, illustrate, loading, measuring, warn
from zoscope.errors import NumericalError, UsageError

if TYPE_CHECKING:
    from zoscope.analysis.spectrum import MomentsResult, SpectrumResult

PRECISION = "precision"  # code of the notice that --rtol was not reached


@takes_options("spectrum")
def command(given: Given) -> None:
    """Eigenvalue density, largest and smallest eigenvalues, and the trace by layer."""
    unwanted = [name for name, wanted in (("--by-layer", given.by_layer), ("--plot", given.plot)) if wanted]
    if given.moments and unwanted:
        raise UsageError(
            f"--moments with {unwanted[0]}: trace, norm and λ_max alone are measured without the spectrum behind "
            f"them. Leave out one of the two."
        )
    with loading(quiet=given.quiet):
        loaded = given.load()
    progress = measuring(max_hvps=given.max_hvps, rtol=given.rtol, quiet=given.quiet)
    with about(loaded.display), progress as on_progress:
        verb = zoscope.moments if given.moments else zoscope.spectrum
        options = given.keywords(verb.__name__, "strict")
        result = verb(loaded.problem, spec=loaded.display, on_progress=on_progress, **options)
    _show(result, given)
    nonsmooth = [notice for notice in result.warnings if notice.code == PRECISION and given.strict]
    warn((notice for notice in result.warnings if notice not in nonsmooth), quiet=given.quiet)
    if nonsmooth:  # after the result, which is honest all the same
        raise NumericalError(nonsmooth[0].message)


def _show(result: SpectrumResult | MomentsResult, given: Given) -> None:
    from zoscope.analysis.spectrum import MomentsResult  # late, for a fast --help
    from zoscope.report.spectrum import render, render_moments

    if isinstance(result, MomentsResult):
        emit(result, given.out, shown=render_moments(result, warnings=False))
    else:
        emit(result, given.out, shown=render(result, warnings=False))
    illustrate(result, given)
