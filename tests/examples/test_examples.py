"""The examples are what their first lines say they are."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

import zoscope

FOLDER = Path(__file__).parents[2] / "examples"
NAMES = ("digits_cnn", "digits_mlp", "quadratic", "transformer")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"zoscope_example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def short(name: str) -> zoscope.Problem:
    """The example without its training."""
    module = load(name)
    return module.problem() if name == "quadratic" else module.problem(steps=0)


def dense_hessian(problem: zoscope.Problem) -> torch.Tensor:
    """Row by row, by nothing but autograd."""
    parameters = [parameter for parameter in problem.model.parameters() if parameter.requires_grad]
    loss = problem.loss(problem.model, problem.batches[0])
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in flat]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows]).double()


@pytest.mark.parametrize("name", NAMES)
def test_an_example_leaves_the_global_seed_the_folder_and_the_threads_alone(name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    problem = short(name)
    assert isinstance(problem, zoscope.Problem)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_an_example_prints_nothing(name: str, capfd) -> None:
    short(name)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "num_params", "num_examples"),
    [("digits_cnn", 1964, 100), ("digits_mlp", 26_122, 1797), ("quadratic", 44, 1), ("transformer", 27_936, 26)],
)
def test_sizes_are_those_announced(name: str, num_params: int, num_examples: int) -> None:
    problem = short(name)
    assert problem.num_params == num_params
    assert problem.num_examples == num_examples


@pytest.mark.parametrize("name", ["digits_cnn", "digits_mlp", "transformer"])
def test_training_is_reproducible_and_lowers_the_loss(name: str) -> None:
    module = load(name)

    def loss(steps: int, seed: int = 0) -> float:
        problem = module.problem(steps=steps, seed=seed)
        return problem.loss(problem.model, problem.batches[0]).item()

    assert loss(20) == loss(20)
    assert loss(20) < loss(0)
    assert loss(0, seed=1) != loss(0)


def test_the_quadratic_is_the_one_in_its_first_lines() -> None:
    problem = load("quadratic").problem(seed=3)
    hessian = dense_hessian(problem)
    start = next(problem.model.parameters()).detach()
    gradient = hessian @ start
    assert np.trace(hessian) == pytest.approx(40, abs=1e-11)
    assert float((hessian**2).sum()) == pytest.approx(110, abs=1e-10)
    assert np.linalg.eigvalsh(hessian)[-1] == pytest.approx(5, abs=1e-12)
    assert float(gradient @ gradient) == pytest.approx(110, abs=1e-10)
    assert float(gradient @ hessian @ gradient) == pytest.approx(505, abs=1e-9)
    assert brentq(lambda lr: 10 * lr / (1 - 5 * lr) + 10 * lr / (1 - lr / 2) - 1, 0.01, 0.1, xtol=1e-14) == (
        pytest.approx(1 / 23, abs=1e-12)
    )
    assert pytest.approx(0.0406654, abs=5e-8) == 2 / (40 + 2 * 505 / 110)


@pytest.mark.slow
def test_the_trained_cnn_is_where_its_first_lines_say() -> None:
    problem = load("digits_cnn").problem()
    assert problem.loss(problem.model, problem.batches[0]).item() == pytest.approx(0.0365, rel=0.02)
    eigenvalues = np.linalg.eigvalsh(dense_hessian(problem))
    assert eigenvalues.sum() == pytest.approx(87.1, rel=0.02)
    assert eigenvalues[-1] == pytest.approx(26.1, rel=0.02)


@pytest.mark.slow
def test_the_trained_mlp_has_a_gradient_worth_its_description() -> None:
    problem = load("digits_mlp").problem()
    loss = problem.loss(problem.model, problem.batches[0])
    gradients = torch.autograd.grad(loss, list(problem.model.parameters()))
    assert 0.1 < loss.item() < 0.25
    assert 0.05 < torch.cat([gradient.reshape(-1) for gradient in gradients]).norm().item() < 0.3
