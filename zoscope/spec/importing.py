"""Import a spec's module: its folder importable, its errors shown with the user's own frame."""

import contextlib
import difflib
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from zoscope.errors import SpecError, UsageError, ZoscopeError
from zoscope.problem.user_code import described, format_frames, where


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
    return path.resolve()


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
        if isinstance(error, SpecError) and not error.frame:
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
    except Exception as error:
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
