"""Losses that are a formula, each for something that zoscope has to say about it."""

import math

import numpy as np
import torch

import zoscope

WEIGHTS = np.linspace(0.5, 2.0, 50)


def _quadratic(eigenvalues: torch.Tensor, start: float = 0.125) -> zoscope.Problem:
    return zoscope.Problem.from_function(
        lambda x: 0.5 * (eigenvalues * x * x).sum(), torch.full_like(eigenvalues, start)
    )


def saddle() -> zoscope.Problem:
    """Few directions, and one of them goes down."""
    return _quadratic(torch.tensor([4.0, 2.0, 0.25, -0.5], dtype=torch.float64))


def hill() -> zoscope.Problem:
    """No direction bends upwards."""
    return _quadratic(torch.tensor([-4.0, -1.0, -0.25], dtype=torch.float64))


def even(scale: float = 1.0) -> zoscope.Problem:
    """Twenty eigenvalues close to one another."""
    return _quadratic(scale * torch.linspace(0.5, 1.5, 20, dtype=torch.float64))


def wide() -> zoscope.Problem:
    """More eigenvalues than a short chain of Lanczos steps can tell apart."""
    return _quadratic(torch.logspace(-3, 0.3, 120, dtype=torch.float64))


def valley(start: float = 0.02) -> zoscope.Problem:
    """A quadratic between walls."""
    return zoscope.Problem.from_function(lambda x: (0.5 * x * x + 100 * x**4).sum(), _start(20, start))


def plain() -> zoscope.Problem:
    """Flat where it starts, and curved after a few steps."""
    return zoscope.Problem.from_function(lambda x: x.cosh().log().sum(), _start(12, 4.0))


def bent() -> zoscope.Problem:
    """A kink along every axis."""
    return zoscope.Problem.from_function(lambda x: (0.5 * x * x + (x - 0.125).abs()).sum(), _start(6, 0.125))


def line() -> zoscope.Problem:
    """No curvature at all."""
    return zoscope.Problem.from_function(lambda x: x.sum(), _start(6, 1.0))


def staircase() -> zoscope.Problem:
    """Constant between jumps."""
    return zoscope.Problem.from_function(
        lambda x: (10 * x).floor().sum() + 0 * x.sum(), torch.linspace(0.1, 2, 12, dtype=torch.float64)
    )


def simulator(weight: float = 1.0) -> zoscope.Problem:
    """Another program, which returns a number and no derivative."""
    return zoscope.Problem.from_function(
        lambda x: float(0.5 * weight * np.sum(WEIGHTS * np.asarray(x) ** 2)), _start(50, 1.0)
    )


def undefined() -> zoscope.Problem:
    """A loss that is not a number."""
    return zoscope.Problem.from_function(lambda x: x.sum() * math.nan, _start(6, 1.0))


def failing() -> zoscope.Problem:
    """A function with a mistake."""
    return 1 / 0


def interrupted() -> zoscope.Problem:
    """Ctrl-C while the spec loads."""
    raise KeyboardInterrupt


def talking() -> zoscope.Problem:
    """A function that prints."""
    print("the user's own words")
    return saddle()


def _start(size: int, value: float) -> torch.Tensor:
    return torch.full((size,), value, dtype=torch.float64)
