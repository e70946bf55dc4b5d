"""Everything that is to be measured on a GPU, in one command: `python tests/benchmarks/bench_gpu.py --json gpu.json`.

    python tests/benchmarks/bench_gpu.py --device cpu --tiny      # does it run?
    python tests/benchmarks/bench_gpu.py --only hvp forward       # without the comparison with other tools

Three parts:

* ``peers``: `bench_peers.py` on the CNN, ResNet-20 and the decoder;
* ``hvp``: a decoder in the shape of GPT-2 small (124M parameters, random weights): seconds of a product by every method
  over those of a gradient, peak memory over that of one product on a fresh graph, and of a whole measurement the share
  of its time that is not spent in products;
* ``forward``: ``--curvature forward`` on that decoder and on one of 1.3 billion parameters: seconds of a direction, of
  which each takes two forward passes, over those of one, and peak memory over that of inference.

Times are medians, taken when the device has done what was asked of it. Memory is of tensors, the model's own included.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # what is measured is this clone, installed or not

import bench_peers
import torch
from peers.clock import now
from peers.workloads import FlatLogits, load_example
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from zoscope import Problem
from zoscope.curvature.forward import LEAST_DIRECTIONS, measure_forward
from zoscope.curvature.operators import METHODS, HessianOperator, shard_products
from zoscope.curvature.slq import measure
from zoscope.problem import OWN_DTYPE, Objective
from zoscope.runtime import is_out_of_memory, peak_bytes, release_memory

PARTS = ("peers", "hvp", "forward")
PEER_WORKLOADS = ("cnn", "resnet", "decoder")
HVPS = 60
"""Products of the measurement whose time outside of them is taken."""

Row = dict[str, float | str | None]


@dataclass(frozen=True)
class Shape:
    """A decoder and the tokens that it sees."""

    name: str
    vocabulary: int
    width: int
    layers: int
    heads: int
    context: int
    rows: int

    def problem(self, device: str) -> Problem:
        """With random weights, on random tokens."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            with torch.device(device):
                decoder = load_example("transformer").Decoder(
                    self.vocabulary, width=self.width, layers=self.layers, context=self.context, heads=self.heads
                )
                tokens = torch.randint(self.vocabulary, (self.rows, self.context + 1))
        batch = (tokens[:, :-1].contiguous(), tokens[:, 1:].flatten())
        return Problem.from_criterion(FlatLogits(decoder), [batch], nn.CrossEntropyLoss())


GPT2 = Shape("GPT-2 small", 50257, 768, 12, 12, 1024, 2)
BILLION = Shape("1.3 billion", 50257, 2048, 24, 16, 1024, 2)
TINY = Shape("tiny", 50, 16, 1, 2, 16, 2)


def median_seconds(run: Callable[[], object], *, rounds: int) -> float:
    """Of a few runs, after one that does not count."""
    run()
    times = []
    for _ in range(rounds):
        start = now()
        run()
        times.append(now() - start)
    return statistics.median(times)


def products(shape: Shape, *, device: str, rounds: int) -> tuple[list[Row], Row]:
    """One row per method, and one of a whole measurement."""
    with shape.problem(device).prepare(device=device, check=False) as objective:
        fresh = peak_bytes(lambda: _fresh_product(objective), objective.device)
        unit = median_seconds(objective.gradient, rounds=rounds)
        sizes = (1,) if shape is TINY else (1, 4)
        rows: list[Row] = [
            _method(objective, method, unit=unit, fresh=fresh, rounds=rounds, sizes=sizes) for method in METHODS
        ]
        return rows, _whole(objective, unit=unit, fresh=fresh)


def _fresh_product(objective: Objective) -> None:
    vector = torch.ones(objective.num_params, device=objective.device, dtype=objective.dtype)
    grads = torch.autograd.grad(objective.loss(objective.shards[0]), objective.params, create_graph=True)
    torch.autograd.grad(grads, objective.params, objective.unflatten(vector))


def _method(objective: Objective, method: str, *, unit: float, fresh: int, rounds: int, sizes: Sequence[int]) -> Row:
    """Seconds per vector of blocks of some sizes, and memory, of one way to compute products."""
    row: Row = {"method": method, "gradient_seconds": unit}
    for size in sizes:
        block = torch.randn(size, objective.num_params, device=objective.device, dtype=objective.dtype)
        try:
            seconds, peak = _block(objective, method, block, rounds=rounds)
            row[f"gradients_per_vector_{size}"] = seconds / size / unit
            row[f"peak_over_fresh_{size}"] = peak / fresh
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            row[f"gradients_per_vector_{size}"] = row[f"peak_over_fresh_{size}"] = None
        release_memory(objective.device)
    return row


def _block(objective: Objective, method: str, block: Tensor, *, rounds: int) -> tuple[float, int]:
    """Seconds of the products with a block, and bytes of the set-up and one of them."""
    (shard,) = objective.shards
    peak = peak_bytes(lambda: shard_products(objective, shard, method=method)(block), objective.device)
    apply = shard_products(objective, shard, method=method)
    return median_seconds(lambda: apply(block), rounds=rounds), peak


def _whole(objective: Objective, *, unit: float, fresh: int) -> Row:
    """A measurement: the share of its time outside of products, and its peak beside the basis that it keeps."""
    operator = HessianOperator(objective)
    inside, product = 0.0, operator.matmat

    def timed(block: Tensor) -> Tensor:
        nonlocal inside
        start = now()
        found = product(block)
        inside += now() - start
        return found

    operator.matmat = timed  # type: ignore[method-assign]
    start = now()
    found = measure(operator, method="deflated-slq", rtol=1e-9, max_hvps=HVPS)
    seconds = now() - start
    del operator.matmat
    again = HessianOperator(objective)
    peak = peak_bytes(lambda: measure(again, method="deflated-slq", rtol=1e-9, max_hvps=HVPS), objective.device)
    row = objective.num_params * torch.empty((), dtype=objective.dtype).element_size()
    return {
        "products": found.num_hvps,
        "method": str(operator.hvp),
        "seconds": seconds,
        "gradients_per_product": inside / found.num_hvps / unit,
        "share_outside_products": 1 - inside / seconds,
        "peak_over_fresh_and_vectors": peak / (fresh + found.num_hvps * row),
    }


def directions(shape: Shape, *, device: str, rounds: int) -> Row:
    """Forward-only: cost of a direction, and memory over that of inference."""
    problem = shape.problem(device)
    (inputs, _), model = problem.batches[0], problem.model
    own = sum(p.numel() * p.element_size() for p in model.parameters())

    @torch.no_grad()
    def inference() -> None:
        model(inputs)

    with problem.prepare(device=device, dtype=OWN_DTYPE, differentiable=False) as objective:
        unit = median_seconds(lambda: float(objective.value()), rounds=rounds)
        inference_peak = peak_bytes(inference, objective.device)
        loss_peak = peak_bytes(lambda: float(objective.value()), objective.device)
        start = now()
        spent = measure_forward(objective, rtol=1e-9, max_hvps=LEAST_DIRECTIONS).num_hvps
        seconds = now() - start
        peak = peak_bytes(lambda: measure_forward(objective, rtol=1e-9, max_hvps=LEAST_DIRECTIONS), objective.device)
        return {
            "model": shape.name,
            "num_params": objective.num_params,
            "forward_seconds": unit,
            "forwards_per_direction": seconds / spent / unit,
            "peak_bytes": own + peak,
            "peak_over_inference": (own + peak) / (own + inference_peak),
            "peak_over_loss": (own + peak) / (own + loss_peak),
        }


def table(title: str, rows: Sequence[Row]) -> Table:
    """One column per number."""
    shown = Table(title=title, title_justify="left")
    for name in rows[0]:
        shown.add_column(name.replace("_", " "), justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        shown.add_row(*(_cell(value) for value in row.values()))
    return shown


def _cell(value: float | str | None) -> str:
    if value is None:
        return "out of memory"
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts asked for."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=140)
    document: dict[str, Any] = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(options.device) if options.device != "cpu" else platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
        "tiny": options.tiny,
    }

    def keep(**found: object) -> None:  # after every part: what is lent may be taken back
        document.update(found)
        if options.json is not None:
            options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    if "hvp" in options.only:
        rows, whole = products(TINY if options.tiny else GPT2, device=options.device, rounds=options.rounds)
        keep(hvp={"methods": rows, "measurement": whole})
        console.print(table("Products in units of a gradient", rows), table("A measurement", [whole]))
    if "forward" in options.only:
        shapes = [TINY] if options.tiny else [GPT2, BILLION]
        found = []
        for shape in shapes:
            found.append(directions(shape, device=options.device, rounds=options.rounds))
            release_memory(torch.device(options.device))
            keep(forward=found)
        console.print(table("Forward passes only", found))
    if "peers" in options.only:
        path = options.json.with_suffix(".peers.json") if options.json is not None else None
        bench_peers.main(
            [
                *("--workloads", *PEER_WORKLOADS, "--device", options.device, "--rounds", str(options.rounds)),
                *(("--tiny", "--tools") if options.tiny else ()),
                *(("--json", str(path)) if path is not None else ()),
            ]
        )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:i or cpu")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument("--tiny", action="store_true", help="networks that take no time, to see that everything runs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
