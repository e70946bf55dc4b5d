"""What a measurement depends on, as one hash: source, parameters, data, options and versions."""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import platform
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoscope._version import __version__
from zoscope.problem import Problem

MAX_DEPTH = 24
_SCALARS = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size, Path)
_INSTALLED = tuple(
    Path(sysconfig.get_paths()[name]).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")
)


class UncacheableError(Exception):
    """Something in the problem has no value that can be hashed; the message names it."""


def problem_fingerprint(problem: Problem, *, source: Path | None) -> str:
    """Hash of a problem: its source files, parameters, buffers, modes, data and loss, and the versions below it.

    Raises:
        UncacheableError: If a part cannot be hashed, so that a change of it would go unnoticed.
    """
    hasher = _Hasher()
    hasher.add(("versions", __version__, torch.__version__, np.__version__, platform.python_version()))
    for file in source_files(problem, source=source):
        # relative, so that a cache serves every checkout of a repository
        name = file.name if source is None else os.path.relpath(file, source.resolve().parent)
        hasher.add((name, file.read_bytes()))
    hasher.add(problem.model)
    hasher.add((problem.params, problem.counts, problem.batches))
    hasher.add(problem.loss)
    return hasher.hexdigest()


def source_files(problem: Problem, *, source: Path | None) -> list[Path]:
    """The spec, the modules beside it that it imports, and the files that define the model's classes and the loss."""
    modules = {type(module).__module__ for module in problem.model.modules()}
    modules.add(getattr(problem.loss, "__module__", "") or "")
    modules.add(getattr(problem.criterion, "__module__", "") or "")
    files = [Path(file) for name in modules if (file := getattr(sys.modules.get(name), "__file__", None))]
    return local_files([*([source] if source is not None else []), *files])


def local_files(start: Sequence[Path]) -> list[Path]:
    """The closure of Python files under imports, installed packages left out; sorted."""
    found: set[Path] = set()
    waiting = [path.resolve() for path in start]
    while waiting:
        path = waiting.pop()
        if path in found or path.suffix != ".py" or not path.is_file() or _installed(path):
            continue
        found.add(path)
        waiting.extend(_imported(path))
    return sorted(found)


def _installed(path: Path) -> bool:
    own = Path(__file__).resolve().parents[2]  # zoscope itself is covered by its version
    return "site-packages" in path.parts or any(path.is_relative_to(root) for root in (*_INSTALLED, own))


def _imported(path: Path) -> Iterable[Path]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return
    package = path.parent
    while (package / "__init__.py").is_file():
        package = package.parent
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _candidates((package, path.parent), alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            roots = (path.parents[node.level - 1],) if 0 < node.level <= len(path.parents) else (package, path.parent)
            yield from _candidates(roots, parts)
            for alias in node.names:
                yield from _candidates(roots, [*parts, alias.name])


def _candidates(roots: Iterable[Path], parts: Sequence[str]) -> Iterable[Path]:
    for root in roots:
        for end in range(1, len(parts) + 1):
            place = root.joinpath(*parts[:end])
            yield place.with_name(f"{place.name}.py")
            yield place / "__init__.py"


class _Hasher:
    """SHA-256 over a nest of Python objects, with the type and length of each part so that no two nests collide."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._seen: dict[int, int] = {}
        self._alive: list[object] = []  # ids stay unique while the objects live

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def add(self, value: Any, depth: int = 0) -> None:
        if depth > MAX_DEPTH:
            raise UncacheableError(f"objects nested more than {MAX_DEPTH} deep")
        if isinstance(value, _SCALARS):
            return self._mark(type(value).__qualname__, repr(value).encode(errors="surrogatepass"))
        if id(value) in self._seen:
            return self._mark("again", str(self._seen[id(value)]).encode())
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        self._mark(f"{type(value).__module__}.{type(value).__qualname__}")
        return self._compound(value, depth + 1)

    def _mark(self, kind: str, content: bytes = b"") -> None:
        self._hash.update(f"{kind}:{len(content)}:".encode())
        self._hash.update(content)

    def _compound(self, value: Any, depth: int) -> None:
        if isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, np.ndarray):
            self._array(value)
        elif isinstance(value, nn.Module):
            self._module(value, depth)
        elif isinstance(value, Mapping):
            self._sequence([part for item in value.items() for part in item], depth)
        elif isinstance(value, list | tuple):
            self._sequence(value, depth)
        elif isinstance(value, set | frozenset):
            self._sequence(sorted(value, key=repr), depth)
        elif isinstance(value, functools.partial):
            self._sequence((value.func, value.args, value.keywords), depth)
        elif isinstance(value, types.MethodType):
            self._sequence((value.__func__, value.__self__), depth)
        elif isinstance(value, types.FunctionType):
            self._function(value, depth)
        elif isinstance(value, types.ModuleType | types.BuiltinFunctionType | type):
            self._mark(getattr(value, "__qualname__", value.__name__))  # its file is among the sources, or installed
        elif hasattr(value, "__dict__") and not _iterates(value):
            self.add(dict(sorted(vars(value).items())), depth)
        else:
            raise UncacheableError(f"a {type(value).__module__}.{type(value).__qualname__} has no value to compare")

    def _sequence(self, items: Sequence[Any], depth: int) -> None:
        self._mark("items", str(len(items)).encode())
        for item in items:
            self.add(item, depth)

    def _tensor(self, value: Tensor) -> None:
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise UncacheableError(f"a tensor of layout {value.layout} cannot be hashed")
        flat = value.detach().cpu().contiguous().reshape(-1)
        self._mark(
            f"{value.dtype}{tuple(value.shape)}", flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        )

    def _array(self, value: np.ndarray[Any, Any]) -> None:
        if value.dtype.hasobject:
            return self._sequence(value.ravel().tolist(), 1)
        return self._mark(f"{value.dtype}{value.shape}", np.ascontiguousarray(value).tobytes())

    def _module(self, value: nn.Module, depth: int) -> None:
        self._mark(repr(value))
        self._sequence([(name, p.requires_grad, p) for name, p in value.named_parameters()], depth)
        self._sequence(list(value.named_buffers()), depth)
        for name, module in value.named_modules():
            settings = {key: item for key, item in vars(module).items() if not key.startswith("_") and _simple(item)}
            self._sequence([name, type(module).__qualname__, settings], depth)

    def _function(self, value: types.FunctionType, depth: int) -> None:
        """Code, and the values that it closes over or reads from its module."""
        self._mark(f"{value.__module__}.{value.__qualname__}")
        self._sequence((value.__defaults__, value.__kwdefaults__), depth)
        self._sequence([cell.cell_contents for cell in value.__closure__ or () if not _is_empty(cell)], depth)
        if _installed(Path(value.__code__.co_filename).resolve()):
            return  # its code and its module are those of a version
        self._mark("code", value.__code__.co_code)
        self._sequence([c for c in value.__code__.co_consts if isinstance(c, _SCALARS)], depth)
        read = {name: value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__}
        self.add(dict(sorted(read.items())), depth)


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - raises when the cell is empty
    except ValueError:
        return True
    return False


def _simple(value: Any, depth: int = 0) -> bool:
    """Attributes of a module that are values; others (locks, tokenizers) are left to the source files."""
    if isinstance(value, list | tuple | set | frozenset):
        return depth < 4 and all(_simple(item, depth + 1) for item in value)
    if isinstance(value, dict):
        return depth < 4 and all(_simple(part, depth + 1) for item in value.items() for part in item)
    return isinstance(value, (*_SCALARS, Tensor, np.ndarray))


def _iterates(value: Callable[..., Any]) -> bool:
    """Generators, files and loaders give other values when read again."""
    return hasattr(value, "__next__") or hasattr(value, "read")
