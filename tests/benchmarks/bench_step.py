"""What a zeroth-order step costs, as ratios taken in one process: `python tests/benchmarks/bench_step.py`.

* a step of one replica against two bare forward passes of the same model, and against a hand-written MeZO loop, on
  networks from 2,000 to 50M parameters;
* peak memory of a step on a 50M-parameter MLP against one forward pass without gradients, each in its own process.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # what is measured is this clone, installed or not

import torch
from torch import Tensor, nn

from zoscope import ZOGD, ZOGDM, Problem, ZOAdam
from zoscope.optim.perturbation import StackedSurface
from zoscope.optim.replicas import Limits, ReplicaPlan, ZerothOrderEstimator, run
from zoscope.optim.rules import GD

STEPS = 300


def digits_cnn() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for block in range(2):
        for channels in ((1, 8), (8, 8)) if block == 0 else ((8, 8), (8, 8)):
            layers += [nn.Conv2d(*channels, 3, padding=1), nn.GELU()]
        layers.append(nn.AvgPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 4))


def alternate(functions: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """Median seconds of each function, called in turns so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 5):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn >= 5:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def mezo_step(params: list[Tensor], closure: Callable[[], Tensor], *, lr: float, mu: float, seed: int) -> None:
    """The step as MeZO's authors write it: per-tensor regeneration from a seed, restored by addition.

    Faster than theirs in one point: tensors are moved in place.
    """

    def move(scale: float) -> None:
        torch.manual_seed(seed)
        for p in params:
            p.data.add_(torch.normal(mean=0, std=1, size=p.data.size(), dtype=p.data.dtype), alpha=scale)

    with torch.no_grad():
        move(mu)
        above = closure()
        move(-2 * mu)
        below = closure()
        move(mu)
        move(-lr * float(above - below) / (2 * mu))


def bench_time(rounds: int) -> dict[str, float]:
    model = digits_cnn()
    x, y = torch.randn(100, 1, 8, 8), torch.randn(100, 4)

    def loss() -> Tensor:
        return nn.functional.mse_loss(model(x), y)

    def two_forwards() -> None:
        with torch.no_grad():
            loss()
            loss()

    params = list(model.parameters())
    functions: dict[str, Callable[[], object]] = {"two forwards": two_forwards}
    for kind in (ZOGD, ZOGDM, ZOAdam):
        optimizer = kind(params, lr=1e-9)
        functions[kind.__name__] = lambda optimizer=optimizer: optimizer.step(loss)
    fixed = ZOGD(params, lr=1e-9, restore="fixed-point")
    functions["ZOGD fixed-point"] = lambda: fixed.step(loss)
    functions["hand-written MeZO"] = lambda: mezo_step(params, loss, lr=1e-9, mu=1e-3, seed=0)
    seconds = alternate(functions, rounds=rounds)
    return {name: value / seconds["two forwards"] for name, value in seconds.items()}


def bench_mezo(rounds: int) -> dict[str, float]:
    """A step of ZO-GD over one of the hand-written loop; wide networks on few examples, where drawing is what costs."""
    networks: dict[str, tuple[nn.Module, Tensor]] = {"digits_cnn": (digits_cnn(), torch.randn(100, 1, 8, 8))}
    for width, layers in ((256, 1), (512, 2), (1024, 8), (2670, 7)):
        model = nn.Sequential(*[layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.ReLU())])
        networks[f"MLP {layers} x {width}"] = model, torch.randn(16, width)
    ratios = {}
    for name, (model, x) in networks.items():
        params = list(model.parameters())
        optimizer = ZOGD(params, lr=1e-9)

        def loss(model: nn.Module = model, x: Tensor = x) -> Tensor:
            return model(x).square().mean()

        functions: dict[str, Callable[[], object]] = {
            "ours": partial(optimizer.step, loss),
            "theirs": partial(mezo_step, params, loss, lr=1e-9, mu=1e-3, seed=0),
        }
        size = sum(p.numel() for p in params)
        seconds = alternate(functions, rounds=max(5, min(rounds, 10**8 // size // 10)))
        ratios[f"{name} ({size:,})"] = seconds["ours"] / seconds["theirs"]
    return ratios


def steps(optimizer: ZOGD, loss: Callable[[], Tensor]) -> None:
    for _ in range(STEPS):
        optimizer.step(loss)


def bench_replicas(rounds: int) -> dict[str, float]:
    """Eight replicas stepped together against one replica, over a short run."""
    torch.manual_seed(0)
    hidden = [layer for _ in range(2) for layer in (nn.Linear(32, 32), nn.GELU())]
    models = {
        "logistic 64-10": nn.Linear(64, 10),
        "MLP 64-32-10": nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10)),
        "MLP 64-32-32-32-10": nn.Sequential(nn.Linear(64, 32), nn.GELU(), *hidden, nn.Linear(32, 10)),
    }
    ratios = {}
    for name, model in models.items():
        problem = Problem.from_criterion(model, [(torch.randn(100, 64), torch.randn(100, 10))], nn.MSELoss())
        with problem.prepare() as objective:
            start, shard = objective.read(), objective.shards[0]
            optimizer = ZOGD(objective.params, lr=1e-9)
            rule, limits = GD(), Limits()
            plan = ReplicaPlan(rule, ZerothOrderEstimator(), lr=1e-9, steps=STEPS, replicas=8, seed=0, limits=limits)
            together = partial(run, StackedSurface(objective), start, plan, together=True)
            loss = partial(objective.loss, shard)
            seconds = alternate(
                {"together": together, "alone": partial(steps, optimizer, loss)}, rounds=max(rounds // STEPS, 5)
            )
        ratios[name] = seconds["together"] / seconds["alone"]
    return ratios


def large_mlp() -> nn.Sequential:
    width = 2670  # 7 square layers: 50M parameters
    return nn.Sequential(*[layer for _ in range(7) for layer in (nn.Linear(width, width), nn.ReLU())])


def peak_bytes(what: str) -> int:
    """Peak resident memory, above what the imports take, of one workload in this process."""
    tiny = nn.Parameter(torch.zeros(1))
    ZOAdam([tiny], lr=0.0).step(tiny.sum)  # torch imports a good deal the first time that an optimizer is made
    before = high_water_mark()
    model = large_mlp().requires_grad_(True)
    x = torch.randn(32, 2670)

    def loss() -> Tensor:
        return model(x).square().mean()

    if what == "forward":
        with torch.no_grad():
            loss()
    else:
        optimizer = {"ZOGD": ZOGD, "ZOGDM": ZOGDM, "ZOAdam": ZOAdam}[what](model.parameters(), lr=1e-9)
        for _ in range(2):
            optimizer.step(loss)
    return high_water_mark() - before


def high_water_mark() -> int:
    # Not ru_maxrss: a child inherits its parent's.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def bench_memory() -> dict[str, float]:
    parameters = 4 * 7 * 2670 * 2671
    own = {"forward": 0, "ZOGD": 0, "ZOGDM": parameters, "ZOAdam": 2 * parameters}
    peaks = {
        what: int(subprocess.run([sys.executable, __file__, "--peak", what], capture_output=True, check=True).stdout)
        for what in own
    }
    return {what: (peaks[what] - own[what]) / peaks["forward"] for what in own}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=["time", "mezo", "memory", "replicas"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak_bytes(options.peak))
        return
    result = {}
    if options.only in (None, "replicas"):
        result["8 replicas together / one"] = bench_replicas(options.rounds)
    if options.only in (None, "time"):
        result["time / two forwards"] = bench_time(options.rounds)
    if options.only in (None, "mezo"):
        result["ZOGD / hand-written MeZO"] = bench_mezo(options.rounds)
    if options.only in (None, "memory"):
        result["(memory - own state) / forward"] = bench_memory()
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
