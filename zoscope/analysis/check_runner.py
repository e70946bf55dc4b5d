"""The measurements of a check: fingerprints of problems, what is kept of earlier ones, what is done anew."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import math
import os
import platform
import sys
import sysconfig
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from zoscope._version import __version__
from zoscope.analysis.advice import FORWARD, JUMPS, Limit, forward_limit
from zoscope.analysis.explanations import PROVISIONAL
from zoscope.config.load import CheckConfig
from zoscope.errors import NumericalError, SpecError, UsageError, ZoscopeError
from zoscope.files import parse_json, read_bytes, write_whole
from zoscope.options import THRESHOLDS
from zoscope.problem import Notice, Problem
from zoscope.registry import FAMILIES, OPTIMIZERS
from zoscope.runtime import is_out_of_memory

if TYPE_CHECKING:
    from zoscope.analysis.thresholds import BoundsResult, OptimizerBounds

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


FORMAT = 3


@dataclass(frozen=True)
class Cache:
    """A folder of measurements. Files that are damaged, changed, renamed or of another format are as good as absent.

    Args:
        folder: Made when it is not there.
    """

    folder: Path

    @classmethod
    def open(cls, folder: Path) -> Cache:
        """A cache in a folder that can be written.

        Raises:
            UsageError: If it cannot.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UsageError(f"--cache: cannot write in {folder} ({error.strerror}). Choose another folder.") from None
        return cls(folder)

    def key(self, fingerprint: str, options: Mapping[str, Any]) -> str:
        """The name of the file for a problem and the options of its measurement."""
        text = json.dumps([FORMAT, fingerprint, options], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, key: str) -> dict[str, Any] | None:
        """What was kept, if it is there."""
        try:
            document = parse_json(read_bytes(self._file(key)))
            entry = document["entry"] if document["format"] == FORMAT else None
            whole = isinstance(entry, dict) and document["checksum"] == _checksum(key, entry)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return entry if whole else None

    def put(self, key: str, entry: Mapping[str, Any]) -> None:
        """Keep a JSON object; a full disk costs the entry, not the run."""
        entry = json.loads(json.dumps(entry, allow_nan=False))  # as it will be read: keys are text
        document = {"format": FORMAT, "checksum": _checksum(key, entry), "entry": entry}
        with suppress(OSError):
            write_whole(self._file(key), json.dumps(document, allow_nan=False).encode("utf-8"))

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.json"


def _checksum(key: str, entry: Mapping[str, Any]) -> str:
    """Of an entry under its name: one that was changed, or moved to another problem's, has another one."""
    text = json.dumps([key, entry], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Held:
    """What a step size is held against.

    Args:
        limit: The threshold with its interval.
        doubts: Codes of why it is provisional; empty where it is not.
    """

    limit: Limit
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class OptimizerThresholds:
    """What is known of one update rule.

    Args:
        first_order: The first-order threshold; ``None`` where it is not known.
        zeroth_order: By number of steps and by policy: what ``bounds`` says there.
        minibatch: Whether they are those of mini-batches.
        jumps: Whether the loss is piecewise constant, so that none of them says anything.
    """

    first_order: Limit | None
    zeroth_order: Mapping[int, Mapping[str, Held]] = field(default_factory=dict)
    minibatch: bool = False
    jumps: bool = False

    def choose(self, policy: str, *, zeroth_order: bool, steps: int, curvature: str) -> Held:
        """What the policy names; the first-order threshold for a first-order optimizer.

        Raises:
            UsageError: If it cannot be known from this kind of curvature, or is not defined at this point.
        """
        more = (JUMPS,) if self.jumps else ()
        if not zeroth_order and self.first_order is not None:
            return Held(self.first_order, more)
        known = self.zeroth_order.get(steps, {}) if zeroth_order else {}
        if policy in known and zeroth_order:
            return replace(known[policy], doubts=(*known[policy].doubts, *more))
        raise UsageError(
            f"the {policy if zeroth_order else 'fo'} threshold is not known here with curvature kind {curvature!r} "
            f"(known: {', '.join(known) or 'none'}). Choose one that is, as policy.threshold; forward passes know no "
            "spectrum, and a stationary point has no descent."
        )

    def to_dict(self) -> dict[str, Any]:
        """For the cache file."""
        return {
            "first_order": None if self.first_order is None else _row(self.first_order),
            "zeroth_order": {
                str(steps): {policy: [_row(held.limit), list(held.doubts)] for policy, held in known.items()}
                for steps, known in self.zeroth_order.items()
            },
            "minibatch": self.minibatch,
            "jumps": self.jumps,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> OptimizerThresholds:
        """From the cache file.

        Raises:
            ValueError, KeyError, TypeError: If it is not what ``to_dict`` wrote.
        """
        first = document["first_order"]
        known = {
            int(steps): {policy: Held(_limit(row), tuple(map(str, doubts))) for policy, (row, doubts) in rows.items()}
            for steps, rows in document["zeroth_order"].items()
        }
        return cls(
            None if first is None else _limit(first), known, bool(document["minibatch"]), bool(document["jumps"])
        )


def _row(limit: Limit) -> list[float | str | None]:
    parts = (limit.value, limit.low, limit.high, limit.error, limit.edge)
    return [limit.name, *(part if part is None or math.isfinite(part) else str(part) for part in parts)]  # no infinity


def _limit(row: Sequence[Any]) -> Limit:
    name, value, low, high, error, edge = row
    numbers = [float(part) for part in (value, low, high, error)]
    return Limit(str(name), numbers[0], numbers[1], numbers[2], numbers[3], None if edge is None else float(edge))


@dataclass(frozen=True)
class CheckMeasurement:
    """One call of ``bounds``, reduced to what the gate needs.

    Args:
        optimizers: Thresholds by update rule.
        num_examples: Examples in the problem's data.
        notices: Warnings of the measurement.
        seconds: Its wall-clock time.
        cached: Whether it was read from the cache.
    """

    optimizers: Mapping[str, OptimizerThresholds]
    num_examples: int
    notices: tuple[Notice, ...]
    seconds: float
    cached: bool = False

    @classmethod
    def of(cls, result: BoundsResult, *, steps: Sequence[int], seconds: float) -> CheckMeasurement:
        """From the result of ``bounds``, with horizons of its spectrum at other numbers of steps."""
        return cls(
            optimizers={name: _thresholds(result, entry, steps) for name, entry in result.optimizers.items()},
            num_examples=result.problem.num_examples,
            # Whether a threshold is provisional depends on the steps: each check says so of its own.
            notices=tuple(notice for notice in result.warnings if notice.code != PROVISIONAL),
            seconds=seconds,
        )

    def to_dict(self) -> dict[str, Any]:
        """For the cache file."""
        return {
            "optimizers": {name: entry.to_dict() for name, entry in self.optimizers.items()},
            "num_examples": self.num_examples,
            "notices": [[notice.code, notice.message] for notice in self.notices],
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> CheckMeasurement:
        """From the cache file.

        Raises:
            ValueError, KeyError, TypeError: If it is not what ``to_dict`` wrote.
        """
        return cls(
            optimizers={name: OptimizerThresholds.from_dict(row) for name, row in document["optimizers"].items()},
            num_examples=int(document["num_examples"]),
            notices=tuple(Notice(code, message) for code, message in document["notices"]),
            seconds=float(document["seconds"]),
            cached=True,
        )


def _thresholds(result: BoundsResult, bounds: OptimizerBounds, steps: Sequence[int]) -> OptimizerThresholds:
    first, jumps = _first_order(result, bounds), any(notice.code == JUMPS for notice in result.warnings)
    if bounds.forward is not None:
        held: dict[str, Held] = {wanted: Held(forward_limit(wanted, bounds.forward)) for wanted in FORWARD}
        cut = bounds.forward.minibatch is not None
        return OptimizerThresholds(first, dict.fromkeys(steps, held), minibatch=cut, jumps=jumps)
    assert bounds.advisor is not None
    known: dict[int, dict[str, Held]] = {}
    for number in sorted(steps):
        advice = bounds.advisor.for_each(number, THRESHOLDS)
        known[number] = {name: Held(one.limit, one.doubts) for name, one in advice.items() if one.limit is not None}
    return OptimizerThresholds(first, known, minibatch=bounds.minibatch is not None, jumps=jumps)


def _first_order(result: BoundsResult, bounds: OptimizerBounds) -> Limit | None:
    """A Ritz value lies below λ_max by at most its residual, so the threshold below ``fo`` by as much."""
    if bounds.fo is None:
        return None
    sharpest = result.curvature[bounds.operator].lambda_max
    low = bounds.fo if math.isinf(bounds.fo) else bounds.fo * sharpest.value / (sharpest.value + sharpest.residual)
    return Limit("fo", bounds.fo, low, bounds.fo, error=0.0 if math.isinf(bounds.fo) else bounds.fo - low)


Constants = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Batch:
    """Checks that share a measurement; two of one update rule agree in its constants.

    Args:
        configs: The checks, at least one.
    """

    configs: tuple[CheckConfig, ...]

    @property
    def steps(self) -> tuple[int, ...]:
        """The horizons wanted."""
        return tuple(sorted({config.steps for config in self._zeroth_order or self.configs}))

    def of_rule(self, rule: str) -> Batch:
        """The checks of one update rule among these."""
        return Batch(tuple(config for config in self.configs if config.optimizer.rule == rule))

    @property
    def _zeroth_order(self) -> tuple[CheckConfig, ...]:
        return tuple(config for config in self.configs if config.optimizer.zeroth_order)

    @property
    def key(self) -> str:
        """Equal for equal measurements of the same problem."""
        return problem_key(self.configs[0]) + json.dumps([self.options(), self.steps], sort_keys=True)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``bounds``.

        The measurement is steered by the longest horizon, which takes the most precision, and by the infinite-time
        threshold where a policy asks for it.
        """
        rules = {config.optimizer.rule for config in self.configs}
        options = {**_measuring(self.configs[0]), "steps": self.steps[-1]}
        for config in self.configs:
            options |= dict(_constants(config))
        exact = any(config.policy.threshold == "exact" for config in self._zeroth_order)
        options["optimizers"] = tuple(rule for rule in FAMILIES if rule in rules)
        options["threshold"] = "exact" if exact else "binding"
        return options


def batch_of(config: CheckConfig, configs: Sequence[CheckConfig]) -> Batch:
    """The batch of a check among others."""
    peers = [other for other in configs if _key(other) == _key(config)]
    place = _place(config, peers)
    return Batch(tuple(other for other in peers if _place(other, peers) == place))


def _place(config: CheckConfig, peers: Sequence[CheckConfig]) -> int:
    """Index of the constants of a check among the different ones of its rule: one batch holds one set of each rule."""
    seen: list[Constants] = []
    for other in peers:
        if other.optimizer.rule == config.optimizer.rule and _constants(other) not in seen:
            seen.append(_constants(other))
    return seen.index(_constants(config))


def _constants(config: CheckConfig) -> Constants:
    """What a measurement has to know of the update rule."""
    record = OPTIMIZERS[config.optimizer.rule]
    constants = tuple((name, getattr(config.optimizer, name)) for name in record.options)
    return (*constants, ("preconditioner", config.curvature.preconditioner)) if record.preconditioned else constants


def _measuring(config: CheckConfig) -> dict[str, Any]:
    estimator = {name: getattr(config.estimator, name) for name in ("directions", "differences", "queries")}
    return {**estimator, **config.curvature.options(), "batch_size": batch_size_of(config)}


def batch_size_of(config: CheckConfig) -> int | None:
    """Examples per step, where the threshold depends on it.

    A first-order optimizer is held against the threshold of all examples.
    """
    return config.estimator.batch_size if config.optimizer.zeroth_order else None


def problem_key(config: CheckConfig) -> str:
    """Equal for checks on the same problem."""
    parts = (config.spec, dict(config.settings), str(config.checkpoint), config.params)
    return json.dumps(parts, sort_keys=True, default=repr)


def _key(config: CheckConfig) -> str:
    # What forward passes know of mini-batches is for one number of steps: there is no spectrum to ask again.
    steps = config.steps if config.curvature.kind == "forward" and batch_size_of(config) is not None else None
    return problem_key(config) + json.dumps([_measuring(config), steps], sort_keys=True)


Progress = Callable[..., None]


@dataclass(frozen=True)
class Failure:
    """Why a check could not be done.

    Args:
        message: One paragraph.
        exit_code: 2 for a mistake of the user, 3 for a failed measurement.
        details: Traceback lines worth showing.
    """

    message: str
    exit_code: int
    details: str = ""

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """What an exception means for one check; the others go on."""
        if isinstance(error, ZoscopeError):
            details = error.frame if isinstance(error, SpecError) else ""
            return cls(" ".join(str(error).split()), error.exit_code, details)
        if is_out_of_memory(error):
            return cls(
                "out of memory while measuring. Lower curvature.micro_batch, put fewer batches in the spec, or select "
                "fewer parameters with params.",
                NumericalError.exit_code,
            )
        reason = (str(error).splitlines() or [""])[0]
        message = f"{type(error).__name__} inside zoscope ({reason}): this is a bug in zoscope, please report it."
        return cls(message, NumericalError.exit_code, "".join(traceback.format_exception(error)))


@dataclass
class CheckRunner:
    """Loads problems and measures them for the checks of one run.

    Args:
        problem: Use this problem for every check instead of loading specs.
        cache: Where measurements are kept between runs.
        on_progress: Called by the measurement.
    """

    problem: Problem | None = None
    cache: Cache | None = None
    on_progress: Progress | None = None
    _problems: dict[str, LoadedProblem | Failure] = field(default_factory=dict)
    _measured: dict[str, CheckMeasurement | Failure] = field(default_factory=dict)

    def measure(self, config: CheckConfig, configs: Sequence[CheckConfig]) -> CheckMeasurement | Failure:
        """The thresholds for a check, from one measurement for all of ``configs`` that can share it."""
        batch = batch_of(config, configs)
        found = self._once(batch)
        if isinstance(found, Failure) and isinstance(self.load(config), LoadedProblem):
            return self._once(batch.of_rule(config.optimizer.rule))  # what failed may concern another optimizer only
        return found

    def _once(self, batch: Batch) -> CheckMeasurement | Failure:
        key = batch.key
        if key not in self._measured:
            self._measured[key] = self._attempt(batch)
        return self._measured[key]

    def load(self, config: CheckConfig) -> LoadedProblem | Failure:
        """The problem of a check."""
        key = problem_key(config)
        if key not in self._problems:
            try:
                self._problems[key] = self._load(config)
            except Exception as error:
                self._problems[key] = Failure.of(error)
        return self._problems[key]

    def _load(self, config: CheckConfig) -> LoadedProblem:
        if self.problem is not None:
            problem = self.problem if config.params is None else self.problem.with_params(config.params)
            return LoadedProblem(problem, None)
        from zoscope.spec import load_spec

        assert config.spec is not None
        loaded = load_spec(config.spec, settings=config.settings, params=config.params, checkpoint=config.checkpoint)
        return LoadedProblem(loaded.problem, loaded.source)

    def _attempt(self, batch: Batch) -> CheckMeasurement | Failure:
        loaded = self.load(batch.configs[0])
        if isinstance(loaded, Failure):
            return loaded
        try:
            return self._cached(loaded, batch)
        except Exception as error:
            return Failure.of(error)

    def _cached(self, loaded: LoadedProblem, batch: Batch) -> CheckMeasurement:
        key = self._key(loaded, {**batch.options(), "horizons": batch.steps})
        kept = self._kept(key)
        if kept is not None:
            return kept
        measurement = self._bounds(loaded, batch)
        if isinstance(key, str) and self.cache is not None:
            self.cache.put(key, measurement.to_dict())
        if isinstance(key, Uncached):
            notice = Notice("not-cached", f"Not cached: {key.reason}.")
            return replace(measurement, notices=(*measurement.notices, notice))
        return measurement

    def _kept(self, key: str | Uncached | None) -> CheckMeasurement | None:
        entry = self.cache.get(key) if self.cache is not None and isinstance(key, str) else None
        try:
            return None if entry is None else CheckMeasurement.from_dict(entry)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None  # damaged

    def _key(self, loaded: LoadedProblem, options: Mapping[str, Any]) -> str | Uncached | None:
        """Where the cache keeps a result, or why it cannot; ``None`` without a cache."""
        if self.cache is None:
            return None
        try:
            return self.cache.key(loaded.fingerprint, {**options, "hardware": _hardware(options)})
        except UncacheableError as reason:
            return Uncached(str(reason))

    def recall(
        self,
        config: CheckConfig,
        options: Mapping[str, Any],
        work: Callable[[Problem, Mapping[str, Any]], dict[str, Any]],
    ) -> dict[str, Any]:
        """A JSON object that depends on the problem of a check and on options: from the cache, or from ``work``."""
        loaded = self.load(config)
        assert isinstance(loaded, LoadedProblem)
        key = self._key(loaded, {**options, "work": work.__qualname__})
        if self.cache is None or not isinstance(key, str):
            return work(loaded.problem, options)
        kept = self.cache.get(key)
        if kept is None:
            kept = work(loaded.problem, options)
            self.cache.put(key, kept)
        return kept

    def _bounds(self, loaded: LoadedProblem, batch: Batch) -> CheckMeasurement:
        from zoscope.analysis.bounds import bounds

        start = time.perf_counter()
        result = bounds(loaded.problem, on_progress=self.on_progress, **batch.options())
        return CheckMeasurement.of(result, steps=batch.steps, seconds=time.perf_counter() - start)


@dataclass(frozen=True)
class Uncached:
    """Why something cannot be kept in a cache."""

    reason: str


def _hardware(options: Mapping[str, Any]) -> str:
    """Which hardware ``auto`` means here: a cache may be shared by machines."""
    if options["device"] == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return torch.cuda.get_device_name()


@dataclass(frozen=True)
class LoadedProblem:
    """A problem and the file that it came from."""

    problem: Problem
    source: Path | None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything in the problem that a measurement depends on."""
        return problem_fingerprint(self.problem, source=self.source)
