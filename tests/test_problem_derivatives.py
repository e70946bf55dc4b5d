"""Second derivatives by hand are those of PyTorch, of every operation and in every way to call it."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from zoscope import Problem
from zoscope.curvature.operators import HessianOperator
from zoscope.problem import SecondDerivativesByHand
from zoscope.runtime.autograd_errors import node_names

BY_HAND = "_ValueBackward"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_norm(x: Tensor, *affine: Tensor) -> Tensor:
    mean, var = normal(3, seed=5), normal(3, seed=6).square() + 0.1
    return functional.batch_norm(x, mean, var, *affine)


CLASSES = torch.tensor([0, 2, -100, 1])

OPERATIONS: dict[str, tuple[Callable[..., Tensor], Sequence[Tensor]]] = {
    "gelu": (functional.gelu, [normal(4, 5)]),
    "gelu tanh": (lambda x: functional.gelu(x, approximate="tanh"), [3 * normal(4, 5)]),
    "silu": (functional.silu, [normal(4, 5)]),
    "conv1d": (functional.conv1d, [normal(2, 3, 7), normal(4, 3, 3), normal(4)]),
    "conv2d": (functional.conv2d, [normal(2, 3, 5, 6), normal(4, 3, 3, 2), normal(4)]),
    "conv2d without bias": (functional.conv2d, [normal(2, 3, 5, 6), normal(4, 3, 3, 2)]),
    "conv2d with a stride": (
        lambda x, w, b: functional.conv2d(x, w, b, stride=2, padding=(1, 2), dilation=2),
        [normal(2, 3, 9, 8), normal(4, 3, 3, 2), normal(4)],
    ),
    "conv2d in groups": (
        lambda x, w, b: functional.conv2d(x, weight=w, bias=b, padding=(1,), groups=2),
        [normal(2, 4, 5, 5), normal(6, 2, 3, 3), normal(6)],
    ),
    "conv3d": (functional.conv3d, [normal(2, 2, 4, 4, 3), normal(3, 2, 2, 2, 2), normal(3)]),
    "batch norm": (batch_norm, [normal(4, 3, 5), normal(3, seed=1), normal(3, seed=2)]),
    "batch norm of rows": (batch_norm, [normal(4, 3)]),
    "log_softmax": (lambda x: functional.log_softmax(x, dim=-1), [normal(4, 5)]),
    "cross entropy": (lambda x: functional.cross_entropy(x, CLASSES), [normal(4, 3)]),
    "cross entropy of one": (lambda x: functional.cross_entropy(x, torch.tensor(1)), [normal(3)]),
    "weighted cross entropy": (
        lambda x: functional.cross_entropy(
            x, CLASSES.expand(2, 4), normal(3, seed=4).abs(), ignore_index=-100, reduction="sum"
        ),
        [normal(2, 3, 4)],
    ),
}


def derivatives(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], *, by_hand: bool, device: str = "cpu"
) -> list[Tensor]:
    """Value, gradient, a product with the Hessian and one with the third derivative; of something that is curved."""
    inputs = [x.to(device, copy=True).requires_grad_() for x in inputs]
    bent = [x + 0.1 * x.square() for x in inputs]  # inputs that have a graph of their own
    if by_hand:
        with SecondDerivativesByHand():
            value = function(*bent)
        assert BY_HAND in node_names([value]) or "AddBackward0" in node_names([value])
    else:
        value = function(*bent)
    loss = (value * normal(*value.shape, seed=7).to(device)).sum() + value.square().sum()
    found, last = [value, loss], loss
    for order in (1, 2, 3):
        keep = order < 3
        grads = torch.autograd.grad(last, inputs, create_graph=keep, retain_graph=True, allow_unused=True)
        found += [g for g in grads if g is not None]
        if order == 2:  # a product of the kind that is computed again and again, without a graph of its own
            again = torch.autograd.grad(last, inputs, retain_graph=True, allow_unused=True)
            found += [g for g in again if g is not None]
        last = sum((g * normal(*g.shape, seed=8 + order).to(device)).sum() for g in grads if g is not None)
    return found


@pytest.mark.parametrize("name", OPERATIONS)
def test_derivatives_of_all_orders_are_those_of_pytorch(name):
    expected, found = (derivatives(*OPERATIONS[name], by_hand=by_hand) for by_hand in (False, True))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["gelu", "silu", "conv1d", "conv2d in groups", "conv3d", "log_softmax"])
def test_they_are_on_a_gpu(name):
    expected, found = (derivatives(*OPERATIONS[name], by_hand=by_hand, device="cuda") for by_hand in (False, True))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_does_not_need_a_derivative_gets_none(name):
    function, inputs = OPERATIONS[name]
    for varied in range(len(inputs)):

        def one(x: Tensor, index: int = varied) -> Tensor:
            return function(*inputs[:index], x, *inputs[index + 1 :])

        expected, found = (derivatives(one, [inputs[varied]], by_hand=by_hand) for by_hand in (False, True))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def by_hand_in(function: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    with SecondDerivativesByHand():
        value = function(x.clone().requires_grad_())
    return BY_HAND in node_names([value])


IMAGES = normal(2, 3, 5, 5)
KERNELS = normal(4, 3, 3, 3)


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (lambda x: functional.silu(x + 0, inplace=True), normal(3)),
        (lambda x: functional.conv2d(x, KERNELS, padding="same"), IMAGES),
        (lambda x: functional.conv2d(x, KERNELS), IMAGES[0]),
        (lambda x: functional.conv2d(torch.complex(x, x), torch.complex(KERNELS, KERNELS)), IMAGES),
        (lambda x: functional.batch_norm(x, None, None, training=True), IMAGES),
        (lambda x: functional.cross_entropy(x, torch.tensor([0, 1]), label_smoothing=0.1), normal(2, 3)),
        (lambda x: functional.cross_entropy(x, normal(2, 3).softmax(1)), normal(2, 3)),
        (lambda x: functional.log_softmax(x, dim=0, dtype=torch.float64), normal(3)),
        (lambda x: checkpoint(functional.gelu, x, use_reentrant=False), normal(3)),
        (lambda x: torch.func.grad(lambda y: functional.gelu(y).sum())(x), normal(3)),
        (lambda x: torch.func.vmap(functional.gelu)(x), normal(3, 2)),
    ],
    ids=[
        "in-place",
        "padding",
        "one image",
        "complex",
        "train",
        "smooth labels",
        "shares",
        "dtype",
        "checkpoint",
        "grad",
        "vmap",
    ],
)
def test_other_calls_are_left_to_pytorch(function, x):
    assert not by_hand_in(function, x)


def test_autocast_is_left_to_pytorch():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not by_hand_in(lambda x: functional.conv2d(x, KERNELS.float()), IMAGES.float())
        with SecondDerivativesByHand():
            assert functional.conv2d(IMAGES.float(), KERNELS.float().requires_grad_()).dtype == torch.bfloat16


def test_subclasses_of_tensors_are_left_to_pytorch():
    class Marked(Tensor):
        pass

    with SecondDerivativesByHand():
        assert isinstance(functional.gelu(normal(3).as_subclass(Marked).requires_grad_()), Marked)


def test_a_checkpointed_layer_has_the_same_second_derivatives():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv1d(2, 3, 3), nn.GELU()).double()

    def product(*, by_hand: bool, kept: bool) -> Tensor:
        x = normal(2, 2, 6)
        with torch.autograd.graph.save_on_cpu() if kept else torch.enable_grad():
            if by_hand:
                with SecondDerivativesByHand():
                    value = functional.silu(checkpoint(layer, x, use_reentrant=False))
            else:
                value = functional.silu(checkpoint(layer, x, use_reentrant=False))
        grads = torch.autograd.grad(value.square().sum(), layer.parameters(), create_graph=True)
        along = sum((g * normal(*g.shape, seed=3)).sum() for g in grads)
        return torch.cat([g.flatten() for g in torch.autograd.grad(along, layer.parameters())])

    expected = product(by_hand=False, kept=False)
    for kept in (False, True):
        torch.testing.assert_close(product(by_hand=True, kept=kept), expected, rtol=1e-10, atol=1e-10)


def test_half_precision_slopes_are_computed_in_float32():
    x = normal(64).to(torch.bfloat16).requires_grad_()
    with SecondDerivativesByHand():
        y = functional.gelu(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    wide = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(functional.gelu(wide).sum(), wide)
    assert slope.dtype == torch.bfloat16
    torch.testing.assert_close(slope.double(), exact, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_normalisation_has_the_hessian_that_its_gradients_have(dim: int | None) -> None:
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4, dtype=torch.float64), dim=dim)
    problem = Problem(nn.Sequential(layer, nn.Tanh()), [normal(5, 3)], lambda m, b: m(b).square().mean())
    with problem.prepare(device="cpu") as objective:
        origin, vector = objective.read(), normal(objective.num_params)
        product = HessianOperator(objective).matmat(vector[None])[0]
        slopes = []
        for sign in (1, -1):
            objective.write(origin + sign * 1e-5 * vector)
            slopes.append(objective.gradient()[1])
        objective.write(origin)
    torch.testing.assert_close(product, (slopes[0] - slopes[1]) / 2e-5, rtol=1e-6, atol=1e-9)
