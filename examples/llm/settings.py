"""Which lr and which eps? The answer for one model and one way of tuning it, beside what MeZO's authors used.

    python examples/llm/settings.py                                    # a small random OPT, all parameters
    python examples/llm/settings.py --model minilm --tuning lora --steps 1000
    python examples/llm/settings.py --model /data/opt-125m --steps 20000 --curvature forward

lr comes from ``zoscope.bounds``. eps (μ in the papers) is measured: along a few random directions the two-point slope
must not depend on it. Too small, and the difference of two losses drowns in rounding; too large, and the loss is no
quadratic on the way.
"""

import argparse
import math

import mezo

import zoscope
from zoscope import Estimate
from zoscope.planning.mu import PerturbationScale, measure_scale

PUBLISHED = {
    "full": "OPT-13B: lr 1e-7 to 1e-6, eps 1e-3, 20,000 steps; RoBERTa-large: lr 1e-6, eps 1e-3, 100,000 steps",
    "lora": "OPT-13B: lr 5e-5 to 1e-4, eps 1e-2, 20,000 steps",
    "prefix": "OPT-13B: lr 1e-3 to 1e-2, eps 1e-1, 20,000 steps",
}


def eps_range(problem: zoscope.Problem, *, batch_size: int | None, lr: float | None, dtype: str) -> PerturbationScale:
    """The values of eps at which slopes are right, for steps on so many examples.

    Args:
        problem: What is trained.
        batch_size: Examples of a step; None for all.
        lr: Step size, for what rounding of weights in half precision leaves of a step.
        dtype: ``"own"`` for the weights as they are.
    """
    with problem.prepare(dtype=dtype, differentiable=False) as objective:
        return measure_scale(objective, batch_size=batch_size, lr=lr)


def main() -> None:
    """Print both answers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="opt", help="opt, roberta, minilm, or the folder of a checkpoint")
    parser.add_argument("--tuning", default="full", choices=tuple(PUBLISHED))
    parser.add_argument("--steps", type=int, default=1000, help="training steps planned")
    parser.add_argument("--curvature", default="hessian", choices=("hessian", "forward"))
    parser.add_argument("--batch-size", type=int, help="examples of a training step (default: all)")
    parser.add_argument("--max-hvps", type=int, default=300)
    options = parser.parse_args()
    problem = mezo.problem(options.model, options.tuning)
    result = zoscope.bounds(
        problem, optimizers=["gd"], steps=options.steps, curvature=options.curvature, max_hvps=options.max_hvps
    )
    row = result.optimizers["gd"]
    print(
        f"{options.model}, {options.tuning}: {result.problem.num_params:,} parameters, loss {result.problem.loss:.3g}"
    )
    if row.binding is not None and row.recommended is not None:
        limit, for_now = row.limit or row.binding, " for now" if row.doubts else ""
        print(f"lr   {limit.name} binds at {limit.value:.2g}: use lr ≤ {row.recommended:.2g}{for_now}")
    dtype = "own" if options.curvature == "forward" else "auto"
    scale = eps_range(problem, batch_size=options.batch_size, lr=row.recommended, dtype=dtype)
    said = f"usable from {_end(scale.lower, 'below 1e-6')} to {_end(scale.upper, 'above 1')}"
    said = said if scale.usable else "none of those tried is usable"
    print(f"eps  {said}: slopes off by at most {scale.tolerance:.0%}")
    print("     eps      slope off by  loss higher by")
    for eps, error, rise in zip(scale.tried, scale.slope_errors, scale.loss_rises, strict=True):
        print(f"     {eps:<8.1g} {_percent(error):>12}  {_percent(rise):>14}")
    if scale.updates is not None and scale.updates.matters:
        print(
            f"     In {scale.updates.dtype} rounding of the weights leaves {scale.updates.kept:.0%} of a step at "
            f"lr {scale.updates.lr:.2g}: keep them in float32 besides, or take lr ≥ {scale.updates.least_lr:.2g}."
        )
    if options.model not in mezo.models.SMALL:
        print(f"MeZO {PUBLISHED[options.tuning]}")


def _end(end: Estimate | None, beyond: str) -> str:
    return beyond if end is None else f"{end.value:.1g}"


def _percent(share: float) -> str:
    return f"{share:.2g} ×" if abs(share) >= 10 else f"{100 * share:.1f} %" if math.isfinite(share) else "–"


if __name__ == "__main__":
    main()
