"""One workload: reference, budgets of the peers, and timed runs in turns."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from zoscope.curvature.slq import relative

from . import budgets, clock, ours
from .budgets import Budget
from .standin import Diagonal, conditions
from .tools import Peer, Plan, Session, Values, twice_differentiable_attention
from .workloads import Workload

CHUNKS = (1, 4)
MOST = 50.0
"""A peer that needs more than this many times zoscope's time is not waited for."""


@dataclass(frozen=True)
class Reference:
    """The truth, as far as it is known.

    Args:
        diagonal: Stand-in with the spectrum.
        values: Moments and thresholds.
        half_widths: Their relative 95 % half-widths.
        products: Hessian-vector products that it took.
    """

    diagonal: Diagonal
    values: Values
    half_widths: Values
    products: int

    @classmethod
    def measure(cls, workload: Workload, *, most: int, cache: Path | None) -> Reference:
        """From a long measurement, or from one that an earlier run kept in the folder ``cache``."""
        kept = None if cache is None else _kept(cache, workload)
        if kept is not None and kept.exists():
            data = np.load(kept)
            named = ({str(k): float(v) for k, v in zip(data["names"], data[part], strict=True)} for part in ("v", "w"))
            return cls(Diagonal(data["diagonal"]), *named, int(data["products"]))
        found = ours.reference(workload, seed=987_654, most=most)
        sampled = found.spectrum
        estimates = {
            "trace": found.trace,
            "frobenius_sq": found.frobenius_sq,
            **{name: condition.estimate(sampled) for name, condition in conditions().items()},
        }
        values = {"lambda_max": found.lambda_max.value, **{k: e.value for k, e in estimates.items()}}
        widths = {"lambda_max": found.lambda_max.residual / found.lambda_max.value}
        widths |= {k: e.half_width / abs(e.value) for k, e in estimates.items()}
        products = found.num_hvps
        if not sampled.is_exact:  # the trace of a spectrum is not precise enough to judge ± 1 %
            alone = ours.reference_moments(workload, seed=987_654, most=most)
            values["trace"], widths["trace"] = alone.trace.value, relative(alone.trace)
            products += alone.num_hvps
        result = cls(Diagonal.of(found), values, widths, products)
        if kept is not None:
            names, v, w = list(values), list(values.values()), [widths[k] for k in values]
            np.savez(kept, diagonal=result.diagonal.values, names=names, v=v, w=w, products=found.num_hvps)
        return result

    def errors(self, values: Values) -> Values:
        """Relative errors."""
        return {name: abs(value / self.values[name] - 1) for name, value in values.items()}


@dataclass
class Timing:
    """What a tool took for one question; medians over the rounds.

    Args:
        tool: Its name.
        seconds: Wall clock.
        products: Hessian-vector products.
        product_seconds: Seconds of a product of a peer, by itself; ``None`` for zoscope.
        projected: Whether ``seconds`` is the number of products times the seconds of one.
        errors: Largest relative error of each value over the rounds; empty where the run was projected.
        missed: Rounds in which zoscope ended with wider intervals than asked for.
        plan: Estimators and budgets of a peer.
    """

    tool: str
    seconds: float
    products: int
    product_seconds: float | None = None
    projected: bool = False
    errors: Values = field(default_factory=dict)
    missed: int = 0
    plan: dict[str, object] = field(default_factory=dict)


@dataclass
class Comparison:
    """One row of each table."""

    workload: Workload
    reference: Reference | None
    moments: list[Timing]
    bounds: list[Timing]

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        w, r = self.workload, self.reference
        return {
            "name": w.name,
            "title": w.title,
            "num_params": w.dim,
            "num_examples": len(w.batch[0]),
            "reference": None
            if r is None
            else {"values": r.values, "relative_half_widths": r.half_widths, "products": r.products},
            "moments": [asdict(t) for t in self.moments],
            "bounds": [asdict(t) for t in self.bounds],
            "ratio_moments": ratio(self.moments),
            "ratio_bounds": ratio(self.bounds),
        }


def ratio(timings: Sequence[Timing]) -> float | None:
    """Seconds of the fastest peer over those of zoscope; ``None`` without a peer."""
    peers = [t.seconds for t in timings[1:]]
    return min(peers) / timings[0].seconds if peers else None


def compare(
    workload: Workload,
    peers: Sequence[Peer],
    *,
    rounds: int,
    patience: float,
    most: int,
    cache: Path | None,
    say: Callable[[str], None],
) -> Comparison:
    """Measure one workload with zoscope and the peers, in turns.

    Args:
        workload: What to measure.
        peers: Whom to compare with; without any, zoscope alone is timed, against no reference.
        rounds: How often; seeds differ between rounds.
        patience: Seconds up to which a peer's run is waited for; a longer one is projected from its products.
        most: Products allowed to the reference.
        cache: Folder in which references are kept.
        say: Told what happens.
    """
    if not peers:
        alone = _zoscope(workload, rounds=rounds, reference=None)
        return Comparison(workload, None, [alone[0]], [alone[1]])
    say(f"{workload.name}: reference")
    reference = Reference.measure(workload, most=most, cache=cache)
    plans, chains = _plans(workload, peers, reference, cache=cache, say=say)
    runs = _Runs(workload, reference, patience=patience, say=say)
    for number in range(rounds):
        runs.ours(seed=1000 + number)
        for peer in peers:
            runs.peer(peer, plans[peer.name], chains, seed=1000 + number)
    return Comparison(workload, reference, *runs.summary(plans, chains))


def _plans(
    workload: Workload, peers: Sequence[Peer], reference: Reference, *, cache: Path | None, say: Callable[[str], None]
) -> tuple[dict[str, Plan], Budget]:
    """Budgets for the moments by peer, and those of plain quadrature for the thresholds; kept beside the reference."""
    kept = None if cache is None else _kept(cache, workload).with_suffix(".json")
    found: dict[str, dict[str, dict[str, object]]] = {}
    if kept is not None and kept.exists():
        found = json.loads(kept.read_text())
    for peer in peers:
        if peer.name not in found:
            say(f"{workload.name}: budgets of {peer.name}")
            found[peer.name] = {key: budget.to_dict() for key, budget in peer.plan(reference.diagonal).items()}
    if "all" not in found:
        found["all"] = {"chains": budgets.slq(reference.diagonal).to_dict()}
    if kept is not None:
        kept.write_text(json.dumps(found, indent=2) + "\n")
    plans = {name: {key: Budget(**budget) for key, budget in plan.items()} for name, plan in found.items()}
    return plans, plans["all"]["chains"]


def _kept(cache: Path, workload: Workload) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    return cache / f"{workload.name}_{workload.dim}_{len(workload.batch[0])}.npz"


def _zoscope(workload: Workload, *, rounds: int, reference: Reference | None) -> tuple[Timing, Timing]:
    runs = _Runs(workload, reference, patience=0.0, say=lambda _: None)
    for number in range(rounds):
        runs.ours(seed=1000 + number)
    moments, bounds = runs.summary({}, None)
    return moments[0], bounds[0]


@dataclass
class _Sample:
    moments: list[ours.Run] = field(default_factory=list)
    bounds: list[ours.Run] = field(default_factory=list)
    product_seconds: list[float] = field(default_factory=list)
    whole: bool = True


class _Runs:
    """Collects the runs of all tools on one workload."""

    def __init__(
        self, workload: Workload, reference: Reference | None, *, patience: float, say: Callable[[str], None]
    ) -> None:
        self._workload, self._reference, self._patience, self._say = workload, reference, patience, say
        self._samples: dict[str, _Sample] = {"zoscope": _Sample()}
        self._chunk = 0

    def ours(self, *, seed: int) -> None:
        sample = self._samples["zoscope"]
        sample.moments.append(ours.moments(self._workload, seed=seed, most=self._workload.most))
        sample.bounds.append(ours.bounds(self._workload, seed=seed, most=self._workload.most))
        for question, run in (("moments", sample.moments[-1]), ("bounds", sample.bounds[-1])):
            self._say(f"{self._workload.name}: zoscope {question} {run.seconds:.1f} s, {run.products} products")

    def peer(self, peer: Peer, plan: Plan, chains: Budget, *, seed: int) -> None:
        sample = self._samples.setdefault(peer.name, _Sample())
        with twice_differentiable_attention(), torch.random.fork_rng():
            torch.manual_seed(seed)
            started = clock.now()
            session = peer.open(self._workload)
            opening = clock.now() - started
            single = self._product_seconds(session)
            sample.product_seconds.append(single)
            needed = sum(budget.products for budget in plan.values())
            if needed * single <= self._patience:
                started = clock.now()
                values = session.moments(plan, seed=seed)
                seconds = opening + clock.now() - started
            else:
                values, seconds, sample.whole = {}, opening + needed * single, False
            sample.moments.append(ours.Run(seconds, needed, values))
            steps = chains.size if chains.method == "slq" else 0
            if 0 < steps * single <= self._patience:
                started = clock.now()
                session.density(steps)
                density = clock.now() - started
                seconds = density * chains.products / steps
            else:
                seconds = chains.products * single
            sample.bounds.append(ours.Run(opening + seconds, chains.products, {}))
        self._workload.model.zero_grad()
        self._say(f"{self._workload.name}: {peer.name} {single:.3f} s a product, {needed} products for the moments")

    def _product_seconds(self, session: Session) -> float:
        """Median of a few products; of blocks where the tool takes blocks, in the size that is fastest per vector."""
        if not hasattr(session, "chunk"):
            return _median_seconds(session.product)
        if not self._chunk:
            timed = {}
            for chunk in CHUNKS:
                session.chunk = chunk
                timed[chunk] = _median_seconds(session.product) / chunk
            self._chunk = min(timed, key=lambda chunk: timed[chunk])
        session.chunk = self._chunk
        return _median_seconds(session.product) / self._chunk

    def summary(self, plans: dict[str, Plan], chains: Budget | None) -> tuple[list[Timing], list[Timing]]:
        moments, bounds = [], []
        for name, sample in self._samples.items():
            single = statistics.median(sample.product_seconds) if sample.product_seconds else None
            plan: dict[str, object] = {key: budget.to_dict() for key, budget in plans.get(name, {}).items()}
            first = self._timing(name, sample.moments, single, plan, projected=not sample.whole)
            moments.append(first)
            whole = {} if chains is None or single is None else {"thresholds": chains.to_dict()}
            bounds.append(self._timing(name, sample.bounds, single, whole, projected=single is not None))
        return moments, bounds

    def _timing(
        self, name: str, runs: list[ours.Run], single: float | None, plan: dict[str, object], *, projected: bool
    ) -> Timing:
        errors: Values = {}
        if self._reference is not None:
            for run in runs:
                for key, error in self._reference.errors(run.values).items():
                    errors[key] = max(errors.get(key, 0.0), error)
        return Timing(
            tool=name,
            seconds=statistics.median(run.seconds for run in runs),
            products=round(statistics.median(run.products for run in runs)),
            product_seconds=single,
            projected=projected,
            errors=errors,
            missed=sum(not run.reached for run in runs),
            plan=plan,
        )


def _median_seconds(function: Callable[[], object], *, least: int = 3, enough: float = 1.0) -> float:
    function()
    times: list[float] = []
    while len(times) < least or (sum(times) < enough and len(times) < 20):
        started = clock.now()
        function()
        times.append(clock.now() - started)
    return statistics.median(times)


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(statistics.fmean(math.log(value) for value in values))
