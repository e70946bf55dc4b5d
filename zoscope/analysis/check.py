"""The gate: is a step size inside the stable range, and which is the largest that would be?"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_DOWN, Context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from zoscope.analysis.advice import DOUBTS, GATE, JUMPS, SHORT, Limit, joined, passing, stand
from zoscope.analysis.check_results import BaselineComparison, CheckReport, CheckResult, CheckStatus
from zoscope.analysis.check_runner import Cache, CheckMeasurement, CheckRunner, Failure, Held
from zoscope.config.load import (
    COMMAND_LINE,
    EMPTY,
    PYPROJECT_NAME,
    YAML_NAME,
    CheckConfig,
    Document,
    build_checks,
    find_config,
    load_document,
    override_tree,
    shown_path,
)
from zoscope.config.sources import Node
from zoscope.config.training import load_hf_args
from zoscope.errors import UsageError
from zoscope.files import parse_json, read_bytes, reason
from zoscope.options import CheckOptions, refuse_unknown
from zoscope.problem import Notice
from zoscope.registry import OPTIMIZERS

if TYPE_CHECKING:
    from zoscope.problem import Problem

PLAN = "plan"
"""The policy that looks ahead over the planned steps."""

PHRASES = {
    "fo": "first-order threshold",
    "exact": "infinite-time threshold",
    "horizon": "horizon threshold",
    "descent": "descent threshold",
    "forward": "threshold from forward passes",
    "short-horizon": "threshold of all eigenvalues",
    PLAN: "step size at which half of the planned runs diverge",
}


@dataclass(frozen=True)
class Decision:
    """What the gate says.

    Args:
        status: ``pass``, ``warn`` or ``fail``.
        message: One paragraph, with the largest step size that passes.
        largest_lr: That step size; ``None`` when every one passes, or none does.
    """

    status: CheckStatus
    message: str
    largest_lr: float | None


def decide(
    lr: float, limit: Limit, *, margin: float = GATE, on_warn: str, steps: int, doubts: Sequence[str] = ()
) -> Decision:
    """Hold a step size against the 95 % interval of a limit.

    Pass: ``lr <= margin * low``, less where the gradient is not small. Fail: ``lr > high``. Between them, and where
    nothing is known: warn, which ``on_warn="fail"`` turns into a fail.

    Args:
        lr: Step size, param²/loss.
        limit: The limit.
        margin: In (0, 1].
        on_warn: ``pass`` or ``fail``.
        steps: Planned steps, for the message.
        doubts: Why the threshold is provisional.
    """
    share = passing(margin, doubts)
    largest = round_down(share * limit.low)
    if JUMPS in doubts:
        message = f"{DOUBTS[JUMPS]}, so that no curvature says whether lr {lr:g} is stable."
        return (
            Decision("warn", message, None)
            if on_warn != "fail"
            else Decision("fail", f"{message} (on_warn: fail)", None)
        )
    what = f"{PHRASES[limit.name]} {_interval(limit)}"
    if limit.name in ("horizon", "short-horizon", PLAN):
        what += f" for {min(steps, SHORT) if limit.name == 'short-horizon' else steps} steps"
    if math.isinf(limit.low):
        return Decision("pass", f"no positive curvature limits the step size: every lr is below the {what}.", None)
    advice = f"The largest lr that passes is {largest:g}." if largest else "No lr passes: the lower end is 0."
    if doubts:
        advice += f" That is provisional: {joined([DOUBTS[code] for code in doubts])}. zoscope plan looks ahead."
    outlook = stand(lr, limit, margin=margin, doubts=doubts)
    if outlook == "stable":
        return Decision("pass", f"lr {lr:g} is {limit.ratio(lr):.2g} times the {what}. {advice}", largest)
    if outlook == "unstable":
        expected = "unstable where the curvature was measured" if doubts else "training is expected to become unstable"
        message = f"lr {lr:g} is above the {what}: {expected}. {advice}"
        return Decision("fail", message, largest)
    message = f"lr {lr:g} is above {share:.2g} of the lower end of the {what}, but not above its upper end. {advice}"
    if on_warn == "fail":
        return Decision("fail", f"{message} (on_warn: fail)", largest)
    return Decision("warn", message, largest)


def round_down(value: float) -> float | None:
    """The value rounded down to two significant digits; ``None`` for 0 and for infinity."""
    if not math.isfinite(value) or value <= 0:
        return None
    return float(Context(prec=2, rounding=ROUND_DOWN).create_decimal(value))


def _interval(limit: Limit) -> str:
    if limit.low == limit.high:
        return f"{limit.value:.3g}"
    high = "∞" if math.isinf(limit.high) else f"{limit.high:.3g}"
    return f"{limit.value:.3g} [{limit.low:.3g}, {high}]"


_KEPT = ("name", "optimizer", "threshold", "threshold_name", "ci95", "error", "status", "settings")


Baseline = Mapping[str, Mapping[str, Any]]
"""An earlier report: its entries by the names of its checks."""


def load_baseline(file: Path) -> Baseline:
    """Read a document ``zoscope.check/1``.

    Raises:
        UsageError: If the file is missing or is not such a document.
    """
    try:
        document = parse_json(read_bytes(file))
        if document["schema"] != CheckReport.schema:
            raise ValueError
        return {str(entry["name"]): _checked(entry) for entry in document["checks"]}
    except FileNotFoundError:
        raise UsageError(f"--baseline: there is no file {file}. Write it first with --update-baseline.") from None
    except OSError as error:
        raise UsageError(f"--baseline: cannot read {file} ({reason(error)}).") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(
            f"--baseline: {file} is not a document {CheckReport.schema}. Write it with --update-baseline, or with "
            "--format json."
        ) from None


def baseline_document(report: CheckReport, *, earlier: Baseline | None, keep_absent: bool) -> dict[str, Any]:
    """What ``--update-baseline`` writes: the thresholds of a report, without times, so that diffs are small.

    Args:
        report: The checks of now. One that had an error keeps its earlier entry.
        earlier: The baseline that is replaced.
        keep_absent: Whether entries of checks that did not run are kept.
    """
    before = earlier or {}
    entries = {name: dict(entry) for name, entry in before.items()} if keep_absent else {}
    for check in report.checks:
        document = check.to_dict()
        if check.status != "error":
            entries[check.name] = {key: document[key] for key in _KEPT}
        elif check.name in before:
            entries[check.name] = dict(before[check.name])
    return {"schema": CheckReport.schema, "zoscope": report.version, "checks": list(entries.values())}


def _checked(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """An entry whose numbers are numbers."""
    ends = [entry["threshold"], entry["error"]]
    if not all(end is None or (isinstance(end, int | float) and math.isfinite(end)) for end in ends):
        raise ValueError
    if not isinstance(entry["settings"], Mapping):
        raise TypeError
    return entry


def compare(result: CheckResult, baseline: Baseline, *, max_drop: float, on_warn: str) -> CheckResult:
    """The result with its comparison; a drop beyond ``max_drop`` turns pass and warn into fail.

    What cannot be compared (no entry of this name, or one with other settings) turns pass into warn.

    Args:
        result: A check of now.
        baseline: The earlier report.
        max_drop: Largest fall allowed, as a fraction of the earlier threshold.
        on_warn: ``fail`` turns that warning into a fail.
    """
    if result.threshold is None:
        return result
    comparison = _comparison(result, result.threshold, baseline.get(result.name), max_drop)
    message = f"{result.message} {comparison.message}"
    if comparison.failed:
        return replace(result, baseline=comparison, message=message, status="fail", exit_code=max(result.exit_code, 1))
    if comparison.before is None and result.status == "pass":
        if on_warn == "fail":
            return replace(result, baseline=comparison, message=message, status="fail", exit_code=1)
        return replace(result, baseline=comparison, message=message, status="warn")
    return replace(result, baseline=comparison, message=message)


def _comparison(
    result: CheckResult, now: Limit, entry: Mapping[str, Any] | None, max_drop: float
) -> BaselineComparison:
    if entry is None:
        return _incomparable("The baseline has no check of this name")
    if entry["status"] == "error" or entry["threshold_name"] is None:
        return _incomparable("The baseline's check of this name had an error")
    same = entry["optimizer"] == result.optimizer and entry["settings"] == _plain(result.settings)
    if not same:
        return _incomparable("The baseline's check of this name had other settings")
    before = math.inf if entry["threshold"] is None else float(entry["threshold"])
    if math.isinf(before):
        dropped = math.isfinite(now.value)
        text = "nothing limited the step size" if dropped else "nothing limits the step size, as"
        return BaselineComparison(before, None, dropped, f"In the baseline {text} before.")
    return _drop(now, before, entry["error"] or 0.0, max_drop)


def _drop(now: Limit, before: float, before_error: float, max_drop: float) -> BaselineComparison:
    """Fail when ``now < (1 - max_drop) before`` by more than the error of the difference."""
    allowed = (1.0 - max_drop) * before
    error = math.hypot(now.error, (1.0 - max_drop) * before_error)
    drop = 1.0 - now.value / before if math.isfinite(now.value) else -math.inf
    failed = now.value + error < allowed
    moved = f"{abs(drop):.1%} {'below' if drop > 0 else 'above'}" if math.isfinite(drop) else "above"
    text = f"The threshold is {moved} the baseline's {before:.3g}"
    text += f", more than --max-drop {max_drop:.0%} allows." if failed else "."
    return BaselineComparison(before, drop, failed, text)


def _incomparable(reason: str) -> BaselineComparison:
    return BaselineComparison(None, None, False, f"{reason}, so nothing was compared; --update-baseline writes it.")


def _plain(settings: Mapping[str, Any]) -> Any:
    """As JSON gives it back: tuples as lists."""
    return json.loads(json.dumps(dict(settings)))


MOST_STEPS = 1000
MOST_SECONDS = 60.0
REPLICAS = 4
PRECISION = 0.1
"""Relative precision of the probe's own measurement: the threshold is known already."""

UNSTABLE = ("diverged", "sharpened")


def with_probe(result: CheckResult, config: CheckConfig, bench: CheckRunner) -> CheckResult:
    """The result with a probe at the configured step size; a run that diverges turns pass and warn into fail.

    A run whose mean loss rises, or that cannot tell, warns: it is no proof that training diverges.

    Args:
        result: What the gate says.
        config: The check.
        bench: Where its problem is, and the cache.
    """
    if result.threshold is None:
        return result
    value = result.threshold.value if result.threshold.edge is None else result.threshold.edge
    if math.isinf(value):
        return result  # nothing limits the step size, so there is nothing to see
    run = bench.recall(config, probe_options(config, value), _probed)
    verdict = str(run["verdict"])
    left = f"{run['diverged']} of {run['replicas']} replicas diverged"
    message = f"{result.message} A probe of {run['steps_done']} steps ({left}): {verdict}; {run['reason']}."
    changed = replace(result, probe=run, message=message)
    if verdict in UNSTABLE:
        return replace(changed, status="fail", exit_code=1)
    if verdict in ("stable", "falls") or result.status != "pass":
        return changed
    if config.policy.on_warn == "fail":
        return replace(changed, status="fail", exit_code=1)
    return replace(changed, status="warn")


def probe_options(config: CheckConfig, threshold: float) -> dict[str, Any]:
    """Keyword arguments of ``probe`` for a check."""
    curvature, optimizer, estimator = config.curvature, config.optimizer, config.estimator
    options: dict[str, Any] = {
        "optimizer": optimizer.name,
        "lr": optimizer.lr,
        "assume_threshold": threshold,
        "threshold": "binding" if config.policy.threshold == PLAN else config.policy.threshold,
        "steps": min(config.steps, MOST_STEPS),
        "max_seconds": MOST_SECONDS,
        "replicas": REPLICAS if optimizer.zeroth_order else 1,
        "mu": estimator.mu,
        "directions": estimator.directions,
        "differences": estimator.differences,
        "queries": estimator.queries,
        "beta": optimizer.beta,
        "betas": optimizer.betas,
        "eps": optimizer.eps,
        "dampening": optimizer.dampening,
        "weight_decay": optimizer.weight_decay,
        "preconditioner": curvature.preconditioner,
        **curvature.options(),
        "rtol": max(curvature.rtol, PRECISION),
        "strict": False,  # the threshold is known already
    }
    if optimizer.zeroth_order and estimator.batch_size is not None:
        options["batch_size"] = estimator.batch_size
    return options


def _probed(problem: Problem, options: Mapping[str, Any]) -> dict[str, Any]:
    """The run at the step size; for Adam the one whose P adapts, as in training."""
    from zoscope.analysis.probe import probe

    return probe(problem, **options).runs[-1].to_dict()


def plan_options(config: CheckConfig) -> dict[str, Any]:
    """Keyword arguments of ``plan`` for a check."""
    curvature, optimizer, estimator = config.curvature, config.optimizer, config.estimator
    schedule = optimizer.schedule
    return {
        "optimizer": optimizer.name,
        "steps": config.steps,
        "schedule": schedule.kind,
        "warmup": schedule.warmup or None,
        **vars(estimator),
        **OPTIMIZERS[optimizer.rule].settings(vars(optimizer)),
        **{name: getattr(curvature, name) for name in ("device", "dtype", "seed", "micro_batch", "max_memory")},
    }


def _planned(problem: Problem, options: Mapping[str, Any]) -> dict[str, Any]:
    """Where half of the runs leave, and what the plan had to say."""
    from zoscope.analysis.plan import plan

    found = plan(problem, **options)
    return {
        "edge": found.edge.lr,
        "ci95": found.edge.ci95,
        "lr": found.answer.lr,
        "notices": [[notice.code, notice.message] for notice in found.warnings],
    }


def _by_plan(config: CheckConfig, bench: CheckRunner) -> tuple[Held, tuple[Notice, ...]]:
    """What a plan holds a step size against, and its notices."""
    if not config.optimizer.zeroth_order:
        raise UsageError(f"policy.threshold plan is for zo- optimizers, and this one is {config.optimizer.name}.")
    found = bench.recall(config, plan_options(config), _planned)
    notices = tuple(Notice(code, message) for code, message in found["notices"])
    if found["edge"] is None:
        return Held(Limit(PLAN, math.inf, math.inf, math.inf)), notices
    edge = float(found["edge"])
    low, high = found["ci95"] or (edge, edge)
    if found["lr"] is not None:
        notices = (Notice("plan-lr", f"zoscope plan expects the lowest loss at lr {found['lr']:.3g}."), *notices)
    return Held(Limit(PLAN, edge, low, high, error=0.5 * (high - low))), notices


def check(
    target: Problem | str | Path | None = None,
    *,
    only: Sequence[str] = (),
    hf_args: str | Path | None = None,
    baseline: str | Path | None = None,
    max_drop: float = 0.2,
    cache: str | Path | None = None,
    on_progress: Callable[..., None] | None = None,
    on_check: Callable[[CheckResult], None] | None = None,
    **options: Unpack[CheckOptions],
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
        **options: Those of ``zoscope check``, which override everything: ``examples/guide/options.md`` has types,
            defaults and ranges.

    Returns:
        One result per check; ``.exit_code`` is what the command line would exit with.

    Raises:
        TypeError: For an option that there is not.
        UsageError: If the configuration, an option or the baseline cannot be used. A spec that cannot be loaded and a
            measurement that fails are results of status ``error`` instead.
    """
    start = time.perf_counter()
    refuse_unknown("check", options)
    if not 0 < max_drop < 1:
        raise UsageError(f"--max-drop must be a fraction between 0 and 1 (20% or 0.2), got {max_drop:g}.")
    problem = None if target is None or isinstance(target, str | Path) else target
    document = _document(None if problem is not None else target, options)
    checks = _checks(document, only, hf_args, options, problem=problem)
    earlier = None if baseline is None else load_baseline(Path(baseline))
    bench = CheckRunner(problem, None if cache is None else Cache.open(Path(cache)), on_progress)
    results = []
    for config in checks:
        result = _run(config, checks, bench, earlier, max_drop)
        if on_check is not None:
            on_check(result)
        results.append(result)
    config_file = None if document.file is None else shown_path(document.file)
    return CheckReport(tuple(results), config=config_file, seconds=time.perf_counter() - start)


def _document(target: str | Path | Problem | None, options: Mapping[str, Any]) -> Document:
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
    options: Mapping[str, Any],
    *,
    problem: Problem | None,
) -> tuple[CheckConfig, ...]:
    overrides: list[tuple[str, Node]] = []
    notices: tuple[str, ...] = ()
    if hf_args is not None:
        arguments = load_hf_args(Path(hf_args))
        overrides.append((shown_path(Path(hf_args)), arguments.tree))
        notices = arguments.notices
    overrides.append((COMMAND_LINE, override_tree(options)))
    return build_checks(document, overrides=overrides, only=only, needs_spec=problem is None, notices=notices)


def _run(
    config: CheckConfig, checks: Sequence[CheckConfig], bench: CheckRunner, earlier: Baseline | None, max_drop: float
) -> CheckResult:
    measurement = bench.measure(config, checks)
    if isinstance(measurement, Failure):
        return _failed(config, measurement)
    try:
        result = _judged(config, measurement, bench)
        if config.policy.probe:
            result = with_probe(result, config, bench)
    except Exception as error:
        return _failed(config, Failure.of(error))
    if earlier is not None:
        result = compare(result, earlier, max_drop=max_drop, on_warn=config.policy.on_warn)
    return result


def _judged(config: CheckConfig, measurement: CheckMeasurement, bench: CheckRunner) -> CheckResult:
    optimizer, policy = config.optimizer, config.policy
    said: tuple[Notice, ...]
    if policy.threshold == PLAN:
        held, said = _by_plan(config, bench)
    else:
        said = tuple(_own_notices(config, measurement))
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
    notices = (*(Notice("hf-args", text) for text in config.notices), *said, *measurement.notices)
    return CheckResult(
        **_identity(config),
        status=decision.status,
        message=decision.message,
        exit_code=1 if decision.status == "fail" else 0,
        threshold=held.limit,
        doubts=held.doubts,
        largest_lr=decision.largest_lr,
        notices=tuple(notice.message for notice in notices),
        codes=tuple(notice.code for notice in notices),
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
        codes=("hf-args",) * len(config.notices),
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
    constants = OPTIMIZERS[optimizer.rule].settings(vars(optimizer))
    settings: dict[str, Any] = {**constants, "curvature": config.curvature.kind}
    if optimizer.zeroth_order:
        estimator = config.estimator
        settings |= {"threshold": config.policy.threshold, "steps": config.steps}
        settings |= {"directions": estimator.directions, "queries": estimator.queries}
    return settings


def _own_notices(config: CheckConfig, measurement: CheckMeasurement) -> Iterator[Notice]:
    if described := config.optimizer.schedule.describe():
        yield Notice("schedule-peak", f"lr is the {described}.")
    size, examples = config.estimator.batch_size, measurement.num_examples
    if size is not None and size < examples and measurement.optimizers[config.optimizer.rule].minibatch:
        yield Notice("mini-batch", f"The threshold is that of mini-batches of {size} of {examples} examples.")
        held = measurement.optimizers[config.optimizer.rule].zeroth_order[config.steps].get("descent")
        if held is not None and held.limit.name == "descent" and config.optimizer.lr > held.limit.high:
            yield Notice(
                "batch-noise",
                f"Above {held.limit.value:.3g} the noise of such mini-batches raises the expected loss: to a floor, or "
                "until the run diverges. Larger batches or a smaller lr lower it.",
            )
    elif size is not None and size < examples:
        yield Notice(
            "full-batch-threshold",
            f"Training uses mini-batches of {size} of {examples} examples. The threshold is that of the full batch; "
            f"that of mini-batches can be as low as {size / examples:.2g} times it.",
        )
