"""``zoscope.track``: what it trains, what it measures, when it stops."""

import json
import math
import threading

import numpy as np
import pytest
import torch

import zoscope
from zoscope import NumericalError, SpecError, TrackInterruptedError, UsageError

from .problems import network, quadratic

ALL = ["zo-gd", "zo-gdm", "zo-adam", "gd", "gdm", "adam"]
EIGENVALUES = np.linspace(0.5, 1.5, 30)
ROUNDING = 1e-9


def numbers_or_null(value):
    if isinstance(value, dict):
        return all(map(numbers_or_null, value.values()))
    if isinstance(value, list):
        return all(map(numbers_or_null, value))
    return value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


@pytest.mark.parametrize("optimizer", ALL)
def test_every_optimizer_trains_and_is_measured(optimizer):
    lr = {"zo-gd": 0.02, "zo-gdm": 0.002, "zo-adam": 0.01}.get(optimizer, 0.05)
    result = zoscope.track(quadratic(EIGENVALUES), optimizer=optimizer, lr=lr, steps=60, every=20, beta=0.5)
    assert [record.step for record in result.records] == [0, 20, 40, 60]
    assert result.status == "finished"
    assert result.records[-1].loss < result.records[0].loss
    assert all(record.num_hvps > 0 and record.exact > 0 for record in result.records)


@pytest.mark.parametrize(
    ("optimizer", "kind", "options"),
    [
        ("zo-gd", zoscope.ZOGD, {}),
        ("zo-gdm", zoscope.ZOGDM, {"beta": 0.5}),
        ("zo-adam", zoscope.ZOAdam, {"betas": (0.8, 0.99), "eps": 1e-6}),
    ],
)
def test_training_is_that_of_the_optimizers(optimizer, kind, options):
    problem = quadratic(EIGENVALUES)
    common = {"mu": 1e-2, "queries": 2, "directions": "sphere", "seed": 3}
    result = zoscope.track(problem, optimizer=optimizer, lr=0.01, steps=25, every=10, **options, **common)
    model = quadratic(EIGENVALUES).model
    stepper = kind(model.parameters(), 0.01, **options, **common)
    for _ in range(25):
        stepper.step(lambda: problem.loss(model, None))
    assert torch.equal(result.parameters["x"], model.x.detach())


@pytest.mark.parametrize(
    ("optimizer", "kind", "options"),
    [
        ("gd", torch.optim.SGD, {}),
        ("gdm", torch.optim.SGD, {"momentum": 0.9}),
        ("adam", torch.optim.Adam, {}),
    ],
)
def test_first_order_training_is_that_of_torch(optimizer, kind, options):
    problem = quadratic(EIGENVALUES)
    result = zoscope.track(problem, optimizer=optimizer, lr=0.01, steps=25, every=25)
    model = quadratic(EIGENVALUES).model
    stepper = kind(model.parameters(), 0.01, **options)
    for _ in range(25):
        stepper.zero_grad()
        problem.loss(model, None).backward()
        stepper.step()
    assert result.parameters["x"].numpy() == pytest.approx(model.x.detach().numpy(), rel=ROUNDING)


def test_terms_of_the_paper_are_those_of_the_spectrum():
    trace, largest = EIGENVALUES.sum(), EIGENVALUES.max()
    beta = 0.9
    expected = {
        "zo-gd": (trace, trace + 2 * largest, 2 / 1e-3),
        "zo-gdm": (trace, trace + 2 / (1 + beta) * largest, 2 * (1 - beta) / 1e-3),
        "gd": (largest, largest, 2 / 1e-3),
        "gdm": (largest, largest, 2 * (1 + beta) / 1e-3),
    }
    for optimizer, terms in expected.items():
        result = zoscope.track(quadratic(EIGENVALUES), optimizer=optimizer, lr=1e-3, steps=2, every=2, beta=beta)
        record = result.records[-1]
        assert (record.lower, record.upper, record.threshold) == pytest.approx(terms, rel=1e-8), optimizer
        assert record.trace == pytest.approx(trace, rel=1e-8)


def test_the_exact_threshold_is_that_of_bounds():
    problem = quadratic(EIGENVALUES)
    row = zoscope.bounds(problem, optimizers=["gd"], steps=50).optimizers["gd"]
    record = zoscope.track(problem, lr=1e-3, steps=50, every=50).records[0]
    assert record.exact == pytest.approx(row.exact.value, rel=1e-9)
    assert record.horizon == pytest.approx((row.horizon.lower, row.horizon.upper), rel=1e-9)
    assert record.ratio == pytest.approx(1e-3 / row.exact.value, rel=1e-9)


def test_a_step_size_above_the_threshold_blows_up_when_it_was_said_to():
    problem = quadratic(EIGENVALUES)
    exact = zoscope.track(problem, lr=1e-3, steps=1, every=1).records[0].exact
    result = zoscope.track(problem, lr=3 * exact, steps=4000, every=4000)
    assert result.status == "diverged"
    assert result.records[0].blow_up[1] < result.steps_done
    assert result.records[-1].step == result.steps_done
    assert result.records[-1].trace is None


def test_adam_is_measured_through_its_own_preconditioner():
    result = zoscope.track(quadratic(EIGENVALUES), optimizer="zo-adam", lr=1e-3, steps=40, every=20)
    first, *later = result.records
    assert first.operator == "preconditioned_hessian"
    for record in (first, *later):
        low, middle, high = record.preconditioner
        assert 0 < low <= middle <= high
        assert 0 <= record.commutator < 1
    # P grows with 1 − β₁ᵗ and then follows the estimates: it is not the expected one of the start.
    assert later[0].preconditioner != first.preconditioner


def test_the_trace_seen_by_adam_is_that_of_the_moments_it_holds():
    problem = quadratic(EIGENVALUES)
    betas, eps, steps = (0.9, 0.99), 1e-8, 30
    result = zoscope.track(problem, optimizer="zo-adam", lr=1e-3, steps=steps, every=steps, betas=betas, eps=eps)
    model = quadratic(EIGENVALUES).model
    stepper = zoscope.ZOAdam(model.parameters(), 1e-3, betas=betas, eps=eps)
    for _ in range(steps):
        stepper.step(lambda: problem.loss(model, None))
    v = stepper.state[model.x]["exp_avg_sq"]
    p = (1 - betas[0] ** steps) * (torch.sqrt(v / (1 - betas[1] ** steps)) + eps)
    hessian = torch.autograd.functional.hessian(lambda x: problem.loss(type("M", (), {"x": x}), None), model.x.detach())
    assert result.records[-1].trace == pytest.approx(float((hessian.diagonal() / p).sum()), rel=1e-6)


def test_the_problem_comes_back_as_it_was():
    problem = network()
    problem.model[-1].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    state = torch.get_rng_state()
    result = zoscope.track(problem, lr=1e-2, steps=20, every=10)
    assert all(torch.equal(value, before[name]) for name, value in problem.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in problem.model.parameters())
    assert not torch.equal(result.parameters["0.weight"], before["0.weight"])


def test_two_runs_are_the_same():
    options = {"optimizer": "zo-adam", "lr": 1e-3, "steps": 30, "every": 10, "batch_size": 5, "seed": 4}
    first, second = (zoscope.track(network(), **options) for _ in range(2))
    assert first.records == second.records
    other = zoscope.track(network(), **{**options, "seed": 5})
    assert other.records[-1].loss != first.records[-1].loss


def test_metrics_are_means_over_all_examples():
    def below_zero(model, batch):
        return (model(batch[0]) < 0).float().mean()

    problem = network(batches=3, metrics={"below zero": below_zero})
    result = zoscope.track(problem, lr=1e-2, steps=4, every=4)
    x = torch.cat([batch[0] for batch in problem.batches])
    with torch.no_grad():
        assert result.records[0].metrics["below zero"] == pytest.approx(float((problem.model(x) < 0).float().mean()))


def test_a_metric_that_fails_is_named():
    problem = network(metrics={"accuracy": lambda model, batch: model.no_such_thing})
    with pytest.raises(SpecError, match="metric 'accuracy' raised AttributeError"):
        zoscope.track(problem, lr=1e-2, steps=4, every=4)


def test_losses_between_measurements_are_not_lost():
    result = zoscope.track(network(), lr=1e-2, steps=20, every=10)
    for record in result.records[1:]:
        assert record.loss_max >= record.loss_mean > 0
    assert result.records[0].loss_mean is None


# --- when it stops ----------------------------------------------------------------------------------------------------


def test_it_stops_at_the_target_loss():
    problem = quadratic(EIGENVALUES)
    start = zoscope.track(problem, optimizer="gd", lr=0.1, steps=1, every=1).records[0].loss
    result = zoscope.track(problem, optimizer="gd", lr=0.1, steps=500, every=100, target_loss=start / 10)
    assert result.status == "target"
    assert result.steps_done < 100
    assert result.records[-1].step == result.steps_done
    assert result.records[-1].loss <= start / 10


def test_with_mini_batches_the_target_is_looked_at_when_it_is_measured():
    start = zoscope.track(network(), lr=1e-2, steps=1, every=1).records[0].loss
    result = zoscope.track(
        network(), optimizer="gd", lr=0.1, steps=400, every=20, batch_size=6, target_loss=start * 0.9
    )
    assert result.status == "target"
    assert result.steps_done % 20 == 0


def test_it_stops_when_time_is_over():
    result = zoscope.track(quadratic(EIGENVALUES), lr=1e-4, steps=10**8, every=10**8, max_seconds=1.0)
    assert result.status == "time"
    assert 0 < result.steps_done < 10**8


def test_divergence_is_a_multiple_of_the_first_loss():
    result = zoscope.track(quadratic(EIGENVALUES), optimizer="gd", lr=2.0, steps=200, every=200, divergence=10.0)
    assert result.status == "diverged"
    assert result.records[-1].loss > 10 * result.records[0].loss


def test_a_start_that_is_not_finite_is_an_error():
    problem = zoscope.Problem.from_function(lambda x: (x / 0).sum(), torch.ones(3))
    with pytest.raises(NumericalError):
        zoscope.track(problem, lr=1e-3, steps=3, every=1)


class Interrupt:
    """Someone who presses Ctrl-C at a step."""

    def __init__(self, at):
        self.at = at

    def begun(self, run):
        self.run = run

    def stepped(self, step, loss):
        if step == self.at:
            self.run.stop.wanted = True

    def measuring(self, step):
        pass

    def measured(self, record):
        pass


def test_an_interrupt_carries_what_was_found():
    with pytest.raises(TrackInterruptedError) as caught:
        zoscope.track(quadratic(EIGENVALUES), lr=1e-3, steps=50, every=10, observers=[Interrupt(17)])
    assert caught.value.result.status == "interrupted"
    assert caught.value.result.steps_done == 17
    assert [record.step for record in caught.value.result.records] == [0, 10]


def test_it_runs_outside_of_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(zoscope.track(network(), lr=1e-2, steps=3, every=3)))
    thread.start()
    thread.join()
    assert found[0].status == "finished"


# --- step sizes -------------------------------------------------------------------------------------------------------


def test_a_change_of_the_step_size_shows_after_it():
    result = zoscope.track(quadratic(EIGENVALUES), lr="0.001,20:0.002", steps=40, every=10)
    assert [record.lr for record in result.records] == [0.001, 0.001, 0.001, 0.002, 0.002]
    assert [record.lr_next for record in result.records] == [0.001, 0.001, 0.002, 0.002, 0.002]


def test_the_step_size_acts_from_its_step_on():
    both = zoscope.track(quadratic(EIGENVALUES), optimizer="gd", lr="0.1,1:0.2", steps=2, every=2)
    start = quadratic(EIGENVALUES).model.x.detach()
    hessian = torch.autograd.functional.hessian(
        lambda x: quadratic(EIGENVALUES).loss(type("M", (), {"x": x}), None), start
    )
    step = start - 0.1 * hessian @ start
    step = step - 0.2 * hessian @ step
    assert both.parameters["x"].numpy() == pytest.approx(step.numpy(), rel=ROUNDING)


# --- documents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ALL)
def test_the_document_holds_numbers_or_null(optimizer):
    document = zoscope.track(network(), optimizer=optimizer, lr=1e-3, steps=4, every=2).to_dict()
    json.dumps(document, allow_nan=False)
    assert document["schema"] == "zoscope.track/1"
    needed = {"step", "loss", "lr", "trace", "lambda_max", "lower", "upper", "threshold", "exact"}
    for record in document["records"]:
        assert needed <= record.keys()
        assert numbers_or_null(record)


def test_a_diverged_run_has_a_document():
    result = zoscope.track(quadratic(EIGENVALUES), optimizer="gd", lr=1e9, steps=200, every=200, divergence=1e300)
    assert result.status == "diverged"
    assert numbers_or_null(json.loads(json.dumps(result.to_dict(), allow_nan=False)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimizer": "sgd"}, "optimizer must be one of"),
        ({"lr": 0.0}, "lr must be"),
        ({"lr": "0.1,0.2"}, "expected a number"),
        ({"steps": 0}, "steps must be"),
        ({"every": 0}, "every must be"),
        ({"every": "often"}, "every must be a number of steps"),
        ({"beta": 1.0, "optimizer": "zo-gdm"}, "beta must be"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"mu": -1.0}, "mu must be"),
        ({"queries": 0}, "queries must be"),
        ({"directions": "cube"}, "directions"),
        ({"divergence": 1.0}, "divergence must be"),
        ({"target_loss": math.nan}, "target_loss must be"),
        ({"max_seconds": 0.0}, "max_seconds must be"),
        ({"curvature": "forward"}, "curvature must be one of"),
    ],
)
def test_an_argument_out_of_range_is_named(options, said):
    with pytest.raises(ValueError, match=said):
        zoscope.track(quadratic(EIGENVALUES), **{"lr": 1e-3, "steps": 2, **options})


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UsageError, match="24 examples"):
        zoscope.track(network(), lr=1e-3, steps=2, batch_size=25)


def test_loss_values_of_the_steps_tell_the_trace_by_themselves() -> None:
    curvatures = torch.linspace(0.5, 3.0, 40, dtype=torch.float64)
    problem = zoscope.Problem.from_function(lambda x: 0.5 * (curvatures * x * x).sum(), torch.ones(40).double())
    result = zoscope.track(problem, lr=1e-3, steps=200, every=100, forward_every=1, device="cpu")
    assert result.records[0].forward is None
    for record in result.records[1:]:
        assert record.forward is not None
        error = abs(record.forward["trace"] - float(curvatures.sum()))
        assert error < 4 * record.forward["trace_stderr"]
        assert record.forward["ratio"] == pytest.approx(1e-3 / record.forward["upper"])
    with pytest.raises(ValueError, match="zeroth-order"):
        zoscope.track(problem, optimizer="gd", lr=1e-3, forward_every=1)


def test_a_point_without_second_derivatives_is_measured_without_curvature_and_says_why() -> None:
    problem = zoscope.Problem.from_function(lambda x: x.abs().pow(1.5).sum(), torch.zeros(5))
    result = zoscope.track(problem, lr=1e-3, steps=2, every=1)
    assert result.records[0].trace is None
    (notice,) = [notice for notice in result.warnings if notice.code == "no-curvature"]
    assert notice.message.startswith("At step 0 there is no curvature. ")
    assert "not finite" in notice.message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": "auto", "optimizer": "gd"}, "zo- optimizers"),
        ({"lr": "auto", "forward_every": 5}, "forward_every"),
        ({"lr": "auto:fast"}, "auto:cosine"),
    ],
)
def test_a_step_size_that_sets_itself_says_what_it_goes_with(options, said):
    with pytest.raises(ValueError, match=said):
        zoscope.track(quadratic(EIGENVALUES), steps=10, **options)
