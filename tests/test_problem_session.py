"""A session works on the user's model and gives it back unchanged."""

import copy
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import zoscope
from zoscope import Problem, SpecError
from zoscope.problem import Objective

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator(), dtype=F64))
    return model


def data(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 3, generator=generator(1), dtype=F64), torch.randn(n, 2, generator=generator(2), dtype=F64)


def problem_of(model: nn.Module, **options: Any) -> Problem:
    return Problem.from_criterion(model, data(), nn.MSELoss(), **options)


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "identity": [id(p) for p in (*model.parameters(), *model.buffers())],
        "modules": [id(module) for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "dtypes": [p.dtype for p in model.parameters()],
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name]), name
    for key in ("modes", "requires_grad", "identity", "modules", "hooks", "dtypes"):
        assert before[key] == after[key], key
    assert all(a is b for a, b in zip(before["grads"], after["grads"], strict=True))


def misuse(objective: Objective) -> None:
    """Everything that a session, or the user's loss in it, may do to the model."""
    objective.write(torch.ones(objective.num_params, dtype=objective.dtype))
    objective.model.eval()
    sum(objective.loss(shard) for shard in objective.shards).backward()
    torch.rand(3)
    np.random.rand()  # noqa: NPY002
    random.random()


@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"check": False}], ids=["in place", "copy", "unchecked"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("raising", [True, False])
def test_the_callers_model_comes_back_unchanged(options: dict[str, Any], training: bool, raising: bool) -> None:
    model = network().train(training)
    model[3].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = state_of(model)
    rng = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    try:
        with problem_of(model, params="weight|3.bias").prepare(device="cpu", **options) as objective:
            misuse(objective)
            if raising:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert_unchanged(model, before)
    assert model[0].weight.grad.eq(1).all()
    assert torch.equal(rng[0], torch.get_rng_state())
    assert (rng[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert rng[2] == random.getstate()


def test_a_refused_problem_leaves_the_model_unchanged_too() -> None:
    model = network().train()
    before = state_of(model)
    with pytest.raises(SpecError), problem_of(model, batch_size=4).prepare(device="cpu"):
        pass
    assert_unchanged(model, before)


def test_graphs_that_the_caller_holds_survive_a_session() -> None:
    model = network().eval()
    x, y = data()
    loss = nn.functional.mse_loss(model(x), y)
    with problem_of(model).prepare(device="cpu") as objective:
        objective.value()
    loss.backward()
    assert model[0].weight.grad is not None


def test_the_model_is_used_in_place_where_it_fits_and_copied_where_not() -> None:
    model = network().eval()
    with problem_of(model).prepare(device="cpu") as objective:
        assert objective.model is model
        assert objective.dtype == F64
    with problem_of(model).prepare(device="cpu", dtype="float32") as objective:
        assert objective.model is not model
        assert objective.read().dtype == torch.float32
        assert objective.shards[0].batch[0].dtype == torch.float32


def test_integer_tensors_keep_their_type_in_a_copy() -> None:
    model = nn.Linear(3, 2)
    batch = (torch.zeros(4, 3), torch.tensor([0, 1, 1, 0]))
    with Problem.from_criterion(model, [batch], nn.CrossEntropyLoss()).prepare(
        device="cpu", dtype="float64"
    ) as objective:
        assert objective.shards[0].batch[1].dtype == torch.int64
        assert objective.value() > 0


def test_the_tensors_of_a_criterion_move_along() -> None:
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))
    batch = (torch.randn(4, 3, generator=generator()), torch.tensor([0, 1, 0, 1]))
    problem = Problem.from_criterion(nn.Linear(3, 2), [batch], criterion)
    with problem.prepare(device="cpu", dtype="float64") as objective:
        assert objective.loss(objective.shards[0]).dtype == F64
    assert criterion.weight is not None
    assert criterion.weight.dtype == torch.float32


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_measured_in_a_float32_copy(half: torch.dtype) -> None:
    model = nn.Linear(3, 2).to(half)
    problem = Problem.from_criterion(model, (torch.ones(4, 3, dtype=half), torch.ones(4, 2, dtype=half)), nn.MSELoss())
    with problem.prepare(device="cpu") as objective:
        assert objective.dtype == torch.float32
        assert [notice.code for notice in objective.warnings] == ["upcast"]
    assert model.weight.dtype == half
    for dtype in (half, "own"):
        with problem.prepare(device="cpu", dtype=dtype) as objective:
            assert objective.dtype == torch.float32
            expected = "upcast" if dtype == "own" else "half-precision"
            assert [notice.code for notice in objective.warnings] == [expected]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use", ["trains", "evaluates"])
def test_steps_and_forward_passes_keep_half_precision(half: torch.dtype, use: str) -> None:
    model = nn.Linear(3, 2).to(half)
    problem = Problem.from_criterion(model, (torch.ones(4, 3, dtype=half), torch.ones(4, 2, dtype=half)), nn.MSELoss())
    with problem.prepare(device="cpu", dtype=half, trains=use == "trains", differentiable=use == "trains") as objective:
        assert objective.model is model
        assert objective.dtype == half
        assert not objective.warnings


def test_a_model_that_cannot_be_copied_is_refused_with_the_remedy() -> None:
    model = nn.Linear(3, 2)
    model.register_buffer("stream", None)
    model.source = (item for item in range(3))
    problem = Problem.from_criterion(model, (torch.ones(4, 3), torch.ones(4, 2)), nn.MSELoss())
    with pytest.raises(SpecError, match="Linear cannot be copied to cpu in float64"), problem.prepare(dtype="float64"):
        pass


def test_the_gradient_mode_of_the_caller_does_not_matter() -> None:
    expected = None
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context(), problem_of(network().eval()).prepare(device="cpu") as objective:
            loss = objective.loss(objective.shards[0])
            gradient = objective.flatten(torch.autograd.grad(loss, objective.params))
        expected = gradient if expected is None else expected
        assert torch.equal(gradient, expected)


def test_scripted_modules_are_measured() -> None:
    inner = network().eval()
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        model = torch.jit.script(inner)
    x, y = data()
    for dtype in ("float64", "float32"):
        with problem_of(model).prepare(device="cpu", dtype=dtype) as objective:
            assert objective.value() == pytest.approx(nn.functional.mse_loss(inner(x), y).item(), rel=1e-5)


# --- the flat vector ----------------------------------------------------------------------------------------------


def test_read_and_write_are_inverse_and_copy() -> None:
    with problem_of(network().eval()).prepare(device="cpu") as objective:
        start, vector = objective.read(), torch.arange(objective.num_params, dtype=F64)
        objective.write(vector)
        vector.zero_()
        assert objective.read().tolist() == list(range(objective.num_params))
        objective.write(start)
        assert torch.equal(objective.read(), start)


def test_unflatten_gives_views_and_flatten_takes_none_for_zeros() -> None:
    with problem_of(network().eval()).prepare(device="cpu") as objective:
        vector = torch.arange(objective.num_params, dtype=F64)
        parts = objective.unflatten(vector)
        assert [part.shape for part in parts] == [p.shape for p in objective.params]
        assert all(part.untyped_storage().data_ptr() == vector.untyped_storage().data_ptr() for part in parts)
        row = torch.empty(2, objective.num_params, dtype=F64)
        objective.flatten([None, *parts[1:]], out=row[1])
        first = parts[0].numel()
        assert row[1, :first].eq(0).all()
        assert torch.equal(row[1, first:], vector[first:])


def test_writing_between_a_gradient_and_its_derivative_is_an_error_not_a_wrong_number() -> None:
    with problem_of(network().eval()).prepare(device="cpu") as objective:
        loss = objective.loss(objective.shards[0])
        gradient = objective.flatten(torch.autograd.grad(loss, objective.params, create_graph=True))
        objective.write(objective.read() + 1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(gradient.sum(), objective.params)


def test_loss_at_is_the_loss_with_other_parameters() -> None:
    with problem_of(network().eval()).prepare(device="cpu") as objective:
        shard, vector = objective.shards[0], objective.read() * 0.5
        at = objective.loss_at(objective.unflatten(vector), shard)
        objective.write(vector)
        assert at.item() == objective.loss(shard).item()


# --- tied weights -------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, tie: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.double()
        with torch.no_grad():
            self.first.weight.copy_(torch.randn(3, 3, generator=generator(), dtype=F64))
        tie(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def same_object(model: Any) -> None:
    model.second.weight = model.first.weight


def same_storage(model: Any) -> None:
    model.second.weight = nn.Parameter(model.first.weight.data)


def same_storage_by_data(model: Any) -> None:
    model.second.weight.data = model.first.weight.data


def same_module(model: Any) -> None:
    model.second = model.first


@pytest.mark.parametrize("tie", [same_object, same_storage, same_storage_by_data, same_module])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_tied_weights_count_once_and_get_the_whole_gradient(tie: Any, dtype: str) -> None:
    x = torch.randn(5, 3, generator=generator(1), dtype=F64)
    model = Tied(tie)
    before = state_of(model)
    problem = Problem(model, [x], lambda m, b: m(b).square().mean())

    def f(w: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ w.T).matmul(w.T).square().mean()

    weight = model.first.weight.detach()
    expected = torch.autograd.functional.jacobian(f, weight)
    with problem.prepare(device="cpu", dtype=dtype) as objective:
        assert objective.names == ("first.weight",)
        assert objective.num_params == problem.num_params == 9
        gradient = torch.autograd.grad(objective.loss(objective.shards[0]), objective.params)[0]
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5 if dtype == "float32" else 1e-12, atol=1e-7)
        at = objective.loss_at([2 * objective.params[0].detach()], objective.shards[0])
        assert at.item() == pytest.approx(f(2 * weight).item(), rel=1e-5)
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert model.second.weight.data_ptr() == model.first.weight.data_ptr()
    assert_unchanged(model, before)


def test_parameters_that_overlap_in_other_shapes_are_refused() -> None:
    def transpose(model: Any) -> None:
        model.second.weight = nn.Parameter(model.first.weight.data.t())

    problem = Problem(Tied(transpose), [torch.ones(2, 3, dtype=F64)], lambda m, b: m(b).square().mean())
    with pytest.raises(SpecError, match=r"'first.weight' and 'second.weight' share memory"):
        _ = problem.num_params


def test_parts_of_one_flat_buffer_are_independent_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    flat = torch.randn(12, generator=generator())
    offset = 0
    for p in model.parameters():
        p.data = flat[offset : offset + p.numel()].view(p.shape)
        offset += p.numel()
    assert Problem(model, [torch.ones(3, 2)], lambda m, b: m(b).square().mean()).num_params == 12


# --- wrappers -----------------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@pytest.fixture
def process_group(tmp_path: Any) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def assert_unwrapped(model: nn.Module, expected: float) -> None:
    before = state_of(model)
    for dtype in ("float64", "float32"):
        with problem_of(model).prepare(device="cpu", dtype=dtype) as objective:
            assert not any("_orig_mod" in n or "module." in n for n in objective.names)
            kinds = {type(module).__name__ for module in objective.model.modules()}
            assert not kinds & {"OptimizedModule", "DistributedDataParallel", "DataParallel"}
            assert objective.value() == pytest.approx(expected, rel=1e-5)
    assert_unchanged(model, before)


def test_compiled_modules_are_unwrapped_at_every_depth() -> None:
    inner = network().eval()
    x, y = data()
    expected = nn.functional.mse_loss(inner(x), y).item()
    assert_unwrapped(torch.compile(copy.deepcopy(inner)), expected)
    assert_unwrapped(Wrapper(torch.compile(copy.deepcopy(inner))), expected)
    assert_unwrapped(torch.compile(Wrapper(torch.compile(copy.deepcopy(inner)))), expected)


def test_parallel_modules_are_unwrapped_at_every_depth(process_group: None) -> None:
    inner = network().eval()
    x, y = data()
    expected = nn.functional.mse_loss(inner(x), y).item()
    parallel = nn.parallel.DistributedDataParallel
    assert_unwrapped(parallel(copy.deepcopy(inner)), expected)
    assert_unwrapped(Wrapper(parallel(copy.deepcopy(inner))), expected)
    assert_unwrapped(nn.DataParallel(copy.deepcopy(inner)), expected)


def test_sharded_models_are_refused(process_group: None) -> None:
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(network().eval(), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(SpecError, match=r"sharded.*not supported"), problem_of(model).prepare(device="cpu"):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_loss_with_tensors_of_its_own_falls_back_to_their_device() -> None:
    scale = torch.tensor([2.0, 1.0, 0.5], dtype=F64)
    problem = Problem(network().eval(), data(), lambda m, b: (m(b[0] * scale) - b[1]).square().mean())
    with problem.prepare() as objective:
        assert objective.device.type == "cpu"
        assert "device" in [notice.code for notice in objective.warnings]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_is_used_and_its_generator_restored() -> None:
    model = network().eval()
    state = torch.cuda.get_rng_state()
    with problem_of(model).prepare(dtype="float32") as objective:
        assert objective.device.type == "cuda"
        torch.rand(3, device="cuda")
        on_gpu = objective.value()
    with problem_of(model).prepare(device="cpu") as objective:
        assert on_gpu == pytest.approx(objective.value(), rel=1e-5)
    assert torch.equal(state, torch.cuda.get_rng_state())


def test_threads_measure_one_problem_one_after_the_other() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    problem = Problem.from_criterion(model, [(torch.randn(8, 4), torch.randn(8, 2))], nn.MSELoss())

    def switches() -> tuple[Any, ...]:
        backends: Any = torch.backends
        return backends.mkldnn.matmul.fp32_precision, backends.mha.get_fastpath_enabled(), torch.get_num_threads()

    def trace(_: int) -> float:
        return zoscope.bounds(problem, optimizers=["gd"], curvature="forward", device="cpu").forward.trace.value

    before, alone = switches(), trace(0)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(trace, range(6))) == [alone] * 6
    assert switches() == before
