"""Another Hessian library, run on the same network, agrees within its own error bars."""

import numpy as np
import pytest
import torch

from zoscope.curvature.operators import HessianOperator
from zoscope.curvature.slq import measure

from .networks import Subject

pytestmark = pytest.mark.slow

pyhessian = pytest.importorskip("pyhessian", reason="PyHessian, the library to compare with, is not installed")

PROBES = 1000


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")  # PyHessian keeps gradient graphs in .grad
def test_pyhessian_sees_the_same_trace_and_largest_eigenvalue(cnn: Subject) -> None:
    problem = cnn.problem
    with problem.prepare(device="cpu", dtype="float32") as objective:
        ours = measure(HessianOperator(objective), method="deflated-slq")
    theirs = pyhessian.hessian(problem.model, problem.criterion, data=problem.batches[0], cuda=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        (largest,), _ = theirs.eigenvalues(maxIter=500, tol=1e-6)
        samples = np.array(theirs.trace(maxIter=PROBES, tol=0))
    assert len(samples) == PROBES
    # Power iteration stops within its tolerance of the eigenvalue; float32 products differ in the last digits.
    assert ours.lambda_max.converged
    assert largest == pytest.approx(ours.lambda_max.value, rel=1e-4, abs=ours.lambda_max.residual)
    noise = 1.96 * float(samples.std(ddof=1)) / np.sqrt(PROBES)
    assert abs(samples.mean() - ours.trace.value) <= noise + ours.trace.half_width
