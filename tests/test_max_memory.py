"""--max-memory: what the process holds stays below it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from zoscope import NumericalError, Problem, UsageError
from zoscope.cli.app import run
from zoscope.cli.validate import size
from zoscope.curvature.operators import LinearOperator
from zoscope.curvature.slq import measure
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
limit = held + int(sys.argv[2]) if len(sys.argv) > 2 else None
if sys.argv[1] == "bounds":
    found = zoscope.bounds(problem, optimizers=("gd",), max_hvps=24, steps=10, max_memory=limit)
    trace = found.to_dict()["curvature"]["hessian"]["trace"]["value"]
elif sys.argv[1] == "track":
    found = zoscope.track(problem, lr=1e-6, max_hvps=24, steps=1, every=1, max_memory=limit)
    trace = found.records[-1].trace
else:
    given = {} if limit is None else {"max_memory": limit}
    found = zoscope.check(problem, optimizer="gd", lr=1e-3, max_hvps=24, **given)
    trace = found.checks[0].threshold.value
# Not ru_maxrss, which begins at that of the process that started this one.
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"held": held, "limit": limit, "peak": peak, "trace": trace}))
"""


def measured(*args: str) -> dict:
    ran = subprocess.run([sys.executable, "-c", MEASURED, *args], capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is read from /proc")
@pytest.mark.parametrize("command", ["bounds", "check", "track"])
def test_a_measurement_stays_below_the_limit(command):
    room = 200 * 2**20
    free, limited = measured(command), measured(command, str(room))
    assert free["peak"] - free["held"] > 1.5 * room  # the limit matters
    assert limited["peak"] <= 1.1 * limited["limit"]
    assert limited["peak"] - limited["held"] <= 1.1 * room
    assert limited["trace"] == pytest.approx(free["trace"], rel=1e-3)


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


SPEC = """
import torch
from torch import nn
import zoscope

data = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(8, 1)
problem = zoscope.Problem.from_criterion(nn.Linear(3, 1), data, nn.MSELoss())
"""


def no_room_in(said: str) -> bool:
    return "--max-memory leaves no room" in " ".join(said.split())


def test_every_command_that_measures_takes_a_limit(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(SPEC)
    Path("zoscope.yaml").write_text(
        "problem: model.py\ndefaults: {curvature: {max_memory: 1MB}}\n"
        "checks: [{name: one, optimizer: {name: gd, lr: 0.1}}]\n"
    )
    for args in (["bounds"], ["spectrum"], ["probe"], ["track", "--lr", "0.1"]):
        assert run([*args, "model.py", "--max-memory", "1MB"]) == 3, args
        assert no_room_in(capsys.readouterr().err), args
    assert run(["check"]) == 3
    assert no_room_in(capsys.readouterr().out)
    assert run(["check", "--max-memory", "64GB"]) == 0
    assert run(["check", "--max-memory", "much"]) == 2


def test_a_run_goes_on_with_another_limit(tmp_path, capsys):
    spec, folder = tmp_path / "model.py", tmp_path / "run"
    spec.write_text(SPEC)
    options = ["--lr", "0.1", "--steps", "4", "--every", "2", "--max-seconds", "1e-9"]
    assert run(["track", str(spec), *options, "--run", str(folder), "--max-memory", "64GB"]) == 0
    assert "max_memory" not in (folder / "config.yaml").read_text()
    assert run(["track", "--resume", str(folder), "--max-memory", "1MB"]) == 3
    assert no_room_in(capsys.readouterr().err)
    assert run(["track", "--resume", str(folder), "--max-memory", "32GB"]) == 0
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4096", 4096), ("500MB", 5 * 10**8), ("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("2g", 2 * 10**9), ("1k", 1000)],
)
def test_sizes(text, expected):
    assert size("--max-memory", text) == expected


@pytest.mark.parametrize("text", ["", "0", "-1GB", "GB", "2XB", "2i", "1e9", "many", "0.5", "9" * 400])
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
