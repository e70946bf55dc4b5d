"""A result without a measurement: a noisy, indefinite spectrum put through the theory."""

from collections.abc import Callable

import numpy as np
import pytest

from zoscope import BoundsResult, Estimate, Notice
from zoscope.analysis import measurement as rows
from zoscope.analysis.measurement import MeasuredOperator, ThresholdQuery, optimizer_row
from zoscope.analysis.thresholds import Estimator
from zoscope.curvature.slq import Curvature, Eigenvalue
from zoscope.result import ProblemInfo
from zoscope.theory.quadratic import GradientMeasure
from zoscope.theory.rules import GAUSSIAN, update_rule
from zoscope.theory.spectrum import SampledSpectrum, Spectrum

SETTINGS = {
    "gd": {},
    "gdm": {"beta": 0.9},
    "adam": {"betas": [0.9, 0.999], "eps": 1e-8, "preconditioner": "expected"},
}
GRAD_SQ, LOSS = 7e-4, 0.0364


def curvature_of(scale: float, *, noise: float) -> Curvature:
    top, low = np.geomspace(26, 1, 12), -np.geomspace(0.9, 0.2, 6)
    bulk, counts = np.concatenate([np.geomspace(1e-6, 0.5, 20), -np.geomspace(1e-6, 0.1, 12)]), np.full(32, 60.0)
    fine = Spectrum(scale * np.concatenate([top, low, bulk]), np.concatenate([np.ones(18), counts]))
    sampled = Spectrum(scale * bulk, counts)
    spectrum = SampledSpectrum(fine, sampled, 8, 1920, errors=((Spectrum(scale * bulk, noise * counts),),))
    if noise == 0:
        spectrum = SampledSpectrum(fine, Spectrum.of([]), 0, 0)
    positive = fine.positive
    return Curvature(
        trace=spectrum.trace_of(lambda x: x),
        frobenius_sq=spectrum.trace_of(np.square),
        lambda_max=Eigenvalue(26 * scale, 1e-3 * scale, True),
        lambda_min=Eigenvalue(-0.9 * scale, 0.02 * scale, noise == 0),
        trace_positive=spectrum.trace_of(lambda x: np.maximum(x, 0)),
        negative_mass=positive.trace - fine.trace,
        effective_rank=positive.trace**2 / positive.frobenius_sq,
        method="deflated-slq" if noise else "dense",
        num_hvps=1234,
        seconds=83.0,
        spectrum=spectrum,
    )


@pytest.fixture
def make_result(monkeypatch: pytest.MonkeyPatch) -> Callable[..., BoundsResult]:
    # Following the predicted loss takes longer than all else together, and any number will do here.
    monkeypatch.setattr(rows.QuadraticModel, "best_lr", lambda *_, upper: upper / 3)
    monkeypatch.setattr(rows, "LONGEST_LOOK", 1000)

    def make(
        *,
        steps: int = 1000,
        lr: float | None = None,
        noise: float = 0.02,
        scale: float = 1.0,
        optimizers: tuple[str, ...] = ("gd", "gdm", "adam"),
    ) -> BoundsResult:
        question = ThresholdQuery(steps, "binding", lr, LOSS, GAUSSIAN)
        found, curvatures = {}, {}
        for name in optimizers:
            rule = update_rule(name)
            key, size = ("preconditioned_hessian", 37 * scale) if rule.preconditioned else ("hessian", scale)
            curvature = curvatures.setdefault(key, curvature_of(size, noise=noise))
            measured = MeasuredOperator(
                key,
                curvature,
                GradientMeasure(np.array([3.0 * size]), np.array([GRAD_SQ])),
                commutator=Estimate(0.004, 0.001) if rule.preconditioned else None,
            )
            falling = 0.03 * (1 - rule.momentum) / rule.lr_scale / size
            descent = Estimate(falling, quadrature=noise * falling)
            found[name] = optimizer_row(measured, question, rule=rule, settings=SETTINGS[name], descent=descent)
        return BoundsResult(
            spec="examples/model.py:problem[0]",
            device="cpu",
            dtype="float32",
            seed=0,
            steps=steps,
            rtol=0.02,
            problem=ProblemInfo(1964, 100, LOSS, GRAD_SQ**0.5),
            curvature=curvatures,
            optimizers=found,
            estimator=Estimator("gaussian", 1),
            num_hvps=2468,
            seconds=166.0,
            warnings=(Notice("indefinite-hessian", "The Hessian is indefinite [as most are]. " * 5),),
        )

    return make
