"""What is to be measured on a GPU runs, at a size that takes no time and on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "bench_gpu.py"


@pytest.mark.slow
def test_products_and_forward_passes_are_measured(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--rounds", "1", "--only", "hvp", "forward"]
    done = subprocess.run([*command, "--json", str(target)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(target.read_text())
    assert {row["method"] for row in document["hvp"]["methods"]} >= {"double-backward", "batched"}
    assert 0 < document["hvp"]["measurement"]["share_outside_products"] < 1
    assert document["forward"][0]["peak_over_inference"] >= 1
