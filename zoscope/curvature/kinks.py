"""Curvature that second derivatives cannot see: kinks of ReLU, max-pooling, absolute values and the like."""

import math
import re
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zoscope.curvature.operators import LinearOperator
from zoscope.problem import Objective
from zoscope.theory.spectrum import Estimate

PROBES = 3
"""Directions compared; differences along one direction average over all kinks at once and scatter little."""

STEP = 1e-3
"""Step along a direction: the usual μ of zeroth-order training, so that the kinks that count are those it crosses."""

CLEAR_OF_ROUNDING = 100.0
"""Second difference of the loss in units of its rounding error; the step is longer where it would be less."""


_SMOOTH = re.compile(
    r"aten\.(convolution\w*|mkldnn_convolution|cudnn_convolution|addmm|baddbmm|mm|bmm|matmul|mv|dot|linear|embedding|"
    r"add_?|sub_?|mul_?|div_?|rsub|neg|exp|tanh|sigmoid|gelu|silu|softplus|mish|elu|celu|sin|cos|erf|"
    r"_?log_softmax|_?softmax|_safe_softmax|nll_loss\w*|cross_entropy_loss|mse_loss|square|logsumexp|"
    r"native_(batch|layer|group)_norm|_native_batch_norm_legit\w*|cudnn_batch_norm|_batch_norm\w*|"
    r"sum|mean|avg_pool\dd|_adaptive_avg_pool\dd|adaptive_avg_pool\dd|cumsum|"
    r"view|_unsafe_view|reshape|_reshape_alias|t|transpose|permute|expand|unsqueeze|squeeze|slice|select|split\w*|"
    r"unbind|cat|stack|clone|contiguous|alias|detach|_to_copy|to|copy_|constant_pad_nd|gather|index_select|flatten|"
    r"arange|zeros\w*|ones\w*|full\w*|empty\w*|new_\w+|masked_fill|tril|triu|bernoulli\w*|upsample_\w+|"
    r"pow|lift_fresh|scalar_tensor)"
)
"""Operations without kinks, as functions of whatever may depend on parameters."""


class _Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Whether every operation is known to be smooth."""

    smooth = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        power = args[1] if name == "aten.pow" and len(args) > 1 else 2
        if not _SMOOTH.fullmatch(name) or power not in (1, 2, 3, 4):
            self.smooth = False
        return func(*args, **(kwargs or {}))


def is_smooth(objective: Objective) -> bool:
    """Whether the loss is made of operations without kinks alone; False where that is not known."""
    seen = _Seen()  # type: ignore[no-untyped-call]
    if objective.crew is not None:
        return False
    with torch.no_grad(), seen:
        for shard in objective.shards[:1]:  # the others are evaluated alike
            objective.loss(shard)
    return seen.smooth


def kink_trace(objective: Objective, operator: LinearOperator, *, generator: torch.Generator) -> Estimate:
    """How much larger the trace is for small random steps than for infinitesimal ones.

    At a kink the second derivative is a point mass: autograd returns 0 almost everywhere, yet every step of finite
    length crosses some kinks, and the loss over many examples bends like a smooth one with more curvature. Compares
    ``(f(θ+hz) - 2f(θ) + f(θ-hz))/h²`` with ``zᵀHz`` for the same ``z ~ N(0, I)``. For a smooth loss the difference is
    zero up to O(h²).

    Args:
        objective: The prepared problem; its parameters are the same afterwards.
        operator: Its Hessian.
        generator: Source of the directions.

    Returns:
        The excess of the trace over ``Tr H`` in loss/param², with its standard error over the directions.
    """
    vectors = torch.randn(PROBES, operator.dim, generator=generator, dtype=operator.dtype, device=operator.device)
    curvatures = (vectors * operator.matmat(vectors)).sum(dim=1).double().tolist()
    start, loss = objective.read(), objective.value()
    noise = 4 * torch.finfo(operator.dtype).eps * max(abs(loss), 1e-30)
    size = max(map(abs, curvatures))
    h = max(STEP, math.sqrt(CLEAR_OF_ROUNDING * noise / size)) if size > 0 else STEP
    excess = []
    try:
        for vector, curvature in zip(vectors, curvatures, strict=True):
            objective.write(start + h * vector)
            above = objective.value()
            objective.write(start - h * vector)
            below = objective.value()
            excess.append((above - 2 * loss + below) / h**2 - curvature)
    finally:
        objective.write(start)
    found = torch.tensor(excess, dtype=torch.float64)
    rounding = noise / h**2
    spread = math.hypot(float(found.std()), rounding) / math.sqrt(PROBES)
    return Estimate(float(found.mean()), spread)
