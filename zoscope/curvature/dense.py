"""The whole matrix, for small problems: every eigenvalue, no error bar."""

import numpy as np
import torch
from numpy.typing import NDArray

from zoscope.curvature.operators import LinearOperator
from zoscope.errors import NumericalError


def dense_eigenvalues(operator: LinearOperator) -> tuple[NDArray[np.float64], float]:
    """All eigenvalues of a symmetric operator, computed in float64.

    Args:
        operator: Symmetric operator of dimension d; its matrix takes ``8 d²`` bytes.

    Returns:
        ``(d,)`` eigenvalues, ascending, and the spectral norm of the antisymmetric part (an upper estimate): how far
        rounding of the products can have moved them.

    Raises:
        NumericalError: If a product is not finite.
    """
    matrix = operator.dense()
    if not bool(torch.isfinite(matrix).all()):
        raise NumericalError(
            "The Hessian has entries that are not finite although the loss is finite. Expected finite second "
            "derivatives at the point where curvature is measured. Look for sqrt or a norm at 0, or overflow in half "
            "precision (try --dtype float32 or float64)."
        )
    double = matrix.double()
    asymmetry = float(torch.linalg.matrix_norm(double - double.T)) / 2
    return torch.linalg.eigvalsh((double + double.T) / 2).cpu().numpy(), asymmetry
