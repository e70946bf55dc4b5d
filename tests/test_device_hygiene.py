"""Nothing is made on, moved to or waited for by the host while a device computes: seen on ``meta``, without a device.

The ``meta`` device knows shapes and no numbers, and mixes with no other one. `Watch` stands in for the few numbers that
are asked for, counts how often, and refuses tensors that appear on the CPU.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zoscope import ZOGD, ZOGDM, ZOAdam
from zoscope.curvature import finite_difference, lanczos
from zoscope.curvature.ggn import GGNOperator
from zoscope.curvature.operators import METHODS, HessianOperator, LinearOperator, Preconditioned
from zoscope.curvature.preconditioner import expected_preconditioner
from zoscope.optim import directions, optimizers
from zoscope.optim.perturbation import StackedSurface
from zoscope.problem import Objective
from zoscope.theory.rules import GAUSSIAN

META = torch.device("meta")
WAITS = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::allclose"}


@dataclass
class Watch(TorchDispatchMode):
    """Counts what makes the host wait, and refuses tensors of the host.

    Attributes:
        waits: How often a number was asked for, by the operation.
    """

    waits: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        if name in WAITS and any(isinstance(t, Tensor) and t.device == META for t in args):
            self.waits[name] += 1
            return True if name != "aten::_local_scalar_dense" else 1.0
        if name == "aten::_to_copy" and (kwargs or {}).get("device") == torch.device("cpu"):
            self.waits["to the host"] += 1  # what a batch of numbers costs: one wait
            return torch.ones(args[0].shape, dtype=(kwargs or {}).get("dtype") or args[0].dtype)
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        hosts = [t for t in tensors if t.device != META and t.dim()]
        # A host's number on its own may go along with a kernel; anything else is a copy.
        assert not hosts or len(hosts) == len(tensors), f"{name} mixes devices: {[t.device for t in tensors]}"
        assert all(t.numel() <= SMALL for t in hosts), f"{name} works on the host: {[tuple(t.shape) for t in hosts]}"
        return result


SMALL = 64
"""Entries of what may be computed on the host: the small matrices of an eigenproblem, never a vector of parameters."""


class Attention(nn.Module):
    """A block of a language model, its embedding tied to its head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(19, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 19, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.words(x))).flatten(0, 1)


class Recurrent(nn.Module):
    """The last state of an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x)[0][:, -1])


def images() -> nn.Module:
    """Convolutions, pooled."""
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 5))


def normalised() -> nn.Module:
    """Convolutions with a norm over groups of channels."""
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(), nn.Linear(288, 5))


def pairs(*shape: int) -> tuple[Tensor, Tensor]:
    """Inputs and classes."""
    return torch.empty(*shape, device=META), torch.empty(shape[0], dtype=torch.long, device=META)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5)), lambda: pairs(12, 6)),
    "relu": (lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5)), lambda: pairs(12, 6)),
    "images": (images, lambda: pairs(12, 1, 8, 8)),
    "normalised": (normalised, lambda: pairs(12, 1, 8, 8)),
    "weight-norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 16)), nn.GELU(), nn.Linear(16, 5)),
        lambda: pairs(12, 6),
    ),
    "attention": (
        Attention,
        lambda: (torch.empty(4, 3, dtype=torch.long, device=META), torch.empty(12, dtype=torch.long, device=META)),
    ),
    "recurrent": (Recurrent, lambda: pairs(12, 2, 6)),
}


UNKNOWN = {(method, "normalised") for method in ("batched", "linearize")}
"""Fail on ``meta`` within torch, and on no other device."""

UNKNOWN |= {(method, "weight-norm") for method in ("forward-over-reverse", "linearize")}  # on any device


SLOW = ("attention", "recurrent")


class Twice(LinearOperator):
    """``2I``, on the device."""

    num_hvps = 0

    def __init__(self, dim: int) -> None:
        self.dim, self.device, self.dtype = dim, META, torch.float32

    def matmat(self, vectors: Tensor) -> Tensor:
        return 2 * vectors


def objective_on_meta(network: str, *, batches: int = 2, dtype: torch.dtype = torch.float32) -> Objective:
    """A prepared problem whose tensors have no numbers."""
    make, batch = NETWORKS[network]
    with META:
        model = make().to(dtype)
    inside = [tuple(t.to(dtype) if t.is_floating_point() else t for t in batch()) for _ in range(batches)]
    criterion = nn.functional.cross_entropy
    return Objective(
        model,
        loss=lambda model, batch: criterion(model(batch[0]), batch[1]),
        criterion=criterion,
        params=dict(model.named_parameters()),
        batches=inside,
        counts=[12] * batches,
        batch_size_of=None,
        device=META,
        dtype=dtype,
    )


def vectors(objective: Objective, count: int) -> Tensor:
    return torch.empty(count, objective.num_params, dtype=objective.dtype, device=META)


@pytest.fixture(autouse=True)
def generators_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """``meta`` has no generators, nor needs any: its tensors take no numbers."""
    made = directions.new_generator
    for module in (directions, optimizers, finite_difference):
        monkeypatch.setattr(module, "new_generator", lambda seed, device="cpu": made(seed))


@contextlib.contextmanager
def watched(*, waits: int) -> Iterator[Watch]:
    """See that a block makes the host wait exactly so often."""
    watch = Watch()
    with watch:
        yield watch
    assert sum(watch.waits.values()) == waits, dict(watch.waits)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_a_block_of_hessian_products_never_waits(network: str, method: str) -> None:
    if (method, network) in UNKNOWN:
        pytest.skip("torch has no such derivative of it here")
    if method == "linearize" and network in SLOW:
        pytest.skip("to record it takes longer than everything else here")
    objective = objective_on_meta(network)
    operator = HessianOperator(objective, hvp=method)
    operator._checked = True  # the check compares numbers, once
    block = vectors(objective, 3)
    with watched(waits=0):
        assert operator.matmat(block).shape == block.shape


@pytest.mark.parametrize("network", NETWORKS)
def test_a_block_of_gauss_newton_products_never_waits(network: str) -> None:
    objective = objective_on_meta(network)
    block = vectors(objective, 3)
    with watched(waits=0):
        assert GGNOperator(objective).matmat(block).shape == block.shape


def test_a_preconditioned_product_never_waits() -> None:
    objective = objective_on_meta("mlp")
    operator = HessianOperator(objective, hvp="double-backward")
    operator._checked = True
    block = vectors(objective, 2)
    with watched(waits=0):
        scaled = Preconditioned(operator, torch.empty(objective.num_params, device=META))
        assert scaled.matmat(block).device == META


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_wait_once_however_many_batches(network: str, dtype: torch.dtype) -> None:
    objective = objective_on_meta(network, batches=5, dtype=dtype)
    with watched(waits=1):
        objective.value()
    with watched(waits=1):
        assert objective.gradient()[1].shape == (objective.num_params,)


def test_the_whole_matrix_is_made_on_the_device() -> None:
    with watched(waits=0):
        assert Twice(70).dense().device == META


def test_the_expected_preconditioner_waits_for_its_few_numbers() -> None:
    gradient = torch.empty(1000, device=META)
    with watched(waits=1):
        expected_preconditioner(gradient, moments=GAUSSIAN, eps=1e-8)


def test_a_lanczos_step_waits_once() -> None:
    objective = objective_on_meta("mlp")
    operator = HessianOperator(objective, hvp="double-backward")
    operator._checked = True
    start = vectors(objective, 1)[0]
    chain = lanczos.Chain(operator, start, capacity=8)
    with watched(waits=6) as watch:
        chain.extend(6)
    assert watch.waits == {"to the host": 6}


def test_recurrences_and_projections_never_wait() -> None:
    objective = objective_on_meta("mlp")
    operator = HessianOperator(objective, hvp="double-backward")
    operator._checked = True
    block = vectors(objective, 3)
    with watched(waits=0):
        lanczos.Recurrences(operator, block, deflated=vectors(objective, 2)).extend(4)
        lanczos.project_out(block, vectors(objective, 2))


@pytest.mark.parametrize("make", [ZOGD, ZOGDM, ZOAdam])
@pytest.mark.parametrize("restore", ["snapshot", "fixed-point"])
@pytest.mark.parametrize("queries", [1, 3])
def test_a_zeroth_order_step_waits_once_a_query(make: Any, restore: str, queries: int) -> None:
    objective = objective_on_meta("mlp")
    optimizer = make(objective.params, lr=1e-3, queries=queries, restore=restore)
    blocks = 1
    # A grid has to know the largest of the parameters.
    waits = queries + (blocks if restore == "fixed-point" else 0)
    with watched(waits=waits):
        optimizer.step(lambda: objective.loss(objective.shards[0]))


@pytest.mark.parametrize("network", ["mlp", "images", "attention"])
def test_a_difference_of_the_loss_waits_for_its_losses_alone(network: str) -> None:
    objective = objective_on_meta(network)
    with Watch():
        stencil = finite_difference.Stencil(objective, seed=0)
    assert math.isfinite(stencil.loss)
    with watched(waits=2):
        stencil.along(stencil.direction(), 1e-2)


@pytest.mark.parametrize("network", ["mlp", "images"])
def test_replicas_side_by_side_never_wait(network: str) -> None:
    objective = objective_on_meta(network)
    surface = StackedSurface(objective)
    theta = vectors(objective, 4)
    with torch.no_grad(), Watch():
        surface.slopes(theta, vectors(objective, 4), 1e-3)  # recorded and compared, once
        surface.values(theta)
    with torch.no_grad(), watched(waits=0):
        slopes, losses = surface.slopes(theta, vectors(objective, 4), 1e-3)
        surface.values(theta)
    assert slopes.device == losses.device == META
