"""Forward passes against the dense Hessian of networks, over many seeds; and what they cost."""

import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from zoscope import Problem
from zoscope.curvature.forward import measure_forward
from zoscope.curvature.operators import HessianOperator, gradient
from zoscope.theory.rules import update_rule
from zoscope.theory.spectrum import Spectrum
from zoscope.theory.stability import MomentBounds, StabilityCondition

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "examples"
SEEDS = 50
HITS = 45  # 90 % of the seeds
ENOUGH = 43  # below this once in 250 times at the nominal 95 %
DIRECTIONS = 100


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"zoscope_example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_cnn() -> Problem:
    digits = example("digits_cnn")
    images, targets = digits.digits(examples=100)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = digits.network(width=3)
    images = images.bfloat16().float()  # numbers that both dtypes hold
    digits.train(model, images, targets, steps=1500, lr=0.02)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return digits.half_squared_error(model(batch[0]).float(), batch[1].float())

    return Problem(model, [(images, targets)], loss)


def small_transformer() -> Problem:
    problem = example("transformer").problem(width=8, layers=1, context=16, steps=60)

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        return functional.cross_entropy(model(rows[:, :-1]).float().flatten(0, 1), rows[:, 1:].flatten())

    return Problem(problem.model, problem.batches, loss)


@dataclass(frozen=True)
class Case:
    problem: Problem
    eigenvalues: Tensor
    rayleigh: float


@pytest.fixture(scope="module", params=["cnn", "transformer"])
def network(request: pytest.FixtureRequest) -> Problem:
    return small_cnn() if request.param == "cnn" else small_transformer()


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def case(request: pytest.FixtureRequest, network: Problem) -> tuple[str, Case]:
    """The network with its weights rounded to the dtype, its loss in float32, and the dense truth about it."""
    for p in network.model.parameters():
        p.data.copy_(p.data.to(getattr(torch, request.param)))
    with network.prepare(device="cpu") as objective:
        h = HessianOperator(objective).dense().double()
        g = gradient(objective)[1].double()
    return request.param, Case(network, torch.linalg.eigvalsh(h), float(g @ h @ g / (g @ g)))


def test_the_dense_truth_lies_within_the_bars(case: tuple[str, Case]) -> None:
    dtype, truth = case
    trace, frobenius_sq = float(truth.eigenvalues.sum()), float(truth.eigenvalues.square().sum())
    exact = StabilityCondition(update_rule("gd")).threshold(Spectrum.of(truth.eigenvalues.numpy()))
    hits = {"trace": 0, "frobenius_sq": 0, "rayleigh": 0, "upper": 0}
    for seed in range(SEEDS):
        with truth.problem.prepare(device="cpu", dtype=dtype, differentiable=False) as objective:
            found = measure_forward(objective, max_hvps=DIRECTIONS, seed=seed)
        assert found.rayleigh is not None
        hits["trace"] += abs(found.trace.value - trace) <= found.trace.half_width
        hits["frobenius_sq"] += abs(found.frobenius_sq.value - frobenius_sq) <= found.frobenius_sq.half_width
        hits["rayleigh"] += abs(found.rayleigh.value - truth.rayleigh) <= found.rayleigh.half_width
        low = found.trace.interval[0], max(found.frobenius_sq.interval[0], 0.0)
        hits["upper"] += exact <= MomentBounds(update_rule("gd")).forward_only(*low).upper
    print(f"\n{type(truth.problem.model).__name__} {dtype}: {hits} of {SEEDS}")
    assert min(hits["trace"], hits["frobenius_sq"], hits["upper"]) >= HITS, hits
    assert hits["rayleigh"] >= ENOUGH, hits


MEMORY = """
import sys, torch
from torch import nn
from torch.nn import functional as F

class Block(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.a, self.b, self.qkv, self.o = nn.LayerNorm(w), nn.LayerNorm(w), nn.Linear(w, 3 * w), nn.Linear(w, w)
        self.f = nn.Sequential(nn.Linear(w, 4 * w), nn.GELU(), nn.Linear(4 * w, w))

    def forward(self, x):
        q, k, v = self.qkv(self.a(x)).unflatten(-1, (3, 12, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.f(self.b(x))

class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.blocks = nn.Embedding(32000, 768), nn.Sequential(*(Block(768) for _ in range(12)))

    def forward(self, rows):
        return F.linear(self.blocks(self.tokens(rows)), self.tokens.weight)

def loss(model, rows):
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

torch.manual_seed(0)
torch.set_num_threads(1)
model, rows = Decoder(), torch.randint(0, 32000, (2, 65))
assert sum(p.numel() for p in model.parameters()) > 100e6
if sys.argv[1] == "plain":
    with torch.no_grad():
        loss(model, rows)
        loss(model, rows)
else:
    from zoscope.curvature.stencil import Stencil
    from zoscope.problem import OWN_DTYPE
    from zoscope import Problem
    print([int(p.view(torch.int32)[0].sum()) for p in model.parameters()], file=sys.stderr)
    with Problem(model, [rows], loss).prepare(device="cpu", dtype=OWN_DTYPE, differentiable=False) as objective:
        stencil = Stencil(objective, seed=0)
        directions = [stencil.direction() for _ in range(4)]
        for direction in directions:
            stencil.along(direction, 1e-3)
        stencil.along(directions[0], 2e-3)
        stencil.along(stencil.combination(directions, [0.5] * 4), 1e-3)
# Not ru_maxrss, which begins at that of the process that started this one.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the resident set as Linux reports it")
def test_a_hundred_million_parameters_take_the_memory_of_inference() -> None:
    def peak(mode: str) -> int:
        done = subprocess.run([sys.executable, "-c", MEMORY, mode], capture_output=True, text=True, check=True)
        return int(done.stdout)

    plain, forward = peak("plain"), peak("forward")
    print(f"\npeak {forward / 1024:.0f} MiB against {plain / 1024:.0f} MiB, {forward / plain:.3f} times")
    assert forward <= 1.05 * plain
