"""Losses as functions of a model and a batch, in the forms that users give them."""

import numbers
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoscope.errors import SpecError

LossFunction = Callable[[nn.Module, Any], Tensor]
Metric = Callable[[nn.Module, Any], Tensor | float]


class CriterionLoss:
    """``criterion(model(x), y)`` as a loss of a model and a batch."""

    def __init__(self, criterion: Callable[[Any, Any], Tensor]) -> None:
        self.criterion = criterion

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss of one pair ``(x, y)``."""
        inputs, targets = pair(batch)
        return self.criterion(model(inputs), targets)


class NumberLoss:
    """A loss that may return a Python or NumPy number instead of a tensor, where no derivative is wanted."""

    def __init__(self, loss: LossFunction) -> None:
        self._loss = loss

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss of a batch; a number becomes a float64 scalar on the CPU."""
        value: Any = self._loss(model, batch)
        return torch.tensor(float(value), dtype=torch.float64) if _is_number(value) else value


def _is_number(value: Any) -> bool:
    """Whether a value is a real number that can vary continuously: counts and truth values cannot."""
    if isinstance(value, np.ndarray):
        return value.ndim == 0 and value.dtype.kind == "f"
    return isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral)


class LossModule(nn.Module):
    """Makes ``loss(model, batch)`` a forward pass, so that torch can run it with other parameter tensors."""

    def __init__(self, model: nn.Module, loss: LossFunction) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        """The loss."""
        return self.loss(self.model, batch)


def pair(batch: Any) -> tuple[Any, Any]:
    """Take ``(inputs, targets)`` apart.

    Raises:
        SpecError: If the batch is something else.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    size = f" of {len(batch)} items" if isinstance(batch, (tuple, list)) else ""
    raise SpecError(
        f"A batch is a {type(batch).__name__}{size}: Problem.from_criterion expects pairs (inputs, targets). For a "
        "dataset in memory pass a tuple (inputs, targets), not a list, which is read as a list of batches; for other "
        "batches use Problem(model, batches, loss) with loss(model, batch)."
    )
