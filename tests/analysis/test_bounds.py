import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from torch import nn

import zoscope
from zoscope import BoundsResult, NumericalError, Problem
from zoscope.registry import DEFAULT_FAMILIES
from zoscope.theory.rules import GAUSSIAN, update_rule
from zoscope.theory.spectrum import Spectrum
from zoscope.theory.stability import ModeCoupling, StabilityCondition

POSITIVE = torch.logspace(-2, 1, 30, dtype=torch.float64)
INDEFINITE = torch.cat([POSITIVE, -torch.logspace(-2, 0, 6, dtype=torch.float64)])


def rotated(eigenvalues: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(eigenvalues), len(eigenvalues), generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(noise)[0]
    matrix = basis @ torch.diag(eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2


def start(size: int) -> torch.Tensor:
    return 0.01 * torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def quadratic(eigenvalues: torch.Tensor) -> Problem:
    h = rotated(eigenvalues)
    return Problem.from_function(lambda x: 1 + 0.5 * x @ h @ x, start(len(eigenvalues)))


def measured(problem: Problem, **options) -> BoundsResult:
    return zoscope.bounds(problem, device="cpu", **{"steps": 100, **options})


# --- against the closed form ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eigenvalues", [POSITIVE, INDEFINITE], ids=["positive", "indefinite"])
@pytest.mark.parametrize("name", ["gd", "gdm"])
def test_a_small_problem_has_the_bounds_of_its_spectrum(eigenvalues: torch.Tensor, name: str) -> None:
    found = measured(quadratic(eigenvalues), optimizers=(name,), beta=0.5).optimizers[name]
    rule, spectrum = update_rule(name, beta=0.5), Spectrum.of(eigenvalues.numpy())
    trace, largest = float(eigenvalues.sum()), 10.0
    speed = 1 - rule.momentum
    signal = 2 / (1 + rule.momentum)
    assert found.fo == pytest.approx(2 * (1 + rule.momentum) / largest, rel=1e-8)
    assert found.zo_upper == pytest.approx(2 * speed / trace, rel=1e-8)
    assert found.zo_lower == pytest.approx(2 * speed / (trace + signal * largest), rel=1e-8)
    assert found.exact.value == pytest.approx(StabilityCondition(rule).threshold(spectrum), rel=1e-8)
    for end, version in ((found.horizon.lower, "full"), (found.horizon.upper, "positive")):
        expected = StabilityCondition(rule, steps=100, version=version).threshold(spectrum)
        assert end == pytest.approx(expected, rel=1e-8)


def test_the_descent_threshold_is_where_the_expected_loss_stops_falling() -> None:
    h, x = rotated(INDEFINITE), start(36)
    g = h @ x
    rayleigh, trace = float(g @ h @ g / (g @ g)), float(h.trace())
    found = measured(quadratic(INDEFINITE), optimizers=("gd",)).optimizers["gd"]
    assert found.descent == pytest.approx(2 / (trace + 2 * rayleigh), rel=1e-8)


def test_adam_is_bounded_by_the_spectrum_of_its_preconditioned_hessian() -> None:
    h, x = rotated(INDEFINITE), start(36)
    g = h @ x
    p = (2 * g.square() + g @ g).sqrt() + 1e-8
    scaled = h / torch.outer(p.sqrt(), p.sqrt())
    spectrum = Spectrum.of(torch.linalg.eigvalsh(scaled).numpy())
    result = measured(quadratic(INDEFINITE), optimizers=("adam",))
    found, rule = result.optimizers["adam"], update_rule("adam")
    assert found.operator == "preconditioned_hessian"
    assert found.exact.value == pytest.approx(StabilityCondition(rule).threshold(spectrum), rel=1e-8)
    assert found.fo == pytest.approx(38 / spectrum.lambda_max, rel=1e-8)
    big = torch.diag(p)
    commutator = torch.linalg.matrix_norm(big @ h - h @ big) / torch.linalg.matrix_norm(big @ h)
    assert found.commutator.value == pytest.approx(float(commutator), rel=1e-8)
    flat = g / p
    denominator = (1 + 0.1 / 1.9) * flat @ h @ flat + (h.diagonal() / p.square()).sum() * (g @ g)
    assert found.descent == pytest.approx(float(2 * g @ flat / denominator), rel=1e-8)


def test_a_stored_state_preconditions_as_well(tmp_path: Path) -> None:
    model = nn.Linear(4, 1, bias=False).double()
    data = torch.eye(4, dtype=torch.float64)
    problem = Problem(model, [data], lambda m, batch: m(batch).square().mean())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "adam.pt")
    p = (1 - 0.9**3) * (model.weight.grad[0].abs() + 1e-8)  # every step saw the same gradient
    found = measured(problem, optimizers=("adam",), preconditioner=f"state:{tmp_path / 'adam.pt'}")
    assert found.curvature["preconditioned_hessian"].trace.value == pytest.approx(float((0.5 / p).sum()), rel=1e-8)


def test_a_preconditioner_that_does_not_commute_is_taken_exactly(tmp_path: Path) -> None:
    h, parameter = rotated(POSITIVE), nn.Parameter(start(30))
    problem = Problem.from_function(lambda x: 1 + 0.5 * x @ h @ x, start(30))
    optimizer = torch.optim.Adam([parameter], lr=0.0)
    parameter.grad = torch.logspace(-1, 1, 30, dtype=torch.float64)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "adam.pt")
    p = 0.1 * (parameter.grad + 1e-8)
    found = measured(problem, optimizers=("adam",), preconditioner=f"state:{tmp_path / 'adam.pt'}", betas=(0.9, 0.999))
    row, rule = found.optimizers["adam"], update_rule("adam")
    eigenvalues, modes = torch.linalg.eigh(h / torch.outer(p.sqrt(), p.sqrt()))
    coupling = (modes.T @ torch.diag(1 / p) @ modes) * (modes.T @ torch.diag(p) @ modes)
    exact = ModeCoupling(eigenvalues.numpy(), coupling.numpy()).threshold(rule=rule, moments=GAUSSIAN)
    commuting = StabilityCondition(rule).threshold(Spectrum.of(eigenvalues.numpy()))
    assert row.exact.value == pytest.approx(exact, rel=1e-6)
    assert row.exact_if_commuting == pytest.approx(commuting, rel=1e-6)
    assert any(notice.code == "commutator" and "exactly" in notice.message for notice in found.warnings)


def test_directions_and_queries_reach_the_bounds() -> None:
    problem = quadratic(POSITIVE)
    one = measured(problem, optimizers=("gd",)).optimizers["gd"]
    many = measured(problem, optimizers=("gd",), queries=16).optimizers["gd"]
    sphere = measured(problem, optimizers=("gd",), directions="sphere").optimizers["gd"]
    assert one.exact.value < many.exact.value < one.fo
    assert one.exact.value < sphere.exact.value < many.exact.value


def test_the_gauss_newton_matrix_of_a_linear_model_is_its_hessian() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(20, 5, generator=generator).double(), torch.randn(20, 2, generator=generator).double()
    problem = Problem.from_criterion(nn.Linear(5, 2).double(), [(inputs, targets)], nn.MSELoss())
    hessian = measured(problem, optimizers=("gd", "adam"))
    ggn = measured(problem, optimizers=("gd", "adam"), curvature="ggn")
    assert list(ggn.curvature) == ["ggn", "preconditioned_ggn"]
    for name in ("gd", "adam"):
        assert ggn.optimizers[name].exact.value == pytest.approx(hessian.optimizers[name].exact.value, rel=1e-8)


# --- how it is measured -----------------------------------------------------------------------------------------------


def test_sampled_bounds_contain_the_exact_ones_and_reach_the_precision() -> None:
    spectrum = torch.cat(
        [torch.logspace(0, 1.5, 12), 1e-3 * torch.rand(388, generator=torch.Generator().manual_seed(2))]
    )
    problem = quadratic(spectrum.double())
    exact = measured(problem, method="dense")
    sampled = measured(problem, method="deflated-slq", max_hvps=300)
    assert "precision" not in {notice.code for notice in sampled.warnings}
    for name in DEFAULT_FAMILIES:
        truth, found = exact.optimizers[name], sampled.optimizers[name]
        low, high = found.horizon.ci95
        assert low <= truth.horizon.upper <= high
        assert high - low < 0.05 * high
        assert found.exact.half_width > 0


def test_one_pass_serves_gd_and_gdm() -> None:
    result = measured(quadratic(POSITIVE), optimizers=("gd", "gdm"), method="deflated-slq", max_hvps=60)
    assert list(result.curvature) == ["hessian"]
    assert result.num_hvps <= 60 + 2  # one for the gradient, one to see that products repeat


def test_a_missed_precision_is_a_warning_or_an_error() -> None:
    problem, options = quadratic(torch.ones(200).double() + torch.rand(200).double()), {"method": "deflated-slq"}
    result = measured(problem, max_hvps=24, rtol=1e-6, **options)
    assert "precision" in {notice.code for notice in result.warnings}
    with pytest.raises(NumericalError, match="--rtol"):
        measured(problem, max_hvps=24, rtol=1e-6, strict=True, **options)


def test_the_same_seed_gives_the_same_numbers() -> None:
    runs = [measured(quadratic(POSITIVE), method="deflated-slq", max_hvps=40, seed=3).to_dict() for _ in range(2)]
    for run in runs:
        for entry in (run, *run["curvature"].values()):
            entry.pop("seconds")
    assert runs[0] == runs[1]


def test_progress_names_the_operator_and_counts_products() -> None:
    seen = []
    measured(quadratic(POSITIVE), method="deflated-slq", max_hvps=40, on_progress=lambda *told: seen.append(told))
    assert {stage.split(":")[0] for stage, _, _ in seen} == {"hessian", "preconditioned hessian"}
    assert all(isinstance(count, int) for _, count, _ in seen)


def test_params_selects_what_is_varied() -> None:
    problem = Problem(nn.Linear(3, 2).double(), [torch.eye(3).double()], lambda m, batch: m(batch).square().mean())
    assert measured(problem, params="weight").problem.num_params == 6


# --- what is said about it --------------------------------------------------------------------------------------------


def test_the_binding_threshold_can_be_chosen() -> None:
    for name in ("exact", "horizon", "descent"):
        found = measured(quadratic(POSITIVE), optimizers=("gd",), threshold=name).optimizers["gd"]
        assert found.binding.name == name
        assert found.recommended == pytest.approx(0.7 * found.binding.value)


def test_a_stationary_point_has_no_descent_threshold_and_a_collapsed_preconditioner() -> None:
    h = rotated(POSITIVE)
    problem = Problem.from_function(lambda x: 0.5 * x @ h @ x, torch.zeros(30, dtype=torch.float64))
    result = measured(problem, lr=0.1)
    assert {row.descent for row in result.optimizers.values()} == {None}
    assert "preconditioner-collapsed" in {notice.code for notice in result.warnings}


def test_a_linear_loss_limits_no_step_size() -> None:
    result = measured(Problem.from_function(lambda x: x.sum(), torch.ones(3, dtype=torch.float64)), lr=1e3)
    for row in result.optimizers.values():
        assert math.isinf(row.exact.value)
        assert row.recommended is None
        assert row.verdict.outlook == "stable"
    assert "zero-curvature" in {notice.code for notice in result.warnings}
    assert "∞" in result._repr_mimebundle_()["text/plain"]


def test_an_indefinite_hessian_is_announced_with_its_negative_mass() -> None:
    result = measured(quadratic(INDEFINITE))
    (notice,) = [notice for notice in result.warnings if notice.code == "indefinite-hessian"]
    assert f"{float(INDEFINITE[INDEFINITE < 0].sum()):.3g}" in notice.message


def test_the_verdict_compares_with_what_binds() -> None:
    row = measured(quadratic(POSITIVE), optimizers=("gd",), lr=0.123).optimizers["gd"]
    assert row.verdict.ratio == pytest.approx(0.123 / row.binding.value)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizers": ("sgd",)},
        {"optimizers": ()},
        {"steps": 0},
        {"rtol": 0.0},
        {"rtol": math.nan},
        {"max_hvps": 0},
        {"seed": -1},
        {"beta": 1.0},
        {"beta": math.nan},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"eps": -1e-8},
        {"eps": math.nan},
        {"lr": 0.0},
        {"lr": math.inf},
        {"queries": 0},
        {"directions": "cube"},
        {"curvature": "fisher"},
        {"preconditioner": "state:"},
        {"preconditioner": "identity"},
        {"threshold": "fo"},
        {"method": "exact"},
    ],
    ids=str,
)
def test_an_argument_outside_of_its_range_is_refused_before_any_work(options) -> None:
    with pytest.raises(ValueError, match=r"must be|is empty|without a file"):
        measured(Problem.from_function(lambda x: x.sum() / 0, torch.ones(1)), **options)


# --- the document -----------------------------------------------------------------------------------------------------

NUMBER = {"type": ["number", "null"]}
PAIR = {"type": "array", "items": NUMBER, "minItems": 2, "maxItems": 2}


def an_object(**properties) -> dict:
    return {"type": "object", "required": list(properties), "properties": properties}


ESTIMATE = an_object(value=NUMBER, stderr=NUMBER)
EIGENVALUE = an_object(value=NUMBER, residual=NUMBER, converged={"type": "boolean"})
CURVATURE_SCHEMA = an_object(
    trace=ESTIMATE,
    frobenius_sq=ESTIMATE,
    lambda_max=EIGENVALUE,
    lambda_min=EIGENVALUE,
    trace_positive=ESTIMATE,
    negative_mass=NUMBER,
    effective_rank=NUMBER,
    method={"enum": ["dense", "deflated-slq", "forward"]},
    num_hvps={"type": "integer"},
    seconds=NUMBER,
)
POINT = an_object(steps={"type": "integer"}, lower=NUMBER, upper=NUMBER)
HORIZON = an_object(
    steps={"type": "integer"}, lower=NUMBER, upper=NUMBER, ci95=PAIR, curve={"type": "array", "items": POINT}
)
ZEROTH_ORDER = an_object(
    lower=NUMBER,
    upper=NUMBER,
    lower_tight=NUMBER,
    upper_tight=NUMBER,
    exact=NUMBER,
    exact_ci95=PAIR,
    ci95=PAIR,
    tight_ci95=PAIR,
    descent_ci95={"anyOf": [PAIR, {"type": "null"}]},
    horizon=HORIZON,
    descent=NUMBER,
    binding=an_object(name={"enum": ["horizon", "descent", "exact"]}, value=NUMBER),
    recommended=NUMBER,
)
OPTIMIZER = an_object(operator={"type": "string"}, fo=NUMBER, zo=ZEROTH_ORDER)
DOCUMENT = an_object(
    schema={"const": "zoscope.bounds/1"},
    zoscope={"const": zoscope.__version__},
    spec={"type": ["string", "null"]},
    device={"type": "string"},
    dtype={"type": "string"},
    seed={"type": "integer"},
    problem=an_object(num_params={"type": "integer"}, num_examples={"type": "integer"}, loss=NUMBER, grad_norm=NUMBER),
    curvature=an_object(hessian=CURVATURE_SCHEMA, preconditioned_hessian=CURVATURE_SCHEMA),
    optimizers=an_object(gd=OPTIMIZER, gdm=OPTIMIZER, adam=OPTIMIZER),
    estimator=an_object(directions={"type": "string"}, queries={"type": "integer"}),
    warnings={"type": "array", "items": an_object(code={"type": "string"}, message={"type": "string"})},
)


@pytest.mark.parametrize("case", ["positive", "indefinite", "flat", "stationary"])
@pytest.mark.parametrize("lr", [None, 0.5])
def test_the_document_is_strict_json_of_the_promised_shape(case: str, lr: float | None) -> None:
    problem = {
        "positive": quadratic(POSITIVE),
        "indefinite": quadratic(INDEFINITE),
        "flat": Problem.from_function(lambda x: x.sum(), torch.ones(3, dtype=torch.float64)),
        "stationary": Problem.from_function(lambda x: x @ x, torch.zeros(3, dtype=torch.float64)),
    }[case]
    document = json.loads(json.dumps(measured(problem, lr=lr, spec="a name").to_dict(), allow_nan=False))
    jsonschema.validate(document, DOCUMENT)
    assert document["optimizers"]["gdm"]["beta"] == 0.9
    assert document["optimizers"]["adam"]["betas"] == [0.9, 0.999]
    assert document["optimizers"]["adam"]["preconditioner"] == "expected"
    for entry in document["optimizers"].values():
        assert entry["operator"] in document["curvature"]


def test_the_document_is_that_of_the_numbers() -> None:
    result = measured(quadratic(INDEFINITE))
    document, row = result.to_dict(), result.optimizers["gd"]
    zo = document["optimizers"]["gd"]["zo"]
    assert (zo["lower"], zo["upper"], zo["exact"]) == (row.zo_lower, row.zo_upper, row.exact.value)
    assert (zo["horizon"]["lower"], zo["horizon"]["upper"]) == (row.horizon.lower, row.horizon.upper)
    assert np.allclose(zo["exact_ci95"], row.exact.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"optimizers": "gdx"}, "optimizers must be one of"),
        ({"optimizers": [None]}, "optimizers must be one of"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"beta": None}, "beta must be a number"),
        ({"rtol": None}, "rtol must be a relative precision"),
        ({"eps": "small"}, "eps must be a finite number"),
        ({"lr": -1.0}, "lr must be a finite number"),
    ],
)
def test_a_bad_argument_is_named_with_what_was_expected(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        zoscope.bounds(quadratic(INDEFINITE), **arguments)


def test_optimizers_are_named_as_on_the_command_line_too() -> None:
    found = zoscope.bounds(quadratic(INDEFINITE), optimizers="zo-gd", device="cpu")
    assert list(found.optimizers) == ["gd"]
    assert "stable for" in str(found.report(verbose=True))


def test_a_preconditioner_that_is_nearly_a_number_costs_no_products() -> None:
    """In 4,000 dimensions no entry of the gradient is near its norm."""
    curvatures = torch.cat([torch.full((3990,), 0.01), torch.linspace(1.0, 5.0, 10)]).double()
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / curvatures
    problem = Problem.from_function(lambda y: 0.5 * (curvatures * y * y).sum(), x)
    together = zoscope.bounds(problem, device="cpu", rtol=0.02, max_hvps=300)
    alone = zoscope.bounds(problem, device="cpu", rtol=0.02, max_hvps=300, optimizers=["adam"])
    assert together.curvature["preconditioned_hessian"].num_hvps == 0
    assert alone.curvature["preconditioned_hessian"].num_hvps > 0
    a, b = together.optimizers["adam"], alone.optimizers["adam"]
    for first, second in ((a.exact, b.exact), (a.horizon.planned.upper, b.horizon.planned.upper)):
        assert abs(first.value - second.value) < first.half_width + second.half_width
    assert a.descent == pytest.approx(b.descent, rel=0.02)
    assert any(notice.code == "measurement" and "no products" in notice.message for notice in together.warnings)


def test_products_add_up_to_what_was_spent() -> None:
    document = measured(quadratic(INDEFINITE), optimizers=("gd", "adam")).to_dict()
    parts = [entry["num_hvps"] for entry in document["curvature"].values()]
    assert document["num_hvps"] == sum(parts) + document["checks"]["num_hvps"]
    assert document["checks"]["num_hvps"] > 0
    assert document["curvature"]["hessian"]["hvp"] == "double-backward"


@pytest.mark.parametrize("curvature", ["hessian", "forward"])
def test_mu_is_judged_where_it_is_asked_about(curvature: str) -> None:
    problem = Problem.from_function(lambda x: torch.exp(2.0 * x).sum(), start(20))
    found = measured(problem, curvature=curvature, mu=0.9, optimizers=("gd",))
    scale = zoscope.perturbation_scale(problem)
    assert found.perturbation is not None
    assert found.perturbation.slope_errors == scale.slope_errors
    assert [notice.code for notice in found.warnings].count("mu") == 1
    assert f"--mu {scale.best:.2g}" in next(notice.message for notice in found.warnings if notice.code == "mu")
    assert "μ  0.9 is not right" in str(found)
    assert f"use {scale.best:.2g}" in str(found)
    document = found.to_dict()
    assert document["mu"] == 0.9
    assert document["perturbation"]["best"] == scale.best
    right = measured(problem, curvature=curvature, mu=scale.best, optimizers=("gd",))
    assert "mu" not in [notice.code for notice in right.warnings]
    assert "perturbation" not in measured(problem, curvature=curvature, optimizers=("gd",)).to_dict()
