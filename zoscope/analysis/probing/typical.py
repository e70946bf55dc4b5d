"""What a typical run does, as opposed to the mean square: replicas of the linear model in its eigenbasis."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from zoscope.optim.replicas import Estimator, Limits, run
from zoscope.optim.rules import GD, GDM
from zoscope.optim.surface import QuadraticSurface

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from zoscope.theory.curve import GradientMeasure
    from zoscope.theory.rules import UpdateRule
    from zoscope.theory.spectrum import Spectrum

REPLICAS = 32
MOST_MODES = 2048  # with more of them a typical run and the mean square agree
MOST_NUMBERS = 3e8  # normal variates: seconds
NEGLIGIBLE = 0.005  # share of the trace whose smallest eigenvalues are left out


def exit_steps(
    spectrum: Spectrum,
    gradient: GradientMeasure | None,
    *,
    rule: UpdateRule,
    estimator: Estimator,
    lr: float,
    loss: float,
    left: float,
    steps: int,
    seed: int,
) -> NDArray[np.float64] | None:
    """Steps at which replicas of the quadratic model leave the valley.

    Args:
        spectrum: Of the operator; the positive part counts.
        gradient: Spectral measure of the gradient.
        rule: Update rule.
        estimator: Source of the update.
        lr: Step size.
        loss: Loss at the start.
        left: Loss at which a replica has left.
        steps: Steps to run.
        seed: Seed of the directions.

    Returns:
        One number a replica, ascending, ``inf`` for those that stayed; ``None`` where there are so many modes that it
        is not needed.
    """
    eigenvalues = modes(spectrum)
    if gradient is None or not 0 < eigenvalues.size <= MOST_MODES:
        return None
    if eigenvalues.size * steps * REPLICAS * estimator.queries > MOST_NUMBERS:
        return None
    amplitudes = np.zeros_like(eigenvalues)
    nearest = np.abs(eigenvalues[None, :] - gradient.nodes[:, None]).argmin(axis=1)
    np.add.at(amplitudes, nearest, gradient.weights)
    scale = torch.from_numpy(eigenvalues)
    surface = QuadraticSurface(
        torch.zeros_like(scale),
        loss=loss,
        gradient=torch.from_numpy(np.sqrt(amplitudes)),
        matmat=lambda rows: rows * scale,
    )
    trajectory = run(
        surface,
        torch.zeros_like(scale),
        rule=GDM(beta=rule.momentum) if rule.momentum else GD(),
        estimator=estimator,
        lr=rule.lr_scale * lr,
        steps=steps,
        replicas=REPLICAS,
        seed=seed,
        together=True,
        limits=Limits(left=left),
    )
    return np.sort([math.inf if step is None else float(step) for step in trajectory.left])


def modes(spectrum: Spectrum) -> NDArray[np.float64]:
    """The positive part as a list of eigenvalues, descending, without the smallest that make up 0.5 % of the trace."""
    part = spectrum.positive
    order = np.argsort(part.nodes)[::-1]
    nodes, weights = part.nodes[order], part.weights[order]
    if nodes.size == 0:
        return nodes
    beyond = np.flatnonzero(np.cumsum(nodes * weights) > (1.0 - NEGLIGIBLE) * part.trace)
    kept = slice(0, max(int(beyond[0]), 1) if beyond.size else None)
    nodes, weights = nodes[kept], weights[kept]
    if weights.sum() > MOST_MODES:
        return np.repeat(nodes[:1], MOST_MODES + 1)
    # Extrapolated quadrature rules have negative weights here and there; their running sum is what counts.
    ends = np.maximum.accumulate(np.rint(np.cumsum(weights)).astype(int)).clip(min=0)
    return np.repeat(nodes, np.diff(ends, prepend=0))
