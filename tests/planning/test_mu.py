"""The range of μ, against losses whose two-point slopes and whose rounding are known."""

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import zoscope
from zoscope.planning.mu import GRID, PerturbationScale, measure_scale, update_rounding

DIRECTIONS = 48
SURE = 4.0
"""Standard errors that a measured end may be off by."""


def measured(
    f: Callable[[Tensor], Tensor], x0: Tensor, *, directions: int = DIRECTIONS, **options: object
) -> PerturbationScale:
    problem = zoscope.Problem.from_function(f, x0)
    with problem.prepare(dtype="own", differentiable=False) as objective:
        return measure_scale(objective, directions=directions, **options)


def close(end: zoscope.theory.spectrum.Estimate | None, truth: float) -> bool:
    return end is not None and abs(math.log(end.value / truth)) <= SURE * end.stderr / end.value + 0.05


def test_a_quadratic_has_no_upper_end_and_no_lower_one_in_double_precision() -> None:
    scales = torch.linspace(0.1, 3.0, 20, dtype=torch.float64)
    found = measured(lambda x: 0.5 * (scales * x * x).sum(), torch.ones(20, dtype=torch.float64))
    assert found.usable
    assert (found.lower, found.upper) == (None, None)
    assert found.tried == GRID
    assert all(found.allows(mu) for mu in (1e-7, 1e-3, 10.0))


def test_the_public_function_measures_a_problem_and_leaves_it_as_it_was() -> None:
    x0 = torch.zeros(50, dtype=torch.float64)
    problem = zoscope.Problem.from_function(lambda x: (x + 20.0 * x**3).sum(), x0)
    found = zoscope.perturbation_scale(problem, directions=DIRECTIONS, lr=1e-3)
    assert found.upper is not None
    assert close(found.upper, math.sqrt(found.tolerance / (20.0 * math.sqrt(15))))
    assert found.updates is not None
    assert float(x0.norm()) == 0.0


def test_the_bias_of_a_cubic_ends_the_range() -> None:
    """``f = Σ (g x + c x³)`` at 0: slopes are ``Σ g u + μ² c u³``; E(error²) = 15 c²μ⁴d, E(slope²) = g²d."""
    g, c, d = 1.0, 20.0, 50
    found = measured(lambda x: (g * x + c * x**3).sum(), torch.zeros(d, dtype=torch.float64))
    truth = math.sqrt(found.tolerance * g / (c * math.sqrt(15)))
    assert found.lower is None
    assert close(found.upper, truth)
    assert found.upper is not None
    assert 0 < found.upper.stderr / found.upper.value < 0.3
    assert not found.allows(2 * truth)


def test_the_bias_of_an_exponential_ends_the_range() -> None:
    """``exp(kaᵀx)`` with ‖a‖ = 1: with z = aᵀu slopes are ``sinh(μkz)/μ`` in place of kz."""
    k, a = 5.0, torch.full((30,), 30**-0.5, dtype=torch.float64)
    found = measured(lambda x: torch.exp(k * (a @ x)), torch.zeros(30, dtype=torch.float64))
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    law = torch.exp(-0.5 * z**2)

    def error(mu: float) -> float:
        return math.sqrt(float((law * (torch.sinh(mu * k * z) / (mu * k) - z) ** 2).sum() / (law * z**2).sum()))

    low, high = 1e-3, 1.0
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if error(middle) > found.tolerance else (middle, high)
    assert close(found.upper, high)
    assert found.slope.value == pytest.approx(k, rel=SURE * found.slope.stderr / found.slope.value)


def test_the_last_place_of_a_float32_loss_ends_the_range() -> None:
    """A constant and a linear part in double precision, rounded once: errors have the variance of a last place, /12."""
    g = torch.full((100,), 0.3, dtype=torch.float64)
    place = 1024 * torch.finfo(torch.float32).eps
    constant = 1024.5 + 0.10566 * place  # rounding above and below it, at equal distance, is not correlated
    found = measured(lambda x: (constant + g @ x.double()).float(), torch.zeros(100))
    truth = place / math.sqrt(12) / (math.sqrt(2) * found.tolerance * 3.0)
    assert close(found.lower, truth)
    assert found.upper is None
    assert found.rounding == pytest.approx(place * 1024.5 / 1024 / math.sqrt(12), rel=1e-3)


def test_one_sided_slopes_end_where_curvature_is_felt() -> None:
    """``gᵀx + ½h‖x‖²`` at 0: the error is ``½μh‖u‖²``, E‖u‖⁴ = d(d + 2)."""
    d, g, h = 40, 1.0, 2.0
    f = lambda x: g * x.sum() + 0.5 * h * x.square().sum()  # noqa: E731
    start = torch.zeros(d, dtype=torch.float64)
    two, one = measured(f, start), measured(f, start, one_sided=True)
    assert two.upper is None
    assert close(one.upper, found := 2 * 0.1 * g * math.sqrt(d) / (h * math.sqrt(d * (d + 2))))
    assert one.one_sided
    assert not one.allows(3 * found)


def test_kinks_narrow_the_range_from_above() -> None:
    bends = torch.linspace(-1e-2, 1e-2, 21, dtype=torch.float64)
    found = measured(lambda x: x.sum() + 5 * (x[:, None] - bends).abs().mean(), torch.zeros(9, dtype=torch.float64))
    assert found.usable
    assert all(error < math.inf for error in found.slope_errors)


def test_mini_batches_have_slopes_of_their_own() -> None:
    """Examples whose gradients cancel: all of them have no slope, a batch of 4 has some."""
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(32)
    model = nn.Linear(6, 1, bias=False, dtype=torch.float64)
    inputs = signs[:, None] * torch.ones(64, 6, dtype=torch.float64)
    problem = zoscope.Problem(model, [inputs], lambda m, batch: m(batch).mean() + 1.0)
    start = model.weight.detach().clone()
    with problem.prepare(dtype="own", differentiable=False) as objective:
        everything = measure_scale(objective)
        batches = measure_scale(objective, batch_size=4, directions=DIRECTIONS)
    assert not everything.usable or everything.slope.value < 1e-6
    assert batches.batch_size == 4
    # Of the mean of 4 signs drawn without replacement from 64: variance (1/4)(60/63); six inputs are equal.
    truth = math.sqrt(6 * 60 / 63 / 4)
    assert batches.slope.value == pytest.approx(truth, rel=2 * SURE * batches.slope.stderr / batches.slope.value)
    assert batches.upper is None
    assert torch.equal(model.weight, start)


def test_nothing_is_usable_where_the_loss_is_flat_or_not_finite() -> None:
    flat = measured(lambda x: 0 * x.sum() + 1.0, torch.ones(5))
    narrow = measured(lambda x: torch.sqrt(1e-16 - x.square().sum()), torch.zeros(5, dtype=torch.float64))
    for found in (flat, narrow):
        assert not found.usable
        assert (found.lower, found.upper, found.best) == (None, None, None)
        assert not found.allows(1e-3)
        json.dumps(found.to_dict(), allow_nan=False)


def test_the_document_is_json_and_says_what_was_asked() -> None:
    found = measured(lambda x: x.square().sum(), torch.ones(8), lr=1e-4, directions=8)
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["tolerance"] == 0.1
    assert document["updates"]["lr"] == 1e-4
    assert len(document["slope_errors"]) == len(document["tried"]) == len(document["loss_rises"])
    assert document["num_evaluations"] <= 2 * 8 * len(GRID) + 1


def test_the_same_seed_gives_the_same_answer_and_too_few_directions_are_refused() -> None:
    f, x0 = lambda x: torch.exp(x).sum(), torch.zeros(6)
    first, again, other = (measured(f, x0, directions=6, seed=seed) for seed in (3, 3, 4))
    assert (first.upper, first.slope_errors) == (again.upper, again.slope_errors)
    assert first.slope_errors != other.slope_errors
    with pytest.raises(zoscope.errors.UsageError, match="at least 4 directions"):
        measured(f, x0, directions=3)


def test_a_model_in_bfloat16_is_perturbed_in_bfloat16() -> None:
    """θ = 1 has a last place of 2⁻⁷ above and 2⁻⁸ below: a μ that is far below moves hardly any weight."""
    x0 = torch.ones(400, dtype=torch.bfloat16)
    found = measured(lambda x: (0.01 * x.float()).sum(), x0)
    assert found.dtype == "bfloat16"
    assert found.lower is not None
    assert 1e-3 < found.lower.value < 0.1
    assert not found.allows(1e-4)


@pytest.mark.parametrize("size", [0.1, 0.3, 0.5, 1.0, 3.0])
def test_what_rounding_leaves_of_updates_is_what_a_rounded_step_moves(size: float) -> None:
    """Steps with one coefficient for all weights, as ZO-GD's are; c is Gaussian."""
    generator = torch.Generator().manual_seed(0)
    theta = (1 + torch.rand(4096, generator=generator)).bfloat16()  # all in [1, 2]: one last place, 2⁻⁷
    rms = size * 2.0**-7
    moved = wanted = vanished = 0.0
    each = []
    for _ in range(400):
        update = rms * torch.randn((), generator=generator) * torch.randn(4096, generator=generator)
        applied = (theta.float() + update).bfloat16().float() - theta.float()
        moved, wanted = moved + float(applied @ update), wanted + float(update @ update)
        each.append((float(applied @ update), float(update @ update)))
        vanished += float((applied == 0).float().mean()) / 400
    found = update_rounding([theta], lr=rms, slope=1.0)
    pairs = torch.tensor(each, dtype=torch.float64)
    spread = float((pairs[:, 0] - moved / wanted * pairs[:, 1]).std()) / (math.sqrt(400) * float(pairs[:, 1].mean()))
    assert found.kept == pytest.approx(moved / wanted, abs=SURE * spread + 0.01)
    assert found.vanishing == pytest.approx(vanished, abs=0.05)
    assert update_rounding([theta], lr=found.least_lr, slope=1.0).kept == pytest.approx(0.9, abs=0.01)
    assert found.matters == (rms < found.least_lr)


def test_float32_weights_and_zeros_keep_their_updates() -> None:
    wide = update_rounding([torch.ones(100)], lr=1e-4, slope=1.0)
    assert (wide.dtype, wide.kept) == ("float32", pytest.approx(1.0, abs=1e-6))
    assert wide.vanishing < 1e-2
    zeros = update_rounding([torch.zeros(100, dtype=torch.bfloat16)], lr=1e-6, slope=1.0)
    assert zeros.kept == pytest.approx(1.0)


def test_a_plan_says_at_which_mu_slopes_are_right_in_the_dtype_that_trains() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 1).bfloat16()
    inputs, targets = torch.randn(64, 8).bfloat16(), torch.randn(64, 1).bfloat16()
    problem = zoscope.Problem.from_criterion(model, [(inputs, targets)], lambda y, t: (y - t).float().square().mean())
    found = zoscope.plan(problem, steps=20, mu=1e-6, replicas=2)
    assert found.dtype == "float32"
    assert found.perturbation.dtype == "bfloat16"
    assert found.perturbation.lower is not None
    assert found.perturbation.lower.value > 1e-4
    assert "mu" in {warning.code for warning in found.warnings}
    assert "mu" not in {w.code for w in zoscope.plan(problem, steps=20, mu=1e-2, replicas=2).warnings}
    assert found.to_dict()["perturbation"]["best"] == found.perturbation.best
