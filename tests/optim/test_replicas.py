import numpy as np
import pytest
import torch
from torch import nn

import zoscope
from zoscope import ZOGD
from zoscope.optim.perturbation import (
    MiniBatchSurface,
    SequentialSurface,
    StackedMiniBatchSurface,
    StackedSurface,
    choose_surface,
)
from zoscope.optim.replicas import Limits, ReplicaPlan, ZerothOrderEstimator, run, run_groups
from zoscope.optim.rules import GD, GDM, Adam


@pytest.fixture
def problem(net, batch):
    data = (batch[0].double(), batch[1].double())
    return zoscope.Problem.from_criterion(net.double(), [data], nn.MSELoss())


def trajectory(surface, start, *, together, rule=None, **options):
    settings = {"lr": 1e-2, "steps": 8, "replicas": 3, "seed": 0, "limits": Limits(), **options}
    estimator = settings.pop("estimator", ZerothOrderEstimator())
    return run(surface, start, ReplicaPlan(rule=rule or GD(), estimator=estimator, **settings), together=together)


@pytest.mark.parametrize("rule", [GD(), GDM(), Adam()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize(
    "estimator",
    [
        ZerothOrderEstimator(),
        ZerothOrderEstimator(queries=3, directions="sphere"),
        ZerothOrderEstimator(one_sided=True),
        ZerothOrderEstimator(order=1),
    ],
)
def test_replicas_are_the_same_together_and_in_turn(problem, rule, estimator):
    with problem.prepare() as objective:
        start = objective.read()
        one = trajectory(StackedSurface(objective), start, together=True, rule=rule, estimator=estimator)
        other = trajectory(SequentialSurface(objective), start, together=False, rule=rule, estimator=estimator)
    np.testing.assert_allclose(one.losses, other.losses, rtol=1e-7)
    np.testing.assert_allclose(one.distances, other.distances, rtol=1e-6, atol=1e-15)


def test_replicas_differ_and_a_stream_does_not_depend_on_their_number(problem):
    with problem.prepare() as objective:
        start, surface = objective.read(), SequentialSurface(objective)
        three = trajectory(surface, start, together=True)
        two = trajectory(surface, start, together=True, replicas=2)
    assert len(set(three.losses[-1])) == 3
    np.testing.assert_array_equal(three.losses[:, :2], two.losses)


def test_a_replica_takes_the_steps_of_the_public_optimizer(problem):
    child = np.random.SeedSequence(0).spawn(1)[0]
    with problem.prepare() as objective:
        start = objective.read()
        ran = trajectory(SequentialSurface(objective), start, together=True, replicas=1)
        objective.write(start)
        optimizer = ZOGD(objective.params, lr=1e-2, seed=child)
        for _ in range(8):
            optimizer.step(lambda: objective.value())
        trained = objective.read()
    # One normal draw over all parameters in both: the same directions.
    torch.testing.assert_close(ran.last[0], trained, rtol=1e-9, atol=1e-12)


def test_a_replica_that_leaves_is_infinite_from_there(problem):
    with problem.prepare() as objective:
        start = objective.read()
        ran = trajectory(SequentialSurface(objective), start, together=True, lr=1e3, limits=Limits(left=10.0))
    assert all(step is not None for step in ran.left)
    assert np.isinf(ran.losses[-1]).all()
    assert torch.isfinite(ran.last).all()


class Stubborn(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x * (1.0 if self.weight.sum().item() > 0 else 2.0) * self.weight  # data-dependent: vmap cannot


def test_a_model_that_vmap_refuses_runs_in_turn_with_the_reason():
    x = torch.ones(2, 3)
    problem = zoscope.Problem.from_criterion(Stubborn(), [(x, x)], nn.MSELoss())
    with problem.prepare() as objective:
        surface, why_not = choose_surface(objective, replicas=4, first_order=False)
        assert torch.equal(objective.read(), torch.ones(3))
    assert isinstance(surface, SequentialSurface)
    assert "vmap" in why_not


@pytest.mark.parametrize("layer", [nn.Linear(6, 3), nn.Linear(6, 40), nn.Conv1d(1, 3, 2)], ids=["thin", "wide", "conv"])
def test_stacked_losses_are_those_of_single_copies(layer):
    x = torch.randn(5, 1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    problem = zoscope.Problem(layer.double(), [x], lambda model, batch: model(batch).square().mean())
    with problem.prepare() as objective:
        rows = objective.read() + torch.linspace(0, 1, 4, dtype=torch.float64)[:, None]
        stacked, single = StackedSurface(objective).values(rows), SequentialSurface(objective).values(rows)
    torch.testing.assert_close(stacked, single, rtol=1e-12, atol=0.0)


def test_a_replica_sees_the_same_mini_batches_whichever_replicas_run_beside_it(problem):
    with problem.prepare() as objective:
        start, surface = objective.read(), MiniBatchSurface(objective, 2, seed=0)
        plan = ReplicaPlan(GD(), ZerothOrderEstimator(), lr=1e-2, steps=8, replicas=3, seed=0, limits=Limits())
        third = run_groups(surface, start, plan, groups=[[2]])[0]
        everyone = run(surface, start, plan, together=False)
    np.testing.assert_array_equal(third.losses[:, 0], everyone.losses[:, 2])
    assert len(set(everyone.losses[-1])) == 3


def test_mini_batches_are_the_same_together_and_in_turn(problem):
    with problem.prepare() as objective:
        start, chosen = objective.read(), {"replicas": 6, "chosen": (1, 5)}
        one = trajectory(StackedMiniBatchSurface(objective, 2, seed=0), start, together=True, **chosen)
        other = trajectory(MiniBatchSurface(objective, 2, seed=0), start, together=False, **chosen)
    np.testing.assert_allclose(one.losses, other.losses, rtol=1e-7)
    np.testing.assert_allclose(one.distances, other.distances, rtol=1e-6, atol=1e-15)


def test_all_queries_of_a_step_see_one_mini_batch(problem):
    with problem.prepare() as objective:
        surface, seen = MiniBatchSurface(objective, 2, seed=0), []
        value_of = objective.value_of
        objective.value_of = lambda shards: seen.append(shards) or value_of(shards)
        plan = ReplicaPlan(GD(), ZerothOrderEstimator(queries=3), lr=1e-2, steps=2, replicas=1, seed=0, limits=Limits())
        run(surface, objective.read(), plan, together=False)
    drawn = [shards for shards in seen if shards is not objective.shards]
    assert [id(shards) for shards in drawn] == [id(drawn[0])] * 6 + [id(drawn[6])] * 6
    assert drawn[0] is not drawn[6]
