"""The comparison with other libraries: it runs, at a size that takes no time and without them, and is even-handed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from peers import budgets
from peers.sketches import Sketch, hutchpp_rmse, xtrace_rmse
from peers.standin import Diagonal
from peers.tools import Eigenthings
from peers.workloads import Size, build

import zoscope
from zoscope.curvature.operators import HessianOperator

SCRIPT = Path(__file__).parent / "bench_peers.py"
ROOT = SCRIPT.parents[2]


@pytest.mark.slow
def test_every_workload_builds_and_is_measured_by_zoscope_alone(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "--rounds", "1", "--json", str(target), "--tools"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(target.read_text())
    assert [w["name"] for w in document["workloads"]] == ["digits_cnn", "cnn", "resnet", "decoder", "digits_mlp"]
    for workload in document["workloads"]:
        for question in ("moments", "bounds"):
            (own,) = workload[question]
            assert own["tool"] == "zoscope"
            assert own["products"] > 0
    assert "digits_mlp" in done.stdout


def test_peers_that_are_not_installed_are_named(tmp_path: Path) -> None:
    # In isolated mode with nothing but the standard library's finders for their names: as if they were not there.
    hide = "import sys; sys.modules.update(dict.fromkeys(['curvlinops', 'hessian_eigenthings', 'pyhessian'])); "
    code = f"{hide}sys.path.insert(0, {str(SCRIPT.parent)!r}); from peers.tools import PEERS, installed; "
    code += "print(installed([peer.name for peer in PEERS]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("([], {'curvlinops': ")


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_the_search_finds_where_a_noisy_error_crosses_the_target(power: float) -> None:
    # Errors of c / n^power that cross r/1.96 at n = 100, each from 50 draws of its own: an RMSE known to 10 %.
    generator, target = np.random.default_rng(0), 0.01
    found = []
    for _ in range(100):

        def rmse(sizes: list[int]) -> np.ndarray:
            truth = target / budgets.WITHIN * (100 / np.array(sizes)) ** power
            return truth * np.sqrt((generator.standard_normal((50, len(sizes))) ** 2).mean(axis=0))

        budget = budgets.smallest("any", rmse, target=target, products=lambda n: 3 * n, most=10_000)
        assert budget is not None
        assert budget.products == 3 * budget.size
        found.append(budget.size)
    spread = np.std(found)
    assert spread < 20
    assert abs(np.mean(found) - 100) < 3 * spread / 10 + 3  # sizes are tried in steps of 4 %


def test_the_search_says_where_no_budget_suffices() -> None:
    assert budgets.smallest("any", np.ones_like, target=0.01, products=lambda n: n, most=500) is None
    assert budgets.smallest("any", np.ones_like, target=0.01, products=lambda n: n, most=0) is None


def test_probes_of_a_repeated_eigenvalue_have_the_products_of_gaussian_vectors() -> None:
    # WᵀW of m dimensions: mean m·1, variances 2m on the diagonal and m off it.
    draws, many, size = 4000, 50, 3
    diagonal, generator = Diagonal(np.repeat([1.0, 2.0], [2, many])), np.random.default_rng(0)
    grams = []
    for _ in range(draws):
        values, rows = diagonal.probes(size, generator)
        assert rows.shape == (2 + size, size)
        grams.append(rows[values == 2].T @ rows[values == 2])
    variances = many * (1 + np.eye(size))
    assert np.abs(np.mean(grams, axis=0) - many * np.eye(size)).max() < 4 * np.sqrt(variances.max() / draws)
    assert np.abs(np.var(grams, axis=0) / variances - 1).max() < 4 * np.sqrt(2.5 / draws)


def test_sketches_give_the_estimates_of_their_definitions_at_every_size() -> None:
    generator = np.random.default_rng(0)
    values, probes = generator.standard_normal(40), generator.standard_normal((40, 9))
    sketch, matrix = Sketch.of(values, probes), np.diag(values)
    for size in (1, 2, 9):
        w = probes[:, :size]
        single = []
        for i in range(size):
            q = np.linalg.qr(matrix @ np.delete(w, i, axis=1))[0]
            left = w[:, i] - q @ (q.T @ w[:, i])
            single.append(np.trace(q.T @ matrix @ q) + left @ matrix @ left)
        assert sketch.xtrace(size) == pytest.approx(np.mean(single), rel=1e-10)
        q = np.linalg.qr(matrix @ w)[0]
        rest = np.eye(40) - q @ q.T
        variance = 2 * (rest @ matrix @ rest).ravel() @ (rest @ matrix @ rest).ravel() / size
        assert sketch.hutchpp_variance(size, float(values @ values)) == pytest.approx(variance, rel=1e-10)


@pytest.mark.skipif(importlib.util.find_spec("curvlinops") is None, reason="curvlinops is not installed")
def test_errors_on_the_stand_in_are_those_of_the_libraries() -> None:
    from curvlinops import hutchpp_trace, xtrace

    diagonal, draws = Diagonal(np.repeat([10.0, 5.0, 3.0, 0.5, 0.1, -0.2], [1, 1, 1, 40, 100, 60])), 400
    matrix, truth = torch.diag(torch.from_numpy(diagonal.values)), diagonal.moment(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for expected, estimate in (
            (xtrace_rmse(diagonal, 1, [8]), lambda: xtrace(matrix, 16, "normal")),
            (hutchpp_rmse(diagonal, 1, [8]), lambda: hutchpp_trace(matrix, 24, "normal")),
        ):
            rmse = np.sqrt(np.mean([(float(estimate()) / truth - 1) ** 2 for _ in range(draws)]))
            assert rmse == pytest.approx(expected[0], rel=0.25)  # four standard errors of both


@pytest.mark.skipif(importlib.util.find_spec("hessian_eigenthings") is None, reason="it is not installed")
def test_rounds_of_a_library_with_generators_of_its_own_differ() -> None:
    session = Eigenthings().open(build("digits_mlp", Size(tiny=True)))
    keys = ("lambda_max", "trace", "frobenius_sq")
    plan = {key: budgets.Budget("hutch++", 3, size, 0.0) for key, size in zip(keys, (3, 1, 1), strict=True)}
    first, again, other = (session.moments(plan, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert all(first[key] != other[key] for key in keys)


def test_zoscope_is_given_the_loss_of_the_others_and_can_cut_its_batch() -> None:
    workload = build("decoder", Size(tiny=True))
    theirs = zoscope.Problem.from_criterion(workload.model, [workload.batch], workload.criterion)
    assert workload.problem.model is workload.model
    found = []
    for problem, micro_batch in ((theirs, None), (workload.problem, None), (workload.problem, 1)):
        with problem.prepare(device="cpu", dtype="float64", micro_batch=micro_batch) as objective:
            value, gradient = objective.gradient()
            vector = torch.ones(workload.dim, dtype=torch.float64)
            found.append((value, gradient, HessianOperator(objective).matmat(vector[None])))
    for value, gradient, product in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-12)
        torch.testing.assert_close(gradient, found[0][1])
        torch.testing.assert_close(product, found[0][2])
