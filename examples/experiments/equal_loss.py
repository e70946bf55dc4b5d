"""Traces of two sweeps at equal loss.

    python examples/experiments/equal_loss.py runs/flatzero-logistic runs/flatzero-logistic-gd

For every run of the first: its loss and trace towards the end, and the trace of the run of the same name in the second
where that passed the same loss.
"""

import json
import sys
from pathlib import Path


def records(folder: Path) -> list[dict]:
    """Measurements of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def traces(first: Path, second: Path) -> str:
    """One line: losses, the steps at which they were reached, and the traces there.

    The loss is the median of the last quarter of the first run, which is noisy; its trace the median over the same
    measurements. In the second run it is the trace of the first measurement at or below that loss.
    """
    noisy, other = records(first), records(second)
    last = noisy[-max(1, len(noisy) // 4) :]
    loss, trace = (sorted(record[key] for record in last)[len(last) // 2] for key in ("loss", "trace"))
    there = next((record for record in other if record["loss"] <= loss), None)
    if there is None:
        return f"{first.name}: the second run never comes down to the loss {loss:.3g}"
    fallen, besides = noisy[0]["trace"] - trace, other[0]["trace"] - there["trace"]
    return (
        f"{first.name}: at loss {loss:.3g} trace {trace:.3g} against {there['trace']:.4g} (step {there['step']}, loss "
        f"{there['loss']:.3g}), {1 - trace / there['trace']:.0%} lower; from {noisy[0]['trace']:.4g} it fell by "
        f"{fallen:.4g} against {besides:.4g}"
    )


if __name__ == "__main__":
    one, two = map(Path, sys.argv[1:3])
    for run in sorted(path for path in one.iterdir() if path.is_dir()):
        print(traces(run, two / run.name))
