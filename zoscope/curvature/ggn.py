"""The generalised Gauss-Newton matrix."""

import torch
from torch import Tensor

from zoscope.curvature.operators import Products, ShardOperator, one_by_one
from zoscope.errors import SpecError, UsageError
from zoscope.problem import Objective, Shard
from zoscope.runtime.autograd_errors import cannot_differentiate


class GGNOperator(ShardOperator):
    """The generalised Gauss-Newton matrix ``Jᵀ (∇²criterion) J``; positive semi-definite for a convex criterion.

    Args:
        objective: A prepared problem made by ``Problem.from_criterion``.

    Raises:
        UsageError: If the problem has no criterion.

    Source: Schraudolph, Fast curvature matrix-vector products, Neural Computation 14 (2002).
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective)
        if objective.criterion is None:
            raise UsageError(
                "--curvature ggn: this problem was made from a loss function, which hides the model's outputs. "
                "Expected Problem.from_criterion(model, batches, criterion); or use --curvature hessian."
            )

    def _products(self, shard: Shard) -> Products:
        objective = self.objective
        assert objective.criterion is not None
        outputs, targets = objective.outputs(shard)
        head = outputs.detach().requires_grad_()
        slope = torch.autograd.grad(objective.criterion(head, targets), head, create_graph=True)[0]
        seed = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(
            outputs, objective.params, seed, create_graph=True, allow_unused=True, materialize_grads=True
        )
        live = [i for i, p in enumerate(pulled) if p.requires_grad]

        if not live or not slope.requires_grad:
            return torch.zeros_like

        def product(parts: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
            # Jv is the derivative of Jᵀs by s, along v: two backward sweeps in place of forward mode.
            (pushed,) = torch.autograd.grad(
                [pulled[i] for i in live], seed, [parts[i] for i in live], retain_graph=True
            )
            (curved,) = torch.autograd.grad(slope, head, pushed, retain_graph=True)
            return torch.autograd.grad(outputs, objective.params, curved, retain_graph=True, allow_unused=True)

        return lambda vectors: one_by_one(objective, vectors, product)

    def matmat(self, vectors: Tensor) -> Tensor:
        """Products with the rows of ``vectors``; as for the Hessian."""
        try:
            return super().matmat(vectors)
        except RuntimeError as error:
            raise SpecError(cannot_differentiate(error)) from error
