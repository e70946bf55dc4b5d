"""Groups of options as dataclasses, spread over the command line of the commands that take them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from typer import Argument, Option

from zoscope.cli import validate
from zoscope.cli.output import load_torch

if TYPE_CHECKING:
    from zoscope.spec import LoadedSpec


def flatten(function: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter whose type is an options dataclass by the fields of that dataclass.

    Typer sees one flat signature; the command receives the built, and thereby validated, groups.

    Args:
        function: A command. Names of fields and parameters must be unique over its groups.

    Returns:
        A command with the flat signature.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, type[Any]] = {}
    flat: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        if is_dataclass(hint) and isinstance(hint, type):
            groups[parameter.name] = hint
            flat += _parameters_of(hint)
        else:
            flat.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hint))

    @functools.wraps(function)
    def command(**values: Any) -> None:
        built = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        function(**built, **values)

    command.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return command


def _parameters_of(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(group)
    ]


METHODS = ("auto", "dense", "deflated-slq")
CURVATURES = ("hessian", "ggn", "forward")
DTYPES = ("auto", "float32", "float64", "bfloat16")
DIRECTIONS = ("gaussian", "sphere")
HVPS = ("auto", "double-backward", "batched", "forward-over-reverse", "linearize")
THRESHOLDS = ("exact", "descent", "horizon", "binding")
FAMILIES = ("gd", "gdm", "adam")
OPTIMIZERS = (*FAMILIES, *(f"zo-{name}" for name in FAMILIES))

_problem, _measurement, _optimizer, _output = (
    partial(Option, rich_help_panel=panel) for panel in ("Problem", "Measurement", "Optimizer", "Output")
)

Quiet = Annotated[bool, _output("--quiet", "-q", help="No progress and no warnings on stderr.")]
Threshold = Annotated[
    str,
    _optimizer(
        "--threshold",
        metavar=" | ".join(THRESHOLDS),
        help="The threshold to go by: infinite time, first step, planned steps, or the smaller of the last two.",
    ),
]


@dataclass(frozen=True)
class ProblemOptions:
    """Which problem: SPEC and what changes it."""

    spec: Annotated[
        str | None,
        Argument(
            metavar="SPEC",
            help="path/to/model.py, path/to/model.py:name or package.module:name (default name: problem). Left out: "
            "'problem' of ./zoscope.yaml or of the table tool.zoscope in ./pyproject.toml, else ./model.py.",
            show_default=False,
        ),
    ] = None
    settings: Annotated[
        list[str] | None,
        _problem(
            "--set", metavar="KEY=VALUE", help="Keyword argument for the spec's callable, a YAML scalar; repeatable."
        ),
    ] = None
    params: Annotated[
        str | None,
        _problem("--params", metavar="REGEX", help="Only parameters whose name matches."),
    ] = None
    checkpoint: Annotated[
        Path | None,
        _problem("--checkpoint", metavar="FILE", help="Weights to load first: a state_dict, .pt or .safetensors."),
    ] = None

    def __post_init__(self) -> None:
        if self.params is not None:
            validate.regex("--params", self.params)
        if self.checkpoint is not None:
            validate.existing("--checkpoint", self.checkpoint)

    def load(self) -> LoadedSpec:
        """The problem; from here on torch is loaded. Its ``display`` says where a SPEC that was left out came from."""
        load_torch()
        from zoscope.spec import load_spec, parse_settings, resolve_spec

        settings = parse_settings(self.settings or [])
        spec, source = resolve_spec(self.spec, cwd=Path.cwd())
        loaded = load_spec(spec, settings=settings, params=self.params, checkpoint=self.checkpoint)
        if source is None:
            return loaded
        found = "found here" if source == spec else f"from {source}"
        return replace(loaded, display=f"{loaded.display} ({found})")


@dataclass(frozen=True)
class MeasureOptions:
    """How the curvature is measured."""

    rtol: Annotated[
        float,
        _measurement(help="Relative 95 % half-width wanted for the thresholds."),
    ] = 0.02
    max_hvps: Annotated[int, _measurement(help="Most Hessian-vector products to spend per operator.")] = 600
    method: Annotated[
        str,
        _measurement(metavar=" | ".join(METHODS), help="Dense eigenvalues or stochastic quadrature."),
    ] = "auto"
    curvature: Annotated[
        str,
        _measurement(
            metavar=" | ".join(CURVATURES),
            help="Hessian, Gauss-Newton matrix, or, for bounds alone, forward passes only (no second derivatives).",
        ),
    ] = "hessian"
    hvp: Annotated[
        str,
        _measurement(metavar=" | ".join(HVPS), help="How Hessian-vector products are computed."),
    ] = "auto"
    device: Annotated[str, _measurement(metavar="auto|cpu|cuda[:i]", help="Where to compute.")] = "auto"
    dtype: Annotated[
        str,
        _measurement(metavar=" | ".join(DTYPES), help="Floating-point type of the copy that is measured."),
    ] = "auto"
    seed: Annotated[int, _measurement(help="Seed of every random number drawn.")] = 0
    micro_batch: Annotated[
        int | None,
        _measurement(
            metavar="N",
            help="Examples per forward and backward pass (default: the batches as they are).",
            show_default=False,
        ),
    ] = None
    max_memory: Annotated[
        str | None,
        _measurement(
            metavar="SIZE",
            help="Most memory that this process may hold, such as 2GB: cuts the batches, keeps fewer vectors.",
            show_default=False,
        ),
    ] = None
    strict: Annotated[
        bool,
        _measurement("--strict", help="Exit 3 when the precision of --rtol was not reached."),
    ] = False
    shard_basis: Annotated[
        bool,
        _measurement(
            "--shard-basis",
            help="With torchrun: spread the Lanczos vectors over the processes, which saves memory on the first.",
        ),
    ] = False

    def __post_init__(self) -> None:
        validate.relative("--rtol", self.rtol)
        validate.at_least("--max-hvps", self.max_hvps, 1)
        validate.choice("--method", self.method, METHODS)
        validate.choice("--curvature", self.curvature, CURVATURES)
        validate.choice("--hvp", self.hvp, HVPS)
        validate.device("--device", self.device)
        validate.choice("--dtype", self.dtype, DTYPES)
        validate.at_least("--seed", self.seed, 0)
        if self.micro_batch is not None:
            validate.at_least("--micro-batch", self.micro_batch, 1)
        self._bytes()

    def _bytes(self) -> int | None:
        return None if self.max_memory is None else validate.size("--max-memory", self.max_memory)

    def kwargs(self) -> dict[str, Any]:
        """As keyword arguments of the functions that measure; ``strict`` is left to the command."""
        return {
            "rtol": self.rtol,
            "max_hvps": self.max_hvps,
            "method": self.method,
            "curvature": self.curvature,
            "hvp": self.hvp,
            "device": self.device,
            "dtype": self.dtype,
            "seed": self.seed,
            "micro_batch": self.micro_batch,
            "max_memory": self._bytes(),
            "shard_basis": self.shard_basis,
        }


@dataclass(frozen=True)
class RuleOptions:
    """Which optimizers, their constants, and the gradient estimate that feeds them."""

    optimizer: Annotated[
        list[str] | None,
        _optimizer(metavar=" | ".join(OPTIMIZERS), help="Optimizer; repeatable.", show_default=False),
    ] = None
    beta: Annotated[float, _optimizer(help="Momentum of GDM.")] = 0.9
    betas: Annotated[str, _optimizer(metavar="B1,B2", help="Both coefficients of Adam.")] = "0.9,0.999"
    eps: Annotated[float, _optimizer(help="ε of Adam.")] = 1e-8
    preconditioner: Annotated[
        str,
        _optimizer(
            metavar="expected|state:FILE",
            help="Adam's preconditioner: its expected value here, or from a saved optimizer state.",
        ),
    ] = "expected"
    directions: Annotated[
        str,
        _optimizer(metavar=" | ".join(DIRECTIONS), help="Law of the random directions."),
    ] = "gaussian"
    queries: Annotated[int, _optimizer(metavar="Q", help="Two-point queries averaged per step.")] = 1

    def __post_init__(self) -> None:
        for name in self.optimizer or ():
            validate.choice("--optimizer", name, OPTIMIZERS)
        validate.momentum("--beta", self.beta)
        validate.pair("--betas", self.betas)
        validate.positive("--eps", self.eps)
        validate.preconditioner("--preconditioner", self.preconditioner)
        validate.choice("--directions", self.directions, DIRECTIONS)
        validate.at_least("--queries", self.queries, 1)

    @property
    def families(self) -> tuple[str, ...]:
        """Optimizers without their ``zo-``, once each, in the order given; all of them when none is."""
        return tuple(dict.fromkeys(name.removeprefix("zo-") for name in self.optimizer or FAMILIES))

    def kwargs(self) -> dict[str, Any]:
        """As keyword arguments, without the optimizers themselves: one command takes several, another one."""
        return {
            "beta": self.beta,
            "betas": validate.pair("--betas", self.betas),
            "eps": self.eps,
            "preconditioner": self.preconditioner,
            "directions": self.directions,
            "queries": self.queries,
        }


@dataclass(frozen=True)
class OptimizerOptions(RuleOptions):
    """The same with the training that is planned."""

    steps: Annotated[int, _optimizer(metavar="N", help="Training steps planned: the horizon.")] = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.at_least("--steps", self.steps, 1)

    def kwargs(self) -> dict[str, Any]:
        """As keyword arguments; see `RuleOptions.kwargs`."""
        return {"steps": self.steps, **super().kwargs()}


@dataclass(frozen=True)
class OutputOptions:
    """Where the result goes and in which form."""

    json: Annotated[bool, _output("--json", help="One JSON document on stdout and nothing else.")] = False
    output: Annotated[
        Path | None,
        _output(
            metavar="FILE",
            help="Write the result to FILE too, whole or not at all; JSON with --json or a .json name, else text.",
        ),
    ] = None
    quiet: Quiet = False

    def __post_init__(self) -> None:
        if self.output is not None:
            from zoscope.cli.output import check_writable

            check_writable(self.output)

    @property
    def file_format(self) -> Literal["json", "text"]:
        """What ``--output`` holds."""
        as_json = self.json or (self.output is not None and self.output.suffix == ".json")
        return "json" if as_json else "text"
