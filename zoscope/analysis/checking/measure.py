"""Measurements for a set of checks: each problem loads once, each measurement is made once or read from a cache."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from zoscope.analysis.checking.cache import Cache
from zoscope.analysis.checking.sharing import Batch, batch_of, problem_key
from zoscope.analysis.checking.thresholds import Measurement
from zoscope.config.model import CheckConfig
from zoscope.errors import NumericalError, SpecError, ZoscopeError

if TYPE_CHECKING:
    from pathlib import Path

    from zoscope.problem import Problem

Progress = Callable[..., None]


@dataclass(frozen=True)
class Failure:
    """Why a check could not be done.

    Args:
        message: One paragraph.
        exit_code: 2 for a mistake of the user, 3 for a failed measurement.
        details: Traceback lines worth showing.
    """

    message: str
    exit_code: int
    details: str = ""

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """What an exception means for one check; the others go on."""
        if isinstance(error, ZoscopeError):
            details = error.frame if isinstance(error, SpecError) else ""
            return cls(" ".join(str(error).split()), error.exit_code, details)
        if _is_out_of_memory(error):
            return cls(
                "out of memory while measuring. Lower curvature.micro_batch, put fewer batches in the spec, or select "
                "fewer parameters with params.",
                NumericalError.exit_code,
            )
        reason = (str(error).splitlines() or [""])[0]
        message = f"{type(error).__name__} inside zoscope ({reason}): this is a bug in zoscope, please report it."
        return cls(message, NumericalError.exit_code, "".join(traceback.format_exception(error)))


def _is_out_of_memory(error: Exception) -> bool:
    from zoscope.runtime import is_out_of_memory

    return isinstance(error, MemoryError) or is_out_of_memory(error)


@dataclass
class Workbench:
    """Loads problems and measures them for the checks of one run.

    Args:
        problem: Use this problem for every check instead of loading specs.
        cache: Where measurements are kept between runs.
        on_progress: Called by the measurement.
    """

    problem: Problem | None = None
    cache: Cache | None = None
    on_progress: Progress | None = None
    _problems: dict[str, LoadedProblem | Failure] = field(default_factory=dict)
    _measured: dict[str, Measurement | Failure] = field(default_factory=dict)

    def measure(self, config: CheckConfig, configs: Sequence[CheckConfig]) -> Measurement | Failure:
        """The thresholds for a check, from one measurement for all of ``configs`` that can share it."""
        batch = batch_of(config, configs)
        found = self._once(batch)
        if isinstance(found, Failure) and isinstance(self.load(config), LoadedProblem):
            return self._once(batch.of_rule(config.optimizer.rule))  # what failed may concern another optimizer only
        return found

    def _once(self, batch: Batch) -> Measurement | Failure:
        key = batch.key
        if key not in self._measured:
            self._measured[key] = self._attempt(batch)
        return self._measured[key]

    def load(self, config: CheckConfig) -> LoadedProblem | Failure:
        """The problem of a check."""
        key = problem_key(config)
        if key not in self._problems:
            try:
                self._problems[key] = self._load(config)
            except Exception as error:
                self._problems[key] = Failure.of(error)
        return self._problems[key]

    def _load(self, config: CheckConfig) -> LoadedProblem:
        if self.problem is not None:
            problem = self.problem if config.params is None else self.problem.with_params(config.params)
            return LoadedProblem(problem, None)
        from zoscope.spec import load_spec

        assert config.spec is not None
        loaded = load_spec(config.spec, settings=config.settings, params=config.params, checkpoint=config.checkpoint)
        return LoadedProblem(loaded.problem, loaded.source)

    def _attempt(self, batch: Batch) -> Measurement | Failure:
        loaded = self.load(batch.configs[0])
        if isinstance(loaded, Failure):
            return loaded
        try:
            return self._cached(loaded, batch)
        except Exception as error:
            return Failure.of(error)

    def _cached(self, loaded: LoadedProblem, batch: Batch) -> Measurement:
        key = self._key(loaded, {**batch.options(), "horizons": batch.steps})
        kept = self._kept(key)
        if kept is not None:
            return kept
        measurement = self._bounds(loaded, batch)
        if isinstance(key, str) and self.cache is not None:
            self.cache.put(key, measurement.to_dict())
        if isinstance(key, Uncached):
            return replace(measurement, notices=(*measurement.notices, f"Not cached: {key.reason}."))
        return measurement

    def _kept(self, key: str | Uncached | None) -> Measurement | None:
        entry = self.cache.get(key) if self.cache is not None and isinstance(key, str) else None
        try:
            return None if entry is None else Measurement.from_dict(entry)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None  # damaged

    def _key(self, loaded: LoadedProblem, options: Mapping[str, Any]) -> str | Uncached | None:
        """Where the cache keeps a result, or why it cannot; ``None`` without a cache."""
        if self.cache is None:
            return None
        from zoscope.analysis.checking.fingerprint import UncacheableError

        try:
            return self.cache.key(loaded.fingerprint(), {**options, "hardware": _hardware(options)})
        except UncacheableError as reason:
            return Uncached(str(reason))

    def recall(
        self,
        config: CheckConfig,
        options: Mapping[str, Any],
        work: Callable[[Problem, Mapping[str, Any]], dict[str, Any]],
    ) -> dict[str, Any]:
        """A JSON object that depends on the problem of a check and on options: from the cache, or from ``work``."""
        loaded = self.load(config)
        assert isinstance(loaded, LoadedProblem)
        key = self._key(loaded, {**options, "work": work.__qualname__})
        if self.cache is None or not isinstance(key, str):
            return work(loaded.problem, options)
        kept = self.cache.get(key)
        if kept is None:
            kept = work(loaded.problem, options)
            self.cache.put(key, kept)
        return kept

    def _bounds(self, loaded: LoadedProblem, batch: Batch) -> Measurement:
        from zoscope.analysis.bounds import bounds

        start = time.perf_counter()
        result = bounds(loaded.problem, on_progress=self.on_progress, **batch.options())
        return Measurement.of(result, steps=batch.steps, seconds=time.perf_counter() - start)


@dataclass(frozen=True)
class Uncached:
    """Why something cannot be kept in a cache."""

    reason: str


def _hardware(options: Mapping[str, Any]) -> str:
    """Which hardware ``auto`` means here: a cache may be shared by machines."""
    import torch

    if options["device"] == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return torch.cuda.get_device_name()


@dataclass
class LoadedProblem:
    """A problem and the file that it came from; its fingerprint is computed once."""

    problem: Problem
    source: Path | None
    _fingerprint: str | None = None

    def fingerprint(self) -> str:
        """Hash of everything in the problem that a measurement depends on."""
        from zoscope.analysis.checking.fingerprint import problem_fingerprint

        if self._fingerprint is None:
            self._fingerprint = problem_fingerprint(self.problem, source=self.source)
        return self._fingerprint
