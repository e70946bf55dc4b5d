"""Sixty and more small networks of many kinds, with every eigenvalue of their curvature known by another route.

    python tests/validation/zoo.py                      # all of them: a table by method and quantity
    python tests/validation/zoo.py --network 'conv*' lstm --seeds 5

Each is measured through the public functions by sampled eigenvalues (``method="deflated-slq"``) of the Hessian, of the
Gauss-Newton matrix and of Adam's preconditioned Hessian, by ``zoscope.moments``, and by forward passes. The truth comes
from ``torch.func`` in double precision, or from differences of first derivatives where that does not reach, never from
zoscope's products.
"""

import argparse
import fnmatch
import itertools
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[2]))  # what a script measures is this clone, installed or not

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import zoscope

if __package__:
    from .coverage import MOST_SIGMAS, Interval, interval, judge
    from .truths import STEPS
else:  # as a script
    from coverage import MOST_SIGMAS, Interval, interval, judge
    from truths import STEPS

from zoscope.theory.quadratic import descent_threshold
from zoscope.theory.rules import update_rule
from zoscope.theory.spectrum import Spectrum
from zoscope.theory.stability import MomentBounds, StabilityCondition

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Network:
    """A model with its data.

    Args:
        model: In single precision, or in double.
        batches: Its data, weighted by the number of examples.
        criterion: Of the outputs and targets; ``None`` where ``loss`` is given.
        loss: Of the model and a batch.
        kinks: Whether the loss has kinks, which differences over a distance see and derivatives do not.
        differences: Whether ``torch.func`` does not reach it, so that the truth is made of first derivatives.
    """

    model: nn.Module
    batches: list[Any]
    criterion: Callable[[Any, Any], Tensor] | None = None
    loss: Loss | None = None
    kinks: bool = False
    differences: bool = False

    @property
    def problem(self) -> zoscope.Problem:
        if self.criterion is not None:
            return zoscope.Problem.from_criterion(self.model, self.batches, self.criterion)
        assert self.loss is not None
        return zoscope.Problem(self.model, self.batches, self.loss)

    @property
    def shares(self) -> list[float]:
        """Of the examples in each batch."""
        sizes = [len(first_of(batch)) for batch in self.batches]
        return [size / sum(sizes) for size in sizes]

    def gradient(self) -> Tensor:
        """``(d,)``, of what trains."""
        chosen = [p for p in self.model.parameters() if p.requires_grad]
        losses = [share * self.loss_of(self.model, b) for share, b in zip(self.shares, self.batches, strict=True)]
        parts = torch.autograd.grad(sum(losses), chosen, allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in parts]).detach()

    def loss_of(self, model: nn.Module, batch: Any) -> Tensor:
        if self.criterion is None:
            assert self.loss is not None
            return self.loss(model, batch)
        inputs, targets = batch
        return self.criterion(model(inputs), targets)


NETWORKS: dict[str, Callable[[], Network]] = {}
"""By name; each trained as far as it says."""


def trained(steps: int, *, lr: float = 1e-2) -> Callable[[Callable[[], Network]], Callable[[], Network]]:
    """Enter a network that is trained by so many steps of Adam: some are fresh, some near a minimum."""

    def enter(build: Callable[[], Network]) -> Callable[[], Network]:
        def built() -> Network:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(len(build.__name__) + 100 * steps)
                network = build()
                chosen = [p for p in network.model.parameters() if p.requires_grad]
                optimizer = torch.optim.Adam(chosen, lr=lr)
                for step in range(steps):
                    optimizer.zero_grad()
                    network.loss_of(network.model, network.batches[step % len(network.batches)]).backward()
                    optimizer.step()
                optimizer.zero_grad()
            return network

        NETWORKS[build.__name__.strip("_").replace("_", "-")] = built
        return built

    return enter


def labels(examples: int, classes: int = 3) -> Tensor:
    return torch.randint(classes, (examples,))


def images(examples: int = 20, channels: int = 1, size: int = 8) -> Tensor:
    return torch.randn(examples, channels, size, size)


ENTROPY, SQUARES = nn.CrossEntropyLoss(), nn.MSELoss()


def classifier(model: nn.Module, inputs: Tensor, *, classes: int = 3, **options: Any) -> Network:
    return Network(model, [(inputs, labels(len(inputs), classes))], ENTROPY, **options)


def regression(model: nn.Module, inputs: Tensor, *targets: int, **options: Any) -> Network:
    return Network(model, [(inputs, torch.randn(len(inputs), *targets))], SQUARES, **options)


def mlp(*sizes: int, unit: type[nn.Module] = nn.GELU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), unit()]
    return nn.Sequential(*layers[:-1])


class Applied(nn.Module):
    """Modules by name, and a function of them and the input: most of what follows is one."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module if isinstance(module, nn.Module) else nn.Parameter(module))

    def forward(self, x: Any) -> Any:
        return self.function(self, x)


def applied(function: Callable[..., Any], **modules: nn.Module | Tensor) -> Applied:
    return Applied(function, **modules)


# Normalisations.


@trained(60)
def batch_norm_in_eval_mode() -> Network:
    model = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
    model(torch.randn(50, 10) + 1)  # for its statistics
    return classifier(model.eval(), torch.randn(40, 10))


@trained(20)
def batch_norm_in_train_mode() -> Network:
    model = nn.Sequential(nn.Linear(10, 12), nn.BatchNorm1d(12, track_running_stats=False), nn.GELU(), nn.Linear(12, 3))
    return classifier(model, torch.randn(40, 10))


@trained(12)
def batch_norm_of_images() -> Network:
    layers = nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.SiLU(), nn.Conv2d(6, 6, 3), nn.SiLU()
    return classifier(nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, 3)).eval(), images())


@trained(0)
def layer_norm() -> Network:
    return classifier(
        nn.Sequential(nn.Linear(8, 20), nn.LayerNorm(20), nn.GELU(), nn.Linear(20, 3)), torch.randn(30, 8)
    )


@trained(200)
def layer_norm_without_scales() -> Network:
    layers = nn.Linear(8, 20), nn.LayerNorm(20, elementwise_affine=False), nn.Tanh(), nn.Linear(20, 1)
    return regression(nn.Sequential(*layers), torch.randn(30, 8), 1)


@trained(20)
def group_norm() -> Network:
    layers = nn.Conv2d(1, 8, 3), nn.GroupNorm(4, 8), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)
    return classifier(nn.Sequential(*layers), images())


@trained(20)
def instance_norm() -> Network:
    layers = nn.Conv2d(1, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.Tanh(), nn.Flatten(), nn.Linear(216, 3)
    return classifier(nn.Sequential(*layers), images())


@trained(100)
def rms_norm() -> Network:
    return classifier(nn.Sequential(nn.Linear(8, 20), nn.RMSNorm(20), nn.SiLU(), nn.Linear(20, 3)), torch.randn(30, 8))


@trained(20)
def local_response_norm() -> Network:
    layers = nn.Conv2d(1, 6, 3), nn.LocalResponseNorm(3), nn.Softplus(), nn.Flatten(), nn.Linear(216, 3)
    return classifier(nn.Sequential(*layers), images())


@trained(50)
def weight_norm() -> Network:
    layers = parametrizations.weight_norm(nn.Linear(10, 20)), nn.Tanh(), parametrizations.weight_norm(nn.Linear(20, 3))
    return classifier(nn.Sequential(*layers), torch.randn(40, 10), differences=True)


@trained(30)
def spectral_norm() -> Network:
    layers = parametrizations.spectral_norm(nn.Linear(10, 20)), nn.GELU(), nn.Linear(20, 3)
    return classifier(nn.Sequential(*layers).eval(), torch.randn(40, 10), differences=True)


@trained(15)
def weight_standardisation() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        w = m.kernel
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True) + 1e-3).sqrt()
        return m.head(functional.conv2d(x, w).tanh().flatten(1))

    return classifier(applied(forward, kernel=torch.randn(6, 1, 3, 3), head=nn.Linear(216, 3)), images())


@trained(100)
def cosine_classifier() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        return 5 * functional.normalize(m.body(x), dim=1) @ functional.normalize(m.centres, dim=1).T

    # One example is nearly at the origin, where its direction turns within a thousandth.
    return classifier(applied(forward, body=mlp(8, 20, 10), centres=torch.randn(3, 10)), torch.randn(30, 8), kinks=True)


# Attention.


def last(m: Any, x: Tensor) -> Tensor:
    return m.head(m.body(x).mean(1))


def encoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True, **options)


@trained(0)
def attention() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.mix(x, x, x, need_weights=False)[0][:, 0])

    model = applied(forward, mix=nn.MultiheadAttention(12, 3, batch_first=True), head=nn.Linear(12, 3))
    return classifier(model, torch.randn(20, 6, 12))


@trained(20, lr=3e-3)
def encoder_in_eval_mode() -> Network:  # which has a faster path without gradients
    body = encoder_layer(activation="gelu", norm_first=True)
    return classifier(applied(last, body=body, head=nn.Linear(12, 3)).eval(), torch.randn(20, 5, 12))


@trained(20, lr=3e-3)
def encoder_with_relu() -> Network:
    return classifier(applied(last, body=encoder_layer(), head=nn.Linear(12, 3)), torch.randn(20, 5, 12), kinks=True)


@trained(30, lr=3e-3)
def encoder_with_padding() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.body(x, src_key_padding_mask=x[..., 0] > 1.0)[:, 0])

    inputs = torch.randn(20, 5, 12)
    inputs[:, 0, 0] = 0.0
    return classifier(applied(forward, body=encoder_layer(activation=functional.gelu), head=nn.Linear(12, 3)), inputs)


def tokens(m: Any, x: Tensor, *, mask: bool = True) -> Tensor:
    """Attention with the weights ``m.qkv`` over ``(n, t, 12)``."""
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in m.qkv(x).chunk(3, dim=-1))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=mask).transpose(1, 2).flatten(2)


@trained(50, lr=3e-3)
def causal_decoder_with_tied_embedding() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.embed(x) + m.place
        h = m.norm(h + tokens(m, h))
        return (h @ m.embed.weight.T).transpose(1, 2)

    model = applied(
        forward,
        embed=nn.Embedding(15, 12),
        place=0.1 * torch.randn(6, 12),
        qkv=nn.Linear(12, 36),
        norm=nn.LayerNorm(12),
    )
    rows = torch.randint(15, (16, 7))
    return Network(model, [(rows[:, :-1], rows[:, 1:])], ENTROPY)


@trained(20, lr=3e-3)
def cross_attention() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.mix(m.queries.expand(len(x), -1, -1), x, x, need_weights=False)[0].flatten(1))

    mix = nn.MultiheadAttention(10, 2, batch_first=True)
    return classifier(
        applied(forward, queries=torch.randn(2, 10), mix=mix, head=nn.Linear(20, 3)), torch.randn(20, 7, 10)
    )


@trained(30, lr=3e-3)
def linear_attention() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).chunk(3, dim=-1)
        q, k = functional.softplus(q), functional.softplus(k)
        mixed = q @ (k.transpose(1, 2) @ v) / (q * k.sum(1, keepdim=True)).sum(-1, keepdim=True)
        return m.head(mixed.mean(1))

    return classifier(applied(forward, qkv=nn.Linear(12, 36), head=nn.Linear(12, 3)), torch.randn(20, 5, 12))


@trained(0)
def attention_with_positions() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).chunk(3, dim=-1)
        return m.head((((q @ k.transpose(1, 2)) / 3.5 + m.bias).softmax(-1) @ v).tanh().mean(1))

    model = applied(forward, qkv=nn.Linear(12, 36), bias=torch.randn(5, 5), head=nn.Linear(12, 1))
    return regression(model, torch.randn(20, 5, 12), 1)


@trained(60, lr=3e-3)
def mixture_of_experts() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        return (m.gate(x).softmax(-1)[..., None] * torch.stack([one(x) for one in m.experts], 1)).sum(1)

    experts = nn.ModuleList(mlp(8, 10, 3) for _ in range(4))
    return classifier(applied(forward, gate=nn.Linear(8, 4), experts=experts), torch.randn(40, 8))


# Convolutions.


@trained(20)
def convolution_of_signals() -> Network:
    layers = nn.Conv1d(2, 8, 5, stride=2), nn.GELU(), nn.Conv1d(8, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(48, 3)
    return classifier(nn.Sequential(*layers), torch.randn(20, 2, 20))


@trained(150)
def convolution_with_strides() -> Network:
    layers = nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(6, 8, 2), nn.Tanh(), nn.Flatten()
    return regression(nn.Sequential(*layers, nn.Linear(72, 1)), images(), 1)


@trained(12)
def separable_convolution() -> Network:
    layers = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.SiLU(), nn.Conv2d(8, 6, 1), nn.SiLU(), nn.Flatten()
    return classifier(nn.Sequential(*layers, nn.Linear(216, 3)), images())


@trained(60)
def transposed_convolution() -> Network:
    layers = nn.Conv2d(1, 4, 4, stride=2), nn.GELU(), nn.ConvTranspose2d(4, 1, 4, stride=2)
    inputs = images()
    return Network(nn.Sequential(*layers), [(inputs, inputs)], SQUARES)


@trained(20)
def dilated_convolution() -> Network:
    layers = nn.Conv2d(2, 6, 3, dilation=2, groups=2, padding="same"), nn.Mish(), nn.AvgPool2d(2), nn.Flatten()
    return classifier(nn.Sequential(*layers, nn.Linear(96, 3)), images(channels=2))


@trained(20)
def convolution_of_volumes() -> Network:
    layers = nn.Conv3d(1, 6, 2), nn.Sigmoid(), nn.Conv3d(6, 4, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(32, 3)
    return classifier(nn.Sequential(*layers), torch.randn(16, 1, 4, 4, 4))


@trained(40)
def residual_convolution() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = functional.gelu(m.stem(x))
        return m.head((h + m.second(functional.gelu(m.first(h)))).mean((2, 3)))

    conv = partial(nn.Conv2d, 6, 6, 3, padding=1)
    return classifier(
        applied(forward, stem=nn.Conv2d(1, 6, 3), first=conv(), second=conv(), head=nn.Linear(6, 3)), images()
    )


@trained(20)
def pixel_shuffle() -> Network:
    layers = nn.Conv2d(1, 8, 3), nn.PixelShuffle(2), nn.Upsample(scale_factor=0.5, mode="bilinear"), nn.ELU(alpha=1.0)
    return classifier(nn.Sequential(*layers, nn.Flatten(), nn.Linear(72, 3)), images())


@trained(30)
def max_pooling() -> Network:
    layers = nn.Conv2d(1, 6, 3), nn.MaxPool2d(2), nn.GELU(), nn.Flatten(), nn.Linear(54, 3)
    return classifier(nn.Sequential(*layers), images(), kinks=True)


# Recurrent networks and others that repeat themselves.


def last_state(m: Any, x: Tensor) -> Tensor:
    return m.head(m.body(x)[0][:, -1])


@trained(40)
def rnn() -> Network:
    model = applied(last_state, body=nn.RNN(4, 16, batch_first=True), head=nn.Linear(16, 3))
    return classifier(model, torch.randn(24, 7, 4), differences=True)


@trained(40)
def lstm() -> Network:
    model = applied(last_state, body=nn.LSTM(4, 10, batch_first=True), head=nn.Linear(10, 3))
    return classifier(model, torch.randn(24, 7, 4), differences=True)


@trained(0)
def gru_in_both_directions() -> Network:
    model = applied(last_state, body=nn.GRU(4, 8, batch_first=True, bidirectional=True), head=nn.Linear(16, 3))
    return classifier(model, torch.randn(24, 6, 4), differences=True)


@trained(60)
def layers_that_are_shared() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.stem(x)
        for _ in range(4):
            h = h + m.step(h).tanh()
        return m.head(h)

    return classifier(
        applied(forward, stem=nn.Linear(6, 16), step=nn.Linear(16, 16), head=nn.Linear(16, 3)), torch.randn(30, 6)
    )


@trained(0)
def module_with_two_names() -> Network:
    shared = nn.Linear(12, 12)
    return classifier(
        nn.Sequential(nn.Linear(6, 12), nn.Tanh(), shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(12, 3)),
        torch.randn(30, 6),
        differences=True,
    )


@trained(50)
def differential_equation() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(8):
            k = m.field(x)
            x = x + 0.125 * m.field(x + 0.0625 * k)
        return m.head(x)

    return regression(applied(forward, field=mlp(4, 20, 4, unit=nn.Tanh), head=nn.Linear(4, 1)), torch.randn(30, 4), 1)


# Linear algebra.


@trained(20)
def cayley_transform() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, eye = m.skew - m.skew.T, torch.eye(10, dtype=x.dtype)
        return m.head((x @ torch.linalg.solve(eye + a, eye - a)).tanh())

    return classifier(applied(forward, skew=0.5 * torch.randn(10, 10), head=nn.Linear(10, 3)), torch.randn(30, 10))


@trained(40)
def log_determinant() -> Network:
    def loss(m: Any, x: Tensor) -> Tensor:
        h = m.body(x)
        factor = torch.linalg.cholesky(m.root @ m.root.T + 0.5 * torch.eye(6, dtype=x.dtype))
        white = torch.linalg.solve_triangular(factor, h.T, upper=False)
        return 0.5 * white.square().sum(0).mean() + factor.diagonal().log().sum() + (h.mean() - 1).square()

    model = applied(lambda m, x: m.body(x), body=mlp(5, 12, 6), root=torch.randn(6, 6))
    return Network(model, [torch.randn(30, 5)], loss=loss)


@trained(20)
def matrix_exponential() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head((x @ torch.linalg.matrix_exp(m.generator)).tanh())

    return classifier(applied(forward, generator=0.3 * torch.randn(10, 10), head=nn.Linear(10, 3)), torch.randn(30, 10))


@trained(10, lr=1e-3)
def eigenvalues() -> Network:
    def loss(m: Any, x: Tensor) -> Tensor:
        h = m(x)
        wanted = torch.linspace(0.1, 3.0, 6, dtype=x.dtype)
        return (torch.linalg.eigvalsh(h.T @ h / len(h)) - wanted).square().sum()

    return Network(mlp(5, 12, 6), [torch.randn(30, 5)], loss=loss)


@trained(10, lr=1e-3)
def nuclear_norm() -> Network:
    def loss(m: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.mse_loss(m(batch[0]), batch[1]) + 0.05 * torch.linalg.svdvals(m[0].weight).sum()

    return Network(mlp(7, 12, 2, unit=nn.Tanh), [(torch.randn(30, 7), torch.randn(30, 2))], loss=loss)


@trained(20)
def orthogonal_layer() -> Network:
    first = parametrizations.orthogonal(nn.Linear(10, 10), orthogonal_map="matrix_exp")
    return classifier(nn.Sequential(first, nn.Tanh(), nn.Linear(10, 3)), torch.randn(30, 10), differences=True)


@trained(100)
def tensor_factors() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.einsum("nij,ir,jr,or->no", x, m.a, m.b, m.c)

    return regression(
        applied(forward, a=torch.randn(6, 7), b=torch.randn(7, 7), c=torch.randn(3, 7)), torch.randn(40, 6, 7), 3
    )


@trained(20)
def fourier_layer() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x) * torch.complex(m.real, m.imaginary)
        return m.head(torch.fft.irfft(spectrum, n=32).tanh())

    model = applied(forward, real=torch.randn(17), imaginary=torch.randn(17), head=nn.Linear(32, 3))
    return classifier(model, torch.randn(30, 32))


@trained(20)
def equilibrium() -> Network:
    """The fixed point of ``z = A z + B x``, A small."""

    def forward(m: Any, x: Tensor) -> Tensor:
        inner = torch.eye(8, dtype=x.dtype) - 0.5 * m.a / torch.linalg.matrix_norm(m.a)
        return m.head(torch.linalg.inv(inner).matmul(m.b(x).T).T.tanh())

    return classifier(
        applied(forward, a=torch.randn(8, 8), b=nn.Linear(5, 8), head=nn.Linear(8, 3)), torch.randn(30, 5)
    )


# Custom functions, checkpoints.


class Swish(torch.autograd.Function):
    """``x sigmoid(x)``, which saves little."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return grad * s * (1 + x * (1 - s))


class Cube(torch.autograd.Function):
    """``x³/3`` in the form that ``torch.func`` takes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3 / 3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x * x


@trained(40)
def custom_function() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(Swish.apply(m.body(x)))

    model = applied(forward, body=nn.Linear(8, 16), head=nn.Linear(16, 3))
    return classifier(model, torch.randn(30, 8), differences=True)


@trained(0)
def custom_function_with_context() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(Cube.apply(m.body(x)))

    model = applied(forward, body=nn.Linear(8, 16), head=nn.Linear(16, 3))
    return classifier(model, torch.randn(30, 8), differences=True)


@trained(30)
def activation_checkpoints() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(checkpoint(m.body, x, use_reentrant=False))

    return classifier(
        applied(forward, body=mlp(8, 16, 16), head=nn.Linear(16, 3)), torch.randn(30, 8), differences=True
    )


# Tied, frozen, pruned, unused.


@trained(60)
def frozen_first_layer() -> Network:
    model = mlp(10, 30, 16, 3)
    model[0].requires_grad_(False)
    return classifier(model, torch.randn(40, 10))


@trained(40)
def low_rank_adapter() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head((m.base(x) + x @ m.down @ m.up).tanh())

    model = applied(
        forward, base=nn.Linear(30, 40), down=0.2 * torch.randn(30, 3), up=torch.zeros(3, 40), head=nn.Linear(40, 3)
    )
    model.base.requires_grad_(False)
    return classifier(model, torch.randn(40, 30))


@trained(30)
def norms_alone() -> Network:
    model = nn.Sequential(
        nn.Linear(10, 60), nn.LayerNorm(60), nn.GELU(), nn.Linear(60, 60), nn.LayerNorm(60), nn.Linear(60, 3)
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("1.", "4.")))
    return classifier(model, torch.randn(40, 10))


@trained(80)
def tied_autoencoder() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        return functional.linear(m.code(x).tanh(), m.code.weight.T, m.bias)

    inputs = torch.randn(40, 20) @ torch.randn(20, 20) / 5
    return Network(applied(forward, code=nn.Linear(20, 6), bias=torch.zeros(20)), [(inputs, inputs)], SQUARES)


@trained(20)
def head_that_is_not_used() -> Network:
    model = applied(lambda m, x: m.head(m.body(x)), body=mlp(8, 20, 10), head=nn.Linear(10, 3), other=nn.Linear(10, 20))
    return classifier(model, torch.randn(30, 8))


@trained(30)
def pruned() -> Network:
    model = mlp(12, 24, 3)
    prune.random_unstructured(model[0], "weight", amount=0.6)
    return classifier(model, torch.randn(30, 12), differences=True)


# Other units.


@trained(100, lr=1e-3)
def sines() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.sin(3 * m.second(torch.sin(3 * m.first(x)))))

    x = torch.linspace(-1, 1, 40)[:, None]
    model = applied(forward, first=nn.Linear(1, 24), second=nn.Linear(24, 24), head=nn.Linear(24, 1))
    return Network(model, [(x, (x * 5).sin())], SQUARES)


@trained(20)
def gated_units() -> Network:
    return classifier(nn.Sequential(nn.Linear(8, 24), nn.GLU(), nn.Linear(12, 3)), torch.randn(30, 8))


@trained(20)
def bilinear_layer() -> Network:
    return regression(
        applied(lambda m, x: m.pair(x[:, :6], x[:, 6:]).sigmoid(), pair=nn.Bilinear(6, 7, 5)), torch.randn(30, 13), 5
    )


@trained(100)
def radial_units() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head((-(x[:, None] - m.centres).square().sum(-1) / 4).exp())

    return regression(applied(forward, centres=torch.randn(20, 4), head=nn.Linear(20, 1)), torch.randn(30, 4), 1)


@trained(50)
def relu_layers() -> Network:
    return classifier(mlp(10, 20, 20, 3, unit=nn.ReLU), torch.randn(40, 10), kinks=True)


@trained(20)
def bag_of_words() -> Network:
    model = applied(lambda m, x: m.head(m.embed(x).mean(1).tanh()), embed=nn.Embedding(30, 12), head=nn.Linear(12, 3))
    return classifier(model, torch.randint(30, (40, 5)))


@trained(40)
def graph_convolution() -> Network:
    edges = (torch.rand(20, 20) < 0.2).float() + torch.eye(20)
    edges = edges / edges.sum(1, keepdim=True)
    model = applied(
        lambda m, x: m.second(x[0] @ m.first(x[0] @ x[1]).tanh()), first=nn.Linear(8, 16), second=nn.Linear(16, 3)
    )
    return Network(model, [((edges, torch.randn(20, 8)), labels(20))], ENTROPY)


@trained(20)
def hypernetwork() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        w = m.maker(x[:, :3]).unflatten(1, (5, 3))
        return torch.einsum("nij,ni->nj", w, x[:, 3:])

    return regression(applied(forward, maker=mlp(3, 20, 15)), torch.randn(40, 8), 3)


# Losses, batches and precision.


@trained(60)
def smoothed_labels_in_unequal_batches() -> Network:
    network = classifier(mlp(8, 20, 4), torch.randn(37, 8), classes=4)
    ((x, y),) = network.batches
    return Network(
        network.model,
        [(x[a:b], y[a:b]) for a, b in ((0, 16), (16, 32), (32, 37))],
        nn.CrossEntropyLoss(label_smoothing=0.1),
    )


@trained(30)
def weighted_classes() -> Network:
    return Network(
        mlp(8, 16, 3), [(torch.randn(40, 8), labels(40))], nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.2]))
    )


@trained(100)
def pseudo_huber() -> Network:
    network = regression(mlp(6, 20, 1), torch.randn(40, 6), 1)
    return Network(network.model, network.batches, lambda y, t: (1 + (y - t).square()).sqrt().mean())


@trained(40)
def counts() -> Network:
    return Network(mlp(6, 16, 2), [(torch.randn(40, 6), torch.poisson(torch.ones(40, 2)))], nn.PoissonNLLLoss())


@trained(100)
def several_labels() -> Network:
    targets = (torch.rand(40, 5) < 0.3).float()
    return Network(mlp(6, 16, 5), [(torch.randn(40, 6), targets)], nn.BCEWithLogitsLoss())


@trained(30)
def distillation() -> Network:
    teacher = mlp(6, 20, 4).requires_grad_(False)
    inputs = torch.randn(40, 6)
    return Network(mlp(6, 12, 4), [(inputs, teacher(inputs).softmax(-1))], ENTROPY)


@trained(60)
def heteroscedastic() -> Network:
    def loss(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        mean, spread = m(batch[0]).chunk(2, dim=1)
        return functional.gaussian_nll_loss(mean, batch[1], functional.softplus(spread) + 0.1)

    return Network(mlp(6, 20, 2), [(torch.randn(40, 6), torch.randn(40, 1))], loss=loss)


@trained(30)
def contrastive() -> Network:
    def loss(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        a, b = (functional.normalize(m(part), dim=1) for part in batch)
        return functional.cross_entropy(4 * a @ b.T, torch.arange(len(a)))

    x = torch.randn(16, 8)
    return Network(mlp(8, 20, 6), [(x, x + 0.3 * torch.randn(16, 8))], loss=loss)


@trained(50)
def variational_autoencoder() -> Network:
    def loss(m: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        mean, spread = m.encoder(batch[0]).chunk(2, dim=1)
        seen = m.decoder(mean + (0.5 * spread).exp() * batch[1])
        return functional.mse_loss(seen, batch[0]) + 0.05 * (mean.square() + spread.exp() - spread - 1).mean()

    model = applied(lambda m, x: x, encoder=mlp(10, 16, 4), decoder=mlp(2, 16, 10))
    return Network(model, [(torch.randn(30, 10), torch.randn(30, 2))], loss=loss)


def slopes(outputs: Tensor, inputs: Tensor) -> Tensor:
    return torch.autograd.grad(outputs.sum(), inputs, create_graph=True)[0]


@trained(60)
def gradient_penalty() -> Network:
    def loss(m: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = m(x)
        return y.square().mean() + (slopes(y, x).norm(dim=1) - 1).square().mean()

    return Network(mlp(6, 16, 1, unit=nn.Tanh), [torch.randn(30, 6)], loss=loss, differences=True)


@trained(60)
def physics_informed() -> Network:
    def loss(m: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        u = m(x)
        curved = slopes(slopes(u, x), x)
        return (curved + (3 * x).sin()).square().mean() + m(0 * x[:1]).square().mean()

    return Network(mlp(1, 16, 16, 1, unit=nn.Tanh), [torch.linspace(0, 1, 25)[:, None]], loss=loss, differences=True)


@trained(60)
def force_field() -> Network:
    def loss(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x = batch[0].detach().requires_grad_()
        return functional.mse_loss(-slopes(m(x), x), batch[1])

    x = torch.randn(30, 5)
    return Network(mlp(5, 20, 1, unit=nn.Softplus), [(x, -x)], loss=loss, differences=True)


@trained(80)
def decayed_weights_in_the_loss() -> Network:
    def loss(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(m(batch[0]), batch[1]) + 1e-2 * sum(p.square().sum() for p in m.parameters())

    return Network(mlp(8, 20, 3), [(torch.randn(30, 8), labels(30))], loss=loss)


@trained(20)
def batches_by_name() -> Network:
    def loss(m: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return functional.cross_entropy(m(batch["x"]), batch["labels"], ignore_index=-100)

    return Network(mlp(8, 20, 3), [{"x": torch.randn(30, 8), "labels": labels(30)}], loss=loss)


@trained(300)
def double_precision() -> Network:
    batch = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 1, dtype=torch.float64)
    return Network(mlp(6, 16, 1, unit=nn.Tanh).double(), [batch], SQUARES)


@trained(0)
def dropout_in_eval_mode() -> Network:
    return classifier(
        nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Dropout(0.5), nn.Linear(24, 3)).eval(), torch.randn(30, 8)
    )


# The truth.


class Whole(nn.Module):
    """A model with the loss of its batches, in double precision, as a function of one vector of what trains.

    Args:
        network: The network, which becomes one in double precision.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = replace(network, batches=[cast(batch) for batch in network.batches])
        self.model = network.model.double()
        if isinstance(network.criterion, nn.Module):
            network.criterion.double()
        self.names = [f"model.{name}" for name, p in self.model.named_parameters() if p.requires_grad]
        self.chosen = [p for p in self.model.parameters() if p.requires_grad]
        self.start = torch.cat([p.detach().flatten() for p in self.chosen])

    def forward(self, batch: Any, outputs: bool) -> Tensor:
        return self.model(batch[0]) if outputs else self.network.loss_of(self.model, batch)

    def at(self, vector: Tensor, batch: Any, *, outputs: bool = False) -> Tensor:
        """The loss of a batch, or its outputs as a vector, at parameters ``(d,)``: pure."""
        parts = vector.split([p.numel() for p in self.chosen])
        named = {name: part.view_as(p) for name, part, p in zip(self.names, parts, self.chosen, strict=True)}
        found: Tensor = functional_call(self, named, (batch, outputs))
        return found.flatten() if outputs else found

    def gradient(self, vector: Tensor) -> Tensor:
        """``(d,)``, by one backward pass."""
        self.put(vector)
        return self.network.gradient()

    @torch.no_grad()
    def put(self, vector: Tensor) -> None:
        """Move the model."""
        for parameter, part in zip(self.chosen, vector.split([p.numel() for p in self.chosen]), strict=True):
            parameter.copy_(part.view_as(parameter))

    def hessian(self) -> Tensor:
        """``(d, d)``.

        Held against first derivatives nearby: that of ``torch.func`` in 2.13 is wrong, and not symmetric, where a
        normalisation has scales. Between kinks differences are of a short step.
        """
        short = self.network.kinks
        found = None if self.network.differences or short else self._by_torch_func()
        if found is None or not torch.allclose(found @ self._axis, self._along(), rtol=1e-5, atol=1e-7):
            found = differences(self.gradient, self.start, step=1e-8 if short else 1e-3)
            self.put(self.start)
        return (found + found.T) / 2

    def _by_torch_func(self) -> Tensor:
        parts = zip(self.network.shares, self.network.batches, strict=True)
        return torch.stack([share * hessian(partial(self.at, batch=batch))(self.start) for share, batch in parts]).sum(
            0
        )

    @property
    def _axis(self) -> Tensor:
        axis = torch.randn(len(self.start), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return axis / axis.norm()

    def _along(self) -> Tensor:
        found = differences(lambda t: self.gradient(self.start + t * self._axis), self.start.new_zeros(1))
        self.put(self.start)
        return found[0]

    def gauss_newton(self) -> Tensor:
        """``(d, d)``: Jacobians of the outputs around the Hessian of the criterion."""
        criterion, total = self.network.criterion, torch.zeros(len(self.start), len(self.start), dtype=torch.float64)
        assert criterion is not None
        for share, batch in zip(self.network.shares, self.network.batches, strict=True):
            outputs = self(batch, True).detach()
            if self.network.differences:
                jacobian = differences(partial(self._outputs, batch=batch), self.start).T
                self.put(self.start)
            else:
                jacobian = jacrev(partial(self.at, batch=batch, outputs=True))(self.start)
            inner = hessian(lambda flat, y=outputs, t=batch[1]: criterion(flat.view_as(y), t))(outputs.flatten())
            total += share * jacobian.T @ inner @ jacobian
        return total

    @torch.no_grad()
    def _outputs(self, vector: Tensor, batch: Any) -> Tensor:
        self.put(vector)
        return self(batch, True).flatten()


def differences(function: Callable[[Tensor], Tensor], start: Tensor, *, step: float = 1e-3) -> Tensor:
    """Derivatives ``(d, n)`` of a function from ``(d,)`` to ``(n,)``, of fourth order in the step."""
    rows = []
    for axis in torch.eye(len(start), dtype=start.dtype):
        near = function(start + step * axis) - function(start - step * axis)
        far = function(start + 2 * step * axis) - function(start - 2 * step * axis)
        rows.append((8 * near - far) / (12 * step))
    return torch.stack(rows)


def cast(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {key: cast(part) for key, part in batch.items()}
    return tuple(cast(part) for part in batch)


def first_of(batch: Any) -> Tensor:
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values() if isinstance(batch, dict) else batch))
    return batch


GD, GDM, ADAM = update_rule("gd"), update_rule("gdm"), update_rule("adam")

SEEN = ("trace", "trace+", "norm²", "λ_max", "λ_min", "full", "positive", "infinite", "descent")
METHODS: dict[str, tuple[str, ...]] = {
    "hessian": (*SEEN, "gdm full", "gdm positive"),
    "ggn": ("trace", "norm²", "λ_max", "full", "positive", "infinite"),
    "adam": ("trace", "norm²", "λ_max", "full", "positive"),
    "moments": ("trace", "norm²", "λ_max"),
    "forward": ("trace", "norm²", "lower", "upper", "descent", "above"),
}
"""Quantities by method; ``above`` is that the upper bound of forward passes lies above the infinite-time threshold."""

OF_KINKS = ("descent",)
"""What kinks count in, beside all that forward passes see: derivatives do not have them."""

ROUNDING = 3e-5
"""What single precision leaves open, relative; of a sum in units of its absolute terms."""


@dataclass(frozen=True)
class Subject:
    """A network, and what is true of it.

    Args:
        build: Makes it, every time the same.
    """

    build: Callable[[], Network]

    @cached_property
    def network(self) -> Network:
        return self.build()

    @cached_property
    def truth(self) -> dict[tuple[str, str], tuple[float, float]]:
        """By method and quantity the value, and how far rounding may have moved it."""
        with sdpa_kernel(SDPBackend.MATH):
            whole = Whole(self.build())
            gradient, matrix = whole.gradient(whole.start), whole.hessian()
            ggn = None if self.network.criterion is None else whole.gauss_newton()
        # Adam's P, of one Gaussian direction; near a minimum the gradient is rounding, that of the network's precision.
        slope = self.network.gradient().double()
        root = (2 * slope.square() + slope.square().sum()).sqrt() + 1e-8
        found = {
            "hessian": _values(matrix, gradient),
            "adam": _values(matrix / (root * root[:, None]).sqrt(), gradient, ADAM),
        }
        found["moments"] = found["forward"] = found["hessian"]
        if ggn is not None:
            found["ggn"] = _values(ggn, gradient)
        return {(method, name): pair for method, values in found.items() for name, pair in values.items()}

    def judged(self, method: str, name: str) -> bool:
        """Whether the truth is a number of this network."""
        if method == "ggn":
            return self.network.criterion is not None
        return not self.network.kinks or (method != "forward" and name not in OF_KINKS)


def _values(matrix: Tensor, gradient: Tensor, rule: Any = GD) -> dict[str, tuple[float, float]]:
    nodes, vectors = torch.linalg.eigh(matrix)
    weights = (gradient @ vectors).square()
    spectrum, rayleigh = Spectrum(nodes.numpy()), float(weights @ nodes / weights.sum())
    size, largest = float(nodes.abs().sum()), float(nodes.abs().max())
    ends = MomentBounds(rule).forward_only(spectrum.trace, spectrum.frobenius_sq)
    infinite = StabilityCondition(rule).threshold(spectrum)
    values = {
        "trace": (spectrum.trace, size),
        "trace+": (spectrum.positive.trace, size),
        "norm²": (spectrum.frobenius_sq, spectrum.frobenius_sq),
        "λ_max": (float(nodes.max()), largest),
        "λ_min": (float(nodes.min()), largest),
        "full": (StabilityCondition(rule, steps=STEPS, version="full").threshold(spectrum), None),
        "positive": (StabilityCondition(rule, steps=STEPS).threshold(spectrum), None),
        "infinite": (infinite, None),
        "above": (infinite, None),
        "gdm full": (StabilityCondition(GDM, steps=STEPS, version="full").threshold(spectrum), None),
        "gdm positive": (StabilityCondition(GDM, steps=STEPS).threshold(spectrum), None),
        "lower": (ends.lower, None),
        "upper": (ends.upper, None),
        "descent": (descent_threshold(spectrum.trace, rayleigh), None),
    }
    return {
        name: (value, ROUNDING * (abs(value) if scale is None else scale)) for name, (value, scale) in values.items()
    }


def measure(network: Network, seed: int = 0) -> dict[tuple[str, str], Interval]:
    """What the public functions say, by method and quantity; what they refuse is missing."""
    problem, common = network.problem, {"seed": seed, "device": "cpu"}
    found: dict[tuple[str, str], Interval] = {}
    plain = zoscope.bounds(problem, optimizers=["gd", "gdm", "adam"], steps=STEPS, method="deflated-slq", **common)
    found |= _of(plain, "hessian", "hessian", "gd") | _of(plain, "adam", "preconditioned_hessian", "adam")
    if plain.optimizers["gd"].descent is not None:
        found["hessian", "descent"] = (plain.optimizers["gd"].descent, *plain.optimizers["gd"].descent_ci95)
    point = plain.optimizers["gdm"].horizon.planned
    found["hessian", "gdm full"], found["hessian", "gdm positive"] = interval(point.lower), interval(point.upper)
    if network.criterion is not None:
        ggn = zoscope.bounds(problem, optimizers=["gd"], steps=STEPS, method="deflated-slq", curvature="ggn", **common)
        found |= _of(ggn, "ggn", "ggn", "gd")
    moments = zoscope.moments(problem, **common).moments
    found["moments", "trace"], found["moments", "norm²"] = interval(moments.trace), interval(moments.frobenius_sq)
    found["moments", "λ_max"] = _end(moments.lambda_max)
    forward = zoscope.bounds(problem, optimizers=["gd"], curvature="forward", **common)
    seen, bounds = forward.forward, forward.optimizers["gd"].forward
    found["forward", "trace"], found["forward", "norm²"] = interval(seen.trace), interval(seen.frobenius_sq)
    for name in ("lower", "upper", "descent"):
        found["forward", name] = interval(getattr(bounds, name))
    found["forward", "above"] = (0.0, -math.inf, bounds.upper.interval[1])
    return found


def _of(result: zoscope.BoundsResult, method: str, operator: str, optimizer: str) -> dict[tuple[str, str], Interval]:
    curvature, row = result.curvature[operator], result.optimizers[optimizer]
    point = row.horizon.planned
    found = {"trace": curvature.trace, "trace+": curvature.trace_positive, "norm²": curvature.frobenius_sq}
    found |= {"full": point.lower, "positive": point.upper, "infinite": row.exact}
    ends = {"λ_max": _end(curvature.lambda_max), "λ_min": _end(curvature.lambda_min)}
    return {(method, name): pair for name, pair in ({n: interval(e) for n, e in found.items()} | ends).items()}


def _end(end: Any) -> Interval:
    """An end of the spectrum: within its residual, if that has converged; otherwise nothing is claimed."""
    if not end.converged:
        return end.value, -math.inf, math.inf
    return end.value, end.value - end.residual, end.value + end.residual


@dataclass(frozen=True)
class Miss:
    """A number that was judged.

    Args:
        network: Name of the network.
        seed: Of the measurement.
        covered: Whether its interval holds the truth.
        sigmas: By how many of its own standard errors it is off.
        found: The interval.
        truth: The true value.
    """

    network: str
    seed: int
    covered: bool
    sigmas: float
    found: Interval
    truth: float

    def __str__(self) -> str:
        value, low, high = self.found
        shown = f"{value:.6g} in [{low:.6g}, {high:.6g}], truly {self.truth:.6g}, {self.sigmas:.1f} s.e."
        return f"{self.network} (seed {self.seed}): {shown}"


Judged = dict[tuple[str, str], list[Miss]]


def judge_all(names: Sequence[str], *, seeds: int = 1, told: Callable[[str], None] = lambda line: None) -> Judged:
    """Measure networks and hold every number against the truth."""
    judged: Judged = {(method, name): [] for method, names in METHODS.items() for name in names}
    for network in names:
        subject = Subject(NETWORKS[network])
        for seed in range(seeds):
            found = measure(subject.network, seed)
            for key, entries in judged.items():
                if not subject.judged(*key):
                    continue
                truth, slack = subject.truth[key]
                covered, sigmas = judge(found[key], truth, slack) if key in found else (False, math.inf)
                entries.append(Miss(network, seed, covered, sigmas, found.get(key, (math.nan,) * 3), truth))
                if not covered:
                    told(f"{' '.join(key)}: {entries[-1]}")
        told(f"{network}: done")
    return judged


def table(judged: Judged) -> str:
    """Covered of judged, and the worst of all in own standard errors."""
    lines = ["method    quantity       covered   worst, own standard errors"]
    for (method, name), entries in judged.items():
        covered, worst = sum(entry.covered for entry in entries), max(entries, key=lambda entry: entry.sigmas)
        beyond = [entry.network for entry in entries if entry.sigmas > MOST_SIGMAS]
        lines.append(
            f"{method:9} {name:14} {covered}/{len(entries):<6} {worst.sigmas:5.1f} {worst.network} {beyond or ''}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 1 where a number is off by more than six of its own standard errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=["*"], metavar="NAME", help="names or patterns")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    names = [name for name in NETWORKS if any(fnmatch.fnmatch(name, pattern) for pattern in options.network)]
    judged = judge_all(names, seeds=options.seeds, told=partial(print, file=sys.stderr, flush=True))
    print(table(judged))
    return int(any(entry.sigmas > MOST_SIGMAS for entries in judged.values() for entry in entries))


if __name__ == "__main__":
    sys.exit(main())
