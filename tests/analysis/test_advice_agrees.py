"""``bounds`` and ``check`` on the same inputs: neither may say what the other denies."""

import math
from collections.abc import Iterator
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

import zoscope
from zoscope import BoundsResult, OptimizerBounds, UsageError
from zoscope.analysis import measurement as rows
from zoscope.analysis.advice import GATE
from zoscope.analysis.check import _judged
from zoscope.analysis.check_runner import CheckMeasurement
from zoscope.analysis.measurement import MeasuredOperator, Slope, ThresholdQuery, optimizer_row
from zoscope.analysis.minibatch import BatchSpread, MiniBatchModel
from zoscope.analysis.thresholds import Estimator, Verdict
from zoscope.config.load import EMPTY, build_checks, override_tree
from zoscope.curvature.slq import Curvature, Eigenvalue
from zoscope.options import Threshold
from zoscope.registry import DEFAULT_FAMILIES
from zoscope.result import ProblemInfo
from zoscope.theory.minibatch import HessianNoise
from zoscope.theory.quadratic import GradientMeasure
from zoscope.theory.rules import GAUSSIAN, update_rule
from zoscope.theory.spectrum import SampledSpectrum, Spectrum

FACTORS = (0.3, 1.0, 1.1, 1.5, 10.0)
STEPS = (100, 20_000)
STATUS = {"stable": "pass", "uncertain": "warn", "unstable": "fail"}

POSITIVE = np.geomspace(1e-3, 10, 20)
SPECTRA = {
    "positive": POSITIVE,
    "slightly negative": np.concatenate([POSITIVE, [-1e-2]]),
    "indefinite": np.concatenate([POSITIVE, -np.geomspace(1e-3, 3, 8)]),
    "concave": -POSITIVE,
    "flat": np.zeros(4),
}
GRADIENTS = {"none": None, "small": (0.5, 0.01), "large": (0.01, 5.0)}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes longer than all else together, and decides nothing here."""
    monkeypatch.setattr(MiniBatchModel, "blow_up", lambda *_, **__: math.inf)
    monkeypatch.setattr(rows.QuadraticModel, "doubling_times", lambda *_: (math.inf, math.inf))
    monkeypatch.setattr(rows.QuadraticModel, "best_lr", lambda *_, **__: None)


def curvature_of(eigenvalues: np.ndarray, *, noise: float) -> Curvature:
    spectrum = SampledSpectrum.exact(eigenvalues)
    if noise:
        fine = spectrum.fine
        error = (Spectrum(fine.nodes, noise * fine.weights),)
        spectrum = SampledSpectrum(fine, fine, 8, len(eigenvalues), errors=(error,))
    return Curvature(
        trace=spectrum.trace_of(lambda x: x),
        frobenius_sq=spectrum.trace_of(np.square),
        lambda_max=Eigenvalue(float(eigenvalues.max()), 0.0, True),
        lambda_min=Eigenvalue(float(eigenvalues.min()), 0.0, True),
        trace_positive=spectrum.trace_of(lambda x: np.maximum(x, 0)),
        negative_mass=float(-eigenvalues[eigenvalues < 0].sum()),
        effective_rank=5.0,
        method="dense",
        num_hvps=0,
        seconds=0.0,
        spectrum=spectrum,
    )


def spread_of(eigenvalues: np.ndarray, slope: Slope | None) -> BatchSpread:
    rng = np.random.default_rng(0)
    count = len(eigenvalues)
    coupling = 0.1 * rng.uniform(0.5, 1.5, size=(4, count, count)) * np.abs(eigenvalues).mean() ** 2 / count
    noise = HessianNoise(eigenvalues, coupling, coupling.sum(axis=2), (), complete=False)
    squares = rng.uniform(0.5, 1.5, size=4)
    return BatchSpread(4, 64, 0.2, noise, slope, squares, squares, 1.0, 0, 0)


class Case:
    """A measured point; rows of it for any question, without measuring again."""

    def __init__(self, spectrum: str, gradient: str, *, noise: float, batches: bool, doubts: tuple[str, ...]) -> None:
        eigenvalues = SPECTRA[spectrum]
        self.curvature, self.doubts, slope = curvature_of(eigenvalues, noise=noise), doubts, None
        self.measure = None
        if GRADIENTS[gradient] is not None:
            node, square = GRADIENTS[gradient]
            self.measure = GradientMeasure(np.array([node]), np.array([square]))
            trace = self.curvature.trace
            slope = Slope(square, node * square, trace.value, square, trace.half_width)
        self.slope = slope
        spread = spread_of(eigenvalues, slope) if batches else None
        self.measured = MeasuredOperator("hessian", self.curvature, self.measure, batches=spread)

    def row(self, name: str, threshold: str, steps: int) -> OptimizerBounds:
        rule = update_rule(name)
        descent = None if self.slope is None else self.slope.estimate(rule, GAUSSIAN)
        question = ThresholdQuery(steps, threshold, None, 1.0, GAUSSIAN, self.doubts)
        return optimizer_row(self.measured, question, rule=rule, settings={}, descent=descent)

    def verdict(self, row: OptimizerBounds, threshold: str, steps: int, lr: float) -> Verdict:
        """That of the row, with the step size asked about."""
        question = ThresholdQuery(steps, threshold, lr, 1.0, GAUSSIAN, self.doubts)
        assert row.advisor is not None
        advice = row.advisor.at(steps, threshold)
        found = rows._verdict(self.measured, question, row.advisor, advice=advice, minibatch=row.minibatch)
        assert found is not None
        return found

    def measurement(self, name: str) -> CheckMeasurement:
        """As ``check`` has it: steered by the longest horizon, and by whatever another check asked for."""
        result = BoundsResult(
            spec=None,
            device="cpu",
            dtype="float64",
            seed=0,
            steps=STEPS[-1],
            rtol=0.02,
            problem=ProblemInfo(len(self.curvature.spectrum.fine.nodes), 64, 1.0, 1.0),
            curvature={"hessian": self.curvature},
            optimizers={name: self.row(name, "binding", STEPS[-1])},
            estimator=Estimator("gaussian", 1),
            num_hvps=0,
            seconds=0.0,
        )
        return CheckMeasurement.of(result, steps=STEPS, seconds=0.0)


def checked(measurement: CheckMeasurement, name: str, threshold: str, steps: int, lr: float):
    options = {"optimizer": f"zo-{name}", "lr": lr, "steps": steps, "threshold": threshold}
    tree = ("the command line", override_tree(options))
    (config,) = build_checks(EMPTY, overrides=[tree], only=(), needs_spec=False, notices=())
    return _judged(config, measurement, None)  # the third is for plans


def cases() -> Iterator[Case]:
    for spectrum in SPECTRA:
        for gradient in GRADIENTS:
            plain = gradient != "small"
            yield Case(
                spectrum, gradient, noise=0.0 if plain else 0.3, batches=False, doubts=() if plain else ("kinks",)
            )
    yield Case("indefinite", "large", noise=0.02, batches=True, doubts=())
    yield Case("slightly negative", "small", noise=0.02, batches=True, doubts=())


@pytest.mark.parametrize("threshold", get_args(Threshold))
@pytest.mark.parametrize("name", DEFAULT_FAMILIES)
def test_bounds_and_check_agree(name: str, threshold: str) -> None:
    doubted = compared = 0
    for case in cases():
        measurement = case.measurement(name)
        for steps in STEPS:
            plain = case.row(name, threshold, steps)
            if plain.limit is None:
                with pytest.raises(UsageError, match=f"the {threshold} threshold is not known"):
                    checked(measurement, name, threshold, steps, 1.0)
                continue
            doubted += bool(plain.doubts)
            if plain.recommended is not None:
                assert checked(measurement, name, threshold, steps, plain.recommended).status == "pass"
            for factor in FACTORS:
                lr = factor * (plain.recommended or 1.0)
                verdict = case.verdict(plain, threshold, steps, lr)
                check = checked(measurement, name, threshold, steps, lr)
                assert STATUS[verdict.outlook] == check.status
                assert verdict.ratio == check.ratio
                assert check.threshold == plain.limit
                assert check.to_dict()["provisional"] == bool(plain.doubts)
                if factor <= 1 and plain.recommended is not None:
                    assert verdict.outlook == "stable"
                compared += 1
    assert doubted
    assert compared > 80


def test_the_lower_end_at_a_long_horizon_gates_nothing() -> None:
    case = Case("slightly negative", "none", noise=0.0, batches=False, doubts=())
    row = case.row("gd", "binding", 20_000)
    assert row.horizon is not None
    assert row.horizon.lower < 0.5 * row.horizon.upper
    assert checked(case.measurement("gd"), "gd", "binding", 20_000, 0.75 * row.horizon.upper).status == "pass"


def test_the_gate_of_a_configuration_is_that_of_the_verdict() -> None:
    tree = ("the command line", override_tree({"optimizer": "zo-gd", "lr": 0.1}))
    (config,) = build_checks(EMPTY, overrides=[tree], only=(), needs_spec=False, notices=())
    assert config.policy.margin == GATE


def network(*, examples: int = 24) -> zoscope.Problem:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, 5, generator=generator, dtype=torch.float64)
    y = (x[:, 0] * x[:, 1] > 0).long()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 2)).double()
    return zoscope.Problem.from_criterion(model, (x, y), nn.CrossEntropyLoss(), batch_size=examples)


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [(name, size) for name in DEFAULT_FAMILIES for size in (None, 8) if (name, size) != ("gdm", 8)],
)
def test_they_agree_on_a_network_that_is_measured(name: str, batch_size: int | None) -> None:
    problem, shared = network(), {"steps": 400, "batch_size": batch_size, "device": "cpu", "method": "dense"}
    advised = zoscope.bounds(problem, optimizers=(name,), **shared).optimizers[name].recommended
    assert advised is not None
    for factor in (1.0, 1.3) if batch_size is None else (1.0,):
        lr = factor * advised
        verdict = zoscope.bounds(problem, optimizers=(name,), lr=lr, **shared).optimizers[name].verdict
        (check,) = zoscope.check(problem, optimizer=f"zo-{name}", lr=lr, **shared).checks
        assert verdict is not None
        assert (STATUS[verdict.outlook], verdict.ratio) == (check.status, pytest.approx(check.ratio))
