"""How `zoscope.AutoLR` ends beside the best of fifteen step sizes, chosen with hindsight, of plain runs.

python tests/validation/plain_loop.py --tasks moons,blobs --optimizers gd --batch all --json edges.jsonl
python tests/validation/auto_lr_suite.py edges.jsonl
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import suite
import torch

import zoscope

KINDS = {"gd": zoscope.ZOGD, "gdm": zoscope.ZOGDM, "adam": zoscope.ZOAdam}


def ends(real: dict[str, Any], seeds: int) -> tuple[list[float], int, float]:
    """Final losses over that at the start, rollbacks of all runs, and forward passes over those of a plain run."""
    found, rollbacks, passes = [], 0, 0
    for seed in range(seeds):
        problem = suite.TASKS[real["task"]].make()
        (batch,) = problem.batches
        tensors = (batch,) if isinstance(batch, torch.Tensor) else tuple(batch)
        count, size = len(tensors[0]), real["batch_size"]
        params = [p.requires_grad_() for p in problem.model.parameters()]
        auto = zoscope.AutoLR(
            KINDS[real["optimizer"]](params, lr=1.0, mu=real["mu"], seed=seed),
            steps=real["steps"],
            schedule=real["schedule"],
        )
        order = torch.Generator().manual_seed(seed)

        def value(examples: Any = slice(None), problem: Any = problem, tensors: Any = tensors) -> torch.Tensor:
            chosen = tuple(tensor[examples] for tensor in tensors)
            return problem.loss(problem.model, chosen[0] if len(chosen) == 1 else chosen).detach()

        with torch.no_grad():
            start = float(value())
            for _ in range(real["steps"]):
                examples = slice(None) if size is None else torch.randperm(count, generator=order)[:size]

                def closure(examples: Any = examples, value: Any = value) -> torch.Tensor:
                    nonlocal passes
                    passes += 1
                    return value(examples)

                auto.step(closure)
            found.append(float(value()))
        rollbacks += auto.rollbacks
    return [loss / abs(start) for loss in found], rollbacks, passes / (2 * real["steps"] * seeds)


def main() -> None:
    """Train every run of a file of real edges."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("edges", type=Path, help="what plain_loop.py --json wrote")
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args()
    gaps: list[float] = []
    lost = 0
    for line in options.edges.read_text(encoding="utf-8").splitlines():
        real = json.loads(line)
        if not real.get("best"):
            continue
        finals, rollbacks, cost = ends(real, options.seeds)
        best = real["best"]["loss"] / abs(real["loss_start"])
        mean, error = float(np.mean(finals)), float(np.std(finals, ddof=1)) / math.sqrt(len(finals))
        gaps.append(mean - best)
        lost += sum(not final <= 4.0 for final in finals)
        row = {name: real[name] for name in ("task", "optimizer", "batch_size", "steps", "schedule")}
        row |= {"best": best, "auto": mean, "stderr": error, "worst": max(finals), "rollbacks": rollbacks, "cost": cost}
        print(json.dumps(row), flush=True)
    print(
        f"ended within 2 % of the start loss of the best of the grid, or below: {sum(g <= 0.02 for g in gaps)} of "
        f"{len(gaps)}; within 10 %: {sum(g <= 0.1 for g in gaps)}; runs lost: {lost}"
    )


if __name__ == "__main__":
    main()
