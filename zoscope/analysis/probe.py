"""``zoscope.probe``: short training runs on each side of a threshold, which confirm it or refute it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from zoscope.analysis.measuring import NO_SPECTRUM
from zoscope.analysis.probing.request import ProbeProgress, ProbeRequest, check_optimizer, numbers
from zoscope.analysis.probing.results import ProbeInterruptedError, ProbeResult
from zoscope.analysis.probing.session import Session
from zoscope.analysis.request import Progress, Request, subject_of
from zoscope.errors import UsageError
from zoscope.problem.precision import measurable

if TYPE_CHECKING:
    from zoscope.analysis.recommend import Threshold
    from zoscope.problem import Problem
    from zoscope.theory.moments import Directions

DEFAULT_RATIOS = (0.8, 1.25)


def probe(
    problem: Problem,
    *,
    optimizer: str = "zo-gd",
    ratios: float | Sequence[float] | None = None,
    lr: float | Sequence[float] | None = None,
    threshold: Threshold = "binding",
    steps: int | None = None,
    growth: float = 1e3,
    max_steps: int = 20_000,
    max_seconds: float = 600.0,
    replicas: int = 8,
    mu: float = 1e-3,
    batch_size: int | None = None,
    edge: bool = False,
    edge_rtol: float = 0.05,
    linearized: bool = False,
    assume_threshold: float | None = None,
    rtol: float = 0.02,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    max_hvps: int = 600,
    directions: Directions = "gaussian",
    queries: int = 1,
    beta: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    curvature: Literal["hessian", "ggn", "forward"] = "hessian",
    preconditioner: str = "expected",
    method: Literal["auto", "dense", "deflated-slq"] = "auto",
    micro_batch: int | None = None,
    max_memory: int | None = None,
    hvp: str = "auto",
    params: str | None = None,
    spec: str | None = None,
    on_progress: Progress | None = None,
    on_run: ProbeProgress | None = None,
) -> ProbeResult:
    """Predict the threshold, then train briefly at step sizes on each side of it and say whether reality agrees.

    The problem comes back as it was. A loss that becomes NaN or infinite in a run is a result, not an error.

    Args:
        problem: Model, batches and loss.
        optimizer: ``"zo-gd"``, ``"zo-gdm"``, ``"zo-adam"``, or ``"gd"``, ``"gdm"``, ``"adam"``.
        ratios: Step sizes as multiples of the threshold; 0.8 and 1.25 unless ``lr`` or ``edge`` says otherwise.
        lr: Absolute step sizes, besides.
        threshold: Which one is probed: ``"exact"``, ``"horizon"``, ``"descent"``, or ``"binding"``, the smaller one of
            the last two. A first-order optimizer has one only.
        steps: Steps of a run; by default as many as the growth takes at the smallest ratio above 1.
        growth: Factor by which the mean square should grow above the threshold.
        max_steps: Most steps of a run.
        max_seconds: Time for all runs; a run that it cuts short is inconclusive.
        replicas: Independent direction streams.
        mu: Smoothing radius of the estimate.
        batch_size: Random batches of so many examples instead of all of them.
        edge: Look for the empirical edge by bisection.
        edge_rtol: Width of its bracket.
        linearized: Run on the quadratic model at the start.
        assume_threshold: Test this value instead of the predicted one.
        rtol: As for ``zoscope.bounds``; so for all arguments that follow.
        seed: Seed of probe vectors and of the direction streams.
        device: Device.
        dtype: Floating-point type.
        max_hvps: Most Hessian-vector products for the first measurement.
        directions: Law of the perturbations.
        queries: Queries averaged per step.
        beta: Momentum of GDM.
        betas: Adam's ``(β₁, β₂)``.
        eps: Adam's ε.
        curvature: Matrix in place of H.
        preconditioner: Adam's frozen P.
        method: How the spectrum is measured.
        micro_batch: Examples per pass.
        max_memory: Bytes that the process may hold in all: batches are cut, and vectors kept, accordingly.
        hvp: How products are computed.
        params: Which parameters.
        spec: Name of the problem in the result.
        on_progress: As for ``zoscope.bounds``.
        on_run: Called as ``on_run(what, done, total)`` with replica steps done and expected.

    Returns:
        A result that prints itself, with the JSON document as ``to_dict()``.

    Raises:
        ValueError: If an argument is outside of its range.
        UsageError: If the curvature or the preconditioner asked for cannot be had.
        SpecError: If the problem cannot be measured.
        NumericalError: If the start is not finite, or nothing limits the step size there.
        ProbeInterruptedError: A ``KeyboardInterrupt`` that carries what was known.
    """
    check_optimizer(optimizer)
    if curvature == "forward":
        raise UsageError(NO_SPECTRUM.format(curvature=curvature))
    lrs = () if lr is None else numbers("lr", lr)
    multiples = numbers("ratios", ratios) if ratios is not None else () if lrs or edge else DEFAULT_RATIOS
    request = ProbeRequest(
        measure=Request(
            optimizers=(optimizer.removeprefix("zo-"),),
            steps=steps or 1000,
            rtol=rtol,
            seed=seed,
            max_hvps=max_hvps,
            directions=directions,
            queries=queries,
            beta=beta,
            betas=betas,
            eps=eps,
            curvature=curvature,
            preconditioner=preconditioner,
            method=method,
            hvp=hvp,
            threshold=threshold,
            lr=None,
            strict=False,
            on_progress=on_progress,
            batch_size=batch_size,
        ),
        optimizer=optimizer,
        mu=mu,
        replicas=replicas,
        growth=growth,
        ratios=multiples,
        lrs=lrs,
        steps=steps,
        max_steps=max_steps,
        max_seconds=max_seconds,
        edge=edge,
        edge_rtol=edge_rtol,
        linearized=linearized,
        assume_threshold=assume_threshold,
        batch_size=batch_size,
        on_progress=on_run,
    )
    subject = subject_of(problem, params)
    options: dict[str, Any] = {"device": device, "micro_batch": micro_batch, "max_memory": max_memory}
    with (
        subject.prepare(dtype=dtype, trains=True, **options) as objective,
        measurable(subject, objective, **options) as measured,
    ):
        session = Session(objective, measured, request, spec=spec if spec is not None else problem.name)
        try:
            session.go()
        except KeyboardInterrupt:
            if session.forecast is None:
                raise
            raise ProbeInterruptedError(session.result(interrupted=True)) from None
        return session.result(interrupted=False)
