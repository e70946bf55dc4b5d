"""What a loss or a training loop does besides: hooks on gradients, frozen parameters and batches written to."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from zoscope import NumericalError, Problem, SpecError
from zoscope.curvature.operators import HessianOperator
from zoscope.problem import pytree as nest

F64 = torch.float64


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, generator=generator, dtype=F64), torch.randn(8, 2, generator=generator, dtype=F64)


def squared(model: nn.Module, batch: Any) -> Tensor:
    return functional.mse_loss(model(batch[0]), batch[1])


def hessian(problem: Problem, **options: Any) -> tuple[Tensor, dict[str, str]]:
    with problem.prepare(device="cpu", **options) as objective:
        return HessianOperator(objective).dense(), {notice.code: notice.message for notice in objective.warnings}


# --- gradient hooks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"check": False}], ids=["checked", "unchecked"])
def test_gradient_hooks_do_not_act_on_the_curvature_and_are_put_back(options: dict[str, Any]) -> None:
    expected, said = hessian(Problem(network(), [data()], squared))
    assert "gradient-hooks" not in said
    model = network()
    handles = [model[0].weight.register_hook(lambda g: 0.1 * g), model[0].weight.register_hook(lambda g: g + 1)]
    hooks = model[0].weight._backward_hooks
    found, said = hessian(Problem(model, [data()], squared), **options)
    assert torch.equal(found, expected)
    assert "Gradients of 0.weight go through hooks" in said["gradient-hooks"]
    assert model[0].weight._backward_hooks is hooks
    bare = network()
    plain, *_ = torch.autograd.grad(squared(bare, data()), bare[0].weight)
    through, *_ = torch.autograd.grad(squared(model, data()), model[0].weight)
    torch.testing.assert_close(through, 0.1 * plain + 1)
    handles[1].remove()
    assert list(model[0].weight._backward_hooks) == [handles[0].id]


def test_hooks_of_a_graph_that_the_caller_holds_act_after_a_session() -> None:
    model = network()
    weight = model[0].weight
    before, *_ = torch.autograd.grad(squared(model, data()), weight)
    weight.register_hook(lambda g: 0.1 * g)
    loss = squared(model, data())
    hessian(Problem(model, [data()], squared))
    after, *_ = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(after, 0.1 * before)


def test_forward_passes_say_nothing_of_gradient_hooks() -> None:
    model = network()
    model[0].weight.register_hook(lambda g: 0.1 * g)
    with Problem(model, [data()], squared).prepare(device="cpu", differentiable=False) as objective:
        assert objective.warnings == []


# --- frozen parameters ----------------------------------------------------------------------------------------------


class Taught(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student = network()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        with torch.no_grad():
            for parameter in self.teacher.parameters():
                parameter.add_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x) - self.teacher(x)


def lerp(teacher: nn.Parameter, student: Tensor) -> None:
    teacher.lerp_(student, 1e-5)


def through_data(teacher: nn.Parameter, student: Tensor) -> None:
    teacher.data.mul_(1 - 1e-5).add_(student, alpha=1e-5)


def replaced(teacher: nn.Parameter, student: Tensor) -> None:
    teacher.data = (1 - 1e-5) * teacher.data + 1e-5 * student


def operator(teacher: nn.Parameter, student: Tensor) -> None:
    teacher *= 1 - 1e-5


def item(teacher: nn.Parameter, student: Tensor) -> None:
    teacher[0] = student[0]


def foreach(teacher: nn.Parameter, student: Tensor) -> None:
    torch._foreach_lerp_([teacher], [student], 1e-5)


def out(teacher: nn.Parameter, student: Tensor) -> None:
    torch.lerp(teacher, student, 1e-5, out=teacher)


@pytest.mark.parametrize("options", [{}, {"check": False}, {"differentiable": False}, {"max_memory": 1 << 40}])
@pytest.mark.parametrize("move", [lerp, through_data, replaced, operator, item, foreach, out])
def test_a_loss_that_moves_a_teacher_is_refused_and_the_teacher_put_back(move: Any, options: dict[str, Any]) -> None:
    model = Taught()
    before = copy.deepcopy(model.state_dict())

    def loss(model: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            for teacher, student in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
                move(teacher, student)
        return squared(model, batch)

    problem = Problem(model, [data()], loss)
    said = r"changes parameters .* \(teacher.0.weight, .* and 1 more\).* outside of the loss"
    with pytest.raises(SpecError, match=said), problem.prepare(device="cpu", **options) as objective:
        objective.value()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_frozen_parameters_are_copied_only_where_the_loss_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, copied = Taught(), []
    clone = Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda t, **how: copied.append(t.data_ptr()) or clone(t, **how))

    def loss(model: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            model.teacher[2].bias.add_(1).sub_(1)
            model.teacher[2].bias.copy_(torch.full((2,), 0.5))
        return squared(model, batch)

    with torch.no_grad():
        model.teacher[2].bias.fill_(0.5)
    with Problem(model, [data()], loss).prepare(device="cpu", differentiable=False):
        pass
    assert [parameter.data_ptr() in copied for parameter in model.teacher.parameters()] == [False, False, False, True]


# --- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("change", ["clamp", "where", "halve"])
def test_a_loss_may_write_into_its_batch(change: str, micro_batch: int | None) -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"]
        if change == "clamp":
            x.clamp_(-1, 1)
        elif change == "where":
            x[x > 1] = 1
        else:
            x.mul_(0.5)
        return squared(model, (x, batch["y"]))

    x, y = data()
    problem = Problem(network(), [{"x": x, "y": y}], loss)
    found, _ = hessian(problem, micro_batch=micro_batch)
    assert torch.equal(x, data()[0])
    seen = {"clamp": x.clamp(-1, 1), "where": x.clamp(max=1), "halve": 0.5 * x}[change]
    expected, _ = hessian(Problem(network(), [(seen, y)], squared))
    torch.testing.assert_close(found, expected)


def test_a_batch_that_is_only_read_is_copied_once() -> None:
    x, y = data()
    seen = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch[0].data_ptr())
        return squared(model, batch)

    hessian(Problem(network(), [(x, y)], loss))
    assert seen[0] != x.data_ptr()
    assert set(seen[1:]) <= {x.data_ptr(), x[4:].data_ptr()}


def test_copies_of_batches_keep_what_tensors_carry() -> None:
    x = torch.ones(3, requires_grad=True)
    x.mask = "of mine"
    packed = nn.utils.rnn.pack_sequence([torch.ones(2)])
    jagged = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged)
    batch = {"x": x, "of": [packed, jagged, "text"]}
    copied = nest.cloned(batch)
    assert copied["x"].is_leaf
    assert copied["x"].requires_grad
    assert copied["x"].mask == "of mine"
    before = nest.versions(copied)
    copied["of"][0].data.zero_()
    copied["of"][1].values().zero_()
    assert packed.data.all()
    assert jagged.values().all()
    assert nest.versions(copied)[1] != before[1]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_batch_of_nested_tensors_is_measured(layout: torch.layout) -> None:
    def batch() -> Tensor:
        torch.manual_seed(2)
        rows = [torch.randn(2, 3, dtype=F64), torch.randn(5, 3, dtype=F64)]
        return torch.nested.nested_tensor(rows, layout=layout)

    problem = Problem(network(), [batch()], lambda m, b: torch.stack([m(u).square().mean() for u in b.unbind()]).mean())
    assert problem.num_examples == 2
    assert torch.isfinite(hessian(problem)[0]).all()
    assert nest.same(batch(), batch())
    assert not nest.same(batch(), batch() * 2)
    assert not nest.same(batch(), torch.zeros(2, 3))
    assert nest.outlined(batch()) == "tensor 2 × …"


def test_a_loss_without_a_single_label_says_so() -> None:
    labels = torch.full((8,), -100)
    problem = Problem(network(), [(data()[0], labels)], lambda m, b: functional.cross_entropy(m(b[0]), b[1]))
    with pytest.raises(NumericalError, match="Every label of this batch is -100"):
        problem.prepare(device="cpu").__enter__()
