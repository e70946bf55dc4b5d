"""Every measurement on a CUDA device against the same on the CPU; each skipped where there is none."""

from typing import Any

import pytest
import torch
from torch import nn

import zoscope
from zoscope.curvature.operators import METHODS, HessianOperator
from zoscope.runtime import held_memory, peak_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def problem() -> zoscope.Problem:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        batch = torch.randn(40, 6, dtype=torch.float64), torch.randint(3, (40,))
    return zoscope.Problem.from_criterion(model, [batch], nn.CrossEntropyLoss())


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_dense_bounds_are_those_of_the_cpu(curvature: Any) -> None:
    here, there = (
        zoscope.bounds(problem(), device=device, method="dense", curvature=curvature) for device in ("cpu", "cuda")
    )
    assert there.device.startswith("cuda")
    for name, row in here.optimizers.items():
        assert there.optimizers[name].exact.value == pytest.approx(row.exact.value, rel=1e-6)
        assert there.optimizers[name].horizon.lower == pytest.approx(row.horizon.lower, rel=1e-6)
        assert there.optimizers[name].descent == pytest.approx(row.descent, rel=1e-6)


def test_sampled_bounds_hold_those_of_all_eigenvalues_within_their_error() -> None:
    exact = zoscope.bounds(problem(), device="cpu", method="dense", optimizers=("gd",)).optimizers["gd"]
    found = zoscope.bounds(problem(), device="cuda", method="deflated-slq", optimizers=("gd",)).optimizers["gd"]
    planned = found.horizon.planned.upper
    assert abs(planned.value - exact.horizon.upper) <= 2.5 * planned.half_width + 1e-9 * planned.value


def test_forward_passes_hold_the_trace_within_their_error() -> None:
    exact = zoscope.bounds(problem(), device="cpu", method="dense", optimizers=("gd",))
    found = zoscope.bounds(problem(), device="cuda", curvature="forward", optimizers=("gd",), rtol=0.1)
    trace = found.forward.trace
    assert abs(trace.value - exact.curvature["hessian"].trace.value) < 4 * trace.stderr


@pytest.mark.parametrize("method", METHODS)
def test_every_way_to_compute_products_agrees_with_the_cpu(method: str) -> None:
    vectors = torch.randn(3, 275, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    products = []
    for device in ("cpu", "cuda"):
        with problem().prepare(device=device) as objective:
            assert objective.num_params == 275
            products.append(HessianOperator(objective, hvp=method).matmat(vectors.to(device)).cpu())
    torch.testing.assert_close(*products, rtol=1e-8, atol=1e-10)


def test_a_measurement_leaves_no_memory_behind() -> None:
    zoscope.bounds(problem(), device="cuda", optimizers=("gd",))
    before = held_memory("cuda")
    zoscope.bounds(problem(), device="cuda", optimizers=("gd",))
    assert held_memory("cuda") <= before


def test_the_peak_counts_what_was_freed_again() -> None:
    def run() -> None:
        torch.empty(2**20, device="cuda").add_(1)

    assert peak_bytes(run, torch.device("cuda")) >= 4 * 2**20
