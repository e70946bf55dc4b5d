"""``zoscope.bounds(curvature="forward")``: what forward passes can know, and null for the rest."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import zoscope
from zoscope import NumericalError, UsageError
from zoscope.analysis.estimate import KindCost, estimate, recommended
from zoscope.theory.rules import update_rule
from zoscope.theory.spectrum import Spectrum
from zoscope.theory.stability import StabilityCondition

DIMENSION = 80


def rotated(eigenvalues, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator).double())[0]
    return (basis * torch.as_tensor(eigenvalues).double()) @ basis.T


def black_box(eigenvalues):
    """A quadratic that leaves torch: NumPy in, a Python float out."""
    h = rotated(eigenvalues).numpy()

    def loss(x):
        values = np.asarray(x)
        return float(0.5 * values @ h @ values)

    start = torch.randn(len(h), generator=torch.Generator().manual_seed(1)).double()
    return zoscope.Problem.from_function(loss, start)


POSITIVE = np.geomspace(1e-3, 5.0, DIMENSION)
INDEFINITE = np.concatenate([POSITIVE, -0.4 * POSITIVE[::2]])


def forward(problem, **options):
    return zoscope.bounds(problem, curvature="forward", **{"max_hvps": 200, "device": "cpu", **options})


@pytest.mark.parametrize("name", ["gd", "gdm"])
def test_the_interval_holds_the_exact_threshold_of_a_positive_case(name):
    exact = StabilityCondition(update_rule(name)).threshold(Spectrum.of(POSITIVE))
    hits = 0
    for seed in range(20):
        found = forward(black_box(POSITIVE), optimizers=(name,), seed=seed).optimizers[name].forward
        hits += found.lower.interval[0] <= exact <= found.upper.interval[1]
    assert hits >= 19, hits


@pytest.mark.parametrize("name", ["gd", "gdm"])
def test_the_upper_bound_holds_on_an_indefinite_case(name):
    exact = StabilityCondition(update_rule(name)).threshold(Spectrum.of(INDEFINITE))
    hits = 0
    for seed in range(20):
        found = forward(black_box(INDEFINITE), optimizers=(name,), seed=seed).optimizers[name].forward
        hits += exact <= found.upper.interval[1]
    assert hits >= 19, hits


def perceptron():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).double()
    x, y = torch.randn(16, 6).double(), torch.randint(0, 3, (16,))
    return zoscope.Problem.from_criterion(model, (x, y), nn.CrossEntropyLoss(), batch_size=16)


@pytest.mark.parametrize("name", ["gd", "gdm", "adam"])
def test_descent_thresholds_agree_with_those_of_the_spectrum(name):
    known = zoscope.bounds(perceptron(), optimizers=(name,), device="cpu").optimizers[name].descent
    found = forward(perceptron(), optimizers=(name,), max_hvps=600).optimizers[name]
    # Adam's P is √b‖g‖ here and between that and √(a+b)‖g‖ in truth: nearly the former for most parameters.
    slack = 0.15 * known if name == "adam" else 0.0
    assert abs(found.descent - known) <= found.forward.descent.half_width + slack


def test_the_document_is_null_where_forward_passes_are_blind():
    document = forward(black_box(POSITIVE)).to_dict()
    json.dumps(document, allow_nan=False)
    curvature, gd = document["curvature"]["hessian"], document["optimizers"]["gd"]
    assert curvature["method"] == "forward"
    assert {row["operator"] for row in document["optimizers"].values()} == {"hessian"}
    assert all(curvature[key] is None for key in ("lambda_max", "lambda_min", "trace_positive", "negative_mass"))
    assert (gd["fo"], gd["zo"]["exact"], gd["zo"]["exact_ci95"], gd["zo"]["horizon"]) == (None, None, None, None)
    assert 0 < gd["zo"]["lower"] < gd["zo"]["upper"]
    assert gd["zo"]["descent"] == gd["forward"]["descent"]["value"]
    assert gd["forward"]["lower"]["assumes"] == "H is positive semidefinite"
    assert gd["forward"]["upper"]["assumes"] is None
    assert gd["zo"]["binding"]["value"] == min(gd["zo"]["descent"], gd["zo"]["upper"])
    least = min(gd["zo"]["binding"]["value"], gd["zo"]["lower"])
    assert gd["zo"]["recommended"] == pytest.approx(min(0.7 * least, 0.8 * gd["zo"]["limit"]["ci95"][0]))


@pytest.mark.parametrize(("factor", "outlook"), [(0.3, "stable"), (1.0, "uncertain"), (3.0, "unstable")])
def test_a_step_size_is_judged_by_the_interval(factor, outlook):
    bounds = forward(black_box(POSITIVE)).optimizers["gd"]
    lr = factor * 0.5 * (bounds.zo_lower + bounds.zo_upper)
    verdict = forward(black_box(POSITIVE), lr=lr).optimizers["gd"].verdict
    assert verdict.outlook == outlook
    assert verdict.blow_up is None


def test_strict_raises_where_the_precision_is_missed():
    with pytest.raises(NumericalError, match=r"--rtol 0.001\) was not reached"):
        forward(black_box(POSITIVE), rtol=1e-3, strict=True)
    assert any(notice.code == "precision" for notice in forward(black_box(POSITIVE), rtol=1e-3).warnings)


@pytest.mark.parametrize("threshold", ["exact", "horizon"])
def test_thresholds_that_need_a_spectrum_are_refused(threshold):
    with pytest.raises(UsageError, match=r"needs the spectrum"):
        forward(black_box(POSITIVE), threshold=threshold)


def test_a_stored_preconditioner_leaves_adam_out(tmp_path):
    state = f"state:{tmp_path / 'state.pt'}"
    found = forward(black_box(POSITIVE), preconditioner=state)
    assert list(found.optimizers) == ["gd", "gdm"]
    assert any(notice.code == "adam-forward" for notice in found.warnings)
    with pytest.raises(UsageError, match=r"knows Adam's preconditioner only as"):
        forward(black_box(POSITIVE), preconditioner=state, optimizers=("adam",))


def test_kinks_and_indefiniteness_are_said():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(8, 4)
    problem = zoscope.Problem.from_criterion(model, [(x, torch.zeros(8, 1))], nn.MSELoss())
    (kinks,) = [notice.message for notice in forward(problem).warnings if notice.code == "kinks"]
    assert "depends on h" in kinks
    assert "less or more" in kinks
    codes = {notice.code for notice in forward(black_box(np.concatenate([POSITIVE, -POSITIVE]))).warnings}
    assert "indefinite-hessian" in codes


def test_steps_that_disagree_are_said_with_what_the_bars_contain():
    def steps(x):
        return float(torch.floor(10 * x).sum())

    found = forward(zoscope.Problem.from_function(steps, torch.zeros(12).double()))
    (message,) = [notice.message for notice in found.warnings if notice.code == "step-size-check"]
    assert "along single directions by about" in message
    assert "the Hessian may lie outside" in message


def test_no_bound_that_assumes_a_positive_hessian_is_shown_for_a_negative_trace():
    positive, negative = (
        str(forward(black_box(sign * POSITIVE), optimizers=("gd",)).report(verbose=True)) for sign in (1, -1)
    )
    short, row = [line for line in negative.splitlines() if line.startswith("GD") and "∞" in line]
    assert short.split()[1:4] == ["∞", "–", "∞"], short
    assert row.split()[1:] == ["∞", "∞", "–"], row
    assert not [line for line in positive.splitlines() if line.startswith("GD") and "–" in line]


def test_a_model_in_half_precision_is_measured_as_it_is():
    problem = perceptron()
    x, y = problem.batches[0]
    model = problem.model.to(torch.bfloat16)
    found = forward(zoscope.Problem.from_criterion(model, [(x.to(torch.bfloat16), y)], nn.CrossEntropyLoss()))
    assert found.dtype == "bfloat16"
    assert not {"upcast", "half-precision"} & {notice.code for notice in found.warnings}
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_a_check_can_be_held_against_forward_passes():
    bounds = forward(black_box(POSITIVE)).optimizers["gd"]
    for factor, status in ((0.2, "pass"), (5.0, "fail")):
        report = zoscope.check(
            black_box(POSITIVE),
            optimizer="zo-gd",
            lr=factor * bounds.binding.value,
            curvature="forward",
            max_hvps=200,
            device="cpu",
        )
        assert [result.status for result in report.checks] == [status]


def test_the_cost_of_every_kind_is_estimated():
    found = estimate(perceptron(), device="cpu")
    document = found.to_dict()
    json.dumps(document, allow_nan=False)
    assert set(document["curvature"]) == {"hessian", "ggn", "forward"}
    costs = {cost.kind: cost for cost in found.kinds}
    assert costs["hessian"].products == 103  # dense: as many as parameters
    assert costs["forward"].total_bytes < costs["hessian"].total_bytes
    assert all(cost.seconds > 0 for cost in found.kinds)
    assert found.recommended == "hessian"


def test_forward_passes_are_recommended_where_nothing_else_works():
    found = estimate(black_box(POSITIVE), device="cpu")
    assert found.recommended == "forward"
    assert "cannot be differentiated" in found.kinds[0].problem or "numpy" in found.kinds[0].problem


def cost(kind, *, fixed, batch):
    return KindCost(kind, 100, 600, 1.0, 100.0, fixed, batch, largest=10)


@pytest.mark.parametrize(
    ("available", "kind", "hint"),
    [(2000, "hessian", "it fits"), (300, "hessian", "--micro-batch 4"), (120, "forward", "")],
)
def test_the_recommendation_is_the_most_telling_kind_that_fits(available, kind, hint):
    kinds = [cost("hessian", fixed=200, batch=100), cost("forward", fixed=10, batch=10)]
    chosen, reason = recommended(kinds, available=available)
    assert chosen == kind
    assert hint in reason


def test_errors_of_bounds_shrink_with_the_budget():
    coarse, fine = (forward(black_box(POSITIVE), rtol=1e-4, max_hvps=n).optimizers["gd"].forward for n in (100, 1600))
    for name in ("lower", "upper", "descent"):
        assert getattr(fine, name).half_width < 0.6 * getattr(coarse, name).half_width
        assert math.isfinite(getattr(fine, name).half_width)
