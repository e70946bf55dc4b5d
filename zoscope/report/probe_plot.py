"""The picture of a probe: loss and distance over steps, one colour a step size, predictions dashed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoscope.report.figures import COLOURS, gaps, new_figure, require_matplotlib, save

if TYPE_CHECKING:
    from zoscope.analysis.probing.results import ProbeResult
    from zoscope.analysis.probing.run_results import ProbeRun

STYLES = {"adaptive": ":"}


def draw(result: ProbeResult, path: Path) -> None:
    """Write the picture; its format follows the file name.

    Raises:
        UsageError: If matplotlib is not installed, does not know the format, or the file cannot be written.
    """
    require_matplotlib()
    figure: Any = new_figure(width=9, height=7)
    losses, distances = figure.subplots(2, 1, sharex=True)
    for run, colour in zip(result.runs, _colours(result.runs), strict=True):
        _draw_run(losses, distances, run, colour)
    losses.set_ylabel("loss")
    losses.axhline(result.problem.loss, color="0.8", linewidth=0.8, zorder=0)
    if all(value > 0 for run in result.runs for row in run.curves.losses for value in row if value is not None):
        losses.set_yscale("log")
    distances.set_ylabel("‖θ − θ₀‖²")
    distances.set_xlabel("step")
    distances.set_yscale("symlog", linthresh=1e-6)
    losses.legend(fontsize="small", frameon=False)
    figure.suptitle(f"{result.spec or 'problem'}, {result.optimizer}: {result.outcome}")
    save(figure, path)


def _colours(runs: tuple[ProbeRun, ...]) -> list[str]:
    lrs = sorted({run.lr for run in runs})
    return [COLOURS[lrs.index(run.lr) % len(COLOURS)] for run in runs]


def _draw_run(losses: Any, distances: Any, run: ProbeRun, colour: str) -> None:
    curves = run.curves
    style = STYLES.get(run.variant, "-")
    label = f"{run.ratio:.3g} × threshold{', adaptive P' if run.variant == 'adaptive' else ''}"
    for replica in range(run.replicas):
        column = [row[replica] for row in curves.losses]
        away = [row[replica] for row in curves.distances]
        losses.plot(curves.steps, gaps(column), style, color=colour, alpha=0.5, linewidth=0.9, label=label)
        distances.plot(curves.steps, gaps(away), style, color=colour, alpha=0.5, linewidth=0.9)
        label = "_nolegend_"
    if any(value is not None for value in curves.predicted):
        ceiling = 10.0 * abs(run.loss_start) + run.loss_start
        shown = [value if value is not None and value < ceiling else None for value in curves.predicted]
        losses.plot(curves.steps, gaps(shown), "--", color=colour, linewidth=1.8, label=f"{run.ratio:.3g} ×, predicted")
