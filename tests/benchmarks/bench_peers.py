"""zoscope against the other Hessian libraries, on the same networks in one process.

    python tests/benchmarks/bench_peers.py                                   # all workloads, all peers installed
    python tests/benchmarks/bench_peers.py --workloads digits_mlp decoder --json result.json
    python tests/benchmarks/bench_peers.py --share 0.1 --cache refs          # a tenth of images and sequences
    python tests/benchmarks/bench_peers.py --tiny --tools                    # does it run? zoscope alone

The peers come with

    pip install '.[bench]'
    pip install --no-deps curvlinops-for-pytorch==3.0.1

the second without dependencies, because one of them, BackPACK, asks for torchvision and serves no estimator used here.
A peer that is not installed is named as not measured.

Two questions are asked of every workload:

* λ_max and Tr H within 1 %, ‖H‖_F² within 3 %;
* η*(1000), with all eigenvalues and with the positive ones only, and the infinite-time threshold, of GD and of GDM with
  β = 0.9, within 2 %. A peer answers it from the nodes of its stochastic Lanczos quadrature.

Within r means with 95 % confidence: zoscope goes on until its own interval is that narrow, counting everything. The
peers are told beforehand which estimator and budget has an RMSE of r/1.96, found on a diagonal matrix with the same
spectrum (`peers/standin.py`) and not charged to them; they get no interval. Tools take turns; times are medians. A run
of a peer that would take longer than ``--patience`` is not waited for: its number of products is multiplied with the
seconds of one, and marked with ~. So are the peers' answers to the second question, where one run of their quadrature
is timed and multiplied. Errors are against a long measurement with an interval of its own, or all eigenvalues where
there are few; they are the largest over the rounds.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # what is measured is this clone, installed or not

import torch
from peers import clock
from peers.compare import Comparison, compare
from peers.table import tables
from peers.tools import PEERS, installed, versions
from peers.workloads import WORKLOADS, Size, build
from rich.console import Console


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    if options.clock == "processor":
        clock.use_processor_time()
    console, log = Console(width=120), Console(stderr=True)
    peers, absent = installed(options.tools)
    for name, reason in absent.items():
        log.print(f"{name} is not measured: {reason}")
    document = {
        "versions": versions(options.tools),
        "not_measured": absent,
        "machine": {
            "cpus": os.cpu_count(),
            "processor": platform.machine(),
            "threads": options.threads,
            "device": torch.cuda.get_device_name(options.device) if options.device != "cpu" else "cpu",
        },
        "date": time.strftime("%Y-%m-%d"),
        "arguments": vars(options) | {"json": None, "cache": None},
        "workloads": [],
    }
    console.print(", ".join(f"{name} {number}" for name, number in document["versions"].items()))
    done: list[Comparison] = []
    for name in options.workloads:
        workload = build(name, Size(share=options.share, tiny=options.tiny), options.device)
        log.print(f"{name}: {workload.title}, {workload.dim:,} parameters")
        found = compare(
            workload,
            peers,
            rounds=options.rounds,
            patience=options.patience,
            most=options.reference,
            cache=options.cache,
            say=log.print,
        )
        done.append(found)
        document["workloads"].append(found.to_dict())
        if options.json is not None:
            options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    console.print(tables(done))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [peer.name for peer in PEERS]
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--tools", nargs="*", choices=names, default=names, help="peers; none: zoscope alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:i")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall", help="processor: on a busy machine")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds that a peer's run is waited for")
    parser.add_argument("--reference", type=int, default=2000, help="most products of the reference measurement")
    parser.add_argument("--share", type=float, default=1.0, help="part of the data of cnn, resnet, decoder")
    parser.add_argument("--tiny", action="store_true", help="networks that take no time, to see that everything runs")
    parser.add_argument("--cache", type=Path, help="folder that keeps the reference measurements")
    parser.add_argument("--json", type=Path, help="file for the result")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
