"""The probe on problems whose answer is known: quadratics in a rotated basis."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import zoscope
from zoscope import NumericalError, ProbeInterruptedError, probe
from zoscope.report.probe import render


def quadratic(eigenvalues, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lam = torch.as_tensor(eigenvalues, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(len(lam), len(lam), generator=generator, dtype=torch.float64))
    matrix = (basis * lam) @ basis.T
    start = torch.randn(len(lam), generator=generator, dtype=torch.float64)
    return zoscope.Problem.from_function(lambda x: 0.5 * x @ (matrix @ x), start)


@pytest.fixture(scope="module")
def many_modes():
    return quadratic(np.linspace(0.5, 1.5, 60))


SHORT = {"growth": 30.0, "replicas": 8, "threshold": "exact"}


@pytest.mark.parametrize(
    "optimizer",
    ["zo-gd", "zo-adam", "gdm", *(pytest.param(n, marks=pytest.mark.slow) for n in ("zo-gdm", "gd", "adam"))],
)
def test_a_right_threshold_is_confirmed(optimizer, many_modes):
    result = probe(many_modes, optimizer=optimizer, ratios=(0.7, 1.4), **SHORT)
    assert result.outcome == "confirmed", result.reason
    counted = [run for run in result.runs if run.variant != "adaptive"]
    assert [run.verdict for run in counted] == ["stable", "diverged"]


@pytest.mark.parametrize("factor", [3.0, 1 / 3.0])
@pytest.mark.parametrize("optimizer", ["zo-gd", "gdm"])
def test_a_wrong_threshold_is_refuted(optimizer, factor, many_modes):
    true = probe(many_modes, optimizer=optimizer, ratios=(0.7,), **SHORT).threshold.value
    result = probe(many_modes, optimizer=optimizer, assume_threshold=factor * true, **SHORT)
    assert result.outcome == "refuted"
    assert not result.confirmed


def test_one_dominant_mode_is_said_and_nothing_is_claimed():
    problem = quadratic([10.0, *([1e-3] * 20)])
    result = probe(problem, optimizer="zo-gd", **SHORT)
    assert result.outcome == "inconclusive"
    assert "typical runs survive" in result.reason


def test_on_the_quadratic_model_of_a_quadratic_the_runs_are_the_same(many_modes):
    real = probe(many_modes, ratios=(0.7,), steps=40, replicas=3)
    model = probe(many_modes, ratios=(0.7,), steps=40, replicas=3, linearized=True)
    assert real.runs[0].loss_end == pytest.approx(model.runs[0].loss_end, rel=1e-6)


@pytest.mark.parametrize("optimizer", ["zo-gd", "zo-adam", "gdm"])
def test_a_large_quadratic_model_runs_in_its_eigenbasis(optimizer, monkeypatch, many_modes):
    monkeypatch.setattr("zoscope.analysis.probe_runs.DENSE_LIMIT", 10)
    result = probe(many_modes, optimizer=optimizer, ratios=(0.7, 1.4), linearized=True, **SHORT)
    assert "linearized-spectrum" in {notice.code for notice in result.warnings}
    assert result.outcome == "confirmed", result.reason


def test_in_the_eigenbasis_the_mean_loss_is_that_of_the_matrix(monkeypatch, many_modes):
    def change():
        result = probe(many_modes, ratios=(0.6,), steps=40, replicas=64, linearized=True)
        return result.runs[0].prediction

    whole = change()
    monkeypatch.setattr("zoscope.analysis.probe_runs.DENSE_LIMIT", 10)
    found = change()
    error = math.hypot(whole.stderr, found.stderr)
    assert abs(found.measured_change - whole.measured_change) < 4 * error


def test_the_predicted_curve_lies_within_four_standard_errors(many_modes):
    result = probe(many_modes, ratios=(0.3, 0.6), steps=40, replicas=32)
    for run in result.runs:
        found = run.prediction
        assert abs(found.predicted_change - found.measured_change) < 4 * found.stderr


def test_the_first_order_edge_lies_at_the_threshold(many_modes):
    result = probe(many_modes, optimizer="gd", edge=True, edge_rtol=0.01, **SHORT)
    assert result.edge.ratio_to_exact == pytest.approx(1.0, abs=0.02)
    assert result.outcome == "confirmed"


def test_the_descent_threshold_is_probed_by_the_sign_of_the_mean_change():
    problem = quadratic(np.full(60, 1.0))
    result = probe(problem, threshold="descent", ratios=(0.3, 2.5), replicas=16)
    assert [run.verdict for run in result.runs] == ["falls", "rises"]
    assert result.threshold.name == "descent"


def test_a_step_cap_makes_it_inconclusive(many_modes):
    result = probe(many_modes, ratios=(0.8, 1.25), max_steps=3, threshold="exact")
    assert result.outcome == "inconclusive"
    assert "step-cap" in {notice.code for notice in result.warnings}


def test_a_time_cap_makes_it_inconclusive(many_modes):
    result = probe(many_modes, max_seconds=1e-6, **SHORT)
    assert result.outcome == "inconclusive"
    assert "time-cap" in {notice.code for notice in result.warnings}


def test_a_loss_that_becomes_nan_on_the_way_is_a_divergence():
    matrix = torch.eye(60, dtype=torch.float64)

    def loss(x):
        value = 0.5 * x @ matrix @ x
        return torch.where(value > 60.0, torch.full_like(value, math.nan), value)

    start = torch.ones(60, dtype=torch.float64)
    result = probe(zoscope.Problem.from_function(loss, start), ratios=(0.5, 1.4), **SHORT)
    above = result.runs[1]
    assert above.verdict == "diverged"
    json.dumps(result.to_dict(), allow_nan=False)


def test_nothing_to_probe_without_curvature():
    with pytest.raises(NumericalError, match="nothing to probe"):
        probe(zoscope.Problem.from_function(lambda x: x.sum(), torch.ones(5, dtype=torch.float64)))


def test_the_problem_and_the_global_generator_come_back(many_modes):
    before = many_modes.model.x.detach().clone()
    state = torch.get_rng_state()
    probe(many_modes, ratios=(0.8, 1.25), steps=5, replicas=2)
    assert torch.equal(many_modes.model.x.detach(), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_seed_gives_the_same_runs(many_modes):
    def losses(seed):
        result = probe(many_modes, ratios=(0.8,), steps=10, replicas=2, seed=seed)
        return result.runs[0].curves.losses

    # To rounding: the fastest way to run replicas is chosen by timing, and each adds up in an order of its own.
    np.testing.assert_allclose(losses(1), losses(1), rtol=1e-9)
    assert not np.allclose(losses(1), losses(2), rtol=1e-3)


def test_an_interruption_carries_what_is_known(many_modes):
    seen = []

    def interrupt(what, done, total):
        seen.append(what)
        if len(set(seen)) == 2 and done > 0:
            raise KeyboardInterrupt

    with pytest.raises(ProbeInterruptedError) as caught:
        probe(many_modes, on_run=interrupt, **SHORT)
    result = caught.value.result
    assert len(result.runs) == 1
    assert result.interrupted
    assert result.outcome == "inconclusive"


@pytest.mark.parametrize("optimizer", ["zo-adam", "gd"])
def test_the_document_has_what_the_contract_names(optimizer, many_modes):
    document = probe(many_modes, optimizer=optimizer, ratios=(0.7, 1.4), steps=20, replicas=2).to_dict()
    assert document["schema"] == "zoscope.probe/1"
    assert document["optimizer"] == optimizer
    assert {"exact", "ci95"} <= document["threshold"].keys()
    wanted = [
        "lr",
        "ratio",
        "side",
        "growth_predicted",
        "steps",
        "replicas",
        "diverged",
        "loss_start",
        "loss_end",
        "verdict",
    ]
    assert all(set(wanted) <= run.keys() for run in document["runs"])
    assert isinstance(document["confirmed"], bool)
    json.dumps(document, allow_nan=False)


@pytest.mark.parametrize("width", [80, 120])
def test_the_report_fits(width, many_modes):
    from rich.console import Console

    result = probe(many_modes, optimizer="zo-adam", ratios=(0.7, 1.4), steps=20, replicas=2)
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(result))
    text = console.export_text()
    assert "adaptive" in text
    assert all(len(line) <= width for line in text.splitlines())


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd"},
        {"optimizer": "zo-zo-gd"},
        {"optimizer": None},
        {"ratios": "0.8"},
        {"ratios": object()},
        {"growth": None},
        {"edge_rtol": None},
        {"edge": "yes"},
        {"betas": (0.9,)},
        {"ratios": (0.0,)},
        {"lr": -1.0},
        {"replicas": 0},
        {"growth": 1.0},
        {"mu": 0.0},
        {"edge_rtol": 0.0},
        {"assume_threshold": -1.0},
        {"steps": 0},
        {"batch_size": 4, "linearized": True},
    ],
)
def test_bad_arguments_are_refused(options, many_modes):
    with pytest.raises(ValueError, match=next(iter(options)).split("_")[0]):
        probe(many_modes, **options)


def test_random_batches_run_and_are_said():
    torch.manual_seed(0)
    model = nn.Linear(10, 3).double()
    x, y = torch.randn(32, 10, dtype=torch.float64), torch.randn(32, 3, dtype=torch.float64)
    problem = zoscope.Problem.from_criterion(model, [(x, y)], nn.MSELoss())
    result = probe(problem, batch_size=8, steps=10, replicas=2)
    assert "mini-batch" in {notice.code for notice in result.warnings}
    # What is only known of full batches is not shown.
    assert {(run.rate_predicted, run.growth_predicted, run.prediction) for run in result.runs} == {(None, None, None)}
    assert "ρ per step" not in str(result)


def test_a_tiny_loss_is_judged_by_its_own_scale():
    basis, _ = torch.linalg.qr(torch.randn(60, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    matrix = (basis * torch.linspace(0.5, 1.5, 60, dtype=torch.float64)) @ basis.T
    start = 1e-6 * torch.ones(60, dtype=torch.float64)  # far below μ = 1e-3: the smoothed loss is 1e6 times the loss
    problem = zoscope.Problem.from_function(lambda x: 0.5 * x @ (matrix @ x), start)
    result = probe(problem, ratios=(0.7, 1.4), **SHORT)
    assert result.outcome == "confirmed", result.reason
