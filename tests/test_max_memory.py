"""--max-memory: what the process holds stays below it."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from zoscope import NumericalError, Problem, UsageError
from zoscope.cli.validate import size
from zoscope.curvature.linear import LinearOperator
from zoscope.curvature.measure import measure
from zoscope.runtime import available_memory, held_memory, is_limited, memory_limit

MEASURED = """
import json, sys
import torch
from torch import nn
import zoscope
from zoscope.runtime import held_memory

torch.manual_seed(0)
width = 16
model = nn.Sequential(nn.Conv2d(3, width, 3), nn.GELU(), nn.Conv2d(width, width, 3), nn.GELU(), nn.Flatten(1, -1),
                      nn.Linear(28 * 28 * width, 4))
batch = torch.randn(256, 3, 32, 32), torch.randint(0, 4, (256,))
problem = zoscope.Problem.from_criterion(model, [batch], nn.CrossEntropyLoss())
held = held_memory("cpu")
limit = held + int(sys.argv[1]) if len(sys.argv) > 1 else None
found = zoscope.bounds(problem, optimizers=("gd",), max_hvps=24, steps=10, max_memory=limit)
# Not ru_maxrss, which begins at that of the process that started this one.
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
trace = found.to_dict()["curvature"]["hessian"]["trace"]
print(json.dumps({"held": held, "limit": limit, "peak": peak, "trace": trace}))
"""


def measured(*args: str) -> dict:
    ran = subprocess.run([sys.executable, "-c", MEASURED, *args], capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is read from /proc")
def test_a_measurement_stays_below_the_limit():
    room = 200 * 2**20
    free, limited = measured(), measured(str(room))
    assert free["peak"] - free["held"] > 1.5 * room  # the limit matters
    assert limited["peak"] <= 1.1 * limited["limit"]
    assert limited["peak"] - limited["held"] <= 1.1 * room
    assert limited["trace"]["value"] == pytest.approx(free["trace"]["value"], rel=1e-3)


def test_what_is_left_of_a_limit():
    held = held_memory("cpu")
    assert not is_limited()
    with memory_limit(held + 2**30), memory_limit(None):
        assert is_limited()
        assert available_memory("cpu") <= 1.1 * 2**30
        with memory_limit(held // 2):
            assert available_memory("cpu") == 0
    assert not is_limited()


def test_no_room_is_said_in_one_paragraph():
    batch = torch.randn(8, 3), torch.randn(8, 1)
    problem = Problem.from_criterion(nn.Linear(3, 1), [batch], nn.MSELoss())
    no_room = pytest.raises(NumericalError, match=r"--max-memory leaves no room.*at least")
    with no_room as raised, problem.prepare(device="cpu", max_memory=2**20):
        pass
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4096", 4096), ("500MB", 5 * 10**8), ("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("2g", 2 * 10**9), ("1k", 1000)],
)
def test_sizes(text, expected):
    assert size("--max-memory", text) == expected


@pytest.mark.parametrize("text", ["", "0", "-1GB", "GB", "2XB", "2i", "1e9", "many"])
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match=r"--max-memory.*500MB"):
        size("--max-memory", text)


def test_no_room_for_vectors():
    with memory_limit(held_memory("cpu") + 20 * 2**20), pytest.raises(NumericalError, match=r"--max-memory leaves"):
        measure(Wide(), method="deflated-slq")


class Wide(LinearOperator):
    dim, device, dtype, num_hvps = 2**22, torch.device("cpu"), torch.float32, 0

    def matmat(self, vectors: torch.Tensor) -> torch.Tensor:
        raise AssertionError("nothing is to be computed")
