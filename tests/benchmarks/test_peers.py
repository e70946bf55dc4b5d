"""The comparison with other libraries runs, at a size that takes no time and without them."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "bench_peers.py"
ROOT = SCRIPT.parents[2]


def test_every_workload_builds_and_is_measured_by_zoscope_alone(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "--rounds", "1", "--json", str(target), "--tools"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(target.read_text())
    assert [w["name"] for w in document["workloads"]] == ["digits_cnn", "cnn", "resnet", "decoder", "digits_mlp"]
    for workload in document["workloads"]:
        for question in ("moments", "bounds"):
            (own,) = workload[question]
            assert own["tool"] == "zoscope"
            assert own["products"] > 0
    assert "digits_mlp" in done.stdout


def test_peers_that_are_not_installed_are_named(tmp_path: Path) -> None:
    # In isolated mode with nothing but the standard library's finders for their names: as if they were not there.
    hide = "import sys; sys.modules.update(dict.fromkeys(['curvlinops', 'hessian_eigenthings', 'pyhessian'])); "
    code = f"{hide}sys.path.insert(0, {str(SCRIPT.parent)!r}); from peers.tools import PEERS, installed; "
    code += "print(installed([peer.name for peer in PEERS]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("([], {'curvlinops': ")
