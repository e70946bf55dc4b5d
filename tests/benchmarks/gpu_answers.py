"""The commands on a GPU: answers against those of the CPU, the same answer twice, and how long they take.

    python tests/benchmarks/gpu_answers.py --json answers.json
    python tests/benchmarks/gpu_answers.py --device cpu --tiny        # does it run?

A row is good when every number that carries an error agrees within four joint standard errors, and one without to a
thousandth; a second run on the device with the same seed must give the same document.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"
SURE = 4.0
"""Joint standard errors that two estimates may be apart."""

TINY = ("quadratic.py",)
WHOLE = ("digits_mlp.py", "digits_cnn.py", "transformer.py")
ESTIMATES = ("trace", "frobenius_sq", "trace_positive")


def command(*words: str) -> tuple[dict[str, Any], float]:
    """A command's JSON document, and the seconds that it took.

    Raises:
        RuntimeError: If it fails; ``probe`` may say no.
    """
    began = time.perf_counter()
    line = [sys.executable, "-m", "zoscope", *words, "--json", "--quiet"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(words)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout), time.perf_counter() - began


def apart(here: dict[str, Any], there: dict[str, Any]) -> float:
    """Largest distance of two measurements of the curvature, in joint standard errors."""
    found = []
    for name in ESTIMATES:
        one, other = (document["curvature"]["hessian"][name] for document in (here, there))
        error = math.hypot(one["stderr"] or 0.0, other["stderr"] or 0.0) + 1e-3 * abs(one["value"]) / SURE
        found.append(abs(one["value"] - other["value"]) / error)
    return max(found)


def answers(example: str, *, device: str, steps: int) -> dict[str, Any]:
    """What all commands say of an example."""
    spec, on = str(EXAMPLES / example), ("--device", device)
    here, _ = command("bounds", spec, "--device", "cpu", "--optimizer", "gd")
    there, seconds = command("bounds", spec, *on, "--optimizer", "gd")
    again, _ = command("bounds", spec, *on, "--optimizer", "gd")
    row: dict[str, Any] = {"bounds s": seconds, "apart": apart(here, there)}
    row["same twice"] = _timeless(there) == _timeless(again)
    half, row["bf16 s"] = command("bounds", spec, *on, "--optimizer", "gd", "--dtype", "bfloat16")
    row["bf16 apart"] = apart(here, half)
    _, row["spectrum s"] = command("spectrum", spec, *on)
    probe, row["probe s"] = command("probe", spec, *on)
    row["probe"] = probe["confirmed"]
    plan, row["plan s"] = command("plan", spec, *on, "--steps", str(steps), "--replicas", "4")
    row["plan lr"] = plan["answer"]["lr"]
    with tempfile.TemporaryDirectory() as folder:
        track = ("track", spec, *on, "--optimizer", "zo-gd", "--lr", "auto", "--steps", str(steps))
        run, row["track auto s"] = command(*track, "--run", f"{folder}/run")
    losses = [record["loss"] for record in run["records"]]
    row["track auto"] = f"{losses[0]:.4g} -> {losses[-1]:.4g}"
    return row


def _timeless(document: Any) -> Any:
    if isinstance(document, dict):
        return {key: _timeless(value) for key, value in document.items() if key != "seconds"}
    return [_timeless(item) for item in document] if isinstance(document, list) else document


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything; exit 1 where an answer is off."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="one example that takes no time")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    rows, good = {}, True
    for example in TINY if options.tiny else WHOLE:
        try:
            row = answers(example, device=options.device, steps=60 if options.tiny else 300)
            row["good"] = row["apart"] < SURE and row["bf16 apart"] < SURE and row["same twice"]
        except RuntimeError as error:
            row = {"good": False, "error": str(error)}
        rows[example], good = row, good and row["good"]
        print(example, json.dumps(row), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
