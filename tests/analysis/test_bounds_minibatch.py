"""``zoscope.bounds`` with a batch size, against the explicit second-moment operator."""

import numpy as np
import pytest
import torch
from torch import nn

import zoscope
from tests.theory.minibatch_oracle import Examples, explicit_threshold
from zoscope import UsageError
from zoscope.theory.rules import GAUSSIAN, update_rule

RATES = {"rtol": 0.05, "device": "cpu"}


class TwoOutputs(nn.Module):
    """Least squares with two outputs of shared weights: examples' Hessians of rank two."""

    def __init__(self, dimension):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dimension, dtype=torch.float64))

    def forward(self, x):
        return x @ self.weight


def least_squares(seed=0, *, examples=12, dimension=4, noise=0.0, batch_size=None):
    """Inputs ``(n, 2, d)``; fitted exactly at the true weights where ``noise`` is 0."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((examples, 2, dimension)) * np.exp(-0.3 * np.arange(dimension))
    true = rng.standard_normal(dimension)
    y = x @ true + noise * rng.standard_normal((examples, 2))
    model = TwoOutputs(dimension)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(true + 0.1))

    def loss(outputs, targets):
        return (outputs - targets).square().sum(dim=1).mean() / 2

    data = (torch.from_numpy(x), torch.from_numpy(y))
    problem = zoscope.Problem.from_criterion(model, data, loss, batch_size=batch_size)
    return problem, Examples(np.einsum("nkd,nke->nde", x, x))


@pytest.mark.parametrize("noise", [0.0, 2.0], ids=["fitted", "noisy"])
@pytest.mark.parametrize("name", ["gd", "gdm"])
def test_thresholds_agree_with_the_explicit_operator(name, noise):
    problem, examples = least_squares(noise=noise)
    for size in (1, 3, 6):
        row = zoscope.bounds(problem, optimizers=(name,), steps=40, batch_size=size, **RATES).optimizers[name]
        found, rule = row.minibatch, update_rule(name)
        true = explicit_threshold(examples, size, rule, GAUSSIAN, guess=found.exact.value)
        assert found.exact.value == pytest.approx(true, rel=0.15)
        true = explicit_threshold(examples, size, rule, GAUSSIAN, guess=found.horizon.upper.value, steps=40)
        assert found.horizon.upper.value == pytest.approx(true, rel=0.15)
        assert found.horizon.upper.value < row.horizon.upper


def test_the_cut_into_batches_does_not_matter():
    whole, parts = (least_squares(batch_size=size)[0] for size in (None, 5))
    first, second = (
        zoscope.bounds(p, optimizers=("gd",), batch_size=3, **RATES).optimizers["gd"].minibatch for p in (whole, parts)
    )
    assert first.exact.value == pytest.approx(second.exact.value, rel=1e-9)


def test_many_examples_are_sampled_within_their_error_bars():
    problem, examples = least_squares(1, examples=300)
    found = zoscope.bounds(problem, optimizers=("gd",), batch_size=10, **RATES).optimizers["gd"].minibatch
    true = explicit_threshold(examples, 10, update_rule("gd"), GAUSSIAN, guess=found.exact.value)
    assert found.exact.stderr > 0
    assert abs(found.exact.value - true) < 1.5 * found.exact.half_width + 0.02 * true


def test_the_descent_threshold_counts_the_noise_of_gradients():
    problem, examples = least_squares(2, noise=1.0)
    n, size = 12, 4
    x, y = (t.numpy() for t in problem.batches[0])
    residuals = np.einsum("nkd,d->nk", x, problem.model.weight.detach().numpy()) - y
    gradients = np.einsum("nkd,nk->nd", x, residuals)
    g, s = gradients.mean(axis=0), (n - size) / (size * (n - 1))
    covariance = np.cov(gradients.T, bias=True)
    H = examples.mean
    noisy = 2 * (g @ H @ g + s * np.trace(H @ covariance)) + np.trace(H) * (g @ g + s * np.trace(covariance))
    found = zoscope.bounds(problem, optimizers=("gd",), batch_size=size, **RATES).optimizers["gd"].minibatch.descent
    true = 2 * (g @ g) / noisy
    assert abs(found.value - true) < 2 * found.half_width + 1e-9


def test_adam_counts_the_noise_in_its_preconditioner():
    problem, _ = least_squares(3, noise=2.0)
    row = zoscope.bounds(problem, optimizers=("adam",), batch_size=1, **RATES).optimizers["adam"]
    assert row.minibatch.model.scale > 1
    assert row.to_dict()["zo"]["minibatch"]["batch_size"] == 1


def test_recommendation_and_verdict_go_by_the_mini_batches():
    problem, _ = least_squares()
    plain = zoscope.bounds(problem, optimizers=("gd",), steps=100, **RATES).optimizers["gd"]
    lr = 0.9 * plain.horizon.upper
    row = zoscope.bounds(problem, optimizers=("gd",), steps=100, batch_size=1, lr=lr, **RATES).optimizers["gd"]
    assert row.horizon == plain.horizon
    assert row.binding.value < plain.binding.value
    assert row.verdict.outlook == "unstable"
    assert "minibatch" not in plain.to_dict()["zo"]


def test_a_batch_of_everything_is_the_full_batch():
    problem, _ = least_squares()
    result = zoscope.bounds(problem, optimizers=("gd",), batch_size=12, **RATES)
    assert result.optimizers["gd"].minibatch is None
    assert "full-batch" in {notice.code for notice in result.warnings}


def test_networks_are_sampled_through_outliers_and_probe_vectors():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 10, generator=generator)
    y = (x[:, :3].sum(dim=1) > 0).long()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 40), nn.Tanh(), nn.Linear(40, 2))
    problem = zoscope.Problem.from_criterion(model, (x, y), nn.CrossEntropyLoss(), batch_size=64)
    options = {"optimizers": ("gd",), "steps": 100, "batch_size": 25, "method": "deflated-slq", "max_hvps": 80, **RATES}
    found = [zoscope.bounds(problem, seed=seed, **options).optimizers["gd"].minibatch.horizon.upper for seed in (0, 1)]
    assert abs(found[0].value - found[1].value) < found[0].half_width + found[1].half_width
    assert all(0 < point.half_width < 0.3 * point.value for point in found)


def test_the_report_has_a_table_of_its_own():
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(zoscope.bounds(least_squares()[0], optimizers=("gd",), batch_size=3, **RATES).report(verbose=True))
    assert "With mini-batches of 3 of 12 examples" in console.export_text()


def test_check_holds_a_step_size_against_the_mini_batches():
    problem, _ = least_squares(examples=24)
    options = {"optimizer": "zo-gd", "steps": 100, "threshold": "horizon", "device": "cpu"}
    full = zoscope.check(problem, lr=1e-3, **options).checks[0].threshold
    assert full is not None
    lr = 0.5 * full.low
    assert zoscope.check(problem, lr=lr, **options).checks[0].status == "pass"
    found = zoscope.check(problem, lr=lr, batch_size=1, **options).checks[0]
    assert found.status == "fail"
    bounds = zoscope.bounds(problem, optimizers=("gd",), steps=100, batch_size=1, device="cpu").optimizers["gd"]
    assert found.threshold.value == pytest.approx(bounds.minibatch.horizon.upper.value)


def test_a_first_order_check_goes_by_all_examples():
    problem, _ = least_squares(examples=24)
    plain, noisy = (
        zoscope.check(problem, optimizer="gd", lr=1e-3, device="cpu", **more).checks[0].threshold
        for more in ({}, {"batch_size": 2})
    )
    assert plain == noisy


def test_batches_that_cannot_be_cut_are_the_mini_batches_or_an_error():
    rng = torch.Generator().manual_seed(0)
    model = nn.Linear(3, 1).double()
    batches = [(torch.randn(4, 3, generator=rng).double(), torch.randn(4, 1, generator=rng).double()) for _ in range(6)]

    def loss(model, batch):
        return (model(batch["data"][0]) - batch["data"][1]).square().mean()

    class Opaque:
        def __init__(self, data):
            self.data = data

        def __getitem__(self, name):
            return self.data

    problem = zoscope.Problem(model, [Opaque(b) for b in batches], loss, batch_size_of=lambda _: 4)
    found = zoscope.bounds(problem, optimizers=("gd",), batch_size=4, device="cpu").optimizers["gd"].minibatch
    assert found.exact.value > 0
    with pytest.raises(UsageError, match="cannot be cut"):
        zoscope.bounds(problem, optimizers=("gd",), batch_size=3, device="cpu")


def test_a_probe_tests_the_threshold_of_its_mini_batches():
    problem, _ = least_squares(examples=40)
    result = zoscope.probe(problem, optimizer="zo-gd", batch_size=2, steps=60, ratios=(0.5, 2.0), replicas=4)
    bounds = zoscope.bounds(problem, optimizers=("gd",), steps=60, batch_size=2).optimizers["gd"]
    assert result.threshold.name == "horizon"
    assert result.threshold.value == pytest.approx(bounds.minibatch.horizon.upper.value)


def test_check_warns_where_the_noise_of_gradients_lifts_the_loss():
    problem, _ = least_squares(examples=24, noise=3.0)
    minibatch = zoscope.bounds(problem, optimizers=("gd",), steps=20, batch_size=6, device="cpu").optimizers["gd"]
    found = minibatch.minibatch
    assert found.descent.value < 0.9 * found.horizon.lower.value
    options = {"optimizer": "zo-gd", "steps": 20, "batch_size": 6, "device": "cpu"}
    statuses = [
        zoscope.check(problem, lr=lr, **options).checks[0].status
        for lr in (0.3 * found.descent.value, 0.95 * found.horizon.lower.value, 1.3 * found.horizon.upper.value)
    ]
    assert statuses == ["pass", "warn", "fail"]
