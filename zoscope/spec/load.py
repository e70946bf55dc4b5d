"""Load a spec: import, look up, call, check."""

import contextlib
import difflib
import inspect
import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from zoscope import runtime
from zoscope.errors import SpecError
from zoscope.problem import Problem
from zoscope.problem.checkpoint import load_checkpoint
from zoscope.spec.importing import existing, importable, load_file, load_module, loading, own_argv
from zoscope.spec.which import DEFAULT_NAME, split_spec

_numbers = itertools.count()  # of problems that several processes have loaded
_MINIMAL = "problem = zoscope.Problem(model=..., batches=..., loss=...)"


@dataclass(frozen=True)
class LoadedSpec:
    """A problem and where it came from.

    Args:
        problem: Ready to prepare; its batches are read.
        display: What a header shows.
        source: The file, None for a module without one.
    """

    problem: Problem
    display: str
    source: Path | None


def load_spec(
    spec: str, *, settings: Mapping[str, Any] | None = None, params: str | None = None, checkpoint: Path | None = None
) -> LoadedSpec:
    """Load a spec: import its module, take the attribute, call it if it is a function, and read the batches.

    What the user's code prints goes to stderr, since stdout belongs to the result.

    Args:
        spec: ``path/to/model.py``, ``path/to/model.py:name`` or ``package.module:name``.
        settings: Keyword arguments for a callable.
        params: Replaces the problem's own selection of parameters.
        checkpoint: State dict to load into the model.

    Raises:
        UsageError: If the spec cannot be found.
        SpecError: If it cannot be loaded, or is not a problem.
    """
    options: dict[str, Any] = {"settings": settings, "params": params, "checkpoint": checkpoint}
    ranks = runtime.current_ranks()
    if ranks is None:
        return _loaded(spec, **options)
    number = next(_numbers)
    ranks.tell("zoscope.spec.load:follow", number, spec, options)
    loaded = ranks.attempt(lambda: _loaded(spec, **options))
    loaded.problem.shared = number
    return loaded


def follow(desk: runtime.Desk, number: int, spec: str, options: dict[str, Any]) -> None:
    """Load on another rank what rank 0 loads."""
    desk.problems[number] = desk.ranks.attempt(lambda: _loaded(spec, **options)).problem


def _loaded(
    spec: str, *, settings: Mapping[str, Any] | None, params: str | None, checkpoint: Path | None
) -> LoadedSpec:
    target, name, named = split_spec(spec)
    source = existing(target) if isinstance(target, Path) else None
    folder = source.parent if source is not None else Path.cwd()
    with importable(folder), contextlib.redirect_stdout(sys.stderr), own_argv(str(target)):
        module = load_file(source) if source is not None else load_module(str(target))
        file = getattr(module, "__file__", None)
        value = _attribute(module, name, named=named, label=str(target))
        problem = _problem_from(value, settings or {}, label=f"{name} in {target}")
        problem.name = problem.name or (name if named else (source or Path(str(target))).stem)
        if params is not None:
            problem = problem.with_params(params)
        _ = problem.counts  # read the batches while the spec's folder is importable
        if checkpoint is not None:
            load_checkpoint(problem.model, checkpoint)
    return LoadedSpec(problem, spec, Path(file) if file else None)


def _attribute(module: ModuleType, name: str, *, named: bool, label: str) -> Any:
    value: Any = module
    for part in name.split("."):
        try:
            with loading(f"Reading {name} in {label}"):
                value = getattr(value, part)
        except SpecError as error:
            if not isinstance(error.__cause__, AttributeError):
                raise
            raise SpecError(f"{label} has no {name!r}. {_candidates(module, part, named=named, label=label)}") from None
    return value


def _candidates(module: ModuleType, name: str, *, named: bool, label: str) -> str:
    own = {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_")
        and (isinstance(value, Problem) or (inspect.isfunction(value) and value.__module__ == module.__name__))
    }
    if not own:
        return f"It defines no Problem and no function that could return one: add for example {_MINIMAL}"
    close = difflib.get_close_matches(name, own, n=1)
    problems = [key for key, value in own.items() if isinstance(value, Problem)]
    best = (close or problems or list(own))[0]
    expected = "" if named else f" (the default is {DEFAULT_NAME!r})"
    return f"It defines {', '.join(list(own)[:6])}: name one{expected}, for example {label}:{best}"


def _problem_from(value: Any, settings: Mapping[str, Any], *, label: str) -> Problem:
    if isinstance(value, Problem):
        if settings:
            raise SpecError(
                f"--set {next(iter(settings))}=... was given, but {label} is a Problem, not a function: settings are "
                "passed as keyword arguments to a function that returns the Problem. Write one, or leave --set out."
            )
        return value
    if not callable(value) or type(value).__module__.startswith("torch.") or hasattr(value, "parameters"):
        raise SpecError(f"{label} is {_kind(value)}: expected a zoscope.Problem, or a function that returns one.")
    _check_arguments(value, settings, label)
    with loading(f"Calling {label}"):
        made = value(**settings)
    if not isinstance(made, Problem):
        raise SpecError(f"{label} returned {_kind(made)}: expected a zoscope.Problem. Write {_MINIMAL} and return it.")
    return made


def _kind(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _check_arguments(function: Callable[..., Any], settings: Mapping[str, Any], label: str) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # a builtin tells nothing; calling it will
    try:
        signature.bind(**settings)
    except TypeError as error:
        parameters = signature.parameters.values()
        accepted = ", ".join(str(p.replace(annotation=p.empty)) for p in parameters) or "no arguments"
        raise SpecError(
            f"{label} cannot be called with {', '.join(settings) or 'no settings'} ({error}): it accepts {accepted}. "
            "Pass them as --set key=value."
        ) from None
