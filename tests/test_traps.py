"""Second-derivative traps of PyTorch: each either works in a prepared session, or is refused with its remedy.

The oracle is a central difference of gradients in float64.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from zoscope import NumericalError, Problem, SpecError, runtime
from zoscope.problem import Objective

F64 = torch.float64


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=F64)


def gradient(objective: Objective, *, create_graph: bool = False) -> Tensor:
    loss = sum(shard.weight * objective.loss(shard) for shard in objective.shards)
    assert isinstance(loss, Tensor)
    grads = torch.autograd.grad(loss, objective.params, create_graph=create_graph, allow_unused=True)
    return objective.flatten(grads)


def hvp(objective: Objective, vector: Tensor) -> Tensor:
    """Double backward."""
    product = gradient(objective, create_graph=True) @ vector.to(objective.dtype)
    return objective.flatten(torch.autograd.grad(product, objective.params, allow_unused=True, materialize_grads=True))


def difference(objective: Objective, vector: Tensor) -> Tensor:
    """``(g(x + h v) - g(x - h v)) / 2h``; the step balances rounding against the third derivative."""
    x, h = objective.read(), 1e-5
    objective.write(x + h * vector)
    above = gradient(objective)
    objective.write(x - h * vector)
    below = gradient(objective)
    objective.write(x)
    return (above - below) / (2 * h)


def assert_differentiable_twice(problem: Problem) -> None:
    with problem.prepare(device="cpu") as objective:
        assert objective.dtype == F64
        vector = normal(objective.num_params, seed=5)
        expected = difference(objective, vector)
        assert expected.norm() > 0
        torch.testing.assert_close(hvp(objective, vector), expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


def squares(model: nn.Module, batch: Any) -> Tensor:
    out = model(batch)
    return (out[0] if isinstance(out, tuple) else out).square().mean()


# --- attention ----------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.qkv, self.options = nn.Linear(4, 12, dtype=F64), options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
        return functional.scaled_dot_product_attention(q, k, v, **self.options)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}])
def test_scaled_dot_product_attention_is_differentiated_twice(options: Any) -> None:
    assert_differentiable_twice(Problem(Attention(**options), [normal(2, 5, 4)], squares))


@pytest.mark.parametrize("training", [True, False])
def test_transformer_encoder_layers_are_differentiated_twice(training: bool) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, activation="gelu", dtype=F64)
    encoder = nn.TransformerEncoder(layer, 2).train(training)
    assert_differentiable_twice(Problem(encoder, [normal(3, 5, 4)], squares))


def test_an_encoder_in_eval_mode_gives_one_value_with_and_without_gradients() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    with Problem(nn.TransformerEncoder(layer, 2).eval(), [normal(3, 5, 4)], squares).prepare(device="cpu") as objective:
        assert objective.value() == objective.loss(objective.shards[0]).item()


def test_a_language_model_of_transformers_is_differentiated_twice() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=17, n_positions=8, n_embd=8, n_layer=2, n_head=2, attn_implementation="sdpa", use_cache=False
    )
    model = transformers.GPT2LMHeadModel(config).double().eval()
    ids = torch.randint(0, 17, (3, 6), generator=generator())
    batch = transformers.BatchEncoding({"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)})

    def loss(model: nn.Module, batch: Any) -> Tensor:  # in float64 throughout: the model's own loss is in float32
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    assert_differentiable_twice(Problem(model, [batch], loss, params=r"h\.0|wte"))


# --- recurrent layers ---------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("training", [True, False])
def test_recurrent_layers_are_differentiated_twice(kind: Any, training: bool) -> None:
    layer = kind(3, 4, num_layers=2, batch_first=True, bidirectional=True, dtype=F64).train(training)
    assert_differentiable_twice(Problem(layer, [normal(2, 5, 3)], squares))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("training", [True, False])
def test_recurrent_layers_and_attention_are_differentiated_twice_on_cuda(training: bool) -> None:
    recurrent = nn.LSTM(3, 4, num_layers=2, batch_first=True, dtype=F64).train(training)
    attention = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, dtype=F64).train(training)
    for model, x in ((recurrent, normal(2, 5, 3)), (attention, normal(2, 5, 4))):
        problem = Problem(model, [x], squares)
        with problem.prepare(device="cpu") as objective:
            vector = normal(objective.num_params, seed=5)
            expected = hvp(objective, vector)
        with problem.prepare(device="cuda") as objective:
            torch.testing.assert_close(hvp(objective, vector.cuda()).cpu(), expected, rtol=1e-8, atol=1e-10)


# --- batch normalisation, randomness ------------------------------------------------


def normalised() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()).double()


def test_train_mode_batch_norm_is_differentiated_twice_and_its_statistics_stay() -> None:
    model = normalised().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert_differentiable_twice(Problem(model, [normal(6, 3)], squares))
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    assert model[1].num_batches_tracked == 0


def test_a_kept_gradient_graph_outlives_later_forward_passes_of_train_mode_batch_norm() -> None:
    with Problem(normalised().train(), [normal(6, 3)], squares).prepare(device="cpu") as objective:
        vector = normal(objective.num_params, seed=5)
        kept = gradient(objective, create_graph=True)
        objective.value()
        late = objective.flatten(torch.autograd.grad(kept @ vector, objective.params))
        assert torch.equal(late, hvp(objective, vector))


def test_dropout_in_train_mode_is_refused_and_in_eval_mode_differentiated() -> None:
    model = nn.Sequential(nn.Linear(3, 4, dtype=F64), nn.Tanh(), nn.Dropout(0.5))
    with pytest.raises(SpecError, match=r"Dropout '2' \(p=0.5\) is active in train mode. Call model.eval\(\)"):
        Problem(model, [normal(6, 3)], squares).prepare(device="cpu").__enter__()
    assert_differentiable_twice(Problem(model.eval(), [normal(6, 3)], squares))


# --- parameters without an effect ---------------------------------------------------


def test_unused_and_linear_parameters_have_zero_curvature() -> None:
    model = nn.ParameterDict({"used": torch.ones(2), "linear": torch.ones(2), "spare": torch.ones(3)}).double()
    problem = Problem(model, [None], lambda m, _: (m["used"] ** 2).sum() + m["linear"].sum())
    with problem.prepare(device="cpu") as objective:
        product = hvp(objective, torch.ones(7, dtype=F64))
        assert dict(zip(objective.names, objective.unflatten(product), strict=True))["used"].tolist() == [2, 2]
        assert product.sum() == 4
        assert [notice.code for notice in objective.warnings] == ["unused-parameters"]


def test_sparse_gradients_of_embeddings_are_dense_here() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True, dtype=F64), nn.Tanh(), nn.Linear(3, 2, dtype=F64))
    assert_differentiable_twice(Problem(model, [torch.tensor([[0, 1], [3, 3]])], squares))
    assert model[0].sparse


def test_a_fully_linear_loss_is_accepted() -> None:
    with Problem.from_function(lambda x: x.sum(), torch.ones(3, dtype=F64)).prepare() as objective:
        assert objective.value() == 3
        assert objective.warnings == []


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3, dtype=F64), nn.Tanh(), nn.Linear(3, 3, dtype=F64))
    model[2].weight = model[0].weight
    problem = Problem(model, [normal(4, 3)], squares)
    assert problem.num_params == 9 + 3 + 3
    assert_differentiable_twice(problem)


def test_the_trace_of_ragged_batches_is_that_of_all_examples() -> None:
    x = normal(7, 1)
    whole = 2 * x.square().mean().item()
    for batches in ([x], [x[:4], x[4:]], [x[:1], x[1:]]):
        problem = Problem(nn.Linear(1, 1, bias=False, dtype=F64), batches, squares)
        with problem.prepare(device="cpu") as objective:
            assert hvp(objective, torch.ones(1, dtype=F64)).item() == pytest.approx(whole, rel=1e-12)


# --- tensors and wrappers -----------------------------------------------------------


def test_inference_tensors_are_cloned_on_entry() -> None:
    with torch.inference_mode():
        x, model = normal(4, 3), nn.Linear(3, 2, dtype=F64)
    assert_differentiable_twice(Problem(nn.Linear(3, 2, dtype=F64), [{"x": x}], lambda m, b: squares(m, b["x"])))
    assert_differentiable_twice(Problem(model, [x], squares))
    assert model.weight.is_inference()


def test_compiled_modules_and_losses_are_differentiated_twice() -> None:
    plain = nn.Sequential(nn.Linear(3, 4, dtype=F64), nn.Tanh())
    assert_differentiable_twice(Problem(torch.compile(plain, backend="aot_eager"), [normal(4, 3)], squares))
    in_place = nn.Sequential(nn.Linear(3, 4, dtype=F64), nn.Tanh())
    in_place.compile(backend="aot_eager")
    assert_differentiable_twice(Problem(in_place, [normal(4, 3)], squares))
    with Problem(in_place, [normal(4, 3)], squares).prepare(device="cpu", dtype="float32") as objective:
        assert hvp(objective, normal(objective.num_params)).isfinite().all()
    compiled_loss = torch.compile(squares, backend="aot_eager")
    assert_differentiable_twice(Problem(plain, [normal(4, 3)], compiled_loss))


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = nn.Sequential(nn.Linear(3, 4, dtype=F64), nn.Tanh()), reentrant
        self.input_requires_grad = True

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_() if self.input_requires_grad and not x.requires_grad else x
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def test_activation_checkpointing_works_unless_reentrant() -> None:
    assert_differentiable_twice(Problem(Checkpointed(reentrant=False), [normal(4, 3)], squares))
    inner = Checkpointed(reentrant=True)
    behind, before = nn.Linear(3, 3, dtype=F64), nn.Linear(4, 2, dtype=F64)
    for model in (inner, nn.Sequential(behind, inner), nn.Sequential(inner, before)):
        for inner.input_requires_grad in (True, False):
            with pytest.raises(SpecError, match=r"use_reentrant=False.*--curvature forward"):
                Problem(model, [normal(4, 3)], squares).prepare(device="cpu").__enter__()


# --- operations without a second derivative -----------------------------------------


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].cos()


def ctc(x: Tensor) -> Tensor:
    log_probs = torch.stack([x, 2 * x], 0).reshape(2, 1, -1).log_softmax(-1)
    return functional.ctc_loss(log_probs, torch.tensor([[1]]), torch.tensor([2]), torch.tensor([1]))


def bag(x: Tensor) -> Tensor:
    return functional.embedding_bag(torch.tensor([[0, 1]]), x).square().sum()


def distances(x: Tensor) -> Tensor:
    return torch.cdist(x[None], x[None] + 1).square().sum()


@pytest.mark.parametrize("f", [distances, ctc, bag])
def test_an_operation_without_double_backward_is_explained(f: Any) -> None:
    problem = Problem.from_function(f, torch.linspace(0.1, 0.9, 6, dtype=F64).reshape(3, 2))
    with problem.prepare() as objective, pytest.raises(RuntimeError) as caught:
        hvp(objective, torch.ones(6, dtype=F64))
    assert "--curvature forward" in (runtime.explain_autograd_error(caught.value) or "")


def test_a_custom_function_that_is_once_differentiable_is_refused_rather_than_taken_for_linear() -> None:
    problem = Problem.from_function(lambda x: OnceOnly.apply(x).square().sum(), torch.ones(3))
    with pytest.raises(SpecError, match=r"once_differentiable: .*--curvature forward"):
        problem.prepare().__enter__()
    with problem.prepare(differentiable=False) as objective:
        assert objective.value() > 0


def test_errors_of_other_kinds_are_not_explained() -> None:
    assert runtime.explain_autograd_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert runtime.explain_autograd_error(ValueError("derivative for aten::x is not implemented")) is None


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        (
            "derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward is not implemented",
            "attn_implementation",
        ),
        (
            "derivative for aten::_scaled_dot_product_efficient_attention_backward is not implemented",
            "attn_implementation",
        ),
        (
            "the derivative for '_cudnn_rnn_backward' is not implemented. Double backwards is not supported",
            "cudnn.flags",
        ),
        ("derivative for aten::mkldnn_rnn_layer_backward is not implemented", "double-backward"),
        ("torch.compile with aot_autograd does not currently support double backward", "uncompiled"),
        ("When use_reentrant=True, torch.utils.checkpoint is incompatible with .grad()", "use_reentrant=False"),
        ("trying to differentiate twice a function that was marked with @once_differentiable", "second derivative"),
        (
            "one of the variables needed for gradient computation has been modified by an inplace operation",
            "out of place",
        ),
        ("Inference tensors cannot be saved for backward. To work around", "clone"),
    ],
)
def test_known_messages_of_torch_have_a_remedy(message: str, remedy: str) -> None:
    assert remedy in (runtime.explain_autograd_error(RuntimeError(message)) or "")


# --- precision ----------------------------------------------------------------------


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_measured_in_float32_by_default(half: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).to(half)
    problem = Problem(model, [normal(4, 3).to(half)], squares)
    with problem.prepare(device="cpu") as objective:
        vector = normal(objective.num_params, seed=5)
        single = hvp(objective, vector)
        assert single.dtype == torch.float32
    with problem.prepare(device="cpu", dtype="float64") as objective:
        exact = hvp(objective, vector)
    assert (single - exact).norm() < 1e-5 * exact.norm()
    assert {p.dtype for p in model.parameters()} == {half}


def test_float16_overflow_names_the_remedy() -> None:
    problem = Problem.from_function(lambda x: (1e4 * x).square().sum(), torch.ones(3, dtype=torch.float16))
    with problem.prepare() as objective:
        assert math.isfinite(objective.value())
    with pytest.raises(NumericalError, match="use --dtype float32"):
        problem.prepare(dtype="float16", trains=True).__enter__()
