"""The loss is evaluated as training evaluates it: with gradients where it takes derivatives itself."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

import zoscope


def physics(model, batch):
    """A derivative by the input, as in physics-informed networks and force fields."""
    x = batch.clone().requires_grad_()
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return (slope + u).square().mean() + (u - 1).square().mean()


def penalty(model, batch):
    """A derivative by the parameters."""
    loss = (model(batch) - 1).square().mean()
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return loss + 0.1 * sum(g.square().sum() for g in grads)


def meta(model, batch):
    """The loss after a step on another one."""
    named = dict(model.named_parameters())
    grads = torch.autograd.grad((model(batch) - 1).square().mean(), list(named.values()), create_graph=True)
    moved = {name: p - 0.1 * g for (name, p), g in zip(named.items(), grads, strict=True)}
    return (functional_call(model, moved, (batch,)) + 1).square().mean()


LOSSES = pytest.mark.parametrize("loss", [physics, penalty, meta])


def problem(loss) -> zoscope.Problem:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    return zoscope.Problem(model, [torch.randn(8, 2, dtype=torch.float64)], loss)


def dense_hessian(found: zoscope.Problem) -> torch.Tensor:
    """By differences of the gradient."""
    params = list(found.model.parameters())

    def gradient() -> torch.Tensor:
        loss = found.loss(found.model, found.batches[0])
        grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in grads])

    rows, h = [], 1e-5
    for parameter in params:
        for index in range(parameter.numel()):
            entry = parameter.data.view(-1)
            entry[index] += h
            above = gradient()
            entry[index] -= 2 * h
            rows.append((above - gradient()) / (2 * h))
            entry[index] += h
    return torch.stack(rows)


@LOSSES
def test_losses_that_differentiate_are_measured(loss) -> None:
    found = problem(loss)
    truth = dense_hessian(found)
    result = zoscope.bounds(found, optimizers=["gd"], device="cpu")
    curvature = result.curvature["hessian"]
    assert curvature.trace.value == pytest.approx(float(truth.trace()), rel=1e-6)
    assert curvature.lambda_max.value == pytest.approx(float(torch.linalg.eigvalsh(truth)[-1]), rel=1e-6)
    assert all(p.requires_grad and p.grad is None for p in found.model.parameters())


@LOSSES
def test_their_forward_passes_are_right_too(loss) -> None:
    found = problem(loss)
    trace = float(dense_hessian(found).trace())
    measured = zoscope.bounds(found, optimizers=["gd"], curvature="forward", device="cpu").forward.trace
    assert measured.value == pytest.approx(trace, abs=5 * measured.stderr)
    assert all(p.requires_grad for p in found.model.parameters())


@LOSSES
def test_they_are_trained_and_watched(loss) -> None:
    found = problem(loss)
    tracked = zoscope.track(found, optimizer="zo-gd", lr=1e-3, steps=2, every=2, device="cpu")
    assert all(record.trace is not None for record in tracked.records)
    optimizer = zoscope.ZOGD(found.model.parameters(), lr=1e-3)
    here = float(found.loss(found.model, found.batches[0]).detach())
    assert optimizer.step(lambda: found.loss(found.model, found.batches[0])) == pytest.approx(here, rel=1e-3)
    monitor = zoscope.ForwardMonitor(zoscope.ZOGD(found.model.parameters(), lr=1e-3, queries=8))
    assert monitor.step(lambda: found.loss(found.model, found.batches[0])) is not None


def test_a_loss_that_is_another_without_gradients_is_measured_with_them() -> None:
    def loss(model, batch):
        value = (model(batch) - 1).square().mean()
        return 2 * value if torch.is_grad_enabled() else value

    found = problem(loss)
    result = zoscope.bounds(found, optimizers=["gd"], device="cpu")
    assert result.problem.loss == pytest.approx(float(loss(found.model, found.batches[0]).detach()))
    assert "kinks" not in [notice.code for notice in result.warnings]  # differences of the loss agree


def test_what_a_loss_gets_wrong_is_still_its_own_error() -> None:
    def loss(model, batch):
        return model(batch[:, :1]).mean()

    with pytest.raises(zoscope.SpecError, match="mat1 and mat2"):
        zoscope.bounds(problem(loss), device="cpu")
