"""``zoscope spectrum``."""

from __future__ import annotations

import zoscope
from zoscope.cli.options import Given, takes_options
from zoscope.cli.output import about, emit, illustrate, measuring
from zoscope.errors import NumericalError, UsageError

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
    loaded = given.load()
    progress = measuring(max_hvps=given.max_hvps, rtol=given.rtol, quiet=given.quiet)
    with about(loaded.display), progress as on_progress:
        verb = zoscope.moments if given.moments else zoscope.spectrum
        options = given.keywords(verb.__name__, "strict")
        result = verb(loaded.problem, spec=loaded.display, on_progress=on_progress, **options)
    nonsmooth = [notice for notice in result.warnings if notice.code == PRECISION and given.strict]
    emit(result, given.out, [notice for notice in result.warnings if notice not in nonsmooth])
    illustrate(result, given)
    if nonsmooth:  # after the result, which is honest all the same
        raise NumericalError(nonsmooth[0].message)
