"""Test matrices built from their spectrum."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=8)
def rotated(eigenvalues: Tensor, *, seed: int) -> Tensor:
    """A symmetric matrix with these eigenvalues in a random basis: Rademacher probes are exact on diagonal ones.

    The same matrix for the same tensor: a decomposition takes longer than most of what is done with it.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(eigenvalues), len(eigenvalues), generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(noise)[0]
    matrix = (basis * eigenvalues.double()) @ basis.T
    return (matrix + matrix.T) / 2


def network_like(*, size: int = 700, negative: float = 0.2) -> Tensor:
    """Eigenvalues as networks have them: a few outliers, a decaying positive bulk, a share of negative ones."""
    rank = torch.arange(1, size + 1, dtype=torch.float64)
    bulk = 0.6 * rank**-0.7
    bulk[torch.rand(size, generator=torch.Generator().manual_seed(3)) < 0.45] *= -negative / 0.45
    return torch.cat([torch.tensor([25.0, 14.0, 9.0, 5.0, 3.0, 2.0, -0.8]).double(), bulk])
