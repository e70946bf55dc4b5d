import numpy as np
import pytest

from zoscope import Estimate
from zoscope.analysis.measurement import HORIZONS, MeasuredOperator, ThresholdQuery, optimizer_row
from zoscope.curvature.slq import Curvature, Eigenvalue
from zoscope.registry import DEFAULT_FAMILIES
from zoscope.theory.quadratic import GradientMeasure, QuadraticModel
from zoscope.theory.rules import GAUSSIAN, update_rule
from zoscope.theory.spectrum import SampledSpectrum

POSITIVE = np.geomspace(1e-3, 10, 30)
INDEFINITE = np.concatenate([POSITIVE, -np.geomspace(1e-3, 1, 8)])


def exact_curvature(eigenvalues: np.ndarray) -> Curvature:
    spectrum = SampledSpectrum.exact(eigenvalues)
    positive = spectrum.fine.positive
    return Curvature(
        trace=spectrum.trace_of(lambda x: x),
        frobenius_sq=spectrum.trace_of(np.square),
        lambda_max=Eigenvalue(eigenvalues.max(), 0.0, True),
        lambda_min=Eigenvalue(eigenvalues.min(), 0.0, True),
        trace_positive=spectrum.trace_of(lambda x: np.maximum(x, 0)),
        negative_mass=float(-eigenvalues[eigenvalues < 0].sum()),
        effective_rank=positive.trace**2 / max(positive.frobenius_sq, 1e-300),
        method="dense",
        num_hvps=0,
        seconds=0.0,
        spectrum=spectrum,
    )


def row(eigenvalues, *, name="gd", steps=100, gradient=None, descent=None, lr=None):
    measured = MeasuredOperator("hessian", exact_curvature(eigenvalues), gradient)
    return optimizer_row(
        measured,
        ThresholdQuery(steps, "binding", lr, 1.0, GAUSSIAN),
        rule=update_rule(name),
        settings={},
        descent=descent,
    )


@pytest.mark.parametrize("name", DEFAULT_FAMILIES)
def test_the_bounds_of_a_positive_spectrum_are_nested(name: str) -> None:
    found = row(POSITIVE, name=name)
    chain = [found.zo_lower, found.lower_tight, found.exact.value, found.upper_tight, found.zo_upper]
    assert chain == sorted(chain)
    assert found.exact.value < found.horizon.upper < found.fo


def test_both_horizons_of_a_positive_spectrum_agree() -> None:
    horizon = row(POSITIVE).horizon
    assert horizon.lower == horizon.upper == horizon.ci95[0] == horizon.ci95[1]


def test_negative_curvature_lowers_the_full_horizon_only() -> None:
    found, positive = row(INDEFINITE).horizon, row(POSITIVE).horizon
    assert found.lower < found.upper == pytest.approx(positive.upper)


@pytest.mark.parametrize("steps", [1, 1000, 2500])
def test_the_curve_holds_the_planned_horizon_in_its_place(steps: int) -> None:
    horizon = row(POSITIVE, steps=steps).horizon
    shown = [point.steps for point in horizon.curve]
    assert shown == sorted({*HORIZONS, steps})
    assert horizon.planned.upper.value == horizon.upper


def test_a_low_descent_threshold_binds() -> None:
    found = row(POSITIVE, descent=Estimate(1e-4))
    assert (found.binding.name, found.binding.value) == ("descent", 1e-4)
    assert found.times_below_fo == pytest.approx(found.fo / 1e-4)


def test_the_predicted_step_size_beats_its_neighbours() -> None:
    gradient = GradientMeasure(np.array([0.5]), np.array([0.3]))
    found = row(np.concatenate([POSITIVE, [-1e-2]]), gradient=gradient)

    def final(lr: float) -> float:
        spectrum = exact_curvature(POSITIVE).spectrum.fine
        return QuadraticModel(spectrum, found.rule, gradient=gradient, loss=1.0).loss_curve(lr, 100)[-1]

    best = final(found.predicted_lr)
    assert best <= min(final(0.9 * found.predicted_lr), final(1.1 * found.predicted_lr))


def test_in_doubt_no_step_size_is_said_to_be_the_best() -> None:
    found = row(INDEFINITE, gradient=GradientMeasure(np.array([0.5]), np.array([0.3])))
    assert found.doubts == ("ends-apart",)
    assert found.predicted_lr is None
    assert found.to_dict()["zo"]["provisional"] is True


def test_a_steep_start_is_doubted() -> None:
    gradient = GradientMeasure(np.array([0.01]), np.array([2.0]))
    found = row(POSITIVE, gradient=gradient, steps=1000)
    assert found.doubts == ("gradient-not-small",)
    assert found.recommended == pytest.approx(0.5 * found.horizon.upper)  # the lower end at 300 steps is above it


def test_ends_far_apart_make_a_range() -> None:
    found = row(INDEFINITE, steps=30_000)
    assert found.horizon.upper > 3 * found.horizon.lower
    low, high = found.recommended_range
    assert high == found.recommended
    assert low < 0.7 * 1.01 * found.horizon.lower
    assert row(POSITIVE).recommended_range is None


def test_without_a_gradient_neither_descent_nor_prediction_is_defined() -> None:
    found = row(POSITIVE)
    assert found.descent is None
    assert found.predicted_lr is None


def test_zero_curvature_limits_nothing() -> None:
    found = row(np.zeros(3), lr=1.0)
    document = found.to_dict()
    assert document["fo"] is None
    assert document["zo"]["exact"] is None
    assert document["zo"]["binding"] == {"name": "horizon", "value": None}
    assert document["zo"]["recommended"] is None
    assert document["verdict"] == {
        "lr": 1.0,
        "steps": 100,
        "ratio": 0.0,
        "outlook": "stable",
        "blow_up": [None, None],
        "doubling": None,
        "descends": None,
    }
