"""Graphs that are kept, and batches taken in pieces."""

import pytest
import torch
from torch import nn

import zoscope
from zoscope.curvature import operators as graphs
from zoscope.curvature.operators import HessianOperator, shard_products


def problem(*, batches: int = 1, flat: bool = False) -> zoscope.Problem:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 3, generator=generator), torch.randint(4, (24, 2), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 8), nn.Unflatten(1, (4, 2)))

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        inputs, targets = batch
        if not flat:
            return nn.functional.cross_entropy(model(inputs), targets)
        return nn.functional.cross_entropy(model(inputs).movedim(1, 2).flatten(0, 1), targets)

    if flat:  # twice as many targets as inputs: such a batch cannot be cut
        return zoscope.Problem(model, [(x, y.flatten())], loss)
    return zoscope.Problem(model, list(zip(x.chunk(batches), y.chunk(batches), strict=True)), loss)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []

    def make(objective, shard, *, method):
        made.append(shard.rows)
        return shard_products(objective, shard, method=method)

    monkeypatch.setattr("zoscope.curvature.operators.shard_products", make)
    return made


def test_the_graphs_of_several_batches_serve_every_product(monkeypatch):
    made = counted(monkeypatch)
    with problem(batches=3).prepare() as objective:
        operator, v = HessianOperator(objective), torch.randn(2, objective.num_params)
        first = operator.matmat(v)
        assert made == [8] * 6  # three of the first product, three to see that it repeats
        assert torch.equal(operator.matmat(v), first)
        assert len(made) == 6


def test_graphs_that_do_not_fit_are_built_each_time(monkeypatch):
    made = counted(monkeypatch)
    monkeypatch.setattr(graphs, "KEPT_SHARE", -1.0)
    with problem(batches=3).prepare() as objective:
        operator, v = HessianOperator(objective), torch.randn(2, objective.num_params)
        first = operator.matmat(v)
        assert torch.equal(operator.matmat(v), first)
        assert made == [8] * 12


def test_moved_parameters_have_graphs_of_their_own():
    with problem(batches=3).prepare() as objective:
        operator, v = HessianOperator(objective), torch.randn(1, objective.num_params)
        here = operator.matmat(v)
        objective.write(objective.read() * 1.5)
        there = operator.matmat(v)
        fresh = HessianOperator(objective).matmat(v)
    assert not torch.allclose(here, there)
    assert torch.allclose(there, fresh)
