"""What every result has: its JSON document, the tables that it shows itself by, and of what it was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, TypeVar

from zoscope._version import __version__
from zoscope.errors import UsageError
from zoscope.theory.spectrum import Estimate

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import RenderableType

    from zoscope.problem import Notice
    from zoscope.report.answer import Report

T = TypeVar("T")


def encode(value: Any) -> Any:
    """Plain JSON types: an object for a dataclass or a mapping, a list for a sequence or an array.

    A number that is not finite is ``None``. A dataclass that is no `JsonObject` has its fields in order.
    """
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, JsonObject):
        return value.to_dict()
    if isinstance(value, Estimate):
        return pick(value, "value stderr quadrature")
    if is_dataclass(value):
        return pick(value, _shown(value))
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return encode(value.tolist())
    return [encode(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def pick(value: Any, keys: str) -> dict[str, Any]:
    """The JSON object of some attributes.

    Args:
        value: What has them.
        keys: Names with spaces between them. ``ci95=exact_ci95`` gives an attribute another name,
            ``exact=exact.value`` reaches into one and is null where that is ``None``, and ``verdict?`` is left out
            where it is ``None``.
    """
    found = {}
    for entry in keys.split():
        key, _, path = entry.partition("=")
        inner = value
        for name in (path or key.rstrip("?")).split("."):
            inner = None if inner is None else getattr(inner, name)
        if inner is not None or not key.endswith("?"):
            found[key.rstrip("?")] = encode(inner)
    return found


def _shown(value: Any) -> str:
    return " ".join(entry.name for entry in fields(value) if entry.repr)


MOST_ROWS = 20


def thinned(entries: Sequence[T], most: int = MOST_ROWS) -> list[T]:
    """At most ``most`` of them, evenly spread, the first and the last among them."""
    last = len(entries) - 1
    places = sorted({round(n * last / (most - 1)) for n in range(most)}) if last >= most else range(last + 1)
    return [entries[place] for place in places]


LISTED = ("optimizers", "records", "runs", "checks", "curve", "top")
"""Keys of documents with what results list; the first one that is there is the table of `to_frame`."""


class JsonObject:
    """A dataclass with a JSON object: of the attributes in ``keys``, or of all fields that its ``repr`` shows."""

    keys: ClassVar[str] = ""
    """What `pick` takes."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON object: numbers, strings and null only."""
        return pick(self, self.keys or _shown(self))

    def to_json(self, *, indent: int | None = None) -> str:
        """The same as text.

        Args:
            indent: Spaces by which nested parts stand apart; ``None`` for one line.
        """
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False, ensure_ascii=False)


class RichResult(JsonObject):
    """A result with tables of its own, which ``zoscope.report`` makes."""

    @property
    def warnings(self) -> tuple[Notice, ...]:
        """What to know before trusting a number."""
        return ()

    def report(self, *, verbose: bool = False, warnings: bool = True) -> Report[Any]:
        """What it shows of itself, to be printed, in ``rich``, in a notebook or with ``print``.

        Args:
            verbose: Everything, in place of the answer alone.
            warnings: Whether it ends with what to know before trusting a number.
        """
        from zoscope.report import render  # late, as whoever wants numbers needs no tables

        return render(self, verbose=verbose, warnings=warnings)

    def __rich__(self) -> RenderableType:
        """The answer for the terminal."""
        return self.report()

    def __str__(self) -> str:
        """The same without colours; ``report(verbose=True)`` has everything."""
        return str(self.report())

    def to_frame(self) -> DataFrame:
        """What the result lists, such as optimizers, records, runs or checks, a row for each, for pandas.

        Nested numbers are columns with dots in their names, such as ``zo.horizon.lower``. A result without a list is
        one row.

        Raises:
            UsageError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise UsageError("to_frame needs pandas, which is not installed: pip install pandas") from None
        document = self.to_dict()
        found = next((document[key] for key in LISTED if key in document), [document])
        if isinstance(found, Mapping):
            found = [{"name": name, **entry} for name, entry in found.items()]
        return pandas.json_normalize(found)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """The same for a notebook."""
        return self.report()._repr_mimebundle_()


@dataclass(frozen=True)
class ProblemInfo(JsonObject):
    """Where the curvature was measured.

    Args:
        num_params: Number of trained parameters ``d``.
        num_examples: Examples in the batches; 1 for a problem that is a function.
        loss: Mean loss.
        grad_norm: ``‖g‖``, loss/param.
    """

    num_params: int
    num_examples: int
    loss: float
    grad_norm: float


class Header(TypedDict):
    """The fields of a `MeasuredResult`."""

    spec: str | None
    device: str
    dtype: str
    seed: int
    problem: ProblemInfo
    num_hvps: int
    seconds: float
    warnings: tuple[Notice, ...]


@dataclass(frozen=True, kw_only=True)
class MeasuredResult(RichResult):
    """The part that results of a measurement share.

    Args:
        spec: What was measured, as the header shows it; ``None`` for a problem without a name.
        device: Device of the measurement.
        dtype: Floating-point type of the measurement.
        seed: Seed of every random number.
        problem: Size of the problem, loss and gradient norm.
        num_hvps: Hessian-vector products spent in all.
        seconds: Wall-clock time of everything.
        warnings: What to know before trusting a number.
        version: Version of zoscope.
    """

    schema: ClassVar[str]

    spec: str | None
    device: str
    dtype: str
    seed: int
    problem: ProblemInfo
    num_hvps: int
    seconds: float
    warnings: tuple[Notice, ...] = ()
    version: str = __version__

    def to_dict(self) -> dict[str, Any]:
        """The document: JSON numbers, strings and null only."""
        header = pick(self, "schema zoscope=version spec device dtype seed num_hvps seconds problem")
        return header | self.body() | pick(self, "warnings")

    def body(self) -> dict[str, Any]:
        """What only this kind of result has."""
        return pick(self, self.keys)
