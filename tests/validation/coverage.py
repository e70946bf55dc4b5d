"""How often 95 % intervals hold the truth, over many seeds, on problems whose every eigenvalue is known.

    python tests/validation/coverage.py --family all --seeds 100 --jobs 2 --json coverage.jsonl
    python tests/validation/coverage.py --family 'linear*' 'head*' --seeds 20
    python tests/validation/coverage.py --list
    python tests/validation/coverage.py --products --seeds 5        # products on the networks of the benchmarks

Every seed calls ``zoscope.bounds(problem, optimizers=["gd"], steps=1000, method="deflated-slq")`` and
``zoscope.moments(problem)`` with default options, and asks of every number: does its interval hold the truth, and by
how many of its own standard errors (half-width over 1.96, on the side of the truth) is it off? A right interval holds
the truth 95 times in 100, and is never off by more than six. Seeds run in ``--jobs`` processes. With ``--json`` a file
gets one line per family, with what every seed said.
"""

import argparse
import fnmatch
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[2]))  # what a script measures is this clone, installed or not

import torch
from rich.console import Console
from rich.table import Table

import zoscope
from zoscope import Estimate, ZoscopeError

if __package__:
    from .families import FAMILIES, Subject
    from .truths import STEPS, Truth
else:  # as a script
    from families import FAMILIES, Subject
    from truths import STEPS, Truth

FILE = Path(__file__).resolve()

LEAST = 0.90
"""Share of the seeds whose interval holds the truth: 95 of 100, less a little over two standard deviations."""

MOST_SIGMAS = 6.0
"""Own standard errors by which no run may be off."""

SHARED = ("full", "positive", "infinite", "trace", "trace+", "norm²", "descent")
MOMENTS = {"moments trace": "trace", "moments norm²": "norm²"}
QUANTITIES = (*SHARED, *MOMENTS, "ends")
"""η*(N) with all eigenvalues and with the positive ones, the infinite-time threshold, trace, sum of the positive
eigenvalues, ‖H‖², the descent threshold; the second engine's trace and ‖H‖²; and whether an eigenvalue lies within the
residual of each end of the spectrum that is said to have converged."""

Interval = tuple[float, float, float]
"""Value, lower and upper end."""


@dataclass(frozen=True)
class Record:
    """What one seed says.

    Args:
        seed: The seed.
        found: Intervals by quantity; where one is missing, the measurement failed.
        products: Of ``bounds``, and of ``moments``.
        notices: Codes of all notices, and errors.
        seconds: Wall time of both.
    """

    seed: int
    found: dict[str, Interval]
    products: tuple[int, int]
    notices: list[str]
    seconds: float


def measure(subject: Subject, seed: int) -> Record:
    """Both engines on one problem."""
    started = time.perf_counter()
    found: dict[str, Interval] = {}
    notices: list[str] = []
    products = [0, 0]
    try:
        result = zoscope.bounds(
            subject.problem,
            optimizers=["gd"],
            steps=STEPS,
            method="deflated-slq",
            curvature=subject.curvature,
            seed=seed,
            device="cpu",
        )
    except ZoscopeError as error:
        notices.append(f"bounds: {type(error).__name__}")
    else:
        curvature, row = result.curvature[subject.curvature], result.optimizers["gd"]
        estimates = {
            "full": row.horizon.planned.lower,
            "positive": row.horizon.planned.upper,
            "infinite": row.exact,
            "trace": curvature.trace,
            "trace+": curvature.trace_positive,
            "norm²": curvature.frobenius_sq,
        }
        found |= {name: interval(estimate) for name, estimate in estimates.items()}
        if row.descent is not None:
            found["descent"] = (row.descent, *row.descent_ci95)
        for name, end in (("lambda_max", curvature.lambda_max), ("lambda_min", curvature.lambda_min)):
            if end.converged:
                found[name] = (end.value, end.value - end.residual, end.value + end.residual)
        products[0] = curvature.num_hvps
        notices += [notice.code for notice in result.warnings]
    try:
        other = zoscope.moments(subject.problem, curvature=subject.curvature, seed=seed, device="cpu")
    except ZoscopeError as error:
        notices.append(f"moments: {type(error).__name__}")
    else:
        found |= {
            "moments trace": interval(other.moments.trace),
            "moments norm²": interval(other.moments.frobenius_sq),
        }
        products[1] = other.moments.num_hvps
        notices += [f"moments {notice.code}" for notice in other.warnings]
    return Record(seed, found, (products[0], products[1]), notices, time.perf_counter() - started)


def interval(estimate: Estimate) -> Interval:
    """Value and 95 % interval; of an infinite value with a finite error, that point alone."""
    if math.isinf(estimate.value) and not math.isinf(estimate.half_width):
        return estimate.value, estimate.value, estimate.value
    lower, upper = estimate.interval
    return estimate.value, *(-math.inf if math.isnan(lower) else lower, math.inf if math.isnan(upper) else upper)


@dataclass(frozen=True)
class Score:
    """How one quantity did over the seeds.

    Args:
        runs: Number of seeds.
        covered: Number of intervals that hold the truth.
        worst: Largest error in units of the own standard error; ``inf`` where there is an error and none was claimed.
        error: Median relative error.
        half_width: Median relative half-width.
    """

    runs: int
    covered: int
    worst: float
    error: float
    half_width: float

    @property
    def passes(self) -> bool:
        return self.covered >= LEAST * self.runs and self.worst <= MOST_SIGMAS

    def __str__(self) -> str:
        return f"{self.covered} " + (f"{self.worst:.1f}" if self.worst < 100 else ">99")


def score(records: Sequence[Record], name: str, truth: Truth) -> Score:
    """How a quantity did."""
    if name == "ends":
        return _ends(records, truth)
    key = MOMENTS.get(name, name)
    value, slack = truth.values[key], truth.slack[key]
    found = [record.found.get(name) for record in records]
    judged = [(False, math.inf) if one is None else judge(one, value, slack) for one in found]
    size = abs(value) if value and math.isfinite(value) else 1.0
    errors = [abs(one[0] - value) / size if one and one[0] != value else 0.0 for one in found]
    widths = [(one[2] - one[1]) / 2 / size if one else math.inf for one in found if one is None or one[1] != one[2]]
    return Score(
        runs=len(records),
        covered=sum(covered for covered, _ in judged),
        worst=max(sigmas for _, sigmas in judged),
        error=statistics.median(errors),
        half_width=statistics.median(widths or [0.0]),
    )


def judge(found: Interval, truth: float, slack: float) -> tuple[bool, float]:
    """Whether an interval holds the truth, and the error in own standard errors, both up to ``slack``."""
    value, lower, upper = found
    if value == truth:
        return True, 0.0
    if math.isinf(truth) and 0.0 < value < math.inf:  # no limit: what is estimated is its inverse, whose truth is 0
        rate, least = 1.0 / value, 1.0 / upper
        return least <= 0.0, 1.96 * rate / (rate - least) if rate > least else math.inf
    if math.isnan(value) or math.isinf(truth) or math.isinf(value):
        holds = lower <= truth <= upper
        return holds, 0.0 if holds else math.inf
    width = value - lower if value > truth else upper - value
    excess = max(abs(value - truth) - slack, 0.0)
    sigmas = 0.0 if excess == 0 or math.isinf(width) else 1.96 * excess / width if width > 0 else math.inf
    return excess <= width, sigmas


def _ends(records: Sequence[Record], truth: Truth) -> Score:
    """Of the two ends that are said to have converged: the distance to the nearest eigenvalue, in residuals."""
    nodes = truth.spectrum.nodes
    slack = truth.eigenvalue_slack
    covered, worst = 0, 0.0
    for record in records:
        ends = [record.found[name] for name in ("lambda_max", "lambda_min") if name in record.found]
        excess = [(max(float(abs(nodes - v).min()) - slack, 0.0), high - v) for v, _, high in ends]
        covered += all(far <= residual for far, residual in excess)
        worst = max([worst, *(far / residual if residual > 0 else math.inf for far, residual in excess if far > 0)])
    return Score(len(records), covered, worst, 0.0, 0.0)


@dataclass(frozen=True)
class Outcome:
    """How a family did."""

    family: str
    truth: Truth
    records: list[Record]
    scores: dict[str, Score]

    @classmethod
    def of(cls, family: str, truth: Truth, records: list[Record]) -> "Outcome":
        return cls(family, truth, records, {name: score(records, name, truth) for name in QUANTITIES})

    @property
    def products(self) -> tuple[float, float]:
        """Medians of ``bounds`` and ``moments``."""
        first, second = zip(*(record.products for record in self.records), strict=True)
        return statistics.median(first), statistics.median(second)

    @property
    def notices(self) -> dict[str, int]:
        """In how many runs each was given."""
        return dict(Counter(code for record in self.records for code in set(record.notices)).most_common())

    def __str__(self) -> str:
        rows = [
            f"{name} {s.covered}/{s.runs}, worst {s.worst:.3g}, off {s.error:.2g} ± {s.half_width:.2g}"
            for name, s in self.scores.items()
            if not s.passes
        ]
        first, second = self.products
        return f"{self.family} ({first:.0f} and {second:.0f} products): {'; '.join(rows) or 'right'}; {self.notices}"

    def to_dict(self) -> dict[str, Any]:
        """The JSON line; what is not finite is null."""
        return _plain(
            {
                "family": self.family,
                "dimension": self.truth.spectrum.weights.sum(),
                "products": self.products,
                "notices": self.notices,
                "truth": self.truth.values,
                "slack": self.truth.slack,
                "scores": {name: vars(score) | {"passes": score.passes} for name, score in self.scores.items()},
                "runs": [vars(record) for record in self.records],
            }
        )


def run(family: str, *, seeds: int, jobs: int = 1) -> Outcome:
    """Measure a family with seeds 0, 1, …, in this process and ``jobs - 1`` others."""
    jobs = max(1, min(jobs, seeds))
    others = [_start(family, range(job, seeds, jobs)) for job in range(1, jobs)]
    try:
        subject = FAMILIES[family]()
        truth = subject.truth
        records = [measure(subject, seed) for seed in range(0, seeds, jobs)]
        for process in others:
            records += list(_finish(process))
    finally:
        for process in others:
            process.kill()
    return Outcome.of(family, truth, sorted(records, key=lambda record: record.seed))


def _start(family: str, seeds: range) -> "subprocess.Popen[str]":
    """A process that measures some of the seeds: each has its own threads and caches, and nothing is pickled."""
    chosen = f"{seeds.start}:{seeds.stop}:{seeds.step}"
    return subprocess.Popen(
        [sys.executable, str(FILE), "--family", family, "--worker", chosen],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
    )


def _finish(process: "subprocess.Popen[str]") -> Iterator[Record]:
    output, _ = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"a worker ended with {process.returncode}; its messages are above")
    for line in output.splitlines():
        values = json.loads(line)
        values["found"] = {name: tuple(ends) for name, ends in values["found"].items()}
        yield Record(**(values | {"products": tuple(values["products"])}))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


def tables(outcomes: Sequence[Outcome]) -> Iterator[Table]:
    """Coverage, half-widths and notices, a row per family; what fails is red, and has a !."""
    shown = Table("family", "products", *QUANTITIES, title="covered, worst own standard errors")
    for outcome in outcomes:
        cells = [str(s) if s.passes else f"[red]{s}![/red]" for s in outcome.scores.values()]
        shown.add_row(outcome.family, f"{outcome.products[0]:.0f} / {outcome.products[1]:.0f}", *cells)
    yield shown
    names = QUANTITIES[:-1]
    shown = Table("family", *names, "notices", title="median half-width, %")
    for outcome in outcomes:
        cells = [f"{100 * outcome.scores[name].half_width:.2g}" for name in names]
        shown.add_row(outcome.family, *cells, ", ".join(f"{k} {n}" for k, n in outcome.notices.items()))
    yield shown


BEFORE = {
    "digits_cnn": (29, 47),
    "digits_mlp": (74, 218),
    "decoder": (44, 252),
    "cnn": (38, 152),
    "resnet": (71, 332),
}
"""Median products of the guide's benchmark tables: moments, thresholds."""


def products(workloads: Sequence[str], *, seeds: int, console: Console) -> None:
    """Products that the questions of ``tests/benchmarks/bench_peers.py`` take, in its settings, and no peers.

    λ_max and trace within 1 %, ‖H‖² within 3 %; and η*(1000), both versions, with the infinite-time threshold of GD
    and GDM within 2 %. A quarter of the images and sequences, single precision, seeds from 1000.
    """
    sys.path.insert(0, str(FILE.parents[1] / "benchmarks"))
    from peers.workloads import Size, build

    shown = Table("workload", "moments", "before", "all", "thresholds", "before", "all")
    for name in workloads:
        workload = build(name, Size(share=0.25))
        spent: tuple[list[int], list[int]] = ([], [])
        options = {"max_hvps": workload.most, "dtype": "float32", "device": "cpu"}
        for seed in range(1000, 1000 + seeds):
            found = zoscope.moments(workload.problem, rtol=0.01, seed=seed, **options)
            spent[0].append(found.moments.num_hvps)
            bounds = zoscope.bounds(
                workload.problem,
                optimizers=("gd", "gdm"),
                steps=1000,
                threshold="exact",
                rtol=0.02,
                method="deflated-slq",
                seed=seed,
                **options,
            )
            spent[1].append(bounds.num_hvps)
            console.print(f"{name}, seed {seed}: {spent[0][-1]} and {spent[1][-1]} products")
        cells = [
            (f"{statistics.median(counts):.0f}", str(before), " ".join(map(str, sorted(counts))))
            for counts, before in zip(spent, BEFORE[name], strict=True)
        ]
        shown.add_row(name, *cells[0], *cells[1])
    console.print(shown)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the families; 1 where one of them fails."""
    options = _parse(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    console = Console(width=None if sys.stdout.isatty() else 240)
    names = [name for name in FAMILIES if any(p == "all" or fnmatch.fnmatch(name, p) for p in options.family)]
    if options.worker:
        subject = FAMILIES[names[0]]()
        for seed in range(*map(int, options.worker.split(":"))):
            print(json.dumps(vars(measure(subject, seed))), flush=True)
        return 0
    if options.list:
        console.print("\n".join(names))
        return 0
    if options.products:
        products(options.workloads, seeds=options.seeds, console=console)
        return 0
    outcomes = []
    for name in names:
        outcomes.append(run(name, seeds=options.seeds, jobs=options.jobs))
        print(outcomes[-1], file=sys.stderr, flush=True)
        if options.json is not None:
            with options.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(outcomes[-1].to_dict()) + "\n")
    for shown in tables(outcomes):
        console.print(shown)
    return int(any(not score.passes for outcome in outcomes for score in outcome.scores.values()))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", default=["all"], metavar="NAME", help="names or patterns, or all")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path, help="file to which a line per family is added")
    parser.add_argument("--list", action="store_true", help="names of the families")
    parser.add_argument("--products", action="store_true", help="products on the networks of the benchmarks")
    parser.add_argument("--workloads", nargs="+", choices=list(BEFORE), default=list(BEFORE), help="of --products")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
