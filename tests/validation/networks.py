"""Trained networks to validate on, with what a dense eigendecomposition says about them."""

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import zoscope
from zoscope.curvature.operators import HessianOperator, gradient
from zoscope.theory.quadratic import GradientMeasure
from zoscope.theory.spectrum import Spectrum

EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass(frozen=True)
class Subject:
    """A point of training with its whole Hessian.

    Args:
        problem: The network where its training stopped.
        matrix: ``(d, d)`` Hessian in float32, symmetric.
        eigenvalues: ``(d,)`` of the matrix, computed in float64.
        loss: Loss.
        gradient: Spectral measure of the gradient, exact.
    """

    problem: zoscope.Problem
    matrix: Tensor
    eigenvalues: Tensor
    loss: float
    gradient: GradientMeasure

    @classmethod
    def of(cls, problem: zoscope.Problem) -> "Subject":
        with problem.prepare(device="cpu", dtype="float32") as objective:
            loss, g = gradient(objective)
            rows = HessianOperator(objective, hvp="batched").dense()
        matrix = (rows + rows.T) / 2
        eigenvalues, vectors = torch.linalg.eigh(matrix.double())
        weights = (g.double() @ vectors).square()
        return cls(problem, matrix, eigenvalues, loss, GradientMeasure(eigenvalues.numpy(), weights.numpy()))

    @property
    def spectrum(self) -> Spectrum:
        return Spectrum.of(self.eigenvalues.numpy())


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"zoscope_validation_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def convolutional() -> zoscope.Problem:
    """The d = 1,964 network of the examples near a minimum: a few outliers, hardly any negative curvature."""
    return example("digits_cnn").problem()


def rectified() -> zoscope.Problem:
    """A ReLU network in the middle of training (d = 3,466): a third of its trace is cancelled by negative curvature."""
    return example("digits_mlp").problem(width=32, steps=80)


def middle() -> zoscope.Problem:
    """The wider ReLU network of the examples (d = 26,122)."""
    return example("digits_mlp").problem()


def decoder() -> zoscope.Problem:
    """A decoder with one layer of width 12 in the middle of training (d = 2,832), its curvature spread out."""
    return example("transformer").problem(width=12, layers=1)


def wide(width: int = 300, steps: int = 300, lr: float = 0.2, examples: int = 200) -> zoscope.Problem:
    """Two hidden layers of 300 GELUs (d = 112,810) on 200 digits."""
    data = load_digits()
    images = torch.tensor(data.data[:examples], dtype=torch.float32)
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(data.target[:examples])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 10))
    descend(model, lambda: nn.functional.cross_entropy(model(images), labels), steps=steps, lr=lr)
    return zoscope.Problem.from_criterion(model, [(images, labels)], nn.CrossEntropyLoss())


def descend(model: nn.Module, loss: Callable[[], Tensor], *, steps: int, lr: float) -> None:
    """Full-batch gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@contextmanager
def losses_near(problem: zoscope.Problem) -> Iterator[tuple[Tensor, Callable[[Tensor], float]]]:
    """Parameters as a vector ``(d,)``, and the loss as a function of such a vector; the model comes back."""
    parameters, (batch,) = list(problem.model.parameters()), problem.batches
    start = parameters_to_vector(parameters).detach().clone()

    def loss_at(vector: Tensor) -> float:
        vector_to_parameters(vector.clone(), parameters)  # which makes views of what it is given
        return float(problem.loss(problem.model, batch))

    with torch.no_grad():
        try:
            yield start, loss_at
        finally:
            vector_to_parameters(start.clone(), parameters)


def exit_step(problem: zoscope.Problem, *, lr: float, steps: int, seed: int) -> float:
    """Steps after which real ZO-GD leaves the valley for good; ``inf`` where it is still inside after ``steps``.

    It is outside while the loss is more than twice that at the start; at thirty times it does not come back. The loss
    that counts is the mean of the two that a step evaluates.
    """
    with losses_near(problem) as (start, loss_at):
        valley = loss_at(start)
        optimizer = zoscope.ZOGD(problem.model.parameters(), lr=lr, mu=1e-3, seed=seed)
        (batch,) = problem.batches
        left = math.inf
        for step in range(steps):
            loss = optimizer.step(lambda: problem.loss(problem.model, batch))
            if loss <= 2 * valley:
                left = math.inf
            elif left == math.inf:
                left = step
            if not loss <= 30 * valley:
                break
    return left
