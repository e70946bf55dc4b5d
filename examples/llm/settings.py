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
import numpy as np

import zoscope
from zoscope.curvature.finite_difference import Stencil

GRID = tuple(10.0 ** (k / 2) for k in range(-12, 1))
"""Values of eps from 1e-6 to 1, two to a decade."""

DIRECTIONS = 8
TOLERANCE = 0.1
"""Error of a slope, relative to the size of slopes, up to which an eps is called usable."""

PUBLISHED = {
    "full": "OPT-13B: lr 1e-7 to 1e-6, eps 1e-3, 20,000 steps; RoBERTa-large: lr 1e-6, eps 1e-3, 100,000 steps",
    "lora": "OPT-13B: lr 5e-5 to 1e-4, eps 1e-2, 20,000 steps",
    "prefix": "OPT-13B: lr 1e-3 to 1e-2, eps 1e-1, 20,000 steps",
}


def slope_errors(problem: zoscope.Problem, *, dtype: str = "auto", seed: int = 0) -> tuple[list[float], list[float]]:
    """How far two-point slopes are off for every eps of the grid, and by how much the loss rises at its two points.

    The truth is taken from where neighbours on the grid agree best: errors of rounding fall as 1/eps along it, those of
    curvature that changes grow as eps².

    Args:
        problem: What is trained.
        dtype: ``"own"`` for the weights as they are.
        seed: Of the directions.

    Returns:
        Root mean square errors, relative to that of the slopes; and mean rises, relative to the loss.
    """
    with problem.prepare(dtype=dtype, differentiable=False) as objective:
        stencil = Stencil(objective, seed=seed)
        found = [
            [stencil.along(direction, eps) for eps in GRID]
            for direction in (stencil.direction() for _ in range(DIRECTIONS))
        ]
        loss = stencil.loss
    slopes = np.array([[difference.slope for difference in row] for row in found])
    bends = np.array([[difference.curvature for difference in row] for row in found])
    steps = np.sqrt(np.mean(np.diff(slopes, axis=1) ** 2, axis=0))
    best = int(np.nanargmin(steps[:-1] + steps[1:])) + 1
    truth = slopes[:, best : best + 1]
    errors = np.sqrt(np.mean((slopes - truth) ** 2, axis=0) / np.mean(truth**2))
    return errors.tolist(), (0.5 * np.array(GRID) ** 2 * bends.mean(axis=0) / loss).tolist()


def usable(errors: list[float]) -> tuple[float, float] | None:
    """The smallest and the largest eps of the run of usable ones around the best."""
    good = [error <= TOLERANCE for error in errors]
    if not any(good):
        return None
    low = high = int(np.nanargmin(errors))
    while low > 0 and good[low - 1]:
        low -= 1
    while high + 1 < len(good) and good[high + 1]:
        high += 1
    return GRID[low], GRID[high]


def main() -> None:
    """Print both answers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="opt", help="opt, roberta, minilm, or the folder of a checkpoint")
    parser.add_argument("--tuning", default="full", choices=tuple(PUBLISHED))
    parser.add_argument("--steps", type=int, default=1000, help="training steps planned")
    parser.add_argument("--curvature", default="hessian", choices=("hessian", "forward"))
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
    errors, rises = slope_errors(problem, dtype="own" if options.curvature == "forward" else "auto")
    span = usable(errors)
    said = "none of the grid is usable" if span is None else f"usable from {span[0]:.1g} to {span[1]:.1g}"
    print(f"eps  {said}: slopes off by at most {TOLERANCE:.0%}")
    print("     eps      slope off by  loss higher by")
    for eps, error, rise in zip(GRID, errors, rises, strict=True):
        print(f"     {eps:<8.1g} {_percent(error):>12}  {_percent(rise):>14}")
    if options.model not in ("opt", "roberta"):
        print(f"MeZO {PUBLISHED[options.tuning]}")


def _percent(share: float) -> str:
    return f"{share:.2g} ×" if abs(share) >= 10 else f"{100 * share:.1f} %" if math.isfinite(share) else "–"


if __name__ == "__main__":
    main()
