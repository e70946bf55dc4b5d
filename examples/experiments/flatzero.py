"""Logistic regression and a squared-hinge SVM on random features, as in arXiv:2506.05454, and the toy ½(xᵀy − 1)².

    zoscope track --config examples/experiments/flatzero-logistic.yaml
    zoscope track --config examples/experiments/flatzero-logistic.yaml --set data=a5a

Far more parameters than examples: there are many minima, and zeroth-order descent drifts to those with a small trace.
The trace has a closed form: mean p(1 − p)‖x‖² for the logistic loss, 2 Σ‖x‖²/n over the examples inside the margin
for the SVM, ‖x‖² + ‖y‖² on the minima of the toy.
"""

import torch
from sources import standardised, two_classes
from torch import nn

import zoscope


def logistic(
    data: str | None = None, examples: int | None = None, features: int = 10_000, scale: float = 0.1, seed: int = 0
) -> zoscope.Problem:
    """Logistic loss. ``features`` random ones and a bias; the weights start as ``scale`` times N(0, 1)."""
    return linear(lambda margin: nn.functional.softplus(-margin).mean(), data, examples, features, scale, seed)


def svm(
    data: str | None = None, examples: int | None = None, features: int = 10_000, scale: float = 0.1, seed: int = 0
) -> zoscope.Problem:
    """Squared hinge ``max(0, 1 − margin)²``, otherwise as ``logistic``."""
    return linear(lambda margin: (1 - margin).relu().square().mean(), data, examples, features, scale, seed)


def linear(loss, data: str | None, examples: int | None, features: int, scale: float, seed: int) -> zoscope.Problem:
    """A linear model of standardised random features with a loss of the margin ``y w·x``."""
    inputs, signs = two_classes(data)
    inputs, signs = inputs[:examples], signs[:examples]
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(inputs.shape[1], features, generator=generator)
    projected = standardised(inputs @ projection)
    projected = torch.cat([projected, torch.ones(len(projected), 1)], dim=1)
    model = nn.utils.skip_init(nn.Linear, features + 1, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(scale * torch.randn(1, features + 1, generator=generator))
    return zoscope.Problem.from_criterion(
        model, [(projected, signs)], lambda outputs, signs: loss(outputs.squeeze(1) * signs)
    )


def toy(size: int = 100, scale: float = 0.2, seed: int = 0) -> zoscope.Problem:
    """``½(xᵀy − 1)²`` of two vectors of ``size`` numbers that start as ``scale`` times N(0, 1)."""
    start = scale * torch.randn(2, size, generator=torch.Generator().manual_seed(seed))
    return zoscope.Problem.from_function(lambda point: 0.5 * (point[0] @ point[1] - 1).square(), start)
