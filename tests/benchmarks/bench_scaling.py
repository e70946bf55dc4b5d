"""How time and memory of a measurement grow: `python tests/benchmarks/bench_scaling.py --figure scaling.svg`.

Networks of two hidden layers, cross-entropy, random data. Against the number of parameters (one product, and memory of
a measurement at a fixed number of products), of examples (one product), and of products (a whole measurement); with the
exponent fitted to the larger half of each range, where what does not grow no longer counts.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # what is measured is this clone, installed or not

import numpy as np
import torch
from torch import nn

from zoscope import Problem
from zoscope.curvature.operators import HessianOperator
from zoscope.curvature.slq import measure
from zoscope.runtime import peak_bytes

CLASSES, INPUTS = 10, 32
HVPS = 24
"""Products of the measurements whose memory is taken."""

Series = dict[str, list[float]]


def network(parameters: int, examples: int) -> Problem:
    """About that many parameters: INPUTS w + w² + CLASSES w."""
    linear = INPUTS + CLASSES + 2
    width = round((-linear + (linear**2 + 4 * parameters) ** 0.5) / 2)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(INPUTS, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, CLASSES)
    )
    batch = torch.randn(examples, INPUTS), torch.randint(0, CLASSES, (examples,))
    return Problem.from_criterion(model, [batch], nn.CrossEntropyLoss())


def one_product(problem: Problem, *, device: str, rounds: int = 5) -> float:
    """Median seconds of a product on a graph that is kept."""
    with problem.prepare(device=device, check=False) as objective:
        operator = HessianOperator(objective, hvp="double-backward")
        vector = torch.randn(1, operator.dim, device=objective.device)
        operator.matmat(vector)
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            float(operator.matmat(vector).sum())  # waits for the device
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def whole(problem: Problem, *, device: str, hvps: int) -> tuple[float, float, int]:
    """Seconds, bytes at the peak and products of a measurement that spends its budget."""
    with problem.prepare(device=device, check=False) as objective:
        spent, seconds = [], []

        def run() -> None:
            operator = HessianOperator(objective, hvp="double-backward")
            start = time.perf_counter()
            spent.append(measure(operator, method="deflated-slq", rtol=1e-9, max_hvps=hvps).num_hvps)
            seconds.append(time.perf_counter() - start)

        peak = peak_bytes(run, objective.device)
    return seconds[0], peak, spent[0]


def exponent(x: list[float], y: list[float]) -> float:
    """Slope of log y against log x over the larger half."""
    half = len(x) // 2 if len(x) > 3 else 0
    return float(np.polyfit(np.log(x[half:]), np.log(y[half:]), 1)[0])


def measured(args: argparse.Namespace) -> dict[str, Series]:
    parameters: Series = {"d": [], "seconds": [], "bytes": []}
    for d in (10**k * m for k in range(4, 10) for m in (1, 3)):
        if d > args.most_params:
            break
        problem = network(d, args.examples)
        parameters["d"].append(problem.num_params)
        parameters["seconds"].append(one_product(problem, device=args.device))
        parameters["bytes"].append(whole(problem, device=args.device, hvps=HVPS)[1])
        print(f"d = {problem.num_params:>12,}: {_said(parameters)}", flush=True)
    examples: Series = {"examples": [], "seconds": []}
    for n in (64, 256, 1024, 4096, 16384):
        examples["examples"].append(n)
        examples["seconds"].append(one_product(network(args.params, n), device=args.device))
    products: Series = {"products": [], "seconds": []}
    problem = network(args.params, 1024)
    whole(problem, device=args.device, hvps=HVPS)  # warm
    for budget in (30, 60, 120, 240):
        seconds, _, spent = whole(problem, device=args.device, hvps=budget)
        products["products"].append(spent)
        products["seconds"].append(seconds)
    return {"parameters": parameters, "examples": examples, "products": products}


def _said(series: Series) -> str:
    return f"{series['seconds'][-1] * 1e3:10.2f} ms per product, {series['bytes'][-1] / 2**20:10,.1f} MiB"


def exponents(found: dict[str, Series]) -> dict[str, float]:
    p, e, h = found["parameters"], found["examples"], found["products"]
    return {
        "seconds per product ~ parameters": exponent(p["d"], p["seconds"]),
        f"memory of {HVPS} products ~ parameters": exponent(p["d"], p["bytes"]),
        "seconds per product ~ examples": exponent(e["examples"], e["seconds"]),
        "seconds of a measurement ~ products": exponent(h["products"], h["seconds"]),
    }


def draw(found: dict[str, Series], fitted: dict[str, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = (
        ("parameters", "d", "seconds", "parameters d", "seconds per product"),
        ("parameters", "d", "bytes", "parameters d", f"peak bytes, {HVPS} products"),
        ("examples", "examples", "seconds", "examples", "seconds per product"),
        ("products", "products", "seconds", "Hessian-vector products", "seconds in all"),
    )
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.1), layout="constrained")
    for axis, (group, x, y, across, up), slope in zip(axes, panels, fitted.values(), strict=True):
        axis.loglog(found[group][x], found[group][y], "o-", markersize=4)
        axis.set(xlabel=across, ylabel=up, title=f"exponent {slope:.2f}")
        axis.grid(alpha=0.3)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most-params", type=float, default=3e7, help="largest network")
    parser.add_argument("--params", type=int, default=100_000, help="network of the other two series")
    parser.add_argument("--examples", type=int, default=64, help="examples of the first series")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="as a picture: .svg, .png or .pdf")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = measured(args)
    fitted = exponents(found)
    for name, slope in fitted.items():
        print(f"{name}: exponent {slope:.2f}")
    if args.json:
        where = {"torch": torch.__version__, "threads": args.threads, "cores": os.cpu_count()}
        where |= {"machine": platform.machine(), "device": args.device}
        args.json.write_text(json.dumps({**where, "exponents": fitted, **found}, indent=2) + "\n")
    if args.figure:
        draw(found, fitted, args.figure)


if __name__ == "__main__":
    main()
