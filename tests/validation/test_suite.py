"""The tasks of the suite, and the plain loop that measures them."""

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import zoscope

from .suite import TASKS, TEXTS

FEWEST, MOST = 200, 40_000
"""Parameters of a task that is no language model."""


@pytest.fixture(scope="module")
def plain_loop() -> ModuleType:
    """A script, which imports the suite from its own folder."""
    folder = Path(__file__).parent
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("plain_loop_under_test", folder / "plain_loop.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


class Bowl(nn.Module):
    """A quadratic ``½ s ‖x‖²`` of ten variables, averaged over scales s."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.linspace(0.5, 1.5, 10))

    def forward(self, scales: Tensor) -> Tensor:
        return 0.5 * scales.mean() * self.x.square().sum()


def bowl(module: ModuleType) -> object:
    return module.Loss(Bowl(), torch.ones(16), lambda model, batch: model(batch))


@pytest.mark.parametrize("name", ["moons", "linnerud", "pde", "policy", "lstm"])
def test_a_task_is_the_same_every_time_and_can_be_cut_into_mini_batches(name: str) -> None:
    first, again = TASKS[name].make(), TASKS[name].make()
    assert FEWEST <= first.num_params <= MOST
    with torch.no_grad():
        (batch,) = first.batches
        whole = float(first.loss(first.model, batch))
        assert whole == float(again.loss(again.model, again.batches[0]))
        tensors = (batch,) if isinstance(batch, Tensor) else batch
        assert {len(tensor) for tensor in tensors} == {first.num_examples}
        half = [tensor[: len(tensor) // 2] for tensor in tensors]
        assert math.isfinite(first.loss(first.model, half[0] if isinstance(batch, Tensor) else half))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_starts_at_a_finite_loss(name: str) -> None:
    problem = TASKS[name].make()
    assert 0 < float(problem.loss(problem.model, problem.batches[0]).detach()) < 10
    low, high = (100_000, 150_000) if TASKS[name].language else (FEWEST, MOST)
    assert low <= problem.num_params <= high


def test_texts_have_eight_words_and_are_different() -> None:
    assert len(set(TEXTS)) == 64
    assert {len(text.split()) for text in TEXTS} == {8}


@pytest.mark.parametrize("optimizer", ["gd", "gdm", "adam"])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_runs_together_are_the_runs_one_by_one(plain_loop: ModuleType, optimizer: str, batch_size: int | None) -> None:
    run = plain_loop.Run(optimizer, 30, batch_size, "cosine")
    found = []
    for together in (True, False):
        loss = bowl(plain_loop)
        loss.together = together
        found.append(run.losses(loss, [1e-3, 1e-2], 3))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)


def test_the_edge_of_a_quadratic_is_where_theory_has_it(plain_loop: ModuleType) -> None:
    """With ten equal eigenvalues λ = 1: E‖x‖² grows by 1 − 2η + (d + 2)η² a step, and a typical run less than that."""
    edge = plain_loop.find_edge(plain_loop.Run("gd", 300), bowl(plain_loop), 10)
    mean_square = 2 / 12
    assert mean_square < edge.lr < 1.6 * mean_square
    assert edge.low < edge.lr < edge.high
    assert plain_loop.find_edge(plain_loop.Run("adam", 5), bowl(plain_loop), 4) is not None


def test_the_interval_of_a_median_covers_what_order_statistics_say(plain_loop: ModuleType) -> None:
    assert plain_loop.covered(10, 2) == pytest.approx(1 - 2 * (1 + 10) / 1024)
    assert plain_loop.covered(8, 1) == pytest.approx(1 - 2 / 256)


@pytest.mark.slow
def test_a_probe_finds_the_edge_of_runs_whose_landscape_sharpens() -> None:
    """The threshold at the start is more than twice the step size at which half of the plain loop's runs diverge."""
    found = zoscope.probe(TASKS["moons"].make(), optimizer="zo-gd", steps=300, device="cpu")
    assert [run.verdict for run in found.runs] == ["sharpened", "diverged"]
    assert found.outcome == "refuted"
    assert found.edge is not None
    assert found.edge.value == pytest.approx(0.181, rel=0.2)  # by tests/validation/plain_loop.py
    assert found.recommended == pytest.approx(0.7 * found.edge.value)
    assert "use lr" in found.reason
