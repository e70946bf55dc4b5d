"""The measured mean path: what the quadratic model cannot know of a descent."""

import numpy as np
import pytest
import torch

import zoscope
from zoscope import probe
from zoscope.analysis.probe_prediction import flow_times, follow_gradient
from zoscope.theory.rules import update_rule


@pytest.fixture
def bowl():
    eigenvalues = torch.linspace(0.5, 1.5, 40, dtype=torch.float64)
    return zoscope.Problem.from_function(
        lambda x: 0.5 * eigenvalues @ x**2, torch.ones(40, dtype=torch.float64)
    ), eigenvalues


def test_on_a_quadratic_the_path_decays_as_the_eigenvalues_say(bowl):
    problem, eigenvalues = bowl
    with problem.prepare() as objective:
        before = objective.read()
        flow = follow_gradient(objective, until=0.5, sharpness=150.0)  # steps of 1/150: Euler's error is 1 %
        assert torch.equal(objective.read(), before)
    lam = eigenvalues.numpy()
    expected = 0.5 * lam @ np.exp(-2 * lam[:, None] * flow.times)
    np.testing.assert_allclose(flow.losses, expected, rtol=1e-2)
    np.testing.assert_allclose(flow.squares, lam**2 @ np.exp(-2 * lam[:, None] * flow.times), rtol=1e-2)


def test_a_preconditioner_is_the_metric_of_the_path(bowl):
    problem, eigenvalues = bowl
    with problem.prepare() as objective:
        flow = follow_gradient(objective, until=0.5, sharpness=100.0, diagonal=eigenvalues.clone())
    np.testing.assert_allclose(flow.losses, flow.losses[0] * np.exp(-2 * flow.times), rtol=1e-2)  # P⁻¹H = I
    assert flow.squares[0] == pytest.approx(float(eigenvalues.sum()))


def test_momentum_takes_its_time_and_then_goes_faster():
    plain = flow_times(lr=0.1, steps=200, rule=update_rule("gd"))
    heavy = flow_times(lr=0.1, steps=200, rule=update_rule("gdm", beta=0.9))
    assert heavy[1] == pytest.approx(plain[1])
    assert heavy[200] - heavy[199] == pytest.approx(10 * 0.1)
    assert heavy[0] == 0.0


def test_a_path_into_infinity_ends_before_it():
    problem = zoscope.Problem.from_function(lambda x: -x.square().square().sum(), torch.ones(3, dtype=torch.float64))
    with problem.prepare() as objective:
        flow = follow_gradient(objective, until=10.0, sharpness=1.0)
    assert np.isfinite(flow.losses).all()
    assert flow.mean_path(lr=1.0, steps=10, rule=update_rule("gd")) is None


def test_where_the_descent_bends_the_measured_path_predicts_it_and_the_quadratic_model_does_not():
    # √(1 + s²) along slow directions, whose curvature rises on the way down; 60 sharp ones bring the noise.
    sharp = torch.linspace(0.8, 1.2, 60, dtype=torch.float64)

    def loss(x):
        return 0.5 * sharp @ x[:60] ** 2 + 0.2 * torch.sqrt(1.0 + x[60:] ** 2).sum()

    start = torch.cat([torch.zeros(60, dtype=torch.float64), torch.full((20,), 1.0, dtype=torch.float64)])
    problem = zoscope.Problem.from_function(loss, start)
    run = probe(problem, ratios=(0.4,), steps=500, replicas=8, threshold="exact").runs[0]
    found = run.prediction
    assert abs(found.predicted_change - found.measured_change) < 4 * found.stderr + 0.03 * abs(found.measured_change)
    assert abs(found.quadratic_change / found.measured_change - 1) > 0.1
