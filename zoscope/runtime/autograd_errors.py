"""What torch means when a derivative fails, and derivatives that are silently wrong."""

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_REMEDIES: tuple[tuple[str, str], ...] = (
    (
        r"use_reentrant=True|Checkpointing is not compatible with \.grad|torch\.utils\.checkpoint.*not compatible",
        "The model uses reentrant activation checkpointing, which cannot be differentiated twice: call checkpoint(..., "
        "use_reentrant=False), with transformers gradient_checkpointing_kwargs={'use_reentrant': False}, or switch it "
        "off; --curvature forward works without derivatives.",
    ),
    (
        r"aot_autograd does not currently support double backward|torch\.compile with.*double backward",
        "A compiled function has no double backward: pass the uncompiled model and loss, or set "
        "TORCHDYNAMO_DISABLE=1; --curvature forward works without derivatives.",
    ),
    (
        r"(flash|efficient|cudnn|fused)_?.*attention.*backward|scaled_dot_product.*backward|FlashAttn|flash_attn",
        "A fused attention kernel has no second derivative: use attn_implementation='eager' with transformers, or "
        "scaled_dot_product_attention without a kernel chosen by hand; --curvature forward works without derivatives.",
    ),
    (
        r"_?cudnn_rnn|mkldnn_rnn_layer|_thnn_fused_(lstm|gru)",
        "A fused recurrent kernel has no such derivative: run the forward pass under torch.backends.cudnn.flags("
        "enabled=False), use --hvp double-backward, or --curvature forward, which works without derivatives.",
    ),
    (
        r"derivative for '?(aten::)?[\w:]+'? is not implemented|is not differentiable twice|once_differentiable"
        r"|marked with @once_differentiable|trying to differentiate twice a function",
        "An operation in the loss has no second derivative: replace it (for example embedding_bag by embedding and a "
        "mean, cdist by (x[:, None] - y).square().sum(-1); ctc_loss has none at all), or use --curvature forward, "
        "which works without derivatives.",
    ),
    (
        r"modified by an inplace operation",
        "The loss, or a layer, changes a tensor in place that its own derivative needs: write it out of place, "
        "for example x = x + y instead of x += y, nn.ReLU() instead of nn.ReLU(inplace=True).",
    ),
    (
        r"Inference tensors cannot be saved for backward",
        "A tensor made under torch.inference_mode() takes part in the loss: make it outside, or clone() it.",
    ),
)


def explain_autograd_error(error: BaseException) -> str | None:
    """One sentence with the cause and the remedy for an error of a first or second derivative.

    Returns:
        None for an error that is not known to come from differentiation.
    """
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    for pattern, remedy in _REMEDIES:
        if re.search(pattern, text, re.IGNORECASE | re.DOTALL):
            return remedy
    return None


_DETACHED = "None of the inputs have requires_grad=True"  # of torch.utils.checkpoint, reentrant
REENTRANT = (
    "A part of the model runs under reentrant activation checkpointing, which hides its parameters from "
    "torch.autograd.grad: call checkpoint(..., use_reentrant=False), with transformers "
    "gradient_checkpointing_kwargs={'use_reentrant': False}, or switch it off; --curvature forward works without "
    "derivatives."
)
ONCE_DIFFERENTIABLE = (
    "The loss uses a torch.autograd.Function whose backward is marked once_differentiable: torch would take its second "
    "derivative for zero. Write the backward with differentiable operations and drop the mark, replace the operation, "
    "or use --curvature forward, which works without derivatives."
)


def _nodes(tensors: Sequence[Tensor | None]) -> Iterator[Any]:
    """All nodes of the autograd graphs of some tensors."""
    stack: list[Any] = [t.grad_fn for t in tensors if t is not None and t.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)


def node_names(tensors: Sequence[Tensor | None]) -> set[str]:
    """Names of all nodes of the autograd graphs of some tensors."""
    return {str(node.name()) for node in _nodes(tensors)}


def has_custom_functions(loss: Tensor) -> bool:
    """Whether a loss passes through a ``torch.autograd.Function`` of the user's."""
    nodes = (node for node in _nodes([loss]) if isinstance(node, torch.autograd.function.BackwardCFunction))
    modules = (str(getattr(type(node), "_forward_cls").__module__) for node in nodes)  # noqa: B009 - of no annotation
    return any(not module.startswith(("torch.", "zoscope.")) for module in modules)


def hides_parameters(loss: Tensor) -> bool:
    """Whether the graph of a loss passes through a reentrant checkpoint."""
    return "CheckpointFunctionBackward" in node_names([loss])


def lacks_second_derivatives(grads: Sequence[Tensor | None]) -> bool:
    """Whether gradients made with ``create_graph`` end in an error node, which a second derivative would skip."""
    return "torch::autograd::Error" in node_names(grads)


@contextmanager
def checkpoint_warnings() -> Iterator[list[str]]:
    """Collect what reentrant checkpoints warn of; other warnings are shown as usual."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield found
        finally:
            found += [str(w.message) for w in caught if _DETACHED in str(w.message)]
    for w in caught:
        if _DETACHED not in str(w.message):
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)


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
