"""``zoscope.bounds(curvature="forward", batch_size=B)``: what forward passes can know of mini-batches."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import zoscope
from tests.analysis.test_bounds_minibatch import least_squares
from tests.theory.minibatch_oracle import explicit_threshold
from zoscope import UsageError
from zoscope.curvature.forward import measure_forward
from zoscope.theory.minibatch import spread_of_batches
from zoscope.theory.rules import GAUSSIAN, update_rule

CPU = {"device": "cpu"}


def forward(problem, **options):
    return zoscope.bounds(problem, curvature="forward", **{"optimizers": ("gd",), **CPU, **options})


def network(*, batches=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).double()
    x, y = torch.randn(48, 6).double(), torch.randint(0, 3, (48,))
    data = [(x, y)] if batches is None else list(zip(x.split(batches), y.split(batches), strict=True))
    return zoscope.Problem.from_criterion(model, data, nn.CrossEntropyLoss())


def spread_by_hand(problem):
    """Of single examples: ``E‖g_e − g‖²``, ``E (g_e − g)ᵀH(g_e − g)`` and ``E‖H_e − H‖_F²``, all exactly."""
    with problem.prepare(**CPU) as objective:
        start = objective.read()
        shards = objective.cut(1)

        def loss(x, shard):
            return objective.loss_at(objective.unflatten(x), shard)

        hessians = torch.stack([torch.func.hessian(loss)(start, shard) for shard in shards])
        gradients = torch.stack([torch.func.grad(loss)(start, shard) for shard in shards])
    h, away = hessians.mean(0), gradients - gradients.mean(0)
    return (
        float(away.square().sum(1).mean()),
        float(((away @ h) * away).sum(1).mean()),
        float((hessians - h).square().sum((1, 2)).mean()),
    )


@pytest.mark.slow
def test_the_spread_of_examples_is_estimated_without_bias():
    expected = spread_by_hand(network())
    samples = []
    for seed in range(12):
        with network().prepare(differentiable=False, **CPU) as objective:
            noise = measure_forward(objective, noise=True, rtol=1e-6, max_hvps=400, seed=seed).noise
        samples.append([noise.gradient_sq.mean(), noise.curvature.mean(), noise.hessian_sq.value])
    samples = np.array(samples)
    stderr = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    assert (np.abs(samples.mean(axis=0) - expected) < 4 * stderr).all(), (samples.mean(axis=0), expected, stderr)
    assert (stderr < 0.1 * np.abs(expected)).all()


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 16])
def test_descent_thresholds_are_those_of_the_hessian(size):
    known = zoscope.bounds(network(), optimizers=("gd",), batch_size=size, method="dense", **CPU)
    known = known.optimizers["gd"].minibatch.descent
    hits = 0
    for seed in range(8):
        found = forward(network(), batch_size=size, seed=seed).optimizers["gd"].forward.minibatch.descent
        hits += abs(found.value - known.value) <= found.half_width + known.half_width
        assert found.half_width < 0.5 * found.value
    assert hits >= 7, hits


def test_batches_that_are_given_cut_have_the_same_spread():
    whole, cut = (forward(network(batches=b), batch_size=6).optimizers["gd"].forward.minibatch for b in (None, 12))
    assert abs(whole.noise_sq.value - cut.noise_sq.value) <= whole.noise_sq.half_width + cut.noise_sq.half_width


@pytest.mark.parametrize("noise", [0.0, 2.0], ids=["fitted", "noisy"])
@pytest.mark.parametrize("name", ["gd", pytest.param("gdm", marks=pytest.mark.slow)])
def test_both_bounds_hold_the_threshold_of_the_explicit_operator(name, noise):
    problem, examples = least_squares(noise=noise)
    rule = update_rule(name)
    for size in (1, 3, 6):
        row = forward(problem, optimizers=(name,), steps=40, batch_size=size).optimizers[name].forward
        found = row.minibatch
        true = explicit_threshold(examples, size, rule, GAUSSIAN, guess=found.upper.value)
        planned = explicit_threshold(examples, size, rule, GAUSSIAN, guess=found.lower.value, steps=40)
        assert true <= found.upper.interval[1]
        assert found.lower.interval[0] <= planned
        assert found.upper.value <= row.upper.value


def test_the_recommendation_goes_by_the_mini_batches():
    row = forward(network(), batch_size=4, optimizers=("gd", "adam")).optimizers
    full = forward(network()).optimizers["gd"]
    for name in ("gd", "adam"):
        found = row[name].forward.minibatch
        assert row[name].binding.value == min(found.descent.value, found.upper.value)
        assert row[name].recommended == pytest.approx(0.7 * min(row[name].binding.value, found.lower.value))
    assert row["gd"].recommended < full.recommended


@pytest.mark.parametrize(("factor", "outlook"), [(0.5, "stable"), (1.1, "uncertain"), (1e3, "unstable")])
def test_a_step_size_is_judged_by_the_bounds_of_mini_batches(factor, outlook):
    lower = forward(network(), batch_size=4, max_hvps=200).optimizers["gd"].forward.minibatch.lower.value
    verdict = forward(network(), batch_size=4, max_hvps=200, lr=factor * lower).optimizers["gd"].verdict
    assert verdict.outlook == outlook


def test_the_document_has_the_shape_of_the_hessians():
    ours = forward(network(), batch_size=4, max_hvps=100).to_dict()
    json.dumps(ours, allow_nan=False)
    ours = ours["optimizers"]["gd"]["zo"]["minibatch"]
    theirs = zoscope.bounds(network(), optimizers=("gd",), batch_size=4, **CPU).to_dict()
    theirs = theirs["optimizers"]["gd"]["zo"]["minibatch"]
    assert set(theirs) <= set(ours)
    assert set(ours["horizon"]) == set(theirs["horizon"])
    assert ours["exact"] is None
    assert ours["upper"]["value"] > ours["lower"]["value"] > 0


def test_what_is_not_known_is_said():
    found = forward(network(), batch_size=4, max_hvps=100)
    assert [notice.code for notice in found.warnings].count("forward-minibatch") == 1


def test_a_batch_of_everything_is_the_full_batch():
    found = forward(network(), batch_size=48, max_hvps=100)
    assert found.optimizers["gd"].forward.minibatch is None
    assert "full-batch" in {notice.code for notice in found.warnings}


class Opaque:
    """A batch whose examples nobody but the loss can tell apart."""

    def __init__(self, x):
        self.x = x


def opaque(count):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    batches = [Opaque(torch.randn(4, 3)) for _ in range(count)]
    return zoscope.Problem(model, batches, lambda m, b: (m(b.x) - 1).square().mean(), batch_size_of=lambda b: len(b.x))


def test_whole_batches_are_mini_batches_where_they_cannot_be_cut():
    found = forward(opaque(6), batch_size=4, max_hvps=100).optimizers["gd"].forward.minibatch
    assert found.noise_sq.value > 0
    assert spread_of_batches(6, 1) == 1


@pytest.mark.parametrize(
    ("problem", "size", "said"),
    [
        (opaque(6), 2, r"6 batches cannot be cut.*batches of 2"),
        (opaque(1), 2, r"one batch, which cannot be cut"),
    ],
)
def test_batches_that_cannot_be_cut_are_refused(problem, size, said):
    with pytest.raises(UsageError, match=said):
        forward(problem, batch_size=size)


def test_parameters_come_back():
    problem = network()
    before = [p.detach().clone() for p in problem.parameters()]
    forward(problem, batch_size=4, max_hvps=60)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.parameters(), strict=True))


def test_a_check_gates_by_mini_batches():
    options = {"optimizer": "zo-gd", "curvature": "forward", "batch_size": 4, "max_hvps": 200, **CPU}
    found = forward(network(), batch_size=4, max_hvps=200).optimizers["gd"].forward.minibatch
    report = {
        lr: zoscope.check(network(), lr=lr, **options).checks[0].status
        for lr in (0.3 * min(found.descent.interval[0], found.lower.value), found.descent.value, 2 * found.upper.value)
    }
    assert list(report.values()) == ["pass", "warn", "fail"]
    (check,) = zoscope.check(network(), lr=1e-3, **options).checks
    assert "mini-batches of 4 of 48 examples" in " ".join(check.notices)


def test_check_agrees_with_bounds():
    options = {"curvature": "forward", "batch_size": 4, "max_hvps": 200, "device": "cpu"}
    found = zoscope.bounds(network(), optimizers=("gd",), **options).optimizers["gd"]
    assert found.recommended is not None
    for factor, status in ((1.0, "pass"), (1e3, "fail")):
        (check,) = zoscope.check(network(), optimizer="zo-gd", lr=factor * found.recommended, **options).checks
        assert (check.status, check.threshold) == (status, found.limit)
