"""Graphs that are kept, and batches taken in pieces."""

import pytest
import torch
from torch import nn

import zoscope
from zoscope.curvature import graphs
from zoscope.curvature.hvp import shard_products
from zoscope.curvature.operators import HessianOperator


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


def test_a_large_batch_is_taken_in_pieces_where_that_is_faster(monkeypatch):
    monkeypatch.setattr(graphs, "PIECE_BYTES", 600)
    monkeypatch.setattr("zoscope.curvature.operators.PAYS", float("inf"))
    made = counted(monkeypatch)
    with problem().prepare() as objective:
        operator, v = HessianOperator(objective), torch.randn(2, objective.num_params)
        found = operator.matmat(v)
        assert made[0] == 24
        assert len(made) > 3
        assert sum(made[1:]) == 24
        whole = shard_products(objective, objective.shards[0], method="double-backward")(v)
        assert torch.allclose(found, whole, rtol=1e-4, atol=1e-6)
        assert torch.equal(operator.matmat(v), found)
        assert sum(made) == 48  # and kept


def test_a_slower_way_is_not_taken(monkeypatch):
    monkeypatch.setattr(graphs, "PIECE_BYTES", 600)
    monkeypatch.setattr("zoscope.curvature.operators.PAYS", 0.0)
    made = counted(monkeypatch)
    with problem().prepare() as objective:
        operator, v = HessianOperator(objective), torch.randn(2, objective.num_params)
        operator.matmat(v)
        operator.matmat(v)
    assert made[-1] == 24
    assert made.count(24) == 2


def test_a_batch_that_cannot_be_cut_stays_whole(monkeypatch):
    monkeypatch.setattr(graphs, "PIECE_BYTES", 600)
    with problem(flat=True).prepare() as objective:
        assert graphs.smaller_pieces(objective) is None
        HessianOperator(objective).matmat(torch.randn(2, objective.num_params))


def test_small_graphs_are_left_alone():
    with problem().prepare() as objective:
        assert graphs.smaller_pieces(objective) is None
