"""A quadratic whose answer can be checked by hand: four eigenvalues of 5 and forty of 1/2, rotated at random.

    zoscope bounds examples/quadratic.py

Tr H = 40, λ_max = 5, Tr H² = 110, and at the starting point gᵀg = 110, gᵀHg = 505. Hence for gradient descent

    first-order threshold   2/λ_max                        = 0.4
    the paper's interval    [2/(Tr H + 2 λ_max), 2/Tr H]   = [0.04, 0.05]
    exact threshold         10η/(1 - 5η) + 10η/(1 - η/2) = 1   at η = 1/23 = 0.0434783
    descent threshold       2/(Tr H + 2·505/110)           = 0.0406654
"""

import numpy as np
import torch

import zoscope

EIGENVALUES = [5.0] * 4 + [0.5] * 40


def problem(seed: int = 0) -> zoscope.Problem:
    """``f(x) = xᵀHx / 2`` at the sum of H's eigenvectors; ``seed`` turns them, which changes no answer."""
    dim = len(EIGENVALUES)
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))
    hessian = torch.from_numpy(rotation @ np.diag(EIGENVALUES) @ rotation.T)
    start = torch.from_numpy(rotation.sum(axis=1))

    def f(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x @ hessian.to(x) @ x  # .to(x): wherever and in whatever precision x is

    return zoscope.Problem.from_function(f, start)
