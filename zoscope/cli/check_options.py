"""Options of ``zoscope check``. All default to "not given": what is not said here is left to the configuration."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from zoscope.cli import validate
from zoscope.cli.options import CURVATURES, DIRECTIONS, DTYPES, HVPS, METHODS, OPTIMIZERS, THRESHOLDS

ON_WARN = ("pass", "fail")


def _option(*names: str, panel: str, help: str, metavar: str | None = None) -> Any:
    return Option(*names, help=help, metavar=metavar, rich_help_panel=panel, show_default=False)


@dataclass(frozen=True)
class OverrideOptions:
    """What overrides every check of the configuration, or makes up one check without a file."""

    spec: Annotated[
        str | None, _option("--spec", metavar="SPEC", panel="Check", help="Check this spec, without a file.")
    ] = None
    settings: Annotated[
        list[str] | None,
        _option("--set", metavar="KEY=VALUE", panel="Check", help="Argument for the spec's callable; repeatable."),
    ] = None
    checkpoint: Annotated[
        Path | None, _option("--checkpoint", metavar="FILE", panel="Check", help="Weights to load first.")
    ] = None
    params: Annotated[
        str | None, _option("--params", metavar="REGEX", panel="Check", help="Only parameters whose name matches.")
    ] = None
    optimizer: Annotated[
        str | None, _option("--optimizer", metavar=" | ".join(OPTIMIZERS), panel="Check", help="Optimizer.")
    ] = None
    lr: Annotated[float | None, _option("--lr", metavar="LR", panel="Check", help="Step size to check.")] = None
    steps: Annotated[
        int | None, _option("--steps", metavar="N", panel="Check", help="Training steps planned: the horizon.")
    ] = None
    beta: Annotated[float | None, _option("--beta", panel="Check", help="Momentum of GDM.")] = None
    betas: Annotated[str | None, _option("--betas", metavar="B1,B2", panel="Check", help="Adam's coefficients.")] = None
    eps: Annotated[float | None, _option("--eps", panel="Check", help="ε of Adam.")] = None
    preconditioner: Annotated[
        str | None,
        _option("--preconditioner", metavar="expected|state:FILE", panel="Check", help="Adam's preconditioner."),
    ] = None
    directions: Annotated[
        str | None,
        _option("--directions", metavar=" | ".join(DIRECTIONS), panel="Check", help="Law of the directions."),
    ] = None
    queries: Annotated[
        int | None, _option("--queries", metavar="Q", panel="Check", help="Two-point queries averaged per step.")
    ] = None
    mu: Annotated[float | None, _option("--mu", panel="Check", help="Perturbation scale of the estimate.")] = None
    batch_size: Annotated[
        int | None, _option("--batch-size", metavar="B", panel="Check", help="Examples per step of training.")
    ] = None
    threshold: Annotated[
        str | None,
        _option("--threshold", metavar=" | ".join(THRESHOLDS), panel="Policy", help="Threshold of zo- optimizers."),
    ] = None
    margin: Annotated[
        float | None,
        _option("--margin", panel="Policy", help="Pass when lr <= margin × lower end of the 95 % interval (0.8)."),
    ] = None
    on_warn: Annotated[
        str | None,
        _option("--on-warn", metavar=" | ".join(ON_WARN), panel="Policy", help="What an lr in between does."),
    ] = None
    probe: Annotated[
        bool | None, Option("--probe/--no-probe", help="Add a short training probe.", rich_help_panel="Policy")
    ] = None
    rtol: Annotated[float | None, _option("--rtol", panel="Measurement", help="Relative 95 % half-width wanted.")] = (
        None
    )
    max_hvps: Annotated[
        int | None, _option("--max-hvps", panel="Measurement", help="Most Hessian-vector products per operator.")
    ] = None
    curvature: Annotated[
        str | None, _option("--curvature", metavar=" | ".join(CURVATURES), panel="Measurement", help="Which matrix.")
    ] = None
    method: Annotated[
        str | None, _option("--method", metavar=" | ".join(METHODS), panel="Measurement", help="How it is measured.")
    ] = None
    hvp: Annotated[
        str | None, _option("--hvp", metavar=" | ".join(HVPS), panel="Measurement", help="How products are computed.")
    ] = None
    device: Annotated[
        str | None, _option("--device", metavar="auto|cpu|cuda[:i]", panel="Measurement", help="Where to compute.")
    ] = None
    dtype: Annotated[
        str | None, _option("--dtype", metavar=" | ".join(DTYPES), panel="Measurement", help="Floating-point type.")
    ] = None
    seed: Annotated[int | None, _option("--seed", panel="Measurement", help="Seed of the probe vectors.")] = None
    micro_batch: Annotated[
        int | None, _option("--micro-batch", metavar="N", panel="Measurement", help="Examples per forward pass.")
    ] = None
    max_memory: Annotated[
        str | None,
        _option(
            "--max-memory", metavar="SIZE", panel="Measurement", help="Most memory that this process may hold, as 2GB."
        ),
    ] = None
    strict: Annotated[
        bool | None,
        Option("--strict/--no-strict", help="Error when --rtol is not reached.", rich_help_panel="Measurement"),
    ] = None

    def given(self) -> dict[str, Any]:
        """Options that were given, as keyword arguments of ``zoscope.check``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {name: value for name, value in values.items() if value is not None}
        if self.betas is not None:
            given["betas"] = validate.pair("--betas", self.betas)
        if self.max_memory is not None:
            given["max_memory"] = validate.size("--max-memory", self.max_memory)
        if self.settings is not None:
            from zoscope.spec import parse_settings

            given["settings"] = parse_settings(self.settings)
        return given
