"""``zoscope bounds``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import zoscope
from zoscope.cli.options import Given, takes_options
from zoscope.cli.output import about, emit, illustrate, measuring
from zoscope.errors import NumericalError, UsageError

if TYPE_CHECKING:
    from zoscope.analysis.estimate import CostEstimate
    from zoscope.spec import LoadedSpec

PRECISION = "precision"  # code of the notice that --rtol was not reached


@takes_options("bounds")
def command(given: Given) -> None:
    """Curvature and step-size bounds for GD, GDM and Adam, first- and zeroth-order."""
    for option in ("plot", "html"):
        if given.estimate and getattr(given, option) is not None:
            raise UsageError(f"--estimate with --{option}: of costs there is no picture. Leave out one of the two.")
    loaded = given.load()
    if given.estimate:
        costs = _estimate(loaded, given)
        emit(costs, given.out)
        if given.strict and costs.short is not None:
            raise NumericalError(costs.short)
        return
    progress = measuring(max_hvps=given.max_hvps, rtol=given.rtol, quiet=given.quiet)
    with about(loaded.display), progress as on_progress:
        result = zoscope.bounds(
            loaded.problem,
            optimizers=given.families,
            spec=loaded.display,
            on_progress=on_progress,
            **given.keywords("bounds", "strict"),
        )
    missed = [notice for notice in result.warnings if notice.code == PRECISION and given.strict]
    emit(result, given.out, [notice for notice in result.warnings if notice not in missed])
    illustrate(result, given)
    if missed:  # after the result, which is honest all the same
        raise NumericalError(missed[0].message)


def _estimate(loaded: LoadedSpec, given: Given) -> CostEstimate:
    from zoscope.analysis.estimate import estimate  # late, for a fast --help

    every = () if "curvature" in given.said else ("curvature",)  # kinds are compared unless one is named
    options = given.keywords("bounds", "strict", *every)
    return estimate(loaded.problem, optimizers=given.families, spec=loaded.display, **options)
