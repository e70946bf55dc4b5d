"""Mini-batches of a run."""

from collections import Counter

import pytest
import torch

from zoscope.analysis.track_loop import MiniBatches

from .problems import network


@pytest.fixture(params=[1, 3])
def objective(request):
    with network(batches=request.param).prepare() as prepared:
        yield prepared


def rows(batches, steps):
    return [tuple(row) for step in steps for shard in batches.shards(step) for row in shard.batch[0].tolist()]


def test_every_example_is_seen_once_in_an_epoch(objective):
    batches = MiniBatches(objective, batch_size=6, seed=0)
    for epoch in range(3):
        seen = Counter(rows(batches, range(4 * epoch, 4 * epoch + 4)))
        assert len(seen) == 24
        assert set(seen.values()) == {1}


def test_what_is_left_over_waits_for_the_next_epoch(objective):
    batches = MiniBatches(objective, batch_size=7, seed=0)
    seen = Counter(rows(batches, range(3)))
    assert len(seen) == 21
    assert len(set(rows(batches, range(30)))) == 24


def test_inputs_stay_with_their_targets(objective):
    whole = torch.cat([torch.cat(shard.batch, dim=1) for shard in objective.shards])
    known = {tuple(row) for row in whole.tolist()}
    batches = MiniBatches(objective, batch_size=5, seed=0)
    assert {tuple(row) for s in batches.shards(2) for row in torch.cat(s.batch, dim=1).tolist()} <= known


def test_any_step_can_be_asked_for_by_itself(objective):
    first, second = (MiniBatches(objective, batch_size=5, seed=3) for _ in range(2))
    for step in range(9):
        first.value(step)
    assert first.value(9) == second.value(9)


def test_epochs_and_seeds_have_orders_of_their_own(objective):
    batches = MiniBatches(objective, batch_size=6, seed=0)
    assert rows(batches, [0]) != rows(batches, [4])
    assert rows(batches, [0]) != rows(MiniBatches(objective, batch_size=6, seed=1), [0])


def test_value_and_gradient_are_of_the_same_examples(objective):
    batches = MiniBatches(objective, batch_size=6, seed=0)
    loss, gradient = batches.gradient(2)
    assert loss == pytest.approx(batches.value(2), rel=1e-6)
    with torch.no_grad():
        step = 1e-2 * gradient / gradient.norm()
        objective.write(objective.read() + step)
        above = batches.value(2)
        objective.write(objective.read() - 2 * step)
        below = batches.value(2)
    assert (above - below) / 2e-2 == pytest.approx(float(gradient.norm()), rel=1e-2)


def test_the_mean_over_an_epoch_is_the_loss_of_all(objective):
    batches = MiniBatches(objective, batch_size=6, seed=0)
    assert sum(batches.value(step) for step in range(4)) / 4 == pytest.approx(objective.value(), rel=1e-5)
