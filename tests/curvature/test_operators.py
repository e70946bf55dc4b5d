import pytest
import torch
from torch import nn

import zoscope
from zoscope import NumericalError, Problem, SpecError, UsageError
from zoscope.curvature.ggn import GGNOperator
from zoscope.curvature.operators import METHODS, DenseOperator, HessianOperator, Preconditioned, gradient


def network(*, activation=nn.Tanh):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 3)).double()


def data(examples=10):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(examples, 4, generator=generator).double(), torch.randint(0, 3, (examples,), generator=generator)


def classification(**options):
    return Problem.from_criterion(network(), data(), nn.CrossEntropyLoss(), **options)


def dense_hessian(problem):
    """Oracle: the Hessian of the loss over all data as torch.func computes it."""
    model, (x, y) = problem.model, data()
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def loss(flat):
        parts = torch.split(flat, [shape.numel() for shape in shapes])
        tensors = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, tensors, (x,)), y)

    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return torch.func.hessian(loss)(flat), torch.func.grad(loss)(flat)


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_every_method_gives_the_dense_hessian(method):
    problem = classification(batch_size=10)
    with problem.prepare(device="cpu") as objective:
        found = HessianOperator(objective, hvp=method).dense()
    torch.testing.assert_close(found, dense_hessian(problem)[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("method", "batch_size"), [*((method, 7) for method in METHODS), ("double-backward", 4)])
def test_ragged_batches_are_weighted_by_their_examples(method, batch_size):
    problem = classification(batch_size=batch_size)
    with problem.prepare(device="cpu") as objective:
        found = HessianOperator(objective, hvp=method).dense()
        loss, g = gradient(objective)
    hessian, expected = dense_hessian(problem)
    torch.testing.assert_close(found, hessian, atol=1e-12, rtol=0)
    torch.testing.assert_close(g, expected, atol=1e-12, rtol=0)
    assert loss == pytest.approx(float(nn.functional.cross_entropy(problem.model(data()[0]), data()[1])))


def test_gauss_newton_is_the_pull_back_of_the_criterion():
    problem = classification(batch_size=4)
    with problem.prepare(device="cpu") as objective:
        found = GGNOperator(objective).dense()
    model, (x, _) = problem.model, data()
    rows = []
    for output in model(x).reshape(-1):
        rows.append(
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(output, model.parameters(), retain_graph=True)])
        )
    jacobian = torch.stack(rows).view(10, 3, -1)
    p = torch.softmax(model(x), dim=1).detach()
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("ncd,nce,nef->df", jacobian, curvature, jacobian) / 10
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_gauss_newton_needs_a_criterion():
    problem = Problem(network(), [data()], lambda model, batch: model(batch[0]).square().mean())
    with problem.prepare(device="cpu") as objective, pytest.raises(UsageError, match="from_criterion"):
        GGNOperator(objective)


def test_gauss_newton_of_a_linear_criterion_is_zero():
    problem = Problem.from_criterion(network(), [data()], lambda out, y: out.mean())
    with problem.prepare(device="cpu") as objective:
        assert not GGNOperator(objective).dense().any()


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_loss_has_no_curvature(method):
    problem = Problem.from_function(lambda x: (3 * x).sum(), torch.ones(4))
    with problem.prepare(device="cpu") as objective:
        assert not HessianOperator(objective, hvp=method).matmat(torch.eye(4)).any()


@pytest.mark.parametrize("method", METHODS)
def test_parameters_that_enter_linearly_or_not_at_all_have_zero_rows(method):
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.curved, self.linear, self.unused = (nn.Parameter(torch.ones(2).double()) for _ in range(3))

    problem = Problem(Partly(), [torch.zeros(1)], lambda m, _: (m.curved**2).sum() + m.linear.sum())
    with problem.prepare(device="cpu") as objective:
        found = HessianOperator(objective, hvp=method).dense()
    torch.testing.assert_close(found, torch.diag(torch.tensor([2.0, 2, 0, 0, 0, 0])).double())


def test_preconditioning_scales_both_sides():
    matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double()
    p = torch.tensor([4.0, 9.0]).double()
    found = Preconditioned(DenseOperator(matrix), p)
    expected = torch.diag(p**-0.5) @ matrix @ torch.diag(p**-0.5)
    torch.testing.assert_close(found.matmat(torch.eye(2).double()), expected)
    torch.testing.assert_close(found.dense(), expected)


def test_products_are_counted():
    with classification(batch_size=10).prepare(device="cpu") as objective:
        operator = HessianOperator(objective)
        operator.matmat(torch.randn(3, operator.dim, generator=torch.Generator().manual_seed(0)).double())
        assert operator.num_hvps == 4  # and one to see that the answer repeats


def test_an_unknown_method_is_refused():
    with classification().prepare(device="cpu") as objective, pytest.raises(UsageError, match="double-backward"):
        HessianOperator(objective, hvp="magic")


class OnceDifferentiable(torch.autograd.Function):
    """exp with no double backward, but with a forward derivative, as some fused kernels have."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.exp()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * y


def test_a_loss_without_second_derivative_is_refused_with_the_way_out():
    problem = Problem.from_function(lambda x: OnceDifferentiable.apply(x).sum(), torch.ones(3))
    with pytest.raises(SpecError, match=r"--curvature forward"), problem.prepare(device="cpu") as objective:
        HessianOperator(objective).matmat(torch.eye(3))


def test_cdist_is_refused_with_the_way_out():
    def loss(x):
        points = x.view(4, 2)
        return torch.cdist(points, points + 1).sum()

    problem = Problem.from_function(loss, torch.arange(8.0))
    with pytest.raises(SpecError, match="--curvature forward"), problem.prepare(device="cpu") as objective:
        HessianOperator(objective).matmat(torch.eye(8))


def test_products_that_do_not_repeat_are_refused():
    noise = torch.Generator().manual_seed(0)

    def loss(x):
        return (x * x * torch.rand(3, generator=noise)).sum()

    problem = Problem.from_function(loss, torch.ones(3))
    with problem.prepare(device="cpu", check=False) as objective, pytest.raises(SpecError, match="two answers"):
        HessianOperator(objective).matmat(torch.eye(3))


class HalfDifferentiable(torch.autograd.Function):
    """x·y, whose backward keeps y from being differentiated."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, slope):
        x, y = ctx.saved_tensors
        return slope * y.detach(), slope * x


@pytest.mark.parametrize("measure", [zoscope.bounds, zoscope.spectrum, zoscope.moments])
def test_second_derivatives_that_are_not_symmetric_are_refused(measure):
    start = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    problem = Problem.from_function(lambda p: HalfDifferentiable.apply(p[:10], p[10:]).sin().sum(), start)
    with pytest.raises(SpecError, match=r"not symmetric .* use --curvature forward"):
        measure(problem)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_method_that_torch_has_wrong_is_refused(kind):
    torch.manual_seed(0)
    layer = kind(2, 3, batch_first=True).double()
    x = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    problem = Problem(layer, [x], lambda m, b: m(b)[0][:, -1].square().mean())
    with problem.prepare(device="cpu") as objective:
        vector = torch.ones(1, objective.num_params, dtype=torch.float64)
        with pytest.raises(SpecError, match=r"--hvp linearize gives other .* Leave --hvp out"):
            HessianOperator(objective, hvp="linearize").matmat(vector)
        assert torch.isfinite(HessianOperator(objective).matmat(vector)).all()


def test_the_faster_of_two_methods_is_taken_only_where_they_agree(monkeypatch):
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4, dtype=torch.float64))
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    problem = Problem(nn.Sequential(layer, nn.Tanh()), [x], lambda m, b: m(b).square().mean())
    clock = iter([0.0, 10.0, 10.0, 11.0])  # batched looks ten times faster
    monkeypatch.setattr("zoscope.curvature.operators._now", lambda device: next(clock))
    with problem.prepare(device="cpu") as objective:
        vectors = torch.eye(objective.num_params, dtype=torch.float64)
        expected = HessianOperator(objective, hvp="double-backward").matmat(vectors)
        operator = HessianOperator(objective)
        operator._checked = True  # as on a GPU, where no method is chosen before a block comes
        assert torch.allclose(operator.matmat(vectors), expected)
        assert operator.hvp == "double-backward"


def test_running_out_of_memory_halves_the_micro_batch_and_goes_on(monkeypatch):
    problem = classification(batch_size=10)
    with problem.prepare(device="cpu") as objective:
        whole, ordinary = objective.shards[0].examples, objective.loss

        def small_only(shard):
            if shard.examples > 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return ordinary(shard)

        monkeypatch.setattr(objective, "loss", small_only)
        found = HessianOperator(objective).dense()
        assert whole == 10
        assert max(shard.examples for shard in objective.shards) <= 3
        assert any(notice.code == "out-of-memory" for notice in objective.warnings)
    torch.testing.assert_close(found, dense_hessian(problem)[0], atol=1e-12, rtol=0)


def test_memory_too_small_for_one_example_is_a_numerical_failure(monkeypatch):
    with classification(batch_size=10).prepare(device="cpu") as objective:

        def never(shard):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        monkeypatch.setattr(objective, "loss", never)
        with pytest.raises(NumericalError, match="Memory ran out"):
            HessianOperator(objective).matmat(torch.eye(objective.num_params).double())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_hessian_on_the_gpu_is_that_on_the_cpu():
    problem = classification(batch_size=4)
    with problem.prepare(device="cuda") as objective:
        found = HessianOperator(objective).dense().cpu()
    torch.testing.assert_close(found, dense_hessian(problem)[0], atol=1e-10, rtol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_squared_error_is_linearized(reduction, weighted):
    # torch's own mse_loss ends the process there.
    target = torch.arange(6.0).view(3, 2).double()
    weight = 1 + target if weighted else None

    def loss(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(x.sin(), target, reduction=reduction, weight=weight).sum()

    problem = Problem.from_function(loss, torch.ones(3, 2).double())
    with problem.prepare(device="cpu") as objective:
        found = HessianOperator(objective, hvp="linearize").dense()
        torch.testing.assert_close(found, HessianOperator(objective, hvp="double-backward").dense())


def test_a_product_that_is_not_finite_is_not_taken_for_random() -> None:
    problem = Problem.from_function(lambda x: x.abs().pow(1.5).sum(), torch.zeros(5))
    with problem.prepare(device="cpu") as objective:
        product = HessianOperator(objective).matmat(torch.ones(1, 5))
    assert not torch.isfinite(product).all()


@pytest.mark.parametrize("method", ["forward-over-reverse", "linearize"])
def test_squared_errors_are_differentiated_forward_over_reverse(method: str) -> None:
    problem = zoscope.Problem.from_criterion(nn.Linear(4, 2), [(torch.randn(6, 4), torch.randn(6, 2))], nn.MSELoss())
    with problem.prepare(device="cpu") as objective:
        found, truth = HessianOperator(objective, hvp=method).dense(), HessianOperator(objective).dense()
        assert torch.allclose(found, truth, atol=1e-5)
        assert not objective.warnings


@pytest.mark.parametrize("method", ["batched", "linearize"])
def test_a_method_that_torch_fails_at_gives_way_and_says_so(method: str) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.ELU(), nn.Flatten(), nn.Linear(16, 2))
    problem = zoscope.Problem.from_criterion(layers, [(torch.randn(5, 2, 6), torch.randn(5, 2))], nn.MSELoss())
    with problem.prepare(device="cpu") as objective:
        operator = HessianOperator(objective, hvp=method)
        assert torch.allclose(operator.dense(), HessianOperator(objective).dense(), atol=1e-5)
        if operator.method != method:  # torch may learn it
            assert [notice.code for notice in objective.warnings] == ["hvp-fallback"]
            assert f"--hvp {method} fails for this loss (torch says" in objective.warnings[0].message
