"""Problems small enough to be trained and measured many times."""

import numpy as np
import torch
from torch import nn

import zoscope


def quadratic(eigenvalues, *, seed=0):
    """½ xᵀHx in a rotated basis, float64."""
    generator = torch.Generator().manual_seed(seed)
    lam = torch.as_tensor(np.asarray(eigenvalues), dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(len(lam), len(lam), generator=generator, dtype=torch.float64))
    matrix = (basis * lam) @ basis.T
    start = torch.randn(len(lam), generator=generator, dtype=torch.float64)
    return zoscope.Problem.from_function(lambda x: 0.5 * x @ (matrix @ x), start)


def network(*, batches=1, metrics=None):
    """Regression with one hidden layer, 29 parameters, 24 examples."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 4, generator=generator)
    y = torch.sin(x.sum(dim=1, keepdim=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1), nn.BatchNorm1d(1).eval())
    data = list(zip(x.chunk(batches), y.chunk(batches), strict=True))
    return zoscope.Problem.from_criterion(model, data, nn.MSELoss(), metrics=metrics)
