"""What a user hands over: batches of every kind, weights, parameters."""

import collections
import dataclasses
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from zoscope import Problem, SpecError, UsageError
from zoscope.problem import pytree as nest

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(inputs: int = 3) -> nn.Linear:
    model = nn.Linear(inputs, 1, dtype=F64)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator(), dtype=F64))
    return model


def pairs(n: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    g = generator(1)
    return torch.randn(n, 3, generator=g, dtype=F64), torch.randn(n, 1, generator=g, dtype=F64)


def squared(model: nn.Module, batch: Any) -> torch.Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


def value_of(problem: Problem, **options: Any) -> float:
    with problem.prepare(device="cpu", **options) as objective:
        return objective.value()


WHOLE = squared(linear(), pairs()).item()


@pytest.mark.parametrize("batch_size", [None, 1, 3, 4, 10, 100])
def test_a_tensor_pair_weighs_its_ragged_last_batch_by_examples(batch_size: int | None) -> None:
    problem = Problem(linear(), pairs(), squared, batch_size=batch_size)
    assert problem.num_examples == 10
    assert value_of(problem) == pytest.approx(WHOLE, rel=1e-14)


def test_every_kind_of_batches_gives_the_same_loss() -> None:
    x, y = pairs()
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    listed = [(x[:4], y[:4]), [x[4:8], y[4:8]], (x[8:], y[8:])]
    for batches in (loader, listed, tuple(map(tuple, listed)), (item for item in listed), iter(loader)):
        assert value_of(Problem(linear(), batches, squared)) == pytest.approx(WHOLE, rel=1e-14)


def test_dict_batches_keep_their_type() -> None:
    transformers = pytest.importorskip("transformers")
    x, y = pairs()
    for kind in (dict, collections.UserDict, collections.OrderedDict, transformers.BatchEncoding):
        seen = []

        def loss(model: nn.Module, batch: Any, seen: list[Any] = seen) -> torch.Tensor:
            seen.append(type(batch))
            return squared(model, (batch["x"], batch["y"]))

        batches = [kind({"x": x[:7], "y": y[:7]}), kind({"x": x[7:], "y": y[7:]})]
        assert value_of(Problem(linear(), batches, loss), micro_batch=2) == pytest.approx(WHOLE, rel=1e-14)
        assert set(seen) == {kind}


def test_one_dict_of_tensors_is_a_dataset() -> None:
    x, y = pairs()
    problem = Problem(linear(), {"x": x, "y": y}, lambda m, b: squared(m, (b["x"], b["y"])), batch_size=4)
    assert [len(batch["x"]) for batch in problem.batches] == [4, 4, 2]
    assert value_of(problem) == pytest.approx(WHOLE, rel=1e-14)


def test_a_one_shot_iterator_is_read_once() -> None:
    x, y = pairs()
    problem = Problem(linear(), ((x[i : i + 1], y[i : i + 1]) for i in range(10)), squared)
    assert value_of(problem) == value_of(problem)
    assert problem.num_examples == 10


def test_problems_with_other_params_share_a_one_shot_iterator() -> None:
    x, y = pairs()
    problem = Problem(linear(), iter([(x, y)]), squared)
    twin = problem.with_params("bias")
    assert value_of(problem) == value_of(twin) == pytest.approx(WHOLE, rel=1e-14)


def test_a_list_of_tensors_is_told_from_a_pair() -> None:
    with pytest.raises(SpecError, match="pass a tuple"):
        value_of(Problem.from_criterion(linear(), list(pairs()), nn.MSELoss()))


@pytest.mark.parametrize("kind", [dict, collections.UserDict, list])
@pytest.mark.parametrize("options", [{}, {"micro_batch": 2}])
def test_a_loss_may_take_things_out_of_its_batch(kind: type, options: dict[str, int]) -> None:
    x, y = torch.randn(6, 2), torch.randn(6, 1)
    batch = [x, y] if kind is list else kind(x=x, y=y)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        targets = batch.pop(1) if kind is list else batch.pop("y")
        return nn.functional.mse_loss(model(batch[0] if kind is list else batch["x"]), targets)

    model = nn.Linear(2, 1)
    with Problem(model, [batch], loss).prepare(device="cpu", **options) as objective:
        assert objective.value() == pytest.approx(float(nn.functional.mse_loss(model(x), y).detach()))
        objective.gradient()
    assert len(batch) == 2


def test_batches_of_anything_count_as_one_example_each() -> None:
    problem = Problem(linear(), ["a", "bc"], lambda model, batch: model.weight.square().sum() * len(batch))
    assert problem.counts == [1, 1]
    assert value_of(problem) == pytest.approx(1.5 * linear().weight.square().sum().item(), rel=1e-14)


def test_batch_size_of_sets_the_weights() -> None:
    x, y = pairs()
    batches = [{"x": x[:2].T.contiguous(), "y": y[:2], "n": 2}, {"x": x[2:].T.contiguous(), "y": y[2:], "n": 8}]
    problem = Problem(linear(), batches, lambda m, b: squared(m, (b["x"].T, b["y"])), batch_size_of=lambda b: b["n"])
    assert value_of(problem) == pytest.approx(WHOLE, rel=1e-14)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "many", None])
def test_batch_size_of_must_return_a_positive_integer(wrong: Any) -> None:
    with pytest.raises(SpecError, match=r"holds|batch_size_of returned"):
        _ = Problem(linear(), [pairs()], squared, batch_size_of=lambda b: wrong).counts


@pytest.mark.parametrize("empty", [[], (), iter([]), DataLoader([], batch_size=2)])
def test_empty_batches_are_refused(empty: Any) -> None:
    with pytest.raises(SpecError, match="batches is empty"):
        _ = Problem(linear(), empty, squared).batches


def test_a_batch_of_zero_examples_is_refused() -> None:
    x, y = pairs()
    with pytest.raises(SpecError, match="Batch 1 of 2 holds 0 examples"):
        _ = Problem(linear(), [(x, y), (x[:0], y[:0])], squared).counts
    with pytest.raises(SpecError, match=r"0 examples|no examples"):
        _ = Problem(linear(), (x[:0], y[:0]), squared, batch_size=2).counts


def test_a_shuffling_loader_is_refused_with_the_remedy() -> None:
    loader = DataLoader(TensorDataset(*pairs()), batch_size=4, shuffle=True)
    with pytest.raises(SpecError, match=r"sampler shuffles.*shuffle=False.*list\(loader\)"):
        _ = Problem(linear(), loader, squared).batches
    assert len(Problem(linear(), list(loader), squared).batches) == 3


def test_an_augmenting_loader_is_refused() -> None:
    x, y = pairs()

    def collate(items: list[Any]) -> Any:
        inputs, targets = torch.utils.data.default_collate(items)
        return inputs + torch.randn_like(inputs), targets

    with pytest.raises(SpecError, match="augments at random"):
        _ = Problem(linear(), DataLoader(TensorDataset(x, y), batch_size=4, collate_fn=collate), squared).batches


def test_reading_a_loader_leaves_generators_alone() -> None:
    own = generator(3)
    loader = DataLoader(TensorDataset(*pairs()), batch_size=4, generator=own)
    problem = Problem(linear(), loader, squared)
    before, mine = torch.get_rng_state(), own.get_state()
    _ = problem.batches
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(mine, own.get_state())


def test_a_loader_with_nan_is_not_taken_for_a_shuffling_one() -> None:
    x, y = pairs()
    x[0, 0] = torch.nan
    assert len(Problem(linear(), DataLoader(TensorDataset(x, y), batch_size=4), squared).batches) == 3


@pytest.mark.parametrize(
    ("batches", "options", "said"),
    [
        (TensorDataset(*pairs()), {}, "DataLoader"),
        (5, {}, "expected a list of batches"),
        ("data.csv", {}, "expected a list of batches"),
        ([pairs()], {"batch_size": 2}, "already are batches"),
        (pairs(), {"batch_size": 0}, "at least 1"),
        ((torch.zeros(3, 2), torch.zeros(4)), {}, "different lengths"),
    ],
)
def test_unusable_batches_are_refused_with_the_remedy(batches: Any, options: Any, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        _ = Problem(linear(), batches, squared, **options).batches


def test_an_error_while_iterating_shows_the_users_line() -> None:
    def broken() -> Any:
        yield pairs()
        raise OSError("disk gone")

    with pytest.raises(SpecError, match=r"OSError: disk gone \(test_problem.py, line \d+\)") as caught:
        _ = Problem(linear(), broken(), squared).batches
    assert 'raise OSError("disk gone")' in caught.value.frame


# --- micro-batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 7, 99])
def test_micro_batches_measure_the_same_loss_and_gradient(micro_batch: int) -> None:
    x, y = pairs()
    problem = Problem(linear(), [(x[:7], y[:7]), (x[7:], y[7:])], squared)
    with problem.prepare(device="cpu", micro_batch=micro_batch) as objective:
        assert max(shard.examples for shard in objective.shards) <= micro_batch or micro_batch == 99
        assert sum(shard.weight for shard in objective.shards) == pytest.approx(1, rel=1e-14)
        total = sum(shard.weight * objective.loss(shard) for shard in objective.shards)
        gradient = objective.flatten(torch.autograd.grad(total, objective.params))
        whole = objective.flatten(torch.autograd.grad(squared(objective.model, pairs()), objective.params))
    assert total.item() == pytest.approx(WHOLE, rel=1e-14)
    torch.testing.assert_close(gradient, whole, rtol=1e-13, atol=1e-14)


@dataclasses.dataclass
class Item:
    x: torch.Tensor
    names: list[str]
    scale: float = 2.0


Named = collections.namedtuple("Named", ["x", "y"])


def test_nests_of_every_kind_are_cut_along_their_examples() -> None:
    x = torch.arange(4)
    whole = {
        "tuple": (x, [x, x]),
        "named": Named(x, torch.tensor(7)),
        "data": Item(x, ["a", "b", "c", "d"]),
        "array": np.arange(8).reshape(4, 2),
        "shared": torch.ones(3, 3),
        "words": ["a", "b", "c", "d"],
        "size": 4,
    }
    first, second = nest.split(whole, [3, 1]) or pytest.fail("not cut")
    assert first["tuple"][1][0].tolist() == [0, 1, 2]
    assert second["named"] == Named(torch.tensor([3]), torch.tensor(7))
    assert second["data"].names == ["d"]
    assert second["data"].scale == 2.0
    assert second["array"].tolist() == [[6, 7]]
    assert second["shared"] is whole["shared"]
    assert second["words"] == ["d"]
    assert second["size"] == 4


def test_a_list_with_one_dict_per_example_is_cut() -> None:
    images, boxes = [torch.zeros(3, i) for i in (1, 2, 5)], [{"box": torch.zeros(i, 4)} for i in (0, 1, 7)]
    assert nest.split({"images": images, "targets": boxes}, [1, 2]) is not None


def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.zeros(3, 3, dtype=F64), torch.zeros(2, 3, dtype=F64)])
    for batch in (packed, "text", types.SimpleNamespace(x=1)):
        problem = Problem(linear(), [batch], lambda model, _: model.weight.square().sum())
        with pytest.raises(SpecError, match=r"--micro-batch 1: a batch of type \w+ cannot be cut"):
            value_of(problem, micro_batch=1)


def test_a_micro_batch_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match="--micro-batch 0"):
        value_of(Problem(linear(), pairs(), squared), micro_batch=0)


def test_refining_halves_down_to_single_examples() -> None:
    with Problem(linear(), pairs(), squared).prepare(device="cpu") as objective:
        sizes = [max(shard.examples for shard in objective.shards)]
        while objective.refine():
            sizes.append(max(shard.examples for shard in objective.shards))
            assert objective.value() == pytest.approx(WHOLE, rel=1e-14)
        assert sizes == [10, 5, 3, 2, 1]
        assert [notice.code for notice in objective.warnings] == ["out-of-memory"]


# --- parameters ---------------------------------------------------------------------------------------------------


def stack() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4, dtype=F64), nn.Linear(4, 1, dtype=F64))


def test_parameters_with_requires_grad_are_the_default() -> None:
    model = stack()
    model[0].requires_grad_(False)
    assert Problem(model, pairs(), squared).num_params == 5


def test_params_selects_by_name_frozen_ones_too() -> None:
    model = stack()
    model[0].requires_grad_(False)
    problem = Problem(model, pairs(), squared, params=r"^0\.")
    assert problem.num_params == 16
    assert problem.with_params("bias$").num_params == 5
    with problem.prepare(device="cpu") as objective:
        assert objective.names == ("0.weight", "0.bias")
        assert [p.requires_grad for p in model.parameters()] == [True, True, False, False]
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


def test_params_that_match_nothing_name_some() -> None:
    with pytest.raises(SpecError, match=r"'conv' matches no trainable parameter. The model has 0.weight, 0.bias"):
        _ = Problem(stack(), pairs(), squared, params="conv").num_params


def test_an_invalid_regular_expression_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="not a regular expression"):
        _ = Problem(stack(), pairs(), squared, params="(").num_params


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(SpecError, match=r"No parameter of the model .* has requires_grad=True"):
        _ = Problem(stack().requires_grad_(False), pairs(), squared).num_params
    with pytest.raises(SpecError, match="has no parameters"):
        _ = Problem(nn.ReLU(), pairs(), squared).num_params


def test_integer_parameters_are_never_selected() -> None:
    model = linear()
    model.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    assert Problem(model, pairs(), squared, params=".").num_params == 4
    with pytest.raises(SpecError, match="matches no trainable"):
        _ = Problem(model, pairs(), squared, params="codes").num_params


def test_complex_meta_and_lazy_parameters_are_refused() -> None:
    for model, said in (
        (nn.Linear(2, 2, dtype=torch.complex64), "complex"),
        (nn.Linear(2, 2, device="meta"), "meta device"),
        (nn.LazyLinear(2), "not initialised"),
    ):
        with pytest.raises(SpecError, match=said):
            _ = Problem(model, pairs(), squared).num_params


# --- constructors -------------------------------------------------------------------------------------------------


def test_from_criterion_is_the_criterion_of_the_outputs() -> None:
    criterion = nn.MSELoss()
    problem = Problem.from_criterion(linear(), pairs(), criterion, batch_size=4)
    assert value_of(problem) == pytest.approx(WHOLE, rel=1e-14)
    with problem.prepare(device="cpu") as objective:
        outputs, targets = objective.outputs(objective.shards[0])
        assert objective.criterion is criterion
        assert outputs.shape == targets.shape == (4, 1)


def test_from_criterion_refuses_batches_that_are_no_pairs() -> None:
    x, y = pairs()
    with pytest.raises(SpecError, match=r"tuple of 3 items.*pairs \(inputs, targets\)"):
        value_of(Problem.from_criterion(linear(), [(x, y, y)], nn.MSELoss()))


def test_from_function_needs_no_model_and_no_data() -> None:
    x0 = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=F64)
    problem = Problem.from_function(lambda x: (x**2).sum(), x0)
    assert problem.num_params == 4
    assert problem.num_examples == 1
    assert value_of(problem) == 30.0
    assert x0.tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Problem(nn.Linear, [], squared), "the class Linear"),
        (lambda: Problem(lambda x: x, [], squared), "from_function"),
        (lambda: Problem(linear(), [], "mse"), "expected a function loss"),
        (lambda: Problem.from_criterion(linear(), [], nn.MSELoss), "criterion"),
        (lambda: Problem.from_function(3, torch.zeros(2)), "expected a function"),
        (lambda: Problem.from_function(torch.sum, torch.zeros(2, dtype=torch.int64)), "floating-point"),
        (lambda: Problem.from_function(torch.sum, [0.0]), "floating-point"),
    ],
)
def test_wrong_arguments_are_refused_at_once(make: Any, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        make()


@pytest.mark.parametrize(("size_of", "said"), [(None, ["unknown-batch-size"]), (len, [])])
def test_batches_of_unknown_size_are_said_to_count_as_one_example(size_of: Any, said: list[str]) -> None:
    batches = [["a", "bb"], ["ccc"]]

    def loss(model: nn.Module, batch: list[str]) -> torch.Tensor:
        return torch.stack([(model.weight * len(word)).square().mean() for word in batch]).mean()

    with Problem(linear(), batches, loss, batch_size_of=size_of).prepare(device="cpu") as objective:
        assert objective.num_examples == (2 if size_of is None else 3)
        notices = {notice.code: notice.message for notice in objective.warnings}
        assert [code for code in notices if code == "unknown-batch-size"] == said
        assert all("2 of 2 batches (of type list) have no tensor" in notices[code] for code in said)


def test_a_problem_without_batches_is_not_told_of_their_size() -> None:
    with Problem.from_function(lambda x: x.square().sum(), torch.ones(3)).prepare(device="cpu") as objective:
        assert not objective.warnings
