"""``zoscope.moments`` from Python."""

import json

import pytest
import torch

import zoscope
from zoscope import NumericalError, UsageError

from .test_density import network


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_they_are_those_of_the_spectrum(curvature):
    problem = network()
    before = [p.detach().clone() for p in problem.model.parameters()]
    truth = zoscope.spectrum(problem, curvature=curvature, method="dense").curvature
    found = zoscope.moments(problem, curvature=curvature, rtol=0.05).moments
    assert abs(found.trace.value - truth.trace.value) < 2 * found.trace.half_width
    assert abs(found.frobenius_sq.value - truth.frobenius_sq.value) < 2 * found.frobenius_sq.half_width
    assert found.lambda_max.value == pytest.approx(truth.lambda_max.value, rel=0.01)
    assert found.error <= 0.05
    assert all(torch.equal(p, q) for p, q in zip(problem.model.parameters(), before, strict=True))


def test_the_document_and_the_tables():
    result = zoscope.moments(network(), rtol=0.1, spec="a network")
    document = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert document["schema"] == "zoscope.moments/1"
    assert set(document["curvature"]["hessian"]) >= {"trace", "frobenius_sq", "lambda_max", "pieces"}
    assert "a network" in str(result)
    assert "λ_max" in str(result)


def test_what_cannot_be_had():
    with pytest.raises(ValueError, match="forward"):
        zoscope.moments(network(), curvature="forward")
    with pytest.raises(UsageError, match="--max-hvps 5"):
        zoscope.moments(network(), max_hvps=5)
    with pytest.raises(NumericalError, match="--rtol"):
        zoscope.moments(network(), rtol=1e-5, max_hvps=30, strict=True)
