"""Whether a linearized gradient is worth its set-up: told by timing it against double-backward on the user's model.

Tracing goes through code of torch that is little used, and where it fails it may end the process without an exception.
So it is tried by itself only for losses made of operations that are known to work.
"""

from __future__ import annotations

import re
import time

import numpy as np
import torch
from torch import Tensor, nn

from zoscope.curvature.hvp import Products, shard_products
from zoscope.problem import Objective, Shard
from zoscope.runtime import available_memory, held_memory, is_limited, is_out_of_memory, release_memory

FEWEST_PRODUCTS = 60
"""Products expected below which no set-up is paid back."""

LOOKS = 3
"""Products of double-backward that are timed; they are products that somebody asked for."""

HOPED_GAIN = 0.2
"""Part of a product's time that linearizing saves on convolutions: 2.3 gradients become 1.7."""

SETUP_PRODUCTS, SETUP_SECONDS = 5.0, 2.0
"""Set-up: in products, and for the tracing, which does not depend on the number of examples."""

MEMORY_RATIO = 4.0
"""Free memory that it takes, in units of double-backward's graph; 2.6 were seen."""

_KNOWN = re.compile(
    r"(Convolution|Gelu|Relu|LeakyRelu|Elu|Silu|Sigmoid|Tanh|Softplus|Hardswish|Mish|Hardtanh|MaxPool2DWithIndices|"
    r"AvgPool2D|AdaptiveAvgPool2D|NativeBatchNorm|NativeGroupNorm|NativeLayerNorm|ConstantPadNd|Slice|Unsqueeze|Cat|"
    r"Softmax|UpsampleNearest2D|UpsampleBilinear2D|Addmm|View|Reshape|T|Add|Sub|Mul|Div|Neg|Pow|Sum|Mean|LogSoftmax|"
    r"NllLoss|NllLoss2D|SmoothL1Loss|MseLoss|Abs|BinaryCrossEntropy|BinaryCrossEntropyWithLogits|Logsumexp|MaskedFill|"
    r"LinalgVectorNorm|ReshapeAlias|UnsafeView)Backward\d*|torch::autograd::AccumulateGrad"
)
"""Names of the nodes of graphs that torch 2.13 linearizes: right, or with an exception."""

AGREEMENT = 1e-3
"""Relative difference between two methods' products beyond which one of them is wrong."""


def now(device: torch.device) -> float:
    """Seconds, once a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Rival:
    """Compares ``linearize`` with ``double-backward`` while products with one shard's Hessian are computed.

    Args:
        objective: The prepared problem.
        expected: Products expected in all.

    Attributes:
        num_products: Products computed for the comparison alone.
    """

    def __init__(self, objective: Objective, *, expected: int) -> None:
        self._objective, self._expected = objective, expected
        self._seconds: list[float] = []
        self.num_products = 0
        self._before = held_memory(objective.device)

    @property
    def possible(self) -> bool:
        """Whether there is anything to gain: a single graph that many products share, of a model with convolutions."""
        objective = self._objective
        return (
            self._expected >= FEWEST_PRODUCTS
            and len(objective.shards) == 1
            and objective.crew is None
            and any(isinstance(module, nn.modules.conv._ConvNd) for module in objective.model.modules())
        )

    def saw(self, seconds: float) -> bool:
        """Take note of what a product took by double-backward, on a graph that was there; whether that is enough."""
        self._seconds.append(seconds)
        return len(self._seconds) >= LOOKS

    def challenge(self, shard: Shard, vector: Tensor, product: Tensor) -> Products | None:
        """The faster way, where it is faster, gives the same product of ``(1, d)``, and is likely to pay.

        Raises:
            KeyboardInterrupt: If it is interrupted; errors of the method itself are its defeat.
        """
        usual, objective = float(np.median(self._seconds)), self._objective
        if self._expected * HOPED_GAIN * usual < SETUP_PRODUCTS * usual + SETUP_SECONDS:
            return None
        if is_limited():  # what it takes at its peak cannot be told beforehand
            return None
        graph = max(held_memory(objective.device) - self._before, 0)
        if available_memory(objective.device) < MEMORY_RATIO * graph:
            return None
        if not _is_known(objective.loss(shard)):
            return None
        try:
            candidate = shard_products(objective, shard, method="linearize")
            candidate(vector)  # brings memory along that later products reuse
            began = now(objective.device)
            found = candidate(vector)
            seconds = now(objective.device) - began
            self.num_products += 2
            wrong = float(torch.linalg.vector_norm(found - product))
        except Exception as error:  # whatever forward mode or tracing cannot do
            if is_out_of_memory(error):
                release_memory(objective.device)
            return None
        right = wrong <= AGREEMENT * float(torch.linalg.vector_norm(product))
        return candidate if right and seconds < usual else None


def _is_known(loss: Tensor) -> bool:
    """Whether a loss is made of operations that are known to be linearized without a crash."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if not _KNOWN.fullmatch(node.name()):
            return False
        seen.add(node)
        todo += [parent for parent, _ in node.next_functions]
    return True
