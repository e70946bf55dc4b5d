"""Start and compare jobs of several processes."""

import contextlib
import io
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoscope.cli.app import run

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SPEC = str(HERE / "spec.py")


def environment(**more: str) -> dict[str, str]:
    found = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    path = os.pathsep.join([str(ROOT), *filter(None, [found.get("PYTHONPATH")])])
    return {**found, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


def by_hand(ranks: int, args: Sequence[str], *, only: int | None = None) -> list[subprocess.Popen[str]]:
    """``python ARGS`` as so many ranks, or one of them alone, with nobody who looks after them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        subprocess.Popen(
            [sys.executable, *args],
            env=environment(
                RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (range(ranks) if only is None else [only])
    ]


def torchrun(ranks: int, args: Sequence[str]) -> subprocess.Popen[str]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [sys.executable, *start, *args],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def alone(args: Sequence[str]) -> Any:
    """The JSON document that a command prints in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run([*args, "--json"])
    return json.loads(out.getvalue())


def wait_for(path: Path, *, seconds: float = 120.0) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path.is_file() and path.read_text():
            return path.read_text()
        time.sleep(0.1)
    raise AssertionError(f"{path.name} did not appear")


# What is zero but for rounding, and what a clock or the machine says.
NOISE = {"quadrature", "residual"}
OWN = {"seconds", "converged"}


def differences(a: Any, b: Any, *, rtol: float, path: str = "") -> list[str]:
    """Where two documents disagree."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for k in a if k not in OWN | NOISE for d in differences(a[k], b[k], rtol=rtol, path=f"{path}/{k}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (x, y) in pairs for d in differences(x, y, rtol=rtol, path=f"{path}/{i}")]
    zero = 1e-6 if path.endswith("stderr") else 1e-12  # the root of a variance that is zero but for rounding
    if isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=rtol, abs_tol=zero):
        return []
    return [] if a == b else [f"{path}: {a} and {b}"]
