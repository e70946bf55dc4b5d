"""Random examples of a problem, whatever its batches are like."""

import pytest
import torch
from torch import nn

import zoscope
from zoscope.problem.objective import Examples


def generator():
    return torch.Generator().manual_seed(0)


def regression(sizes=(5, 3, 4)):
    stream = generator()
    model = nn.Linear(2, 1).double()
    batches = [
        (torch.randn(k, 2, generator=stream).double(), torch.randn(k, 1, generator=stream).double()) for k in sizes
    ]
    return zoscope.Problem.from_criterion(model, batches, nn.MSELoss())


def test_groups_partition_the_examples_and_average_to_the_whole_gradient():
    with regression().prepare(device="cpu") as objective:
        examples = Examples(objective)
        groups = examples.groups(4, generator())
        assert examples.count == 12
        assert [sum(shard.examples for shard in group) for group in groups] == [3, 3, 3, 3]
        mean = torch.stack([objective.gradient_of(group)[1] for group in groups]).mean(dim=0)
        torch.testing.assert_close(mean, objective.gradient()[1])


def test_there_are_no_more_groups_than_examples():
    with regression().prepare(device="cpu") as objective:
        groups = Examples(objective).groups(100, generator())
    rows = torch.cat([group[0].batch[0] for group in groups])
    assert len(groups) == 12
    assert len(rows.unique(dim=0)) == 12


def test_a_drawn_batch_is_joined_where_it_is_no_larger_than_a_batch_and_weighted_where_it_is():
    with regression().prepare(device="cpu") as objective:
        examples = Examples(objective)
        (small,) = examples.draw(4, generator())
        large = examples.draw(9, generator())
    assert (small.examples, small.weight) == (4, 1.0)
    assert sum(shard.examples for shard in large) == 9
    assert sum(shard.weight for shard in large) == pytest.approx(1.0)


def test_batches_padded_to_different_lengths_stay_apart_and_count_what_the_user_counts():
    model = nn.Embedding(7, 1)
    batches = [{"ids": torch.ones(3, 4, dtype=torch.long)}, {"ids": torch.ones(3, 6, dtype=torch.long)}]

    def loss(model, batch):
        return model(batch["ids"]).square().mean()

    problem = zoscope.Problem(model, batches, loss, batch_size_of=lambda batch: batch["ids"].numel())
    with problem.prepare(device="cpu") as objective:
        shards = Examples(objective).gather(torch.arange(1, 5).numpy())
    assert [shard.batch["ids"].shape for shard in shards] == [(2, 4), (2, 6)]
    assert [shard.weight for shard in shards] == pytest.approx([0.4, 0.6])


def test_batches_that_cannot_be_cut_are_taken_whole():
    model = nn.Linear(1, 1)
    problem = zoscope.Problem(model, [1.0, 2.0, 3.0], lambda model, batch: batch * model.weight.square().sum())
    with problem.prepare(device="cpu") as objective:
        examples = Examples(objective)
        assert examples.whole
        assert examples.count == 3
        assert len(examples.draw(1, generator())) == 1
