"""Families of problems whose every eigenvalue is known, from easy ones to those that deceive an estimator."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

import zoscope

if __package__:
    from . import networks, truths
    from .truths import Array, Truth
else:  # as part of a script
    import networks
    import truths
    from truths import Array, Truth


@dataclass(frozen=True)
class Subject:
    """A problem and what is true of it, computed when asked for.

    Args:
        problem: The problem.
        find_truth: Computes the truth.
        curvature: The matrix that is measured.
    """

    problem: zoscope.Problem
    find_truth: Callable[[], Truth]
    curvature: str = "hessian"

    @cached_property
    def truth(self) -> Truth:
        return self.find_truth()


FAMILIES: dict[str, Callable[[], Subject]] = {}
"""By name."""


def _criterion(model: nn.Module, inputs: Tensor, targets: Tensor, criterion: nn.Module, **options: str) -> Subject:
    """A model of which the Gauss-Newton matrix is asked for, or is the Hessian."""
    problem = zoscope.Problem.from_criterion(model, [(inputs, targets)], criterion)
    return Subject(problem, lambda: truths.gauss_newton(model, inputs, targets, criterion), **options)


# Fewer examples than parameters: as many outliers as examples, above zeros.


def linear_regression(examples: int, features: int, *, decay: float, dtype: torch.dtype = torch.float32) -> Subject:
    """Least squares with fewer examples than features, whose scales fall like ``k^-decay``."""
    generator = torch.Generator().manual_seed(1)
    scales = torch.arange(1, features + 1, dtype=torch.float64).pow(-decay)
    inputs = torch.randn(examples, features, generator=generator, dtype=torch.float64) * scales
    targets = torch.randn(examples, 1, generator=generator, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Linear(features, 1, bias=False)
    return _criterion(model.to(dtype), inputs.to(dtype), targets.to(dtype), nn.MSELoss())


for _n in (20, 200):
    for _d in (5_000, 20_000):
        for _name, _decay in (("flat", 0.0), ("decaying", 0.5)):
            FAMILIES[f"linear-{_name}-n{_n}-d{_d}"] = lambda n=_n, d=_d, decay=_decay: linear_regression(
                n, d, decay=decay
            )
FAMILIES["linear-flat-n200-d5000-float64"] = lambda: linear_regression(200, 5_000, decay=0.0, dtype=torch.float64)


def few_shot_head(kind: str, *, steps: int = 0) -> Subject:
    """A linear head for two classes on 16 examples of 4,096 features, after ``steps`` steps of Adam."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(16, 4096, generator=generator)
    if kind == "common":  # features of an encoder share a large mean, and are often positive
        inputs = (inputs + torch.randn(4096, generator=generator)).relu()
    targets = torch.arange(16) % 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = nn.Linear(4096, 2)
    _train(model, lambda: nn.functional.cross_entropy(model(inputs), targets), steps=steps, lr=1e-3)
    return _criterion(model, inputs, targets, nn.CrossEntropyLoss())


FAMILIES["head-flat"] = lambda: few_shot_head("flat")
FAMILIES["head-common"] = lambda: few_shot_head("common")
FAMILIES["head-trained"] = lambda: few_shot_head("flat", steps=10)


FITTED = 1e-6
"""Loss at which examples are fitted; much further on the gradient would be nothing but rounding."""


def interpolating(
    unit: type[nn.Module], *, squared: bool, dtype: torch.dtype = torch.float32, examples: int = 24
) -> Subject:
    """A network of about 2,600 parameters, trained until it fits its 24 examples."""
    generator = torch.Generator().manual_seed(24)
    inputs = torch.randn(examples, 20, generator=generator)
    outputs = 1 if squared else 3
    targets = torch.randn(examples, 1, generator=generator) if squared else torch.arange(examples) % outputs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(24)
        model = _mlp(unit, 20, 40, outputs)
    criterion = nn.MSELoss() if squared else nn.CrossEntropyLoss()
    _train(model, lambda: criterion(model(inputs), targets), steps=400, lr=3e-3, until=FITTED)
    model, inputs = model.to(dtype), inputs.to(dtype)
    targets = targets.to(dtype) if squared else targets
    problem = zoscope.Problem.from_criterion(model, [(inputs, targets)], criterion)
    return Subject(problem, lambda: truths.dense(problem, kinks=unit is nn.ReLU))


for _unit in (nn.ReLU, nn.GELU):
    for _name, _squared in (("squared", True), ("entropy", False)):
        FAMILIES[f"interpolating-{_unit.__name__.lower()}-{_name}"] = lambda unit=_unit, squared=_squared: (
            interpolating(unit, squared=squared)
        )
FAMILIES["interpolating-gelu-squared-float64"] = lambda: interpolating(nn.GELU, squared=True, dtype=torch.float64)


def untrained_gauss_newton(examples: int, *, squared: bool) -> Subject:
    """The Gauss-Newton matrix of a fresh network, of as many outliers as examples and outputs."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(examples, 20, generator=generator)
    outputs = 1 if squared else 3
    targets = torch.randn(examples, 1, generator=generator) if squared else torch.arange(examples) % outputs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = _mlp(nn.GELU, 20, 40, outputs)
    return _criterion(model, inputs, targets, nn.MSELoss() if squared else nn.CrossEntropyLoss(), curvature="ggn")


FAMILIES["ggn-squared-n24"] = lambda: untrained_gauss_newton(24, squared=True)
FAMILIES["ggn-entropy-n24"] = lambda: untrained_gauss_newton(24, squared=False)
FAMILIES["ggn-entropy-n400"] = lambda: untrained_gauss_newton(400, squared=False)


# Spectra written down.


def explicit(eigenvalues: Array, dtype: torch.dtype = torch.float64) -> Subject:
    """A quadratic with these eigenvalues ``(d,)``, as ``dtype`` rounds them, away from its minimum."""
    e = torch.as_tensor(eigenvalues).to(dtype)
    x0 = torch.randn(len(e), generator=torch.Generator().manual_seed(4), dtype=dtype)
    problem = zoscope.Problem.from_function(lambda x: 0.5 * (e * x * x).sum(), x0)
    return Subject(problem, lambda: truths.diagonal(e, e.double() * x0.double()))


def _written(name: str, eigenvalues: Callable[[], Array], *, both: bool = False) -> None:
    """Enter a spectrum in double precision, and in single precision too."""
    FAMILIES[name] = lambda: explicit(eigenvalues())
    if both:
        FAMILIES[f"{name}-float32"] = lambda: explicit(eigenvalues(), torch.float32)


def _random() -> np.random.Generator:
    return np.random.default_rng(5)


def outliers_above(count: int, bulk: Array) -> Array:
    """Outliers from 1 to 30, evenly in their logarithm, above a bulk of 5,000."""
    return np.concatenate([np.geomspace(1.0, 30.0, count) if count > 1 else [30.0], bulk])


FLAT_BULK, ZERO_BULK = np.full(5000, 0.01), np.zeros(5000)

for _count in (1, 10, 100, 300):
    _written(f"outliers-{_count}-flat", lambda count=_count: outliers_above(count, FLAT_BULK), both=_count == 100)
    _written(f"outliers-{_count}-zero", lambda count=_count: outliers_above(count, ZERO_BULK), both=_count == 100)
_written("outliers-30-broad", lambda: outliers_above(30, 0.02 * _random().random(5000)))


_written("multiple-10", lambda: np.r_[np.full(10, 20.0), _random().exponential(0.02, 3000)])
_written("multiple-30", lambda: np.r_[np.full(30, 20.0), _random().exponential(0.02, 3000)], both=True)
_written("multiple-30-zero", lambda: np.r_[np.full(30, 20.0), np.zeros(3000)])
_written("all-equal", lambda: np.full(3000, 2.0), both=True)
_written("two-valued", lambda: np.r_[np.full(200, 5.0), np.full(2800, 0.5)], both=True)
_written("cluster-30", lambda: np.r_[100 + 1e-6 * np.arange(30), np.exp(_random().normal(size=3000))], both=True)
_written("clusters-3", lambda: np.r_[[c + 1e-3 * k for c in (50, 51, 80) for k in range(8)], _random().random(3000)])
_written("symmetric", lambda: np.outer([1, -1], np.abs(_random().normal(size=1500))).ravel(), both=True)
_written(
    "indefinite",
    lambda: np.r_[np.geomspace(2, 40, 15), -np.geomspace(2, 20, 10), 0.05 * _random().normal(size=3000)],
    both=True,
)
_written("power-0.5", lambda: np.arange(1, 20_001) ** -0.5)
_written("power-1", lambda: np.arange(1, 20_001) ** -1.0, both=True)
_written("power-2", lambda: np.arange(1, 20_001) ** -2.0)
_written("pareto", lambda: _random().pareto(1.2, 20_000))


def robust(dim: int) -> Array:
    """Twenty outliers far above an exponential bulk."""
    bulk = _random().exponential(1e-3, dim - 20)
    return np.r_[np.linspace(100.0, 1000.0, 20), bulk]


for _d in (50, 300, 5_000, 100_000):
    _written(f"dim-{_d}", lambda d=_d: robust(d), both=True)
FAMILIES["dim-2000000-float32"] = lambda: explicit(robust(2_000_000), torch.float32)


# The networks of the other validations.

FAMILIES["digits-cnn"] = lambda: _network(networks.convolutional())
FAMILIES["digits-mlp"] = lambda: _network(networks.rectified(), kinks=True)
FAMILIES["decoder"] = lambda: _network(networks.decoder())


def _network(problem: zoscope.Problem, *, kinks: bool = False) -> Subject:
    return Subject(problem, lambda: truths.dense(problem, kinks=kinks))


def _mlp(unit: type[nn.Module], inputs: int, width: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, width), unit(), nn.Linear(width, width), unit(), nn.Linear(width, outputs))


def _train(model: nn.Module, loss: Callable[[], Tensor], *, steps: int, lr: float, until: float = 0.0) -> None:
    """Adam on all examples, for so many steps or until the loss is small enough."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        found = loss()
        if float(found.detach()) <= until:
            break
        found.backward()
        optimizer.step()
    model.zero_grad()
