"""A record as the flat numbers that loggers take."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoscope.analysis.tracking.record import Record

LOGGED = {
    "loss": "loss",
    "lr": "lr",
    "trace": "trace",
    "lambda_max": "lambda_max",
    "lower": "lower",
    "upper": "upper",
    "threshold": "threshold",
    "exact": "exact",
    "ratio": "ratio",
}
"""Fields of a record and the names that they are logged under, after ``zoscope/``."""


def log_values(record: Record) -> dict[str, float]:
    """What is known, by name; what is not is left out."""
    values = {name: getattr(record, field) for field, name in LOGGED.items()}
    return {f"zoscope/{name}": float(value) for name, value in values.items() if value is not None}
