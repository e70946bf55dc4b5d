"""``zoscope.plan`` against runs of a plain loop: its edge over the real one, and what its step size costs in loss.

``python tests/validation/plain_loop.py --tasks moons,wine --json edges.jsonl`` measures the real edges, and
``python tests/validation/plan_suite.py edges.jsonl`` plans the same runs.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import suite

import zoscope


def compared(real: dict[str, Any], method: str) -> dict[str, Any]:
    """One run, planned: ``ratio`` is its edge over the real one, ``gap`` the loss at its step size over the best one.

    The loss is that of the plain loop's own grid, between its points on a line over log lr; in units of the start loss.
    """
    plan = zoscope.plan(
        suite.TASKS[real["task"]].make(),
        optimizer=f"zo-{real['optimizer']}",
        steps=real["steps"],
        batch_size=real["batch_size"],
        schedule=real["schedule"],
        mu=real["mu"],
        method=method,
    )
    means = [
        (row["lr"], np.mean([math.inf if loss is None else loss for loss in row["final"]])) for row in real["grid"]
    ]
    lrs, losses = np.array([row for row in means if math.isfinite(row[1])]).T
    lr = plan.answer.lr
    loss = real["loss_start"] if lr is None else float(np.interp(math.log(lr), np.log(lrs), losses))
    names = ("task", "optimizer", "batch_size", "steps", "schedule")
    return {name: real[name] for name in names} | {
        "ratio": plan.edge.lr / real["edge"]["lr"] if plan.edge.lr and real["edge"]["lr"] else None,
        "lr": lr,
        "gap": (loss - real["best"]["loss"]) / abs(real["loss_start"]),
        "method": plan.method,
        "cost": plan.cost.forward_passes / plan.cost.run,
    }


def main() -> None:
    """Plan every run of a file of real edges."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("edges", type=Path, help="what plain_loop.py --json wrote")
    parser.add_argument("--method", default="auto", help="auto, rehearsal or replicas")
    options = parser.parse_args()
    found = []
    for line in options.edges.read_text(encoding="utf-8").splitlines():
        found.append(compared(json.loads(line), options.method))
        print(json.dumps(found[-1]), flush=True)
    ratios = [row["ratio"] for row in found if row["ratio"] is not None]
    print(
        f"edge within 10 %: {sum(0.9 <= ratio <= 1.1 for ratio in ratios)} of {len(ratios)}, "
        f"within 20 %: {sum(0.8 <= ratio <= 1.2 for ratio in ratios)}; "
        f"loss within 5 % of the start: {sum(row['gap'] <= 0.05 for row in found)} of {len(found)}"
    )


if __name__ == "__main__":
    main()
