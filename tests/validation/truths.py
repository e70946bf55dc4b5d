"""What is true of a problem, from all eigenvalues in double precision: what measurements are judged by.

Nothing here comes from ``zoscope.curvature``: derivatives are autograd's, eigenvalues LAPACK's.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import zoscope
from zoscope.theory.quadratic import GradientMeasure, descent_threshold
from zoscope.theory.rules import update_rule
from zoscope.theory.spectrum import Spectrum
from zoscope.theory.stability import StabilityCondition

Array = NDArray[np.float64]

STEPS = 1000
"""Planned number of steps of η*(N)."""

GD = update_rule("gd")
SLACK = 1e-6
"""Relative rounding of a true value that is computed in float64 from many numbers."""

ROUNDING = 2.0
"""Rounding that is let pass, in units of what was seen: another order of the same operations rounds otherwise."""

ROWS = 64
"""Rows of a Hessian that are computed together."""

MU = 1e-3
"""Step of a zeroth-order difference, in which a kink counts as curvature."""


@dataclass(frozen=True)
class Truth:
    """True values of a problem.

    Args:
        spectrum: All eigenvalues, with multiplicities.
        gradient: Spectral measure of the gradient.
        kinks: What kinks add to the trace of differences, and so to the descent threshold.
        kinks_error: How far off that may be.
        rounded: Spectrum and gradient of the same problem in its own, lower precision, where they differ; what both
            say differs by what rounding leaves open.
    """

    spectrum: Spectrum
    gradient: GradientMeasure
    kinks: float = 0.0
    kinks_error: float = 0.0
    rounded: tuple[Spectrum, GradientMeasure] | None = None
    values: dict[str, float] = field(init=False)
    slack: dict[str, float] = field(init=False)
    """By quantity: the true value, and how far rounding may have moved it."""

    @property
    def eigenvalue_slack(self) -> float:
        """How far rounding may have moved an eigenvalue: that of products in single precision, or more if seen."""
        slack = 1e-5 * float(np.abs(self.spectrum.nodes).max())
        if self.rounded is None:
            return slack
        return max(slack, ROUNDING * float(np.abs(self.rounded[0].nodes - self.spectrum.nodes).max()))

    def __post_init__(self) -> None:
        values = _values(self.spectrum, self.gradient, kinks=self.kinks)
        shifted = _values(self.spectrum, self.gradient, kinks=self.kinks + self.kinks_error)
        rounded = values if self.rounded is None else _values(*self.rounded, kinks=self.kinks)
        sizes = {name: abs(value) for name, value in values.items()}
        sizes["trace"] = float(self.spectrum.weights @ np.abs(self.spectrum.nodes))  # it may cancel
        slack = {
            name: SLACK * sizes[name] + _apart(shifted[name], value) + ROUNDING * _apart(rounded[name], value)
            for name, value in values.items()
        }
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "slack", slack)


def _apart(first: float, second: float) -> float:
    return 0.0 if first == second else abs(first - second)  # both may be infinite


def _values(spectrum: Spectrum, gradient: GradientMeasure, *, kinks: float) -> dict[str, float]:
    rayleigh = float(gradient.weights @ gradient.nodes / gradient.weights.sum())
    return {
        "full": StabilityCondition(GD, steps=STEPS, version="full").threshold(spectrum),
        "positive": StabilityCondition(GD, steps=STEPS).threshold(spectrum),
        "infinite": StabilityCondition(GD).threshold(spectrum),
        "trace": spectrum.trace,
        "trace+": spectrum.positive.trace,
        "norm²": spectrum.frobenius_sq,
        "descent": descent_threshold(spectrum.trace + kinks, rayleigh),
    }


def diagonal(eigenvalues: Tensor, gradient: Tensor) -> Truth:
    """Of a diagonal matrix: eigenvalues and gradient ``(d,)``, as the problem rounds them."""
    nodes, counts = np.unique(eigenvalues.double().numpy(), return_counts=True)
    weights = gradient.double().square().numpy()
    return Truth(Spectrum(nodes, counts), GradientMeasure(eigenvalues.double().numpy(), weights))


def dense(problem: zoscope.Problem, *, kinks: bool = False) -> Truth:
    """Of a network with one batch, from its whole Hessian.

    Args:
        problem: In single precision, or in double.
        kinks: Whether its loss has kinks.
    """
    double = _loss_of(problem, torch.float64)
    own = _loss_of(problem, next(problem.model.parameters()).dtype)
    hessian, gradient = _derivatives(*double)
    values, vectors = torch.linalg.eigh(hessian)
    measure = _measure(values, vectors, gradient)
    rounded = None
    if own[0].parameters[0].dtype != torch.float64:
        single, g = _derivatives(*own)
        rounded = Spectrum(torch.linalg.eigvalsh(single).numpy()), _measure(values, vectors, g)
    added, error = _beyond(*double, hessian, blocks=8 if kinks else 1)
    if not kinks:  # of a smooth loss it is the next order in the step, with which or without which is all the same
        added, error = 0.0, abs(added) + error
    return Truth(Spectrum(values.numpy()), measure, added, error, rounded=rounded)


def gauss_newton(model: nn.Module, inputs: Tensor, targets: Tensor, criterion: nn.Module) -> Truth:
    """Of ``JᵀLJ``, from the smaller one of ``L^½ J Jᵀ L^½`` and itself; with a linear model it is the Hessian."""
    model = copy.deepcopy(model).double()
    inputs, targets = (t.double() if t.is_floating_point() else t for t in (inputs, targets))
    parameters = list(model.parameters())
    outputs = model(inputs)
    loss = criterion(outputs, targets)
    gradient = parameters_to_vector(torch.autograd.grad(loss, parameters, retain_graph=True))
    jacobian = _rows(outputs.flatten(), parameters)
    size, shape = outputs.numel(), outputs.shape
    inner = torch.autograd.functional.hessian(
        lambda flat: criterion(flat.reshape(shape), targets), outputs.detach().flatten()
    )
    scales, axes = torch.linalg.eigh(inner)
    scales[scales < 1e-12 * scales.max()] = 0.0  # of a softmax, whose logits may all move together
    factor = scales.sqrt()[:, None] * (axes.T @ jacobian)
    dim = len(gradient)
    if dim <= size:
        values, vectors = torch.linalg.eigh(factor.T @ factor)
        return Truth(Spectrum(values.numpy()), _measure(values, vectors, gradient))
    values, vectors = torch.linalg.eigh(factor @ factor.T)
    kept = values > 1e-13 * values.max()
    values, vectors = values[kept], vectors[:, kept]
    weights = (vectors.T @ (factor @ gradient)).square() / values
    rest = max(0.0, float(gradient.square().sum() - weights.sum()))
    counts = np.append(np.ones(len(values)), dim - len(values))
    nodes = np.append(values.numpy(), 0.0)
    return Truth(Spectrum(nodes, counts), GradientMeasure(nodes, np.append(weights.numpy(), rest)))


@dataclass(frozen=True)
class _Point:
    """A copy of a model that may be moved."""

    model: nn.Module
    parameters: list[Tensor]


def _loss_of(problem: zoscope.Problem, dtype: torch.dtype) -> tuple[_Point, Callable[[], Tensor]]:
    (batch,) = problem.batches
    batch = _cast(batch, dtype)
    model = copy.deepcopy(problem.model).to(dtype)
    return _Point(model, [p for p in model.parameters() if p.requires_grad]), lambda: problem.loss(model, batch)


def _cast(batch: object, dtype: torch.dtype) -> object:
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    return type(batch)(_cast(part, dtype) for part in batch)  # a tuple or a list


def _derivatives(point: _Point, loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Hessian ``(d, d)`` and gradient ``(d,)``, both in float64."""
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
        gradient = parameters_to_vector(torch.autograd.grad(loss(), point.parameters, create_graph=True))
        rows = _rows(gradient, point.parameters).double()
    return (rows + rows.T) / 2, gradient.detach().double()


def _rows(outputs: Tensor, parameters: list[Tensor]) -> Tensor:
    """Jacobian ``(n, d)`` of a vector ``(n,)``."""
    found = []
    for chunk in torch.eye(len(outputs), dtype=outputs.dtype).split(ROWS):
        parts = torch.autograd.grad(
            outputs, parameters, chunk, retain_graph=True, is_grads_batched=True, materialize_grads=True
        )
        found.append(torch.cat([part.flatten(1) for part in parts], dim=1).detach())
    return torch.cat(found)


def _measure(values: Tensor, vectors: Tensor, gradient: Tensor) -> GradientMeasure:
    return GradientMeasure(values.numpy(), (gradient @ vectors).square().numpy())


def _beyond(point: _Point, loss: Callable[[], Tensor], hessian: Tensor, *, blocks: int) -> tuple[float, float]:
    """By how much the trace of differences over steps ``MU`` is larger, and its 95 % half-width."""
    generator = torch.Generator().manual_seed(12345)
    start = parameters_to_vector(point.parameters).detach().clone()
    found: list[float] = []

    def loss_at(vector: Tensor) -> float:
        vector_to_parameters(vector.clone(), point.parameters)  # which makes views of what it is given
        return float(loss())

    with torch.no_grad():
        before = loss_at(start)
        for _ in range(blocks):
            z = torch.randn(256, len(start), generator=generator, dtype=start.dtype)
            curvatures = ((z @ hessian) * z).sum(dim=1).tolist()
            for step, curvature in zip(MU * z, curvatures, strict=True):
                found.append((loss_at(start + step) + loss_at(start - step) - 2 * before) / MU**2 - curvature)
        loss_at(start)
    return float(np.mean(found)), 1.96 * float(np.std(found, ddof=1)) / math.sqrt(len(found))
