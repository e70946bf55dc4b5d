"""Which step sizes really blow up, and which learn most: plain zeroth-order training, without any code of zoscope.

    python tests/validation/plain_loop.py --tasks moons,blobs --optimizers gd,adam --batch all --json edges.jsonl

A step is MeZO's: draw u, take c = (f(θ + μu) − f(θ − μu)) / 2μ on one mini-batch, and use cu as the gradient; lr > 0
descends. A run has left when the loss of all examples is above four times that at the start, or not finite; that is
looked at fifty times a run. Replicas at all step sizes run together under `torch.func.vmap`, where that gives the
model's own losses. Replica r sees the same directions and mini-batches at every step size.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from suite import TASKS
from torch import Tensor, nn
from torch.func import functional_call, vmap

LEFT = 4.0
"""Times the start loss above which a run has left."""

LEAST, MOST, FACTOR = 1e-6, 1e3, 4.0
"""Step sizes among which the edge is sought, and steps between them at first."""

CLOSE = 1.05
"""Ratio of two step sizes between which the edge is known well enough."""

GRID, SPAN, GRID_RUNS = 15, 50.0, 4
"""Step sizes whose final losses are told, from the edge down to ``edge / SPAN``, and runs at each."""

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
"""What lr is multiplied by when this share of the steps is done."""

MEMORY = 1 << 28
"""Bytes of parameters that are evaluated at once."""


class Loss:
    """The loss of a task as a function of rows of parameters.

    Args:
        model: Comes back with other parameters.
        batch: All examples, in the first dimension of each tensor.
        loss: ``loss(model, batch)``.
    """

    def __init__(self, model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        self._params = dict(model.requires_grad_(False).named_parameters())
        self._module, self._loss, self._model = _Module(model, loss), loss, model
        self.tensors = (batch,) if isinstance(batch, Tensor) else tuple(batch)
        self._single = isinstance(batch, Tensor)
        self.count = len(self.tensors[0])
        self.start = torch.cat([p.detach().flatten() for p in self._params.values()])
        self.together = self._safe()

    def __call__(self, rows: Tensor, examples: Tensor | None = None) -> Tensor:
        """Losses ``(R,)`` at ``(R, d)``, of all examples or of those ``(R, B)`` of each row."""
        if not self.together:
            chosen = [None] * len(rows) if examples is None else examples
            return torch.stack([self._one(row, which) for row, which in zip(rows, chosen, strict=True)])
        at_once = max(MEMORY // (rows.shape[1] * rows.element_size()), 1)
        if len(rows) > at_once:
            parts = range(0, len(rows), at_once)
            cut = [(rows[i : i + at_once], None if examples is None else examples[i : i + at_once]) for i in parts]
            return torch.cat([self(*part) for part in cut])
        if examples is None:
            return vmap(lambda row: self._pure(row, self.tensors))(rows)
        return vmap(self._pure)(rows, tuple(tensor[examples] for tensor in self.tensors))

    def _split(self, row: Tensor) -> list[Tensor]:
        sizes = [p.numel() for p in self._params.values()]
        return [part.view(p.shape) for part, p in zip(row.split(sizes), self._params.values(), strict=True)]

    def _pure(self, row: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        named = {f"model.{name}": part for name, part in zip(self._params, self._split(row), strict=True)}
        found: Tensor = functional_call(self._module, named, (tensors[0] if self._single else tensors,))
        return found

    def _one(self, row: Tensor, examples: Tensor | None = None) -> Tensor:
        torch._foreach_copy_(list(self._params.values()), self._split(row))
        tensors = self.tensors if examples is None else tuple(tensor[examples] for tensor in self.tensors)
        return self._loss(self._model, tensors[0] if self._single else tensors)

    def _safe(self) -> bool:
        """Whether several rows at once give the losses of each, and are not slower."""
        rows = self.start + 1e-2 * torch.randn(32, len(self.start), generator=torch.Generator().manual_seed(0))
        seconds = []
        self.together = True
        try:
            for _ in range(3):
                begun = time.process_time()
                together = self(rows)
                seconds.append(time.process_time() - begun)
        except Exception:  # a model may raise anything under vmap
            return False
        begun = time.process_time()
        one_by_one = torch.stack([self._one(row) for row in rows])
        slower = min(seconds) > time.process_time() - begun
        return torch.allclose(together, one_by_one, rtol=1e-4) and not slower


class _Module(nn.Module):
    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model, self._loss = model, loss

    def forward(self, batch: Any) -> Tensor:
        return self._loss(self.model, batch)


@dataclass(frozen=True)
class Run:
    """How runs are done.

    Args:
        optimizer: ``gd``, ``gdm`` (β = 0.9) or ``adam`` (β = 0.9, 0.999, ε = 1e-8).
        steps: N.
        batch_size: B, examples of a step drawn without replacement; None for all.
        schedule: Of the step size.
        mu: μ.
    """

    optimizer: str = "gd"
    steps: int = 300
    batch_size: int | None = None
    schedule: str = "constant"
    mu: float = 1e-3

    @torch.no_grad()
    def losses(self, loss: Loss, lrs: Sequence[float], replicas: int) -> Tensor:
        """Final losses ``(len(lrs), replicas)``; infinite for runs that have left."""
        valley = float(loss(loss.start[None]))
        rate = torch.tensor(lrs, dtype=loss.start.dtype).repeat_interleave(replicas)[:, None]
        replica = torch.arange(replicas).repeat(len(lrs))
        alive, final = torch.arange(len(rate)), torch.full((len(rate),), math.inf)
        theta = loss.start.repeat(len(rate), 1)
        state = [torch.zeros_like(theta) for _ in range({"gd": 0, "gdm": 1, "adam": 2}[self.optimizer])]
        streams = [torch.Generator().manual_seed(1000 + r) for r in range(replicas)]
        u = torch.empty(replicas, len(loss.start))
        check = max(self.steps // 50, 1)
        for step in range(self.steps):
            for row, stream in zip(u, streams, strict=True):
                row.normal_(generator=stream)
            examples = None
            if self.batch_size is not None:
                draws = [torch.randperm(loss.count, generator=s)[: self.batch_size] for s in streams]
                examples = torch.stack(draws)[replica].repeat(2, 1)
            along = u[replica]
            pair = loss(torch.cat([theta + self.mu * along, theta - self.mu * along]), examples)
            c = (pair[: len(theta)] - pair[len(theta) :]) / (2 * self.mu)
            factor = rate * SCHEDULES[self.schedule](step / self.steps)
            theta -= factor * self._update(c[:, None] * along, state, step + 1)
            if (step + 1) % check == 0 or step + 1 == self.steps:
                value = loss(theta)
                stays = value <= LEFT * valley
                final[alive] = torch.where(stays, value, math.inf)
                if not stays.all():
                    alive, theta, rate, replica = alive[stays], theta[stays], rate[stays], replica[stays]
                    state = [part[stays] for part in state]
                if not len(alive):
                    break
        return final.view(len(lrs), replicas)

    def _update(self, estimate: Tensor, state: list[Tensor], step: int) -> Tensor:
        if self.optimizer == "gd":
            return estimate
        if self.optimizer == "gdm":
            return state[0].mul_(0.9).add_(estimate)
        m, v = state
        m.mul_(0.9).add_(estimate, alpha=0.1)
        v.mul_(0.999).addcmul_(estimate, estimate, value=0.001)
        return m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)


@dataclass(frozen=True)
class Edge:
    """The step size at which half of the runs leave.

    Args:
        lr: Between the last tried one at which fewer leave and the first at which half do.
        low, high: 95 % interval of the median over runs, from order statistics; infinite where runs are too few.
        shares: Share of runs that left by step size.
    """

    lr: float
    low: float
    high: float
    shares: dict[float, float]


def spread(low: float, high: float, count: int) -> list[float]:
    """``count`` step sizes between two, evenly in their logarithm, without the ends."""
    return [low * (high / low) ** ((k + 1) / (count + 1)) for k in range(count)]


def find_edge(run: Run, loss: Loss, replicas: int) -> Edge | None:
    """Bracket the edge on a log grid, then close in on it by sections; None where runs leave at no step size."""
    low, high = LEAST, None
    lr = LEAST
    while high is None and lr < MOST:  # a few at a time: those far above the edge leave at once and cost little
        tried = [lr * FACTOR**k for k in range(1, 5)]
        gone = run.losses(loss, tried, 2).isinf().double().mean(1)
        first = next((k for k, share in enumerate(gone.tolist()) if share >= 0.5), None)
        low = tried[-1] if first is None else tried[first - 1] if first else lr
        high, lr = (None if first is None else tried[first]), tried[-1]
    if high is None:
        return None
    left: dict[float, list[bool]] = {}

    def leave(tried: Sequence[float]) -> None:
        found = run.losses(loss, tried, replicas).isinf()
        left.update(zip(tried, found.tolist(), strict=True))

    leave([low, high])
    while sum(left[low]) >= replicas / 2:  # two runs may mislead
        low, high = low / FACTOR, low
        leave([low])
    while sum(left[high]) < replicas / 2:
        low, high = high, high * FACTOR
        leave([high])
    while high / low > CLOSE:
        tried = spread(low, high, 3 if high / low > CLOSE**2 else 1)
        leave(tried)
        order = [low, *tried, high]
        first = next(k for k, lr in enumerate(order) if sum(left[lr]) >= replicas / 2)
        low, high = order[first - 1], order[first]
    ordered = sorted(left)
    own = sorted(next((lr for lr in ordered if left[lr][r]), math.inf) for r in range(replicas))
    rank = next((k for k in range(replicas // 2, 0, -1) if covered(replicas, k) >= 0.95), None)
    lower, upper = (0.0, math.inf) if rank is None else (own[rank - 1], own[-rank])
    below = max((lr for lr in ordered if lr < lower), default=0.0)  # a run's own edge is above the last lr that it held
    return Edge(math.sqrt(low * high), below, upper, {lr: sum(left[lr]) / replicas for lr in ordered})


def covered(runs: int, rank: int) -> float:
    """Probability that the median lies between the ``rank``-th smallest and the ``rank``-th largest of ``runs``."""
    return 1 - 2 * sum(math.comb(runs, k) for k in range(rank)) / 2**runs


def measure(name: str, run: Run, replicas: int) -> dict[str, Any]:
    """The edge of a task, and the final losses on a grid of step sizes up to it."""
    begun = time.perf_counter()
    problem = TASKS[name].make()
    (batch,) = problem.batches
    loss = Loss(problem.model, batch, problem.loss)
    with torch.no_grad():
        valley = float(loss(loss.start[None]))
    edge = find_edge(run, loss, replicas)
    top = edge.lr if edge else MOST
    lrs = [top * SPAN ** (k / (GRID - 1) - 1) for k in range(GRID)]
    finals = run.losses(loss, lrs, GRID_RUNS).double()
    means = finals.mean(1)
    best = int(means.argmin())
    return {
        **key(name, run),
        "num_params": len(loss.start),
        "num_examples": loss.count,
        "mu": run.mu,
        "loss_start": valley,
        "edge": None
        if edge is None
        else {
            "lr": edge.lr,
            "interval": [edge.low, edge.high if math.isfinite(edge.high) else None],
            "runs": replicas,
            "shares": sorted(edge.shares.items()),
        },
        "best": {
            "lr": lrs[best],
            "loss": float(means[best]) if means[best].isfinite() else None,
            "stderr": float(finals[best].std()) / math.sqrt(GRID_RUNS) if means[best].isfinite() else None,
        },
        "grid": [
            {"lr": lr, "final": [value if math.isfinite(value) else None for value in row]}
            for lr, row in zip(lrs, finals.tolist(), strict=True)
        ],
        "vmap": loss.together,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def key(name: str, run: Run) -> dict[str, Any]:
    """What tells one measurement from another."""
    return {
        "task": name,
        "optimizer": run.optimizer,
        "batch_size": run.batch_size,
        "steps": run.steps,
        "schedule": run.schedule,
    }


def main() -> None:
    """Measure what is asked for and is not in the file yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    small = ",".join(name for name, task in TASKS.items() if not task.language)
    parser.add_argument("--tasks", default=small, help="names, separated by commas; all but the language models")
    parser.add_argument("--optimizers", default="gd", help="of gd, gdm, adam")
    parser.add_argument("--batch", default="all", help="all, n/8, n/32 or a number of examples; several with commas")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--schedules", default="constant", help="of constant, linear, cosine")
    parser.add_argument("--mu", type=float, default=1e-3)
    parser.add_argument("--runs", type=int, default=10, help="replicas for the edge")
    parser.add_argument("--json", type=Path, help="file that one line per measurement is added to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = []
    if options.json and options.json.exists():
        known = [json.loads(line) for line in options.json.read_text(encoding="utf-8").splitlines()]
    for optimizer in options.optimizers.split(","):
        for batch in options.batch.split(","):
            for schedule in options.schedules.split(","):
                for name in options.tasks.split(","):
                    run = Run(optimizer, options.steps, _batch_size(name, batch), schedule, options.mu)
                    if any(key(name, run).items() <= line.items() for line in known):
                        continue
                    line = json.dumps(measure(name, run, options.runs))
                    print(line if options.json is None else _summary(json.loads(line)), flush=True)
                    if options.json:
                        with options.json.open("a", encoding="utf-8") as file:
                            file.write(line + "\n")


def _batch_size(name: str, batch: str) -> int | None:
    if batch == "all":
        return None
    if not batch.startswith("n/"):
        return int(batch)
    return max(TASKS[name].make().num_examples // int(batch.removeprefix("n/")), 1)


def _summary(line: dict[str, Any]) -> str:
    edge, best, size = line["edge"], line["best"], line["batch_size"] or "all"
    said = "no edge" if edge is None else f"edge {edge['lr']:.3g} ({edge['interval'][0]:.3g} to {edge['interval'][1]})"
    loss = "–" if best["loss"] is None else f"{best['loss'] / line['loss_start']:.3f} × start"
    return (
        f"{line['task']:16} {line['optimizer']:4} B {size:>4} N {line['steps']} {line['schedule']}: {said}, "
        f"best {loss} at {best['lr']:.3g}; {line['seconds']} s"
    )


if __name__ == "__main__":
    main()
