"""A fully connected network on handwritten digits, squared loss (d = 3,466).

    zoscope track --config examples/experiments/zo-gd-mlp.yaml

Small enough to reach the edge of stability of zeroth-order descent within a minute.
"""

import itertools

import torch
from sources import half_squared_error, images, one_hot, standardised
from torch import nn

import zoscope

ACTIVATIONS = {"gelu": nn.GELU, "tanh": nn.Tanh}


def problem(
    examples: int = 200, width: int = 32, depth: int = 2, scale: float = 4.0, activation: str = "tanh", seed: int = 0
) -> zoscope.Problem:
    """An untrained network with ``depth`` hidden layers of ``width`` units.

    Every pixel is standardised by itself and multiplied by ``scale``: many directions of curvature of about the same
    size, and no few that carry all the noise. ``seed`` is that of the network.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}: expected {' or '.join(ACTIVATIONS)}")
    pixels, labels = images(None, examples=examples, classes=10)
    pixels = scale * standardised(pixels.flatten(1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = [64, *[width] * depth]
        unit = ACTIVATIONS[activation]
        hidden = [layer for n, m in itertools.pairwise(sizes) for layer in (nn.Linear(n, m), unit())]
        model = nn.Sequential(*hidden, nn.Linear(width, 10))
    return zoscope.Problem.from_criterion(model, [(pixels, one_hot(labels, 10))], half_squared_error)
