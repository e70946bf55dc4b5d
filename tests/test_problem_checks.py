"""What cannot be measured is refused on entry, with the cause and the remedy."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import zoscope
from zoscope import NumericalError, Problem, SpecError

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def linear() -> nn.Linear:
    model = nn.Linear(3, 2, dtype=F64)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator(), dtype=F64))
    return model


X = torch.randn(8, 3, generator=generator(1), dtype=F64)
Y = torch.randn(8, 2, generator=generator(2), dtype=F64)


def refused(
    loss: Callable[[nn.Module, Any], Any], *, model: nn.Module | None = None, batches: Any = None, **options: Any
) -> SpecError:
    problem = Problem(model or linear(), [(X, Y)] if batches is None else batches, loss)
    with pytest.raises(SpecError) as caught, problem.prepare(device="cpu", **options):
        pass
    assert "\n" not in str(caught.value)
    return caught.value


def codes(
    loss: Callable[[nn.Module, Any], Any], *, model: nn.Module | None = None, batches: Any = None, **options: Any
) -> list[str]:
    problem = Problem(model or linear(), [(X, Y)] if batches is None else batches, loss)
    with problem.prepare(device="cpu", **options) as objective:
        return [notice.code for notice in objective.warnings]


def mean_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return functional.mse_loss(model(batch[0]), batch[1])


# --- scalar, floating, finite, with gradient ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda m, b: (m(b[0]) - b[1]).square().mean(1), r"shape \(8,\): expected a scalar"),
        (lambda m, b: mean_loss(m, b).reshape(1), r"shape \(1,\)"),
        (lambda m, b: (m(b[0]) > b[1]).sum(), "dtype int64"),
        (lambda m, b: mean_loss(m, b).item(), r"a float: .* without .item\(\)"),
        (lambda m, b: int(mean_loss(m, b)), "an int: .* a count has no curvature"),
        (lambda m, b: mean_loss(m, b).detach().numpy().reshape(1), r"a ndarray of shape \(1,\): .* end with .item\(\)"),
        (lambda m, b: None, "None: .* return statement"),
        (lambda m, b: mean_loss(m, b).to(torch.complex64), "dtype complex64"),
        (lambda m, b: mean_loss(m, b).detach(), "no gradient"),
        (lambda m, b: torch.no_grad()(mean_loss)(m, b), "no gradient"),
        (lambda m, b: b[1].mean().requires_grad_(), "no gradient"),
        (lambda m, b: mean_loss(linear(), b), "depends on none of the 2 selected"),
    ],
)
def test_a_loss_that_is_no_differentiable_scalar_is_refused(loss: Any, said: str) -> None:
    error = refused(loss)
    assert re.search(said, str(error))
    assert error.exit_code == 2


def test_a_model_output_object_is_refused_with_the_attribute_to_return() -> None:
    class Output:
        def __init__(self, loss: torch.Tensor) -> None:
            self.loss = loss

    assert "return its .loss" in str(refused(lambda m, b: Output(mean_loss(m, b))))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index", [0, 1])
def test_a_loss_that_is_not_finite_is_a_numerical_failure(bad: float, index: int) -> None:
    batches = [(X, Y), (X, Y)]
    batches[index] = (X, Y * bad)
    problem = Problem(linear(), batches, lambda m, b: (m(b[0]) - b[1]).mean())
    with pytest.raises(NumericalError, match=rf"The loss is (-?inf|nan) on batch {index} of 2") as caught:
        problem.prepare(device="cpu").__enter__()
    assert caught.value.exit_code == 3
    assert "This batch holds NaN or infinity" in str(caught.value)


def test_a_loss_that_is_not_finite_is_traced_to_the_parameters_or_to_itself() -> None:
    model = linear()
    with torch.no_grad():
        model.bias.fill_(math.nan)
    with pytest.raises(NumericalError, match="holds NaN or infinity in bias: look at the checkpoint"):
        Problem(model, [(X, Y)], mean_loss).prepare(device="cpu").__enter__()
    with pytest.raises(NumericalError, match="Parameters and data are finite: look at logarithms"):
        Problem(linear(), [(X, Y)], lambda m, b: mean_loss(m, b) * math.nan).prepare(device="cpu").__enter__()


def test_a_gradient_that_is_not_finite_is_a_numerical_failure() -> None:
    problem = Problem.from_function(lambda x: x.square().sum().sqrt(), torch.zeros(3))
    with pytest.raises(NumericalError, match="finite but its gradient is not, for x"):
        problem.prepare(device="cpu").__enter__()


def test_a_loss_without_derivatives_is_fine_where_none_are_taken() -> None:
    problem = Problem.from_function(lambda x: x.detach().square().sum(), torch.ones(3))
    with problem.prepare(device="cpu", differentiable=False) as objective:
        assert objective.value() == 3


def test_unused_parameters_are_counted() -> None:
    model = nn.ModuleDict({"used": linear(), "spare": nn.Linear(5, 4, dtype=F64)})
    problem = Problem(model, [(X, Y)], lambda m, b: mean_loss(m["used"], b))
    with problem.prepare(device="cpu") as objective:
        (notice,) = objective.warnings
    assert notice.code == "unused-parameters"
    assert notice.message.startswith("2 of 4 parameter tensors (24 of 32 numbers: spare.weight, spare.bias)")


# --- the user's own errors ------------------------------------------------------------------------------------------


def test_an_error_in_the_loss_shows_the_users_line() -> None:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch[0] @ torch.ones(5, 5)).mean()

    error = refused(loss)
    assert "The loss function raised RuntimeError: " in str(error)
    assert "(test_problem_checks.py, line" in str(error)
    assert "return model(batch[0] @ torch.ones(5, 5)).mean()" in error.frame
    assert str(Path(zoscope.__file__).parent) not in error.frame  # the clone may be called zoscope, too


def test_a_loss_with_other_arguments_says_how_it_is_called() -> None:
    assert "called as loss(model, batch)" in str(refused(lambda batch: batch))


def test_a_tensor_of_another_dtype_names_the_remedy() -> None:
    fixed = torch.ones(3, 3)
    assert "--dtype" in str(refused(lambda m, b: mean_loss(m, (b[0] @ fixed, b[1]))))


# --- determinism ----------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self, layer: nn.Module, width: int = 3) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 2)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layer(x)
        return self.head(out[0] if isinstance(out, tuple) else out)


class DropPath(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (torch.rand(len(x), 1) > 0.5) if self.training else x


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, x, x)


def unsettled_spectral_norm() -> nn.Module:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
    with torch.no_grad():  # new values: the power iteration starts over
        layer.parametrizations.weight.original.copy_(torch.randn(3, 3, generator=generator()))
    return layer


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (nn.Dropout(0.3), "Dropout 'layer' (p=0.3)"),
        (nn.Sequential(nn.Tanh(), nn.AlphaDropout(0.1)), "AlphaDropout 'layer.1'"),
        (nn.LSTM(3, 3, num_layers=2, dropout=0.5), "LSTM 'layer' (dropout=0.5 between its layers)"),
        (SelfAttention(3, 1, dropout=0.2), "SelfAttention 'layer' (dropout=0.2"),
        (nn.TransformerEncoderLayer(3, 1, 4), "'layer.self_attn'"),
        (nn.RReLU(), "RReLU 'layer' (random slopes)"),
        (DropPath(), "DropPath 'layer' (stochastic depth)"),
        (unsettled_spectral_norm(), "_SpectralNorm"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_random_layer_in_train_mode_is_named(layer: nn.Module, said: str) -> None:
    model = Noisy(layer).train()
    text = str(refused(mean_loss, model=model))
    assert said in text
    assert "model.eval()" in text
    assert codes(mean_loss, model=model.eval()) == []


def test_functional_randomness_is_recognised_by_the_numbers_it_draws() -> None:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return mean_loss(model, (functional.dropout(batch[0], 0.2), batch[1]))

    model = linear()
    assert "as a functional dropout does. Call model.eval()" in str(refused(loss, model=model.train()))
    assert "outside of the loss" in str(refused(loss, model=model.eval()))


def test_a_loss_with_a_memory_is_refused() -> None:
    calls: list[int] = []

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        calls.append(1)
        return mean_loss(model, batch) * len(calls)

    assert "keeps state from one call to the next" in str(refused(loss))


def test_a_loss_that_calls_eval_or_seeds_itself_is_deterministic() -> None:
    def evaluating(model: nn.Module, batch: Any) -> torch.Tensor:
        return mean_loss(model.eval(), batch)

    def seeding(model: nn.Module, batch: Any) -> torch.Tensor:
        torch.manual_seed(0)
        return mean_loss(model.train(), batch)

    for loss in (evaluating, seeding):
        assert codes(loss, model=Noisy(nn.Dropout(0.5)).train()) == []


# --- means over examples --------------------------------------------------------------------------------------------


def summed(model: nn.Module, batch: Any) -> torch.Tensor:
    return (model(batch[0]) - batch[1]).square().sum()


def contrastive(model: nn.Module, batch: Any) -> torch.Tensor:
    z = model(batch[0])
    return functional.cross_entropy(z @ z.T, torch.arange(len(z)))


def test_a_sum_over_examples_is_noticed() -> None:
    assert codes(summed) == ["sum-reduced"]
    assert codes(mean_loss) == []
    assert codes(summed, batches=[(X[:1], Y[:1])]) == []


def test_a_sum_says_by_how_much_its_step_sizes_differ() -> None:
    with Problem(linear(), [(X, Y)], summed).prepare(device="cpu") as objective:
        assert f"are {len(X)} times as large" in objective.warnings[0].message


@pytest.mark.parametrize("options", [{"weight": torch.tensor([1.0, 30.0])}, {"ignore_index": 0}])
def test_means_that_weigh_classes_are_noticed_over_several_batches(options: dict[str, Any]) -> None:
    x, y = torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 1, 0])
    criterion = nn.CrossEntropyLoss(**options)
    for batches, expected in ([(x, y)], []), ([(x[:3], y[:3]), (x[3:], y[3:])], ["not-a-mean"]):
        with Problem.from_criterion(linear(), batches, criterion).prepare(device="cpu") as objective:
            assert [notice.code for notice in objective.warnings] == expected


def test_batch_norm_in_train_mode_is_noticed() -> None:
    model = nn.Sequential(linear(), nn.BatchNorm1d(2))
    for mode, expected in (True, ["batch-statistics"]), (False, []):
        with Problem(model.train(mode), [(X, Y)], mean_loss).prepare(device="cpu") as objective:
            assert [notice.code for notice in objective.warnings] == expected


def test_a_mean_with_a_penalty_is_still_a_mean() -> None:
    assert codes(lambda m, b: mean_loss(m, b) + m.weight.square().sum()) == []


@pytest.mark.parametrize("loss", [summed, contrastive])
def test_micro_batches_of_a_loss_that_ties_examples_are_refused(loss: Any) -> None:
    assert "changes the function that is measured" in str(refused(loss, micro_batch=4))
    with Problem(linear(), [(X, Y)], loss).prepare(device="cpu") as objective:
        assert not objective.refine()


def test_a_mean_over_tokens_is_noticed_and_batch_size_of_repairs_it() -> None:
    weights = torch.tensor([0.7, 1, 1, 1, 1, 1, 1, 1], dtype=F64)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        x, y, w = batch
        return ((model(x) - y).square().mean(1) * w).sum() / w.sum()

    batch = (X, Y, weights)
    assert codes(loss, batches=[batch], micro_batch=4) == ["not-a-mean"]
    counts = (10 * weights).round().to(torch.int64)
    problem = Problem(
        linear(),
        [(X, Y, weights, counts)],
        lambda m, b: loss(m, b[:3]),
        batch_size_of=lambda b: int(b[3].sum()),
    )
    with problem.prepare(device="cpu", micro_batch=4) as objective:
        assert objective.warnings == []
        assert objective.value() == pytest.approx(loss(objective.model, batch).item(), rel=1e-14)


# --- batch normalisation --------------------------------------------------------------------------------------------


def test_train_mode_batch_norm_with_several_shards_is_refused() -> None:
    model = Noisy(nn.BatchNorm1d(3)).train()
    said = str(refused(mean_loss, model=model, micro_batch=4))
    assert "BatchNorm1d 'layer' normalises with the statistics of each batch" in said
    assert "model.eval()" in said
    refused(mean_loss, model=model, batches=[(X[:4], Y[:4]), (X[4:], Y[4:])])
    refused(mean_loss, model=Noisy(nn.BatchNorm1d(3, track_running_stats=False)).eval(), micro_batch=4)


def test_train_mode_batch_norm_with_one_batch_is_measured_and_never_cut() -> None:
    with Problem(Noisy(nn.BatchNorm1d(3)).train(), [(X, Y)], mean_loss).prepare(device="cpu") as objective:
        assert not objective.refine()
        assert [notice.code for notice in objective.warnings] == ["batch-statistics"]


def test_eval_mode_batch_norm_may_be_cut() -> None:
    assert codes(mean_loss, model=Noisy(nn.BatchNorm1d(3)).eval(), micro_batch=3) == []


# --- memory ---------------------------------------------------------------------------------------------------------


def hungry(limit: int) -> Callable[[nn.Module, Any], torch.Tensor]:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        if len(batch[0]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return mean_loss(model, batch)

    return loss


def test_out_of_memory_on_entry_halves_the_micro_batch() -> None:
    with Problem(linear(), [(X, Y)], hungry(2)).prepare(device="cpu") as objective:
        assert {shard.examples for shard in objective.shards} == {2}
        assert objective.warnings[0].message == "Memory ran out: the micro-batch was reduced to 2 examples."


def test_out_of_memory_for_one_example_is_a_numerical_failure() -> None:
    problem = Problem(linear(), [(X, Y)], hungry(0))
    with pytest.raises(NumericalError, match="a single example does not fit"):
        problem.prepare(device="cpu").__enter__()
