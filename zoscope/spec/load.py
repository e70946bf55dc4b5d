"""Import a spec's module: its folder importable, its errors shown with the user's own frame."""

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from zoscope import runtime
from zoscope.errors import SpecError, UsageError, ZoscopeError
from zoscope.files import resolved
from zoscope.problem import Problem
from zoscope.problem.checkpoint import load_checkpoint
from zoscope.problem.data import described, format_frames, raised_by_user, where
from zoscope.spec.which import DEFAULT_NAME, split_spec


def existing(path: Path) -> Path:
    """The absolute path of a spec's file; a UsageError with near matches where there is none."""
    if path.is_dir():
        inside = [p.name for p in sorted(path.glob("*.py"))]
        hint = f" It holds {', '.join(inside[:5])}." if inside else ""
        raise UsageError(f"SPEC {path} is a folder: expected a Python file.{hint}")
    if not path.is_file():
        folder = path.parent
        if not folder.is_dir():
            raise UsageError(f"SPEC {path} does not exist: there is no folder {folder}.")
        names = [p.name for p in sorted(folder.glob("*.py"))]
        close = difflib.get_close_matches(path.name, names, n=3) or [n for n in names if n == f"{path.name}.py"]
        hint = f" Did you mean {' or '.join(str(folder / n) for n in close)}?" if close else ""
        raise UsageError(f"SPEC {path} does not exist.{hint} Write a starter with: zoscope init {path}")
    return resolved(path)


_local_modules: dict[str, Path] = {}  # modules that specs imported from their own folders, and which folder that was


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Make a folder importable, so that its modules win over those of the same name next to another spec."""
    for name in [name for name, home in _local_modules.items() if home != folder]:
        sys.modules.pop(name, None)
        del _local_modules[name]
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have removed it
            sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if _is_local(name, folder):
                _local_modules[name] = folder


def _is_local(name: str, folder: Path) -> bool:
    """Whether a module was found in ``folder`` itself, rather than in an environment somewhere below it."""
    file, top = getattr(sys.modules[name], "__file__", None), name.partition(".")[0]
    if not file or top == "zoscope" or not Path(file).is_relative_to(folder):
        return False
    return Path(file).relative_to(folder).parts[0] in (top, f"{top}.py")


@contextlib.contextmanager
def own_argv(name: str) -> Iterator[None]:
    """A spec that reads ``sys.argv`` is a script without arguments; zoscope's are not meant for it."""
    before = sys.argv
    sys.argv = [name]
    try:
        yield
    finally:
        sys.argv = before


@contextlib.contextmanager
def loading(what: str, *, missing: str | None = None) -> Iterator[None]:
    """Report what the user's code raises, with the user's frame.

    Args:
        what: Subject of the sentence.
        missing: Module whose absence is not the user's code's fault.
    """
    try:
        yield
    except ZoscopeError as error:
        if isinstance(error, SpecError) and not error.frame and not raised_by_user(error):
            error.frame = format_frames(error)
        raise
    except ModuleNotFoundError as error:
        if missing is not None and error.name is not None and (missing + ".").startswith(error.name + "."):
            raise UsageError(
                f"SPEC module {missing!r} was not found ({error.name!r} is not installed and not in the current "
                "folder). Give a path such as path/to/model.py, or install the package."
            ) from None
        raise SpecError(
            f"{what} needs the module {error.name!r}, which is not installed{where(error)}. Install it into the "
            "environment of zoscope, or put it next to the file that imports it.",
            frame=format_frames(error),
        ) from error
    except SystemExit as error:
        raise SpecError(
            f"{what} called sys.exit({error.code!r}){where(error)}. Loading a spec runs the file: put what belongs to "
            "a script under if __name__ == '__main__'.",
            frame=format_frames(error),
        ) from error
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # also those that a library derives from it
        raise SpecError(f"{what} raised {described(error)}{where(error)}.", frame=format_frames(error)) from error


def load_file(path: Path) -> ModuleType:
    """Run a file as a fresh module."""
    name = f"_zoscope_spec_{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}"
    location = importlib.util.spec_from_file_location(name, path, loader=None)
    if location is None or location.loader is None:
        raise UsageError(f"SPEC {path} is not a Python file: expected a name that ends in .py.")
    module = importlib.util.module_from_spec(location)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    try:
        with loading(f"Loading {path.name}"):
            location.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def load_module(name: str) -> ModuleType:
    """Import a module by name."""
    with loading(f"Importing {name}", missing=name):
        return importlib.import_module(name)


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
    return _loaded(runtime.current_ranks() or runtime.ALONE, spec, settings or {}, params, checkpoint)


def problem_from(source: str | os.PathLike[str] | Callable[..., Any]) -> Problem:
    """The problem of a spec or of a function that returns one.

    Raises:
        UsageError: If the spec cannot be found.
        SpecError: If it cannot be loaded, or is not a problem.
    """
    if isinstance(source, (str, os.PathLike)):
        return load_spec(os.fspath(source)).problem
    name = getattr(source, "__name__", type(source).__name__)
    problem = _problem_from(source, {}, label=f"{name}()")
    problem.name = problem.name or name
    return problem


@runtime.collective
def _loaded(
    ranks: runtime.Ranks, spec: str, settings: Mapping[str, Any], params: str | None, checkpoint: Path | None
) -> LoadedSpec:
    loaded = ranks.attempt(lambda: _read(spec, settings, params, checkpoint))
    if ranks.size > 1:
        loaded.problem.shared = ranks.keep(loaded.problem)
    return loaded


def _read(spec: str, settings: Mapping[str, Any], params: str | None, checkpoint: Path | None) -> LoadedSpec:
    target, name, named = split_spec(spec)
    source = existing(target) if isinstance(target, Path) else None
    folder = source.parent if source is not None else Path.cwd()
    with importable(folder), contextlib.redirect_stdout(sys.stderr), own_argv(str(target)):
        module = load_file(source) if source is not None else load_module(str(target))
        file = getattr(module, "__file__", None)
        value = _attribute(module, name, named=named, label=str(target))
        problem = _problem_from(value, settings, label=f"{name} in {target}")
        problem.name = problem.name or (name if named else (source or Path(str(target))).stem)
        if params is not None:
            problem = problem.with_params(params)
        _ = problem.counts  # read the batches while the spec's folder is importable
        if checkpoint is not None:
            problem.notices += load_checkpoint(problem.model, checkpoint)
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
    given = ", ".join(f"{name}={setting!r}" for name, setting in settings.items())
    with loading(f"Calling {label}" + (f" with {given}" if given else "")):
        made = value(**settings)
    if inspect.iscoroutine(made):
        made.close()  # it was never to run
        raise SpecError(f"{label} is async def, which returns a coroutine: expected def, and a zoscope.Problem.")
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
