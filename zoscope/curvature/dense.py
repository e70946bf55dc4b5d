"""The whole matrix, for small problems: every eigenvalue, no error bar."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoscope.curvature.faults import NEARLY, NOT_SYMMETRIC
from zoscope.curvature.operators import LinearOperator
from zoscope.errors import NumericalError, SpecError, UsageError
from zoscope.runtime import available_memory


def dense_eigenvalues(operator: LinearOperator) -> tuple[NDArray[np.float64], float]:
    """All eigenvalues of a symmetric operator, computed in float64.

    Args:
        operator: Symmetric operator of dimension d; its matrix takes ``8 d²`` bytes.

    Returns:
        ``(d,)`` eigenvalues, ascending, and the spectral norm of the antisymmetric part (an upper estimate): how far
        rounding of the products can have moved them.

    Raises:
        UsageError: If the matrix does not fit in memory.
        NumericalError: If a product is not finite.
        SpecError: If the matrix is not symmetric.
    """
    needed, free = 32 * operator.dim**2, available_memory(operator.device)
    if needed > free:
        raise UsageError(
            f"--method dense: all eigenvalues of {operator.dim:,} parameters need about {needed / 2**30:.0f} GiB, and "
            f"{free / 2**30:.0f} GiB are free. Expected a smaller problem; use --method deflated-slq, or fewer "
            "parameters (--params)."
        )
    matrix = operator.dense()
    if not bool(torch.isfinite(matrix).all()):
        raise NumericalError(
            "The Hessian has entries that are not finite although the loss is finite. Expected finite second "
            "derivatives at the point where curvature is measured. Look for sqrt or a norm at 0, or overflow in half "
            "precision (try --dtype float32 or float64)."
        )
    double = matrix.double()
    asymmetry = float(torch.linalg.matrix_norm(double - double.T)) / 2
    if asymmetry > NEARLY * float(torch.linalg.matrix_norm(double)):
        raise SpecError(NOT_SYMMETRIC)
    return torch.linalg.eigvalsh((double + double.T) / 2).cpu().numpy(), asymmetry


def dense_eigenpairs(operator: LinearOperator) -> tuple[NDArray[np.float64], Tensor]:
    """All eigenvalues ``(d,)``, ascending, and the eigenvectors as rows ``(d, d)``, in the operator's type."""
    double = operator.dense().double()
    values, vectors = torch.linalg.eigh((double + double.T) / 2)
    return values.cpu().numpy(), vectors.T.to(operator.dtype)
