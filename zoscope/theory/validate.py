"""Argument checks that the theory functions share."""

import math
from numbers import Integral, Real


def require_finite(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite number."""
    if not _is_finite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")


def require_positive(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` is finite and greater than zero."""
    if not (_is_finite(value) and value > 0):
        raise ValueError(f"{name} must be finite and > 0, got {value!r}")


def require_non_negative(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` is finite and at least zero."""
    if not (_is_finite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}")


def require_count(name: str, value: int, *, least: int = 1) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
