"""What a command loads: imports are most of the time that a small problem takes."""

import subprocess
import sys
from pathlib import Path

QUADRATIC = Path(__file__).parents[2] / "examples" / "quadratic.py"
SLOW = ("sympy", "scipy.optimize", "scipy.special", "torch._dynamo", "matplotlib", "zoscope.optim")


def loaded_after(*args: str) -> set[str]:
    code = f"import sys; from zoscope.cli.app import run; run({list(args)!r}); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_bounds_loads_no_package_that_takes_longer_than_its_measurement() -> None:
    loaded = loaded_after("bounds", str(QUADRATIC), "--quiet")
    assert "zoscope.analysis.bounds" in loaded
    assert not loaded & set(SLOW)


def test_help_of_a_command_loads_no_other_command() -> None:
    loaded = loaded_after("bounds", "--help")
    assert "zoscope.cli.bounds" in loaded
    assert not loaded & {"zoscope.cli.check", "zoscope.cli.probe", "zoscope.cli.track", "zoscope.config.keys"}
