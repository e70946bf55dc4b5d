"""``zoscope.ForwardMonitor``: the trace from loss values that training makes anyway."""

import math

import numpy as np
import pytest
import torch

import zoscope
from zoscope.theory.rules import update_rule
from zoscope.theory.spectrum import Spectrum
from zoscope.theory.stability import MomentBounds

EIGENVALUES = np.linspace(0.2, 4.0, 40)


def quadratic(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))
    h = (q * torch.tensor(EIGENVALUES)) @ q.T
    x = torch.nn.Parameter(torch.randn(40, generator=generator, dtype=torch.float64))
    return x, lambda: 0.5 * x @ h @ x


@pytest.mark.parametrize("directions", ["gaussian", "sphere"])
@pytest.mark.parametrize("queries", [1, 4])
def test_trace_and_norm_are_those_of_the_hessian_within_their_errors(directions, queries) -> None:
    x, closure = quadratic()
    optimizer = zoscope.ZOGD([x], 1e-3, directions=directions, queries=queries)
    monitor = zoscope.ForwardMonitor(optimizer, every=1, window=400)
    for _ in range(400 // queries):
        record = monitor.step(closure)
    spectrum = Spectrum.of(EIGENVALUES)
    assert record.directions == 400
    assert abs(record.trace.value - spectrum.trace) < 4 * record.trace.stderr
    # The variance of 400 nearly normal samples is known to sqrt(2/400) = 7 %.
    assert record.frobenius_sq == pytest.approx(spectrum.frobenius_sq, rel=0.3)
    bounds = MomentBounds(update_rule("gd"), _moments(optimizer)).forward_only(record.trace.value, record.frobenius_sq)
    assert (record.lower, record.upper.value) == pytest.approx((bounds.lower, bounds.upper))
    assert record.ratio == pytest.approx(1e-3 / bounds.upper)


def _moments(optimizer):
    from zoscope.theory.rules import estimator_moments

    return estimator_moments(optimizer.directions, queries=optimizer.queries, dimension=40)


def test_the_error_bar_covers_the_trace() -> None:
    covered = 0
    for seed in range(40):
        x, closure = quadratic(seed)
        monitor = zoscope.ForwardMonitor(zoscope.ZOGD([x], 1e-3, seed=seed), every=1, window=100)
        for _ in range(100):
            record = monitor.step(closure)
        low, high = record.trace.interval
        covered += low <= EIGENVALUES.sum() <= high
    assert covered >= 33  # 95 % of 40 less three standard deviations


def test_observing_less_often_costs_one_evaluation_each_time() -> None:
    x, closure = quadratic()
    calls = 0

    def counted():
        nonlocal calls
        calls += 1
        return closure()

    monitor = zoscope.ForwardMonitor(zoscope.ZOGD([x], 1e-3), every=20)
    records = [monitor.step(counted) for _ in range(200)]
    assert calls == 2 * 200 + 10
    assert sum(record is not None for record in records) == 3  # from the eighth direction on
    assert [record.step for record in records if record is not None] == [141, 161, 181]
    assert monitor.record is records[180]


def test_a_loop_without_the_optimizer_may_observe_by_itself() -> None:
    x, closure = quadratic()
    optimizer = zoscope.ZOGD([x], 1e-3)
    own, mine = zoscope.ForwardMonitor(optimizer, every=1), zoscope.ForwardMonitor(mu=1e-3)
    for _ in range(20):
        loss = float(closure().detach())
        expected = own.step(closure)
        ((above, below),) = optimizer.evaluations
        record = mine.observe(loss, above=above, below=below, lr=1e-3)
    assert record.to_dict() == expected.to_dict()


def test_a_monitor_goes_on_from_its_state() -> None:
    x, closure = quadratic()
    optimizer = zoscope.ZOGD([x], 1e-3)
    whole, first, second = (zoscope.ForwardMonitor(mu=1e-3, window=10) for _ in range(3))
    for n in range(20):
        if n == 12:
            second.load_state_dict(first.state_dict())
        loss = float(closure().detach())
        optimizer.step(closure)
        ((above, below),) = optimizer.evaluations
        for monitor in (whole, first if n < 12 else second):
            record = monitor.observe(loss, above=above, below=below, lr=1e-3)
    assert record.to_dict() == whole.record.to_dict()


def test_adams_threshold_is_in_units_of_its_preconditioner() -> None:
    x, closure = quadratic()
    optimizer = zoscope.ZOAdam([x], 1e-6)
    monitor = zoscope.ForwardMonitor(optimizer, every=1)
    for _ in range(60):
        record = monitor.step(closure)
    v = optimizer.state[x]["exp_avg_sq"]
    p = (1 - 0.9**60) * ((v / (1 - 0.999**60)).sqrt().mean() + 1e-8)
    plain = MomentBounds(update_rule("adam")).forward_only(
        record.trace.value / float(p), record.frobenius_sq / float(p) ** 2
    )
    assert record.upper.value == pytest.approx(plain.upper)


def test_a_loss_that_is_not_finite_is_left_out() -> None:
    monitor = zoscope.ForwardMonitor()
    for value in (1.0, math.nan, math.inf, *([1.0] * 10)):
        record = monitor.observe(1.0, above=value, below=1.0, lr=0.1)
    assert record.directions == 11


def test_a_monitor_without_an_optimizer_takes_no_step() -> None:
    with pytest.raises(ValueError, match="SGD, which evaluates no two-point queries"):
        zoscope.ForwardMonitor(torch.optim.SGD([torch.zeros(2)], lr=0.1))
    with pytest.raises(ValueError, match="observe"):
        zoscope.ForwardMonitor().step(lambda: 0.0)


@pytest.mark.parametrize(("above", "below"), [([1.0, 2.0], [1.0]), (1.0, [1.0, 2.0]), ([[1.0]], [[1.0]])])
def test_losses_that_do_not_pair_up_are_refused_before_any_is_taken_in(above, below) -> None:
    monitor = zoscope.ForwardMonitor()
    with pytest.raises(ValueError, match=r"above has the shape .*expected one loss for each query in both"):
        monitor.observe(1.0, above=above, below=below, lr=0.1)
    assert monitor.state_dict() == {"steps": 0, "samples": []}


@pytest.mark.parametrize("seed", range(3))
def test_a_run_whose_curvature_grows_is_warned_of_before_its_loss_has_doubled(seed: int) -> None:
    """The ratio lags behind by half a window: some 13 steps."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.nn.Parameter(torch.randn(40, generator=generator, dtype=torch.float64))
    eigenvalues = torch.tensor(EIGENVALUES, dtype=torch.float64)
    growth, lr = 1.0, 0.2 * 2 / float(eigenvalues.sum())
    monitor = zoscope.ForwardMonitor(zoscope.ZOGD([x], lr, seed=seed))
    losses: list[float] = []
    warned = None
    while not losses or losses[-1] <= 2 * min(losses):
        growth *= 1.002
        record = monitor.step(lambda g=growth: 0.5 * g * (eigenvalues * x.square()).sum())
        losses.append(0.5 * growth * float((eigenvalues * x.detach().square()).sum()))
        if warned is None and record is not None and record.ratio > 1:
            warned = len(losses)
    assert warned is not None
    assert warned > 600  # the threshold is passed about there
    assert len(losses) - warned >= 10
