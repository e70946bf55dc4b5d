"""The gate against the truth: a dense eigendecomposition of a trained network, over seeds."""

from pathlib import Path

import pytest

import zoscope
from zoscope.spec import load_spec

CNN = str(Path(__file__).parents[2] / "examples" / "digits_cnn.py")
TRAINED = 1500  # steps of gradient descent: past the worst of the negative curvature


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_the_gate_never_passes_above_the_exact_threshold_nor_fails_well_below_it(seed: int) -> None:
    problem = load_spec(CNN, settings={"seed": seed, "steps": TRAINED}).problem
    dense = zoscope.bounds(problem, optimizers=("gd",), method="dense", device="cpu").optimizers["gd"].exact
    assert dense is not None

    def status(ratio: float) -> str:
        options = {"optimizer": "zo-gd", "threshold": "exact", "method": "deflated-slq", "device": "cpu"}
        (check,) = zoscope.check(problem, lr=ratio * dense.value, seed=seed, **options).checks
        return check.status

    assert status(1.1) != "pass"
    assert status(0.7) != "fail"
