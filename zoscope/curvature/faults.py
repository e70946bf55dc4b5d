"""Faults of second derivatives: how they show in products, and what a user is told."""

import math

import torch
from torch import Tensor

from zoscope.runtime import explain_autograd_error

SAME, NEARLY = 1e-3, 1e-2
"""Relative difference of two products, and of ``uᵀHv`` and ``vᵀHu``, up to which it is rounding."""

NOT_DETERMINISTIC = (
    "A Hessian-vector product computed twice gives two answers: the loss is not a function of the parameters alone. "
    "Expected a deterministic loss. Look for dropout or noise in a custom layer; call model.eval() or fix the noise in "
    "the spec."
)
NOT_SYMMETRIC = (
    "The second derivatives are not symmetric (uᵀHv and vᵀHu differ), so that of some operation in the loss is wrong: "
    "a custom autograd.Function whose backward cannot be differentiated, or a fault of torch. Expected twice "
    "differentiable operations. Replace it, or use --curvature forward, which takes no derivatives."
)
WRONG_METHOD = (
    "--hvp {method} gives other Hessian-vector products than double-backward: torch differentiates some operation in "
    "the loss wrongly there, such as recurrent layers with linearize. Leave --hvp out."
)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two products are equal up to rounding; whoever asked for one that is not finite says so."""
    norm = torch.linalg.vector_norm
    return bool(norm(a - b) <= SAME * norm(a)) or not bool(torch.isfinite(a).all())


def symmetric(v: Tensor, hv: Tensor, u: Tensor, hu: Tensor) -> bool:
    """Whether ``uᵀHv = vᵀHu``, relative to what such a number is for random vectors."""
    norm = torch.linalg.vector_norm
    scale = torch.maximum(norm(u) * norm(hv), norm(v) * norm(hu)) / math.sqrt(u.numel())
    difference = ((u * hv).sum() - (v * hu).sum()).abs()
    return bool(difference <= NEARLY * scale) or not bool(torch.isfinite(hv).all())


def cannot_differentiate(error: BaseException) -> str:
    """What a user should know of an error from a second derivative."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    remedy = explain_autograd_error(error) or "Replace the operation, or use --curvature forward."
    return f"The loss cannot be differentiated twice: torch says '{first}'. {remedy}"
