"""The rooms of the package and who may enter which."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import zoscope
import zoscope.options

PACKAGE = Path(zoscope.__file__).parent
FOUNDATION = {"errors", "_version", "files", "options", "registry", "text"}

# Which rooms of zoscope each room may import, beside itself and the foundation.
ALLOWED = {
    "errors": set(),
    "_version": set(),
    "files": set(),
    "options": set(),
    "registry": set(),
    "text": set(),
    "theory": set(),
    "config": {"theory"},
    "runtime": set(),
    "problem": {"runtime"},
    "spec": {"problem", "runtime"},
    "curvature": {"optim", "problem", "runtime", "theory"},  # forward passes along the optimizers' directions
    "optim": {"problem", "runtime", "theory"},
    "planning": {"curvature", "optim", "problem", "result", "runtime", "theory"},
    "result": {"report", "theory"},  # of the report only what finds the tables of a result
    "analysis": {"config", "curvature", "optim", "planning", "problem", "result", "runtime", "spec", "theory"},
    "report": {"analysis", "config", "curvature", "problem", "result", "theory"},
    "integrations": {"analysis", "optim", "problem", "runtime"},
}
FREE = {"cli", "__init__", "__main__"}
# The only packages from outside that these rooms may see.
OUTSIDE = {
    "theory": {"numpy", "scipy"},
    "errors": set(),
    "_version": set(),
    "files": set(),
    "options": set(),
    "registry": set(),
    "text": set(),
    "config": {"yaml", "numpy"},
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "templates" not in path.parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import that happens at run time, wherever in the file it is."""
    for node in run_time_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module == "zoscope":
                yield from ((node.lineno, f"zoscope.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, str(node.module)


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        for child in node.orelse:
            yield from run_time_nodes(child)
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from run_time_nodes(child)


def test_every_room_imports_only_the_rooms_it_may() -> None:
    strangers = []
    for path in sources():
        room = room_of(path)
        if room in FREE:
            continue
        assert room in ALLOWED, f"{path.relative_to(PACKAGE)} is in no room"
        for line, name in imports(path):
            if not name.startswith("zoscope."):
                continue
            target = name.split(".")[1]
            if target not in {room, *FOUNDATION, *ALLOWED[room]}:
                strangers.append(f"{path.relative_to(PACKAGE)}:{line} imports {name}")
    assert not strangers, "\n".join(strangers)


@pytest.mark.parametrize("room", sorted(OUTSIDE))
def test_rooms_without_torch_import_nothing_but_their_tools(room: str) -> None:
    strangers = []
    for path in sources():
        if room_of(path) != room:
            continue
        for line, name in imports(path):
            top = name.split(".")[0]
            if top not in {"zoscope", *sys.stdlib_module_names, *OUTSIDE[room]}:
                strangers.append(f"{path.relative_to(PACKAGE)}:{line} imports {name}")
    assert not strangers, "\n".join(strangers)


def test_reports_do_not_import_torch() -> None:
    assert not [
        f"{path.name}:{line}"
        for path in sources()
        if room_of(path) == "report"
        for line, name in imports(path)
        if name.split(".")[0] == "torch"
    ]


def calls(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


def test_no_module_imports_itself_by_way_of_others() -> None:
    names = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__") for path in sources()
    }
    waiting = {}
    for path in sources():
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        waiting[name] = {found for _, found in deep_imports(path, names)} - {name}
    while leaves := [name for name, needed in waiting.items() if not needed & waiting.keys()]:
        for name in leaves:
            del waiting[name]
    assert not waiting, f"these modules need one another: {sorted(waiting)}"


def deep_imports(path: Path, names: set[str]) -> Iterator[tuple[int, str]]:
    """As ``imports``, with the module itself where a name is taken out of a package."""
    for node in run_time_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield node.lineno, inner if inner in names else str(node.module)


def test_classes_have_the_names_that_the_field_knows() -> None:
    private = re.compile(
        r"\b(Party|Crew|Desk|Mirror|Fates|Workbench|Forecast|class (Post|Ground|Apart|Beyond|Met|Shown))\b"
    )
    for path in sources():
        found = private.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path.relative_to(PACKAGE)}: {found.group()}"


def defaults(path: Path) -> Iterator[tuple[int, str, ast.expr]]:
    """Line, name and default of every parameter and of every field of a class."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args]
            pairs = [*zip(reversed(arguments), reversed(node.args.defaults), strict=False)]
            pairs += [
                (arg, value) for arg, value in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if value
            ]
            yield from ((node.lineno, argument.arg, value) for argument, value in pairs)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            yield node.lineno, node.target.id, node.value


def test_every_option_is_declared_in_the_table_alone() -> None:
    known = {
        name: {option.default, *(use.default for use in option.uses.values())}
        for name, option in zoscope.options.OPTIONS.items()
    }
    repeated = []
    for path in sources():
        if room_of(path) not in {"analysis", "cli", "config"}:
            continue
        for line, name, value in defaults(path):
            if name in known and isinstance(value, ast.Constant) and type(value.value) in {str, int, float}:
                repeated += [f"{path.relative_to(PACKAGE)}:{line} {name}"] if value.value in known[name] else []
        for line, name in calls(path):  # `init`, `explain` and --version are no measurements
            if path.name not in {"app.py", "explain.py", "init.py"} and name.split(".")[-1] in {
                "Option",
                "Argument",
                "Declared",
            }:
                assert path.relative_to(PACKAGE).as_posix() == "cli/options.py", f"{path.name}:{line}"
    assert not repeated, "\n".join(repeated)


PUBLIC = re.compile(r"from (zoscope\.[\w.]+) import (?:\(([^)]*)\)|([^\n]*))")


def test_tests_and_examples_import_public_names_from_the_top() -> None:
    root = PACKAGE.parent
    if not (root / "tests").is_dir():
        pytest.skip("installed without its tests")
    for path in (*(root / "tests").rglob("*.py"), *(root / "examples").rglob("*.py")):
        for found in PUBLIC.finditer(path.read_text(encoding="utf-8")):
            names = {name.split(" as ")[0].strip() for name in (found[2] or found[3]).split(",")}
            verbs = {
                "bounds",
                "check",
                "moments",
                "plan",
                "probe",
                "spectrum",
                "track",
            }  # modules have these names, too
            assert not names & {*zoscope.__all__} - verbs, f"{path.relative_to(root)}: {found[0]}"


def test_only_the_command_line_exits_and_only_reports_print() -> None:
    for path in sources():
        for line, name in calls(path):
            where = f"{path.relative_to(PACKAGE)}:{line}"
            assert name not in {"sys.exit", "exit", "quit", "os._exit"} or room_of(path) == "cli", where
            assert name != "print" or room_of(path) == "report", where


def test_no_stream_of_random_numbers_is_global() -> None:
    for path in sources():
        for line, name in calls(path):
            where = f"{path.relative_to(PACKAGE)}:{line}"
            assert name not in {"torch.manual_seed", "np.random.seed", "random.seed", "np.random.rand"}, where


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_zoscope_and_its_command_line_leaves_torch_unloaded() -> None:
    code = "import sys, zoscope, zoscope.cli; dir(zoscope); print('torch' in sys.modules, 'scipy' in sys.modules)"
    assert run_python(code).split() == ["False", "False"]


@pytest.mark.parametrize(
    "args",
    [["--help"], ["--version"], *([name, "--help"] for name in ("bounds", "probe", "check", "track", "spectrum"))],
)
def test_help_leaves_torch_unloaded(args: list[str]) -> None:
    code = f"import sys; from zoscope.cli.app import run; run({args!r}); print('torch' in sys.modules)"
    assert run_python(code).split()[-1] == "False"


def test_every_public_name_has_a_home() -> None:
    for name in zoscope.__all__:
        assert getattr(zoscope, name) is not None


def test_every_test_that_is_said_to_take_long_exists() -> None:
    here = Path(__file__).parent
    for line in (here / "long.txt").read_text(encoding="utf-8").splitlines():
        file, _, node = line.partition("::")
        assert f"def {node.partition('[')[0]}(" in (here / file).read_text(encoding="utf-8"), line
