"""Traps that show in the autograd graph, or in a warning of torch, and nowhere else: silently wrong derivatives."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

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


def node_names(tensors: Sequence[Tensor | None]) -> set[str]:
    """Names of all nodes of the autograd graphs of some tensors."""
    stack: list[Any] = [t.grad_fn for t in tensors if t is not None and t.grad_fn is not None]
    seen, names = set(stack), set()
    while stack:
        node = stack.pop()
        names.add(str(node.name()))
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return names


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
