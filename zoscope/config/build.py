"""One check from its layers of values."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoscope.config.keys import CHECK
from zoscope.config.located import InvalidError, Issue
from zoscope.config.model import (
    CheckConfig,
    CurvatureConfig,
    EstimatorConfig,
    OptimizerConfig,
    PolicyConfig,
    Where,
)
from zoscope.config.schedule import Schedule
from zoscope.config.sections import OneOf, Section


@dataclass(frozen=True)
class Layers:
    """What one check is made of.

    Args:
        own: The check's own entry; empty for one that comes from options alone.
        values: Layers of values, later ones win.
        problem: Spec of a check that names none.
        folder: What relative paths are relative to.
        file: The file of the check.
        line: The line of its ``lr``, else its own.
        start: Its own line.
    """

    own: Mapping[str, Any]
    values: tuple[Mapping[str, Any], ...]
    problem: str | None
    folder: Path
    file: Path | None
    line: int | None
    start: int | None


def build_check(layers: Layers, *, needs_spec: bool = True) -> CheckConfig:
    """The check with every default filled in.

    Raises:
        InvalidError: If a value that has no default is missing, or two values contradict each other.
    """
    merged: dict[str, Any] = _defaults(CHECK)
    for values in layers.values:
        merged = _merge(merged, values)
    spec = merged["spec"] or layers.problem
    issues = _missing(merged, layers, spec=spec if needs_spec else "given")
    if issues:
        raise InvalidError(issues)
    optimizer = _optimizer(merged["optimizer"])
    checkpoint = merged["checkpoint"]
    return CheckConfig(
        name=merged["name"] or optimizer.name,
        spec=None if spec is None else absolute_spec(spec, layers.folder),
        shown_spec="problem" if spec is None else shown_spec(spec, layers.folder),
        settings=merged["set"] or {},
        checkpoint=None if checkpoint is None else Path(os.path.normpath(layers.folder / checkpoint)),
        params=merged["params"],
        optimizer=optimizer,
        steps=merged["steps"],
        estimator=EstimatorConfig(**merged["estimator"]),
        curvature=CurvatureConfig(**_absolute_state(merged["curvature"], layers.folder)),
        policy=PolicyConfig(**merged["policy"]),
        where=None if layers.file is None else Where(layers.file, layers.line, layers.start),
    )


def _defaults(section: Section) -> dict[str, Any]:
    return {
        key.name: _defaults(key.kind) if isinstance(key.kind, Section) else key.default
        for key in section.keys
        if not isinstance(key.kind, OneOf)
    }


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Sections and ``set`` merge key by key; everything else is replaced."""
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping) and name != "lr"
        merged[name] = _merge(merged[name], value) if both else value
    return merged


def _missing(merged: Mapping[str, Any], layers: Layers, *, spec: str | None) -> list[Issue]:
    optimizer = merged["optimizer"]
    name = f"the check {layers.own['name']!r}" if layers.own else "the check"
    wanted = {
        "optimizer.name": (optimizer["name"], "--optimizer"),
        "optimizer.lr": (optimizer.get("lr"), "--lr"),
        "spec": (spec, "--spec"),
    }
    place = "give it here, in defaults, or with" if layers.own else "name a file that lists checks, or give"
    issues = [
        Issue(layers.line, f"{name} has no {key}; {place} {option}.")
        for key, (value, option) in wanted.items()
        if value is None
    ]
    if not issues:
        schedule, steps = _schedule(optimizer["lr"]), merged["steps"]
        if schedule.warmup_steps(steps) >= steps and schedule.warmup:
            message = (
                f"a warm-up of {schedule.warmup:g} never reaches its peak in {steps} steps; shorten it or raise steps."
            )
            issues.append(Issue(layers.line, f"{name}: {message}"))
    return issues


def _optimizer(values: Mapping[str, Any]) -> OptimizerConfig:
    first, second = values["betas"]
    return OptimizerConfig(
        name=values["name"],
        schedule=_schedule(values["lr"]),
        beta=values["beta"],
        betas=(first, second),
        eps=values["eps"],
    )


def _schedule(lr: float | Mapping[str, Any]) -> Schedule:
    if isinstance(lr, Mapping):
        return Schedule(lr["schedule"], lr["peak"], lr.get("warmup", 0.0))
    return Schedule("constant", lr)


def absolute_spec(spec: str, folder: Path) -> str:
    """A spec that names a file, with the path made absolute; one that names a module as it is."""
    found = re.fullmatch(r"(.*\.py)(:[^:/\\]*)?", spec)
    return spec if found is None else os.path.normpath(folder / found[1]) + (found[2] or "")


def shown_spec(spec: str, folder: Path) -> str:
    """A spec as the user knows it: its path relative to the working folder where it lies below."""
    absolute = absolute_spec(spec, folder)
    return Path(absolute).relative_to(Path.cwd()).as_posix() if _below(absolute, Path.cwd()) else absolute


def _below(path: str, folder: Path) -> bool:
    return Path(path).is_absolute() and Path(path).is_relative_to(folder)


def _absolute_state(curvature: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    kind, _, file = curvature["preconditioner"].partition(":")
    return {**curvature, "preconditioner": f"{kind}:{folder / file}" if file else kind}
