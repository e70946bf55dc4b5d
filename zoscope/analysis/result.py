"""What every result of a measurement has: of what it is, at which cost, and how it shows itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from zoscope._version import __version__
from zoscope.analysis.thresholds import number

if TYPE_CHECKING:
    from rich.console import RenderableType

    from zoscope.problem import Notice


class RichResult(ABC):
    """A result with tables of its own. The report is imported late: results know nothing of how they are shown."""

    @abstractmethod
    def __rich__(self) -> RenderableType:
        """Tables for the terminal."""

    def __str__(self) -> str:
        """The same without colours."""
        from zoscope.report.style import to_text

        return to_text(self.__rich__()).rstrip()

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """The same for a notebook."""
        from zoscope.report.style import to_html

        return {"text/html": to_html(self.__rich__()), "text/plain": str(self)}


@dataclass(frozen=True)
class ProblemInfo:
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

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "num_params": self.num_params,
            "num_examples": self.num_examples,
            "loss": number(self.loss),
            "grad_norm": number(self.grad_norm),
        }


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

    spec: str | None
    device: str
    dtype: str
    seed: int
    problem: ProblemInfo
    num_hvps: int
    seconds: float
    warnings: tuple[Notice, ...] = ()
    version: str = __version__

    def document(self, schema: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON document: what all have, the fields of this kind of result, and the warnings."""
        return {
            "schema": schema,
            "zoscope": self.version,
            "spec": self.spec,
            "device": self.device,
            "dtype": self.dtype,
            "seed": self.seed,
            "num_hvps": self.num_hvps,
            "seconds": number(self.seconds),
            "problem": self.problem.to_dict(),
            **fields,
            "warnings": [asdict(notice) for notice in self.warnings],
        }
