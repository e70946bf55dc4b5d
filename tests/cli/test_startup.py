"""What a command loads: imports are most of the time that a small problem takes."""

import subprocess
import sys
from pathlib import Path

QUADRATIC = Path(__file__).parents[2] / "examples" / "quadratic.py"
SLOW = ("sympy", "scipy", "torch._dynamo", "matplotlib", "jsonschema", "zoscope.optim")
NEEDLESS = (
    *("yaml", "tomllib", "statistics", "rich.progress", "rich.live"),
    *("zoscope.analysis.estimate", "zoscope.analysis.minibatch", "zoscope.curvature.minibatch"),
    *("zoscope.curvature.ggn", "zoscope.curvature.forward"),
)
"""What only some options, or a terminal, ask for."""


def loaded_after(*args: str) -> set[str]:
    code = f"import sys; from zoscope.cli.app import run; run({list(args)!r}); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_bounds_loads_no_package_that_takes_longer_than_its_measurement() -> None:
    loaded = loaded_after("bounds", str(QUADRATIC), "--quiet")
    assert "zoscope.analysis.bounds" in loaded
    assert not loaded & set(SLOW)


def test_bounds_loads_nothing_that_only_other_options_need() -> None:
    loaded = loaded_after("bounds", str(QUADRATIC), "--quiet")
    assert "zoscope.analysis.measurement" in loaded
    assert not loaded & set(NEEDLESS)


def test_torch_is_loaded_without_a_collection_of_garbage() -> None:
    code = (
        "import gc; from zoscope.cli.output import load_torch\n"
        "before = gc.get_stats()[2]['collections']; load_torch()\n"
        "print(gc.get_stats()[2]['collections'] - before, gc.isenabled(), gc.get_freeze_count() > 100_000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "True", "True"]


def test_help_loads_no_torch() -> None:
    loaded = loaded_after("--help")
    assert "zoscope.cli.bounds" in loaded
    assert not loaded & {"torch", "numpy", "scipy"}


def test_help_of_a_command_loads_no_other_command() -> None:
    loaded = loaded_after("bounds", "--help")
    assert "zoscope.cli.bounds" in loaded
    assert not loaded & {"zoscope.cli.check", "zoscope.cli.probe", "zoscope.cli.track", "zoscope.config.keys"}
