"""The table of options as parameters of commands."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Context
from typer import Option as Declared

from zoscope.cli.output import load_torch, loading
from zoscope.cli.validate import checked
from zoscope.errors import UsageError
from zoscope.options import KEYWORDS, Flag, Option, Several, left_open, options_of, shown, single
from zoscope.registry import DEFAULT_FAMILIES, OPTIMIZERS, family_of

if TYPE_CHECKING:
    from zoscope.spec import LoadedSpec


class Given:
    """The options of a command, by name: checked, but for those that a file may say, too.

    Args:
        command: Name of the command.
        values: What its parameters were called with.
        said: Which of them the user wrote.
        line: The words of the command line.
    """

    def __init__(
        self, command: str, values: Mapping[str, Any], said: Container[str] = (), line: Sequence[str] = ()
    ) -> None:
        kept = left_open(command)
        self.command, self.said, self.line = command, said, line
        self.values = {
            option.name: values[option.name] if option.name in kept else checked(option, values[option.name])
            for _, option in options_of(command)
        }
        if "eps" in said:
            self._refuse_eps()

    def _refuse_eps(self) -> None:
        """MeZO's users call ε what is μ here; ε is Adam's, and of no effect on other optimizers."""
        named = self.values["optimizer"] or ()
        names = (named,) if isinstance(named, str) else tuple(named)
        names = tuple(name for name in names if family_of(name) in OPTIMIZERS)  # others are refused in their turn
        if names and not any("eps" in OPTIMIZERS[family_of(name)].options for name in names):
            raise UsageError(
                f"--eps is the ε of Adam, and {', '.join(names)} has none. Expected it with an Adam. The step of the "
                "loss differences, which MeZO calls ε, is μ: see --mu of zoscope plan, probe and track."
            )

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None

    def keywords(self, function: str, *without: str) -> dict[str, Any]:
        """Those that a function of Python takes, under the same names; what selects the problem is done."""
        names = KEYWORDS[function][1].__annotations__.keys() & self.values.keys() - {"spec", "params", *without}
        return {name: self.values[name] for name in names}

    def overrides(self) -> dict[str, Any]:
        """Those that a file may say, too, as far as they were given."""
        return {name: self.values[name] for name in left_open(self.command) if self.values[name] is not None}

    @property
    def families(self) -> tuple[str, ...]:
        """Optimizers without their ``zo-``, once each, in the order given; all of them when none is."""
        return tuple(dict.fromkeys(family_of(name) for name in self.optimizer or DEFAULT_FAMILIES))

    @property
    def out(self) -> OutputOptions:
        """Where the result goes."""
        return OutputOptions(self.json, self.output, self.quiet, self.verbose)

    def load(self) -> LoadedSpec:
        """The problem; from here on torch is loaded. Its ``display`` says where a SPEC that was left out came from."""
        load_torch()
        from zoscope.spec import load_spec, parse_settings, resolve_spec

        settings = parse_settings(self.settings or [])
        spec, source = resolve_spec(self.spec, cwd=Path.cwd())
        with loading(spec, quiet=self.quiet):
            loaded = load_spec(spec, settings=settings, params=self.params, checkpoint=self.checkpoint)
        if source is None:
            return loaded
        found = "found here" if source == spec else f"from {source}"
        return replace(loaded, display=f"{loaded.display} ({found})")


def takes_options(command: str) -> Callable[[Callable[[Given], None]], Callable[..., None]]:
    """Give a function the options of a command: Typer sees parameters, the function their checked values."""
    kept = left_open(command)
    parameters = [_parameter(command, panel, option, option.name in kept) for panel, option in options_of(command)]

    def decorate(function: Callable[[Given], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(context: Context, **values: Any) -> None:
            defaults = {parameter.name: parameter.default for parameter in parameters}
            sources = {name: context.get_parameter_source(name) for name in values}
            said = {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
            function(Given(command, {**defaults, **values}, said, context.obj or ()))

        first = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=Context)
        run.__signature__ = inspect.Signature([first, *parameters])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in (first, *parameters)}
        return run

    return decorate


def _parameter(command: str, panel: str, option: Option, is_open: bool) -> inspect.Parameter:
    domain = option.domain
    default = None if is_open else shown(option.default) if isinstance(option.default, tuple) else option.default
    kind: Any = list[single(domain).type] if isinstance(domain, Several) else domain.type  # type: ignore[misc]
    help = option.help
    shows = option.default is not None and not isinstance(domain, Flag)
    if command == "track" and is_open and shows:  # Typer would use parentheses
        help += f" [dim]\\[default: {shown(option.default)}][/]"
    declared: dict[str, Any] = {"help": help, "metavar": option.metavar, "show_default": default is not None}
    if panel == "Arguments":
        declaration = Argument(**declared)
    else:
        declaration = Declared(*option.flags, **declared, rich_help_panel=None if panel == "Options" else panel)
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind if default is not None else kind | None, declaration],
    )


@dataclass(frozen=True)
class OutputOptions:
    """Where the result goes and in which form."""

    json: bool = False
    output: Path | None = None
    quiet: bool = False
    verbose: bool = False

    @property
    def file_format(self) -> Literal["json", "text"]:
        """What ``--output`` holds."""
        as_json = self.json or (self.output is not None and self.output.suffix == ".json")
        return "json" if as_json else "text"
