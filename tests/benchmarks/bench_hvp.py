"""What a Hessian-vector product costs: `python tests/benchmarks/bench_hvp.py`.

For every way to compute one, on the networks of the comparison with other tools: seconds per vector in units of one
gradient of the same model in the same process, medians of rounds in which all take turns; set-up in the same unit; and
peak memory of set-up and one product in units of one product by reverse-over-reverse on a fresh graph, as most
libraries compute it, each in a process of its own.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # what is measured is this clone, installed or not

import torch
from peers.workloads import WORKLOADS, Size, build

from zoscope.curvature.hvp import shard_products
from zoscope.problem import Objective
from zoscope.runtime import held_memory

METHODS = ("double-backward", "linearize", "forward-over-reverse")
DEFAULT = ("cnn", "decoder", "digits_mlp")


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def costs(objective: Objective, *, rounds: int) -> dict[str, dict[str, float]]:
    """Per method: seconds per vector and of the set-up, in gradients."""
    vector = torch.randn(1, objective.num_params, generator=torch.Generator().manual_seed(0), dtype=objective.dtype)
    (shard,) = objective.shards
    functions: dict[str, Callable[[], object]] = {"gradient": objective.gradient}
    setup = {}
    objective.gradient()
    for method in METHODS:
        start = time.perf_counter()
        products = shard_products(objective, shard, method=method)
        setup[method] = time.perf_counter() - start
        products(vector)
        functions[method] = lambda products=products: products(vector)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(timed(function))
    unit = statistics.median(times["gradient"])
    found = {
        name: {"per_vector": statistics.median(times[name]) / unit, "setup": setup[name] / unit} for name in METHODS
    }
    return {"gradient": {"seconds": unit}, **found}


def peak_of(name: str, method: str, size: Size) -> int:
    """Bytes that the process grew by at its peak, in this process: run in one of its own."""
    with build(name, size).problem.prepare(device="cpu", check=False) as objective:
        vector, before = torch.ones(1, objective.num_params), held_memory("cpu")
        if method == "fresh":
            grads = torch.autograd.grad(objective.loss(objective.shards[0]), objective.params, create_graph=True)
            torch.autograd.grad(grads, objective.params, objective.unflatten(vector[0]))
        else:
            shard_products(objective, objective.shards[0], method=method)(vector)
        return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, 0)


def memory(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Per method: peak over that of a fresh graph."""
    found = {}
    for method in ("fresh", *METHODS):
        command = [sys.executable, __file__, name, "--share", str(args.share), "--peak-of", method]
        ran = subprocess.run([*command, *(["--tiny"] if args.tiny else [])], capture_output=True, text=True, check=True)
        found[method] = int(ran.stdout.split()[-1])
    return {method: found[method] / max(found["fresh"], 1) for method in METHODS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=DEFAULT, help=f"some of {', '.join(WORKLOADS)}")
    parser.add_argument("--share", type=float, default=1.0, help="part of the examples, where products take seconds")
    parser.add_argument("--tiny", action="store_true", help="small networks: to see that it runs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--peak-of", metavar="METHOD", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = Size(share=args.share, tiny=args.tiny)
    if args.peak_of:
        print(peak_of(args.workloads[0], args.peak_of, size))
        return
    results = {}
    for name in args.workloads:
        workload = build(name, size)
        with workload.problem.prepare(device="cpu", check=False) as objective:
            results[name] = costs(objective, rounds=args.rounds)
        print(f"{workload.title}: d = {workload.dim:,}, one gradient {results[name]['gradient']['seconds']:.3g} s")
        ratios = memory(name, args)
        print(f"{'':24}gradients/vector   set-up (gradients)   peak memory / one fresh product")
        for method in METHODS:
            row = results[name][method]
            row["memory"] = ratios[method]
            print(f"  {method:22}{row['per_vector']:16.2f}{row['setup']:21.1f}{row['memory']:34.2f}", flush=True)
    if args.json:
        where = {"torch": torch.__version__, "threads": args.threads, "machine": platform.machine()}
        args.json.write_text(json.dumps({**where, "share": args.share, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
