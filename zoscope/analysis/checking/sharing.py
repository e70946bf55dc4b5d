"""Which checks one call of ``bounds`` serves: those on one problem, measured in one way, whatever their optimizers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zoscope.config.model import CheckConfig
from zoscope.theory.rules import OPTIMIZERS

Constants = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Batch:
    """Checks that share a measurement; two of one update rule agree in its constants.

    Args:
        configs: The checks, at least one.
    """

    configs: tuple[CheckConfig, ...]

    @property
    def steps(self) -> tuple[int, ...]:
        """The horizons wanted."""
        return tuple(sorted({config.steps for config in self._zeroth_order or self.configs}))

    def of_rule(self, rule: str) -> Batch:
        """The checks of one update rule among these."""
        return Batch(tuple(config for config in self.configs if config.optimizer.rule == rule))

    @property
    def _zeroth_order(self) -> tuple[CheckConfig, ...]:
        return tuple(config for config in self.configs if config.optimizer.zeroth_order)

    @property
    def key(self) -> str:
        """Equal for equal measurements of the same problem."""
        return problem_key(self.configs[0]) + json.dumps([self.options(), self.steps], sort_keys=True)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``bounds``.

        The measurement is steered by the longest horizon, which takes the most precision, and by the infinite-time
        threshold where a policy asks for it.
        """
        rules = {config.optimizer.rule for config in self.configs}
        options = {**_measuring(self.configs[0]), "steps": self.steps[-1]}
        for config in self.configs:
            options |= dict(_constants(config))
        exact = any(config.policy.threshold == "exact" for config in self._zeroth_order)
        options["optimizers"] = tuple(rule for rule in OPTIMIZERS if rule in rules)
        options["threshold"] = "exact" if exact else "binding"
        return options


def batch_of(config: CheckConfig, configs: Sequence[CheckConfig]) -> Batch:
    """The batch of a check among others."""
    peers = [other for other in configs if _key(other) == _key(config)]
    place = _place(config, peers)
    return Batch(tuple(other for other in peers if _place(other, peers) == place))


def _place(config: CheckConfig, peers: Sequence[CheckConfig]) -> int:
    """Index of the constants of a check among the different ones of its rule: one batch holds one set of each rule."""
    seen: list[Constants] = []
    for other in peers:
        if other.optimizer.rule == config.optimizer.rule and _constants(other) not in seen:
            seen.append(_constants(other))
    return seen.index(_constants(config))


def _constants(config: CheckConfig) -> Constants:
    """What a measurement has to know of the update rule."""
    optimizer = config.optimizer
    if optimizer.rule == "gdm":
        return (("beta", optimizer.beta),)
    if optimizer.rule == "adam":
        preconditioner = config.curvature.preconditioner
        return (("betas", optimizer.betas), ("eps", optimizer.eps), ("preconditioner", preconditioner))
    return ()


def _measuring(config: CheckConfig) -> dict[str, Any]:
    curvature = config.curvature
    return {
        "directions": config.estimator.directions,
        "queries": config.estimator.queries,
        "rtol": curvature.rtol,
        "max_hvps": curvature.max_hvps,
        "curvature": curvature.kind,
        "method": curvature.method,
        "hvp": curvature.hvp,
        "device": curvature.device,
        "dtype": curvature.dtype,
        "seed": curvature.seed,
        "micro_batch": curvature.micro_batch,
        "max_memory": curvature.max_memory,
        "strict": curvature.strict,
        "batch_size": batch_size_of(config),
    }


def batch_size_of(config: CheckConfig) -> int | None:
    """Examples per step, where the threshold depends on it.

    A first-order optimizer is held against the threshold of all examples.
    """
    return config.estimator.batch_size if config.optimizer.zeroth_order else None


def problem_key(config: CheckConfig) -> str:
    """Equal for checks on the same problem."""
    parts = (config.spec, dict(config.settings), str(config.checkpoint), config.params)
    return json.dumps(parts, sort_keys=True, default=repr)


def _key(config: CheckConfig) -> str:
    # What forward passes know of mini-batches is for one number of steps: there is no spectrum to ask again.
    steps = config.steps if config.curvature.kind == "forward" and batch_size_of(config) is not None else None
    return problem_key(config) + json.dumps([_measuring(config), steps], sort_keys=True)
