"""What a Hessian-vector product costs: `python tests/benchmarks/bench_hvp.py`.

    python tests/benchmarks/bench_hvp.py                        # some ten minutes on one core
    python tests/benchmarks/bench_hvp.py cnn --share 1 --patience 600

For every way to compute one, and for what ``--hvp auto`` makes of them, on the networks of the comparison with other
tools (their weights as they are drawn, which costs do not depend on, and a share of the data where a product takes
seconds): seconds per vector in units of one gradient of the same model in the same process, medians of rounds in which
all take turns; set-up in the same unit; and peak memory of set-up and one product in units of one product by
reverse-over-reverse on a fresh graph, as most libraries compute it, each in a process of its own (on Linux). What takes
longer than ``--patience`` is left out and shown as –.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))  # what is measured is this clone, installed or not

import torch
from peers import clock
from peers.workloads import WORKLOADS, Size, build

from zoscope.curvature.operators import HessianOperator, Products, shard_products
from zoscope.problem import Objective
from zoscope.runtime import held_memory

PLAIN = "without rules by hand"
"""Double-backward with the second derivatives of PyTorch alone."""

METHODS = ("auto", "double-backward", PLAIN, "linearize", "forward-over-reverse", "batched")
BLOCK = {"batched": 4}
"""Vectors that go together, where a method takes blocks."""

SHARES = {"cnn": 0.1, "resnet": 0.25, "decoder": 0.25}
"""Part of the data by default: a gradient then takes about a second or less."""


def _products(objective: Objective, method: str) -> Products:
    if method == PLAIN:
        with mock.patch("zoscope.curvature.operators.SecondDerivativesByHand", nullcontext):
            return shard_products(objective, objective.shards[0], method="double-backward")
    if method != "auto":
        return shard_products(objective, objective.shards[0], method=method)
    operator = HessianOperator(objective)
    operator.matmat(torch.ones(1, objective.num_params))  # when it looks which way is faster
    return operator.matmat


def timed(run: Callable[[], object]) -> float:
    start = clock.now()
    run()
    return clock.now() - start


def costs(objective: Objective, *, rounds: int, patience: float) -> dict[str, dict[str, float]]:
    """Per method that a round of does not outlast the patience: seconds per vector and of the set-up, in gradients."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(max(BLOCK.values()), objective.num_params, generator=generator, dtype=objective.dtype)
    functions: dict[str, Callable[[], object]] = {"gradient": objective.gradient}
    setup = {}
    objective.gradient()
    for method in METHODS:
        vectors = block[: BLOCK.get(method, 1)]
        start = clock.now()
        products = _products(objective, method)
        setup[method] = clock.now() - start
        if setup[method] + timed(lambda apply=products, v=vectors: apply(v)) <= patience:
            functions[method] = lambda apply=products, v=vectors: apply(v)
    times: dict[str, list[float]] = {name: [] for name in functions}
    deadline = clock.now() + patience
    for done in range(rounds):
        for name, function in functions.items():
            times[name].append(timed(function))
        if done >= 2 and clock.now() > deadline:  # three rounds have a median
            break
    unit = statistics.median(times["gradient"])
    found = {
        name: {
            "per_vector": statistics.median(taken) / BLOCK.get(name, 1) / unit,
            "setup": setup[name] / unit,
            "rounds": len(taken),
        }
        for name, taken in times.items()
        if name != "gradient"
    }
    return {"gradient": {"seconds": unit}, **found}


def peak_of(name: str, method: str, size: Size) -> int:
    """Bytes that the process grew by at its peak, in this process: run in one of its own."""
    with build(name, size).problem.prepare(device="cpu", check=False) as objective:
        vectors, before = torch.ones(BLOCK.get(method, 1), objective.num_params), held_memory("cpu")
        if method == "fresh":
            grads = torch.autograd.grad(objective.loss(objective.shards[0]), objective.params, create_graph=True)
            torch.autograd.grad(grads, objective.params, objective.unflatten(vectors[0]))
        else:
            _products(objective, method)(vectors)
        # Not ru_maxrss, which begins at that of the process that started this one.
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) - before


def memory(name: str, size: Size, *, patience: float) -> dict[str, float]:
    """Per method that is done in time: peak over that of a fresh graph."""
    found = {}
    for method in ("fresh", *METHODS):
        command = [sys.executable, __file__, name, "--share", str(size.share), "--peak-of", method]
        command += ["--tiny"] if size.tiny else []
        try:
            ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=patience)
        except subprocess.TimeoutExpired:
            continue
        found[method] = int(ran.stdout.split()[-1])
    return {method: peak / max(found["fresh"], 1) for method, peak in found.items()} if "fresh" in found else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS), help=f"some of {', '.join(WORKLOADS)}")
    parser.add_argument("--share", type=float, help="part of the examples of cnn, resnet and decoder")
    parser.add_argument("--tiny", action="store_true", help="small networks: to see that it runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=60.0, help="seconds for the rounds of a network, and a peak")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall", help="processor: on a busy machine")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--peak-of", metavar="METHOD", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.clock == "processor":
        clock.use_processor_time()
    if args.peak_of:
        (name,) = args.workloads
        print(peak_of(name, args.peak_of, _size(name, args)))
        return
    results = {}
    for name in args.workloads:
        size = _size(name, args)
        workload = build(name, size)
        with workload.problem.prepare(device="cpu", check=False) as objective:
            results[name] = costs(objective, rounds=args.rounds, patience=args.patience)
        print(f"{workload.title}: d = {workload.dim:,}, one gradient {results[name]['gradient']['seconds']:.3g} s")
        for method, peak in memory(name, size, patience=args.patience).items():
            results[name].setdefault(method, {})["memory"] = peak
        print(f"{'':24}gradients/vector   set-up (gradients)   peak memory / one fresh product")
        for method in METHODS:
            cells = [_cell(results[name].get(method, {}).get(key)) for key in ("per_vector", "setup", "memory")]
            print(f"  {method:22}{cells[0]:>16}{cells[1]:>21}{cells[2]:>34}", flush=True)
    if args.json:
        where = {"torch": torch.__version__, "threads": args.threads, "machine": platform.machine()}
        shares = {name: _size(name, args).share for name in args.workloads}
        args.json.write_text(json.dumps({**where, "shares": shares, "results": results}, indent=2) + "\n")


def _size(name: str, args: argparse.Namespace) -> Size:
    share = SHARES.get(name, 1.0) if args.share is None else args.share
    return Size(share=share, tiny=args.tiny, trained=False)


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
