"""``zoscope.track``: train, and follow the edge of stability on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zoscope.analysis.tracking.folder import RunFolder
from zoscope.analysis.tracking.interrupt import gentle_interrupts
from zoscope.analysis.tracking.loop import Observer, Run
from zoscope.analysis.tracking.request import Every, TrackRequest
from zoscope.analysis.tracking.results import OVER, TrackInterruptedError, TrackResult
from zoscope.config.schedule import Schedule, StepSizes, parse_step_sizes
from zoscope.config.track import TRACK
from zoscope.errors import UsageError
from zoscope.problem.precision import measurable
from zoscope.theory.validate import require_positive

if TYPE_CHECKING:
    from zoscope.problem import Problem
    from zoscope.theory.moments import Directions


DEFAULTS = {key.name: key.default for key in TRACK.keys}


def track(
    problem: Problem,
    *,
    optimizer: str = "zo-gd",
    lr: float | str | StepSizes,
    steps: int = 1000,
    every: Every = "auto",
    run: str | PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    mu: float = 1e-3,
    queries: int = 1,
    directions: Directions = "gaussian",
    beta: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    batch_size: int | None = None,
    target_loss: float | None = None,
    divergence: float = 1e6,
    max_seconds: float | None = None,
    checkpoint_every: int | None = None,
    forward_every: int | None = None,
    seed: int = 0,
    rtol: float = 0.05,
    max_hvps: int = 150,
    method: Literal["auto", "dense", "deflated-slq"] = "auto",
    curvature: Literal["hessian", "ggn"] = "hessian",
    hvp: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    micro_batch: int | None = None,
    max_memory: int | None = None,
    params: str | None = None,
    spec: str | None = None,
    observers: Sequence[Observer] = (),
) -> TrackResult:
    """Train a problem, and measure every so often how its step size compares with what its curvature allows.

    The problem comes back as it was; the trained parameters are in the result, and in ``checkpoint.pt`` of the folder.
    The first interrupt stops the run after the step under way.

    Args:
        problem: Model, batches and loss.
        optimizer: ``"zo-gd"``, ``"zo-gdm"``, ``"zo-adam"``, ``"gd"``, ``"gdm"`` or ``"adam"``.
        lr: Step size: a number, ``"0.001,20000:0.007"`` (0.007 from step 20,000 on), or a schedule.
        steps: Steps to train.
        every: Steps between measurements. ``"auto"`` spends about a fifth of all passes on them; ``"adaptive"`` starts
            like that, and measures more often while the ratio to the threshold moves.
        run: Folder of the run; nothing is written without one.
        resume: Go on from the folder's checkpoint; the rest is the same as if the run had not stopped.
        overwrite: Replace a run that is there.
        mu: Smoothing radius of the estimate.
        queries: Queries averaged per step.
        directions: Law of the perturbations.
        beta: Momentum of GDM.
        betas: Adam's ``(β₁, β₂)``.
        eps: Adam's ε.
        batch_size: Examples per step, drawn without replacement in every epoch; all by default. What is measured is
            always the loss of all examples.
        target_loss: Stop at this loss; with ``batch_size`` it is looked at when the run is measured.
        divergence: Stop where the loss exceeds the first one by this factor, or is not finite.
        max_seconds: Stop after so long; the run can be resumed.
        checkpoint_every: Steps between checkpoints, besides those at every measurement.
        forward_every: Steps between observations of a ``zoscope.ForwardMonitor``, one more loss value each, whose
            estimate of the trace and threshold is in the records; none by default.
        seed: Seed of directions, mini-batches and probe vectors.
        rtol: Relative 95 % half-width wanted for the trace and the exact threshold.
        max_hvps: Most Hessian-vector products per measurement.
        method: How the spectrum is measured.
        curvature: ``"hessian"`` or ``"ggn"``.
        hvp: How products are computed.
        device: Device.
        dtype: Floating-point type.
        micro_batch: Examples per pass.
        max_memory: Bytes that the process may hold in all: batches are cut, and vectors kept, accordingly. Another
            session of the run may have another limit.
        params: Regular expression that selects parameters by name.
        spec: Name of the problem in the result.
        observers: Told of every step and of every measurement.

    Returns:
        A result that prints itself, with the JSON document as ``to_dict()``.

    Raises:
        ValueError: If an argument is outside of its range.
        UsageError: If the folder cannot be used, or another run is in it.
        SpecError: If the problem cannot be measured.
        NumericalError: If the start is not finite.
        RunFolderError: If the folder can no longer be written; its last checkpoint stays.
        TrackInterruptedError: A ``KeyboardInterrupt`` that carries what was found.
    """
    request = TrackRequest(
        optimizer=optimizer,
        lr=as_step_sizes(lr),
        steps=steps,
        every=every,
        mu=mu,
        queries=queries,
        directions=directions,
        beta=beta,
        betas=(betas[0], betas[1]),
        eps=eps,
        batch_size=batch_size,
        target_loss=target_loss,
        divergence=divergence,
        checkpoint_every=checkpoint_every,
        forward_every=forward_every,
        seed=seed,
        rtol=rtol,
        max_hvps=max_hvps,
        method=method,
        curvature=curvature,
        hvp=hvp,
        device=device,
        dtype=dtype,
        micro_batch=micro_batch,
    )
    return track_request(
        problem if params is None else problem.with_params(params),
        request,
        origin={} if params is None else {"params": params},
        folder=None if run is None else Path(run),
        resume=resume,
        overwrite=overwrite,
        max_seconds=max_seconds,
        max_memory=max_memory,
        spec=spec,
        observers=observers,
    )


def as_step_sizes(lr: float | str | StepSizes) -> StepSizes:
    """Step sizes from what a user may give.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(lr, str):
        return parse_step_sizes(lr)
    if isinstance(lr, int | float):
        require_positive("lr", float(lr))
        return Schedule("constant", float(lr))
    return lr


def track_request(
    problem: Problem,
    request: TrackRequest,
    *,
    origin: Mapping[str, Any],
    folder: Path | None,
    resume: bool,
    overwrite: bool,
    max_seconds: float | None,
    max_memory: int | None = None,
    spec: str | None,
    observers: Sequence[Observer],
) -> TrackResult:
    """`track` with its options in one piece.

    Args:
        problem: Model, batches and loss.
        request: Options that make the run what it is.
        origin: Where the problem comes from, as keys of a configuration.
        folder: Folder of the run.
        resume: Go on from its checkpoint.
        overwrite: Replace a run that is there.
        max_seconds: Time for this session.
        max_memory: Bytes that the process may hold in this session.
        spec: Name of the problem in the result.
        observers: Who watches.
    """
    if max_seconds is not None:
        require_positive("max_seconds", max_seconds)
    config = {**origin, **request_config(request)}
    name = spec if spec is not None else problem.name
    with ExitStack() as stack:
        place = None if folder is None else RunFolder(folder)
        if place is not None:
            stack.enter_context(place.opened())
            _check_folder(place, config, resume=resume, overwrite=overwrite)
        options: dict[str, Any] = {
            "device": request.device,
            "micro_batch": request.micro_batch,
            "max_memory": max_memory,
        }
        objective = stack.enter_context(problem.prepare(dtype=request.dtype, trains=True, **options))
        measured = stack.enter_context(measurable(problem, objective, **options))
        stop = stack.enter_context(gentle_interrupts())
        going = Run(
            objective,
            measured,
            request,
            place,
            stop,
            max_seconds=max_seconds,
            observers=tuple(observers),
            config=config,
        )
        _start(going, config, overwrite=overwrite)
        status, reason = going.go()
        result = TrackResult(
            spec=name,
            optimizer=request.optimizer,
            config=config,
            device=str(objective.device),
            dtype=str(objective.dtype).removeprefix("torch."),
            num_params=objective.num_params,
            num_examples=objective.num_examples,
            every=going.every,
            status=status,
            reason=reason,
            steps_done=going.step,
            records=tuple(going.records),
            folder=folder,
            seconds=going.seconds,
            measuring_seconds=going.measuring_seconds,
            parameters=going.parameters(),
            warnings=tuple(objective.warnings),
        )
        if place is not None:
            place.write_summary(result.summary())
    if status == "interrupted":
        raise TrackInterruptedError(result)
    return result


def request_config(request: TrackRequest) -> dict[str, Any]:
    """Every option of a request as keys of a configuration."""
    config = {entry.name: getattr(request, entry.name) for entry in fields(request)}
    config |= {"lr": request.lr.to_config(), "betas": list(request.betas)}
    return {key: value for key, value in config.items() if value is not None}


def _check_folder(place: RunFolder, config: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Refuse to go on with another run, or to write over one.

    Raises:
        UsageError: With the first option that differs, or what to do about the run that is there.
    """
    if not place.has_run:
        if resume:
            raise UsageError(
                f"--resume {place.path}: there is no run in this folder. Expected one given to --run before."
            )
        return
    if resume:
        stored = {**DEFAULTS, **place.read_config()}  # an older version may not have known an option
        given = {**DEFAULTS, **config}
        for key in sorted(stored.keys() | given.keys()):
            if stored.get(key) != given.get(key):
                raise UsageError(
                    f"--resume {place.path}: {key} is {given.get(key)!r}, and the run began with {stored.get(key)!r}. "
                    "A run goes on with the options that it began with; leave the others out, or start a new one."
                )
        summary = place.read_summary()
        if summary is not None and summary.get("status") in OVER:
            raise UsageError(
                f"--resume {place.path}: this run is over ({summary.get('reason')}). Look at it with: zoscope track "
                f"--compare {place.path}"
            )
    elif not overwrite:
        raise UsageError(
            f"--run {place.path}: there is a run in this folder. Go on with it: zoscope track --resume {place.path}. "
            "Or replace it with --overwrite, or name another folder."
        )


def _start(going: Run, config: Mapping[str, Any], *, overwrite: bool) -> None:
    place = going.folder
    if place is None:
        return
    if overwrite or not place.has_run:
        place.clear()
        place.write_config(config)
        return
    place.forget_summary()
    content = place.read_checkpoint()
    if content is None:  # stopped before the first one: from the start
        place.truncate_metrics(0)
        return
    stored = content.get("config", config)
    for key in sorted({*stored, *config}):
        if stored.get(key) != config.get(key):
            raise UsageError(
                f"--resume {place.path}: {key} is {config.get(key)!r} in config.yaml, and was {stored.get(key)!r} when "
                "the checkpoint was written. Put it back, or start a new run from checkpoint.pt with --checkpoint."
            )
    going.restore(content)
