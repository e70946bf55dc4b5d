"""Which spec is meant, and with which settings; loads no spec, and a parser only where there is something to parse."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoscope.errors import UsageError
from zoscope.files import read_text, reason

SHOWN = 60
"""Characters of a setting that an error message repeats."""

DEFAULT_NAME = "problem"
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\Z")
_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+\Z")


def resolve_spec(spec: str | None, *, cwd: Path) -> tuple[str, str | None]:
    """Decide which spec is meant.

    Args:
        spec: As given on the command line; None looks in ``zoscope.yaml``, ``pyproject.toml``, then for ``model.py``.
        cwd: Folder in which to look.

    Returns:
        The spec, and the name of the file that it was taken from (None where it was given).

    Raises:
        UsageError: If none is given and none is found, or a config file cannot be read.
    """
    if spec is not None:
        return spec, None
    for name, read in (("zoscope.yaml", _spec_of_yaml), ("pyproject.toml", _spec_of_pyproject)):
        path = cwd / name
        if not path.is_file():
            continue
        found = read(path)
        if found is None:
            continue
        if not isinstance(found, str):
            raise UsageError(f"{name}: problem is a {type(found).__name__}: expected a spec, such as model.py:problem.")
        return _relative_to(cwd, found), name
    if (cwd / "model.py").is_file():
        return _relative_to(cwd, "model.py"), "model.py"
    raise UsageError(
        "No SPEC was given, and there is none to fall back on: neither problem: in ./zoscope.yaml, nor problem under "
        "[tool.zoscope] in ./pyproject.toml, nor ./model.py. Name one (zoscope bounds path/to/model.py), or write a "
        "starter with: zoscope init"
    )


def _spec_of_yaml(path: Path) -> Any:
    import yaml

    try:
        config = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise UsageError(f"{path.name} cannot be read: {_reason(error)}. Fix it, or name a SPEC.") from error
    return config.get("problem", config.get("spec")) if isinstance(config, dict) else None


def _reason(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)  # a MarkedYAMLError knows where
    if mark is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}: {getattr(error, 'problem', None) or 'not valid YAML'}"


def _spec_of_pyproject(path: Path) -> Any:
    import tomllib

    try:
        config = tomllib.loads(read_text(path))
    except (ValueError, RecursionError, OSError) as error:
        raise UsageError(f"{path.name} cannot be read: {reason(error)}. Fix it, or name a SPEC.") from error
    tools = config.get("tool")
    table = tools.get("zoscope") if isinstance(tools, dict) else None
    return table.get("problem", table.get("spec")) if isinstance(table, dict) else None


def _relative_to(cwd: Path, spec: str) -> str:
    target, _, _ = split_spec(spec)
    return str(cwd / spec) if isinstance(target, Path) and cwd.resolve() != Path.cwd() else spec


def split_spec(spec: str) -> tuple[Path | str, str, bool]:
    """Take ``target[:name]`` apart.

    Returns:
        A path or a module's name, the attribute (``problem`` by default), and whether it was named.
    """
    head, colon, tail = spec.rpartition(":")
    named = bool(colon and head) and _NAME.match(tail) is not None
    target, name = (head, tail) if named else (spec, DEFAULT_NAME)
    is_path = target.endswith(".py") or "/" in target or "\\" in target or Path(target).is_file()
    if not is_path and _NAME.match(target) is None:
        raise UsageError(
            f"SPEC {spec!r} is not understood: expected path/to/model.py, path/to/model.py:name or package.module:name."
        )
    return (Path(target) if is_path else target), name, named


def parse_settings(items: Sequence[str]) -> dict[str, Any]:
    """Read ``--set key=value`` options; values are YAML scalars, and ``1e-3`` is a number.

    Raises:
        UsageError: If an option has no ``=``, no valid key, or a value that is not YAML.
    """
    if not items:
        return {}
    import yaml

    settings: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        key = key.strip()
        if not equals or not key.isidentifier():
            raise UsageError(
                f"--set {_start(item)}: expected key=value, with a key that names an argument of the spec's function."
            )
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # also a number too long, or nested too deeply
            raise UsageError(
                f"--set {_start(item)}: the value is not YAML that can be read; put quotes around it: {key}='\"...\"'."
            ) from error
        settings[key] = float(text) if _EXPONENT.match(text.strip()) else value  # YAML 1.1 reads 1e-3 as a string
    return settings


def _start(item: str) -> str:
    return repr(item) if len(item) <= SHOWN else f"{item[:SHOWN]!r}…"
