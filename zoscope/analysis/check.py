"""``zoscope.check``: is the configured step size inside the stable range?"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoscope.analysis.checking.baseline import Baseline, compare, load_baseline
from zoscope.analysis.checking.cache import Cache
from zoscope.analysis.checking.gate import decide
from zoscope.analysis.checking.measure import Failure, Workbench
from zoscope.analysis.checking.probing import with_probe
from zoscope.analysis.checking.results import CheckReport, CheckResult
from zoscope.analysis.checking.thresholds import Measurement
from zoscope.config.hf_args import load_hf_args
from zoscope.config.load import (
    COMMAND_LINE,
    EMPTY,
    PYPROJECT_NAME,
    YAML_NAME,
    Document,
    build_checks,
    find_config,
    load_document,
    override_tree,
    shown_path,
)
from zoscope.config.located import Located
from zoscope.config.model import CheckConfig
from zoscope.errors import UsageError

if TYPE_CHECKING:
    from zoscope.problem import Problem

MAX_DROP = 0.2


def check(
    target: Problem | str | Path | None = None,
    *,
    only: Sequence[str] = (),
    hf_args: str | Path | None = None,
    baseline: str | Path | None = None,
    max_drop: float = MAX_DROP,
    cache: str | Path | None = None,
    on_progress: Callable[..., None] | None = None,
    on_check: Callable[[CheckResult], None] | None = None,
    **options: Any,
) -> CheckReport:
    """Hold configured step sizes against the thresholds of their problems.

    A check passes when ``lr <= margin * low`` and fails when ``lr > high``, with ``[low, high]`` the 95 % interval of
    what ``bounds`` goes by too: the threshold that its policy names, in doubt with η*(300) of all eigenvalues. Between
    the two it warns. Every check runs even when an earlier one errors.

    Args:
        target: A configuration file, or a problem to check one optimizer of. Left out: the file of the working folder,
            unless ``spec`` is among the options.
        only: Names of the checks to run; all when empty.
        hf_args: Training arguments in the style of Hugging Face, JSON or YAML, that override the configuration.
        baseline: An earlier document ``zoscope.check/1``; a threshold that fell by more than ``max_drop`` fails.
        max_drop: Largest fall allowed, in (0, 1).
        cache: Folder in which measurements are kept.
        on_progress: Called by the measurement as ``on_progress(stage, num_hvps, precision)``.
        on_check: Called with each result as it comes.
        **options: The options of the command line, which override everything: ``spec``, ``settings``, ``checkpoint``,
            ``params``, ``optimizer``, ``lr``, ``steps``, ``beta``, ``betas``, ``eps``, ``directions``, ``queries``,
            ``mu``, ``batch_size``, ``rtol``, ``max_hvps``, ``curvature``, ``method``, ``hvp``, ``device``, ``dtype``,
            ``seed``, ``preconditioner``, ``micro_batch``, ``max_memory``, ``strict``, ``threshold``, ``margin``,
            ``on_warn`` and ``probe``.

    Returns:
        One result per check; ``.exit_code`` is what the command line would exit with.

    Raises:
        UsageError: If the configuration, an option or the baseline cannot be used. A spec that cannot be loaded and a
            measurement that fails are results of status ``error`` instead.
    """
    start = time.perf_counter()
    if not 0 < max_drop < 1:
        raise UsageError(f"--max-drop must be a fraction between 0 and 1 (20% or 0.2), got {max_drop:g}.")
    problem = None if target is None or isinstance(target, str | Path) else target
    document = _document(None if problem is not None else target, options)
    checks = _checks(document, only, hf_args, options, problem=problem)
    earlier = None if baseline is None else load_baseline(Path(baseline))
    bench = Workbench(problem, None if cache is None else Cache.open(Path(cache)), on_progress)
    results = []
    for config in checks:
        result = _run(config, checks, bench, earlier, max_drop)
        if on_check is not None:
            on_check(result)
        results.append(result)
    config_file = None if document.file is None else shown_path(document.file)
    return CheckReport(tuple(results), config=config_file, seconds=time.perf_counter() - start)


def _document(target: str | Path | Problem | None, options: dict[str, Any]) -> Document:
    """The file that is named, else the one of the working folder unless a spec is named, else none."""
    if isinstance(target, str | Path):
        path = Path(target)
        if path.is_dir():
            found = find_config(path)
            if found is None:
                raise UsageError(f"CONFIG: the folder {path} has no {YAML_NAME} and no {PYPROJECT_NAME} for zoscope.")
            path = found
        return load_document(path)
    if options.get("spec") is None and target is None:
        found = find_config(Path.cwd())
        if found is not None:
            return load_document(found)
    return EMPTY


def _checks(
    document: Document,
    only: Sequence[str],
    hf_args: str | Path | None,
    options: dict[str, Any],
    *,
    problem: Problem | None,
) -> tuple[CheckConfig, ...]:
    overrides: list[tuple[str, Located]] = []
    notices: tuple[str, ...] = ()
    if hf_args is not None:
        arguments = load_hf_args(Path(hf_args))
        overrides.append((shown_path(Path(hf_args)), arguments.tree))
        notices = arguments.notices
    overrides.append((COMMAND_LINE, override_tree(options)))
    return build_checks(document, overrides=overrides, only=only, needs_spec=problem is None, notices=notices)


def _run(
    config: CheckConfig, checks: Sequence[CheckConfig], bench: Workbench, earlier: Baseline | None, max_drop: float
) -> CheckResult:
    measurement = bench.measure(config, checks)
    if isinstance(measurement, Failure):
        return _failed(config, measurement)
    try:
        result = _judged(config, measurement)
        if config.policy.probe:
            result = with_probe(result, config, bench)
    except Exception as error:
        return _failed(config, Failure.of(error))
    if earlier is not None:
        result = compare(result, earlier, max_drop=max_drop, on_warn=config.policy.on_warn)
    return result


def _judged(config: CheckConfig, measurement: Measurement) -> CheckResult:
    optimizer, policy = config.optimizer, config.policy
    held = measurement.optimizers[optimizer.rule].choose(
        policy.threshold,
        zeroth_order=optimizer.zeroth_order,
        steps=config.steps,
        curvature=config.curvature.kind,
    )
    decision = decide(
        optimizer.lr,
        held.limit,
        margin=policy.margin,
        on_warn=policy.on_warn,
        steps=config.steps,
        doubts=held.doubts,
    )
    return CheckResult(
        **_identity(config),
        status=decision.status,
        message=decision.message,
        exit_code=1 if decision.status == "fail" else 0,
        threshold=held.limit,
        doubts=held.doubts,
        largest_lr=decision.largest_lr,
        notices=(*config.notices, *_own_notices(config, measurement), *measurement.notices),
        seconds=measurement.seconds,
        cached=measurement.cached,
    )


def _failed(config: CheckConfig, failure: Failure) -> CheckResult:
    where = config.where
    return CheckResult(
        **{**_identity(config), "line": None if where is None else where.start},  # the fault lies with more than its lr
        status="error",
        message=failure.message,
        exit_code=failure.exit_code,
        notices=config.notices,
        details=failure.details,
    )


def _identity(config: CheckConfig) -> dict[str, Any]:
    where = config.where
    return {
        "name": config.name,
        "spec": config.shown_spec,
        "optimizer": config.optimizer.name,
        "lr": config.optimizer.lr,
        "settings": _settings(config),
        "file": None if where is None else shown_path(where.file),
        "line": None if where is None else where.line,
    }


def _settings(config: CheckConfig) -> dict[str, Any]:
    """What a threshold depends on besides the problem; equal settings make thresholds comparable."""
    optimizer = config.optimizer
    constants: dict[str, dict[str, Any]] = {
        "gd": {},
        "gdm": {"beta": optimizer.beta},
        "adam": {"betas": list(optimizer.betas), "eps": optimizer.eps},
    }
    settings: dict[str, Any] = {**constants[optimizer.rule], "curvature": config.curvature.kind}
    if optimizer.zeroth_order:
        estimator = config.estimator
        settings |= {"threshold": config.policy.threshold, "steps": config.steps}
        settings |= {"directions": estimator.directions, "queries": estimator.queries}
    return settings


def _own_notices(config: CheckConfig, measurement: Measurement) -> list[str]:
    notices = []
    if described := config.optimizer.schedule.describe():
        notices.append(f"lr is the {described}.")
    size, examples = config.estimator.batch_size, measurement.num_examples
    if size is not None and size < examples and measurement.optimizers[config.optimizer.rule].minibatch:
        notices.append(f"The threshold is that of mini-batches of {size} of {examples} examples.")
        held = measurement.optimizers[config.optimizer.rule].zeroth_order[config.steps].get("descent")
        if held is not None and held.limit.name == "descent" and config.optimizer.lr > held.limit.high:
            notices.append(
                f"Above {held.limit.value:.3g} the noise of such mini-batches raises the expected loss, to a floor "
                "or out of the valley. Larger batches or a smaller lr lower it."
            )
    elif size is not None and size < examples:
        notices.append(
            f"Training uses mini-batches of {size} of {examples} examples. The threshold is that of the full batch; "
            f"that of mini-batches can be as low as {size / examples:.2g} times it."
        )
    return notices
