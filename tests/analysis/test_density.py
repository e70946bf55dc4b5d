import json
import math

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from torch import nn

import zoscope
from zoscope import NumericalError, Problem, SpectrumResult
from zoscope.theory.density import density
from zoscope.theory.spectrum import SampledSpectrum

SEEDS = 10


def bulk_and_outliers(size: int = 600) -> torch.Tensor:
    """Outliers, and a bulk that spans five decades on both sides of zero."""
    generator = torch.Generator().manual_seed(1)
    values = torch.exp(2 * torch.randn(size, generator=generator, dtype=torch.float64) - 4)
    values[torch.rand(size, generator=generator) < 0.3] *= -0.3
    values[:5] = torch.tensor([40.0, 20.0, 15.0, 8.0, 6.0], dtype=torch.float64)
    return values


VALUES = bulk_and_outliers()


def rotated(eigenvalues: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(eigenvalues), len(eigenvalues), generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(noise)[0]
    matrix = (basis * eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2


def quadratic(eigenvalues: torch.Tensor) -> Problem:
    h = rotated(eigenvalues)
    return Problem.from_function(lambda x: 0.5 * x @ h @ x, torch.ones(len(h), dtype=torch.float64))


def network() -> Problem:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (40,), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Sequential(nn.Linear(20, 12), nn.Tanh()))
        model.append(nn.Linear(12, 3)).double()
    return Problem.from_criterion(model, [(x, y)], nn.CrossEntropyLoss())


@pytest.fixture(scope="module", params=[3, pytest.param(SEEDS, marks=pytest.mark.slow)])
def sampled(request: pytest.FixtureRequest) -> list[SpectrumResult]:
    problem = quadratic(VALUES)
    given = {"method": "deflated-slq", "device": "cpu", "max_hvps": 240}
    return [zoscope.spectrum(problem, seed=seed, **given) for seed in range(request.param)]


# --- the density ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dense", "deflated-slq"])
def test_the_density_integrates_to_the_number_of_parameters(method: str) -> None:
    found = zoscope.spectrum(quadratic(VALUES), method=method, device="cpu").density
    assert trapezoid(found.values, found.positions) == pytest.approx(len(VALUES), rel=1e-5)


def test_a_dense_spectrum_has_no_band() -> None:
    found = zoscope.spectrum(quadratic(VALUES), method="dense", device="cpu")
    assert found.density.half_widths.max() < 1e-6 * found.density.values.max()
    assert len(found.outliers) == len(VALUES)


def test_the_band_covers_the_smoothed_density(sampled: list[SpectrumResult]) -> None:
    exact = SampledSpectrum.exact(VALUES.numpy())
    covered = []
    for result in sampled:
        found = result.density
        truth = density(exact, scale=found.scale)
        true_values = np.interp(found.positions, truth.positions, truth.values)
        seen = true_values > 1e-3 * true_values.max()
        missed = np.abs(found.values - true_values) > found.half_widths + 1e-9 * true_values.max()
        covered.append(1 - missed[seen].mean())
    assert np.mean(covered) >= 0.95
    assert np.mean(np.array(covered) >= 0.9) >= 0.9


def test_the_band_is_worth_looking_at(sampled: list[SpectrumResult]) -> None:
    assert np.median([result.density.error for result in sampled]) <= 0.1
    assert np.median([result.density.scale for result in sampled]) <= 0.1


def test_counts_by_decade_hold_the_true_ones(sampled: list[SpectrumResult]) -> None:
    values, covered = VALUES.numpy(), []
    for result in sampled:
        assert sum(part.count.value for part in result.decades) == pytest.approx(len(values))
        for part in result.decades:
            inside = values[(part.lower <= values) & (values < part.upper)]
            covered.append(
                abs(part.count.value - len(inside)) <= part.count.half_width + 0.5
                and abs(part.total.value - inside.sum()) <= part.total.half_width + 1e-3 * np.abs(inside).sum()
            )
    assert np.mean(covered) >= 0.95


# --- the ends ---------------------------------------------------------------------------------------------------------


def test_the_ends_are_eigenvalues_in_order(sampled: list[SpectrumResult]) -> None:
    exact = np.sort(VALUES.numpy())
    for result in sampled:
        assert len(result.top) == 10
        for ranked, truth in ((result.top, exact[::-1]), (result.bottom, exact)):
            assert len(ranked) >= 3
            for found, expected in zip(ranked, truth, strict=False):
                assert found.value == pytest.approx(expected, rel=0.02) or not found.converged
                assert np.abs(exact - found.value).min() <= found.residual + 1e-9


def test_all_eigenvalues_of_a_small_problem_are_listed_once() -> None:
    found = zoscope.spectrum(quadratic(torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)), top=2, device="cpu")
    assert [end.value for end in found.top] == pytest.approx([3.0, 0.5])
    assert [end.value for end in found.bottom] == pytest.approx([-1.0])


def test_what_has_not_converged_has_no_place_in_the_order() -> None:
    few = zoscope.spectrum(quadratic(VALUES), method="deflated-slq", max_hvps=20, device="cpu")
    assert 1 <= len(few.bottom) < 10
    assert not few.bottom[0].converged


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_traces_by_layer_are_those_of_the_diagonal_blocks(curvature: str) -> None:
    problem = network()
    exact = zoscope.spectrum(problem, curvature=curvature, method="dense", by_layer=True, device="cpu")
    assert [(layer.name, layer.num_params) for layer in exact.layers] == [("0", 140), ("2.0", 252), ("3", 39)]
    assert sum(layer.trace.value for layer in exact.layers) == pytest.approx(exact.curvature.trace.value)
    covered = []
    for seed in range(SEEDS):
        found = zoscope.spectrum(
            problem, curvature=curvature, method="deflated-slq", max_hvps=60, by_layer=True, device="cpu", seed=seed
        )
        total = sum(layer.trace.value for layer in found.layers)
        assert total == pytest.approx(found.curvature.trace.value, rel=1e-9)
        if curvature == "ggn":  # has no negative eigenvalues that could make its trace so
            assert sum(layer.share for layer in found.layers) == pytest.approx(1)
        covered += [
            abs(layer.trace.value - truth.trace.value) <= layer.trace.half_width + 1e-9
            for layer, truth in zip(found.layers, exact.layers, strict=True)
        ]
    assert np.sum(covered) >= 26  # P(fewer of 30) < 2 % at a true coverage of 95 %


def test_traces_by_layer_take_no_further_product() -> None:
    problem = network()
    plain, split = (
        zoscope.spectrum(problem, method="deflated-slq", max_hvps=80, by_layer=by_layer, device="cpu")
        for by_layer in (False, True)
    )
    assert plain.num_hvps == split.num_hvps
    assert plain.layers is None


def test_only_the_chosen_parameters_count() -> None:
    found = zoscope.spectrum(network(), params=r"^2\.", by_layer=True, device="cpu")
    assert [(layer.name, layer.num_params) for layer in found.layers] == [("2.0", 252)]


# --- options and documents --------------------------------------------------------------------------------------------


def test_the_document_is_json_and_says_what_was_measured() -> None:
    result = zoscope.spectrum(network(), method="deflated-slq", max_hvps=60, by_layer=True, seed=3, device="cpu", top=2)
    found = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert found["schema"] == "zoscope.spectrum/1"
    assert (found["seed"], found["device"], found["dtype"]) == (3, "cpu", "float64")
    assert set(found["curvature"]) == {"hessian"}
    assert [set(end) for end in found["top"]] == [{"value", "residual", "converged"}] * 2
    arrays = [found["density"][name] for name in ("position", "eigenvalue", "value", "lower", "upper")]
    assert len({len(array) for array in arrays}) == 1
    assert all(low >= 0 for low in found["density"]["lower"])
    assert found["layers"][0]["trace"]["stderr"] > 0
    assert found["num_hvps"] <= 60 + 1  # one more checks that products repeat


def test_a_seed_fixes_the_result() -> None:
    problem = network()
    first, same, other = (
        zoscope.spectrum(problem, method="deflated-slq", max_hvps=60, seed=seed, device="cpu") for seed in (0, 0, 1)
    )
    assert first.curvature.trace == same.curvature.trace != other.curvature.trace


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_a_multiple_of_the_identity_has_a_spectrum(value: float) -> None:
    problem = Problem.from_function(lambda x: 0.5 * value * (x * x).sum() + x.sum() ** 3 * 0, torch.ones(50))
    for method in ("dense", "deflated-slq"):
        result = zoscope.spectrum(problem, method=method, by_layer=True, device="cpu", max_hvps=100)
        assert result.top[0].value == pytest.approx(value)
        assert sum(part.count.value for part in result.decades) == pytest.approx(50)
        assert result.layers[0].trace.value == pytest.approx(50 * value)


def test_a_precision_out_of_reach_is_said_and_with_strict_raised() -> None:
    problem = quadratic(VALUES)
    options = {"method": "deflated-slq", "max_hvps": 24, "rtol": 1e-4, "device": "cpu"}
    assert "precision" in {notice.code for notice in zoscope.spectrum(problem, **options).warnings}
    with pytest.raises(NumericalError, match="--rtol"):
        zoscope.spectrum(problem, **options, strict=True)


def test_forward_passes_have_no_spectrum() -> None:
    with pytest.raises(ValueError, match=r"curvature must be one of hessian, ggn, got 'forward'"):
        zoscope.spectrum(network(), curvature="forward", device="cpu")


@pytest.mark.parametrize("bad", [{"top": 0}, {"rtol": 0.0}, {"max_hvps": 0}, {"method": "magic"}])
def test_bad_arguments_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        zoscope.spectrum(network(), **bad)


def test_loss_and_gradient_that_are_not_finite_are_an_error() -> None:
    problem = Problem.from_function(lambda x: x.abs().sqrt().sum(), torch.zeros(3))
    with pytest.raises((NumericalError, zoscope.SpecError)):
        zoscope.spectrum(problem, device="cpu")


def test_the_result_prints_itself_in_a_notebook() -> None:
    shown = zoscope.spectrum(network(), device="cpu", by_layer=True).report(verbose=True)._repr_mimebundle_()
    assert "Trace by layer" in shown["text/plain"]
    assert math.isfinite(len(shown["text/html"]))
