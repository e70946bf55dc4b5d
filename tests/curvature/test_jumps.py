"""Losses that are constant but for jumps are recognised, and others are not."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import zoscope
from zoscope.curvature.finite_difference import Stencil
from zoscope.curvature.nonsmooth import jump_along, jump_of

STEPPED = {
    "floor": lambda out, y: torch.floor(4 * out).square().mean(),
    "round": lambda out, y: functional.mse_loss(torch.round(8 * out) / 8, functional.one_hot(y, 3).float()),
    "accuracy": lambda out, y: (out.argmax(1) != y).float().mean() + 0 * out.sum(),
}
SMOOTH = {
    "cross-entropy": functional.cross_entropy,
    "partly a floor": lambda out, y: functional.cross_entropy(out, y) + torch.floor(out).mean(),
    "constant": lambda out, y: 1 + 0 * out.sum(),
    "linear": lambda out, y: out.mean(),
}


def problem(loss):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    x, y = torch.randn(40, 6), torch.randint(0, 3, (40,))
    return zoscope.Problem.from_criterion(model, [(x, y)], loss)


def jumps(loss, *, derivatives):
    with problem(loss).prepare(device="cpu", differentiable=derivatives) as objective:
        before = objective.read()
        found = (
            jump_of(objective, generator=torch.Generator()) if derivatives else jump_along(Stencil(objective, seed=0))
        )
        assert torch.equal(objective.read(), before)
        return found


@pytest.mark.parametrize("derivatives", [True, False])
@pytest.mark.parametrize("name", STEPPED)
def test_jumps_are_found(name, derivatives):
    found = jumps(STEPPED[name], derivatives=derivatives)
    assert found is not None
    assert found.before != found.after


@pytest.mark.parametrize("name", SMOOTH)
def test_losses_with_a_slope_or_none_at_all_have_no_jump(name):
    assert jumps(SMOOTH[name], derivatives=False) is None
    assert jumps(SMOOTH[name], derivatives=True) is None


def test_a_minimum_flatter_than_any_parabola_is_no_jump():
    quartic = zoscope.Problem.from_function(lambda x: 1 + (x**4).sum(), torch.zeros(5, dtype=torch.float64))
    with quartic.prepare(device="cpu") as objective:
        assert jump_of(objective, generator=torch.Generator()) is None


@pytest.mark.parametrize("command", [zoscope.bounds, zoscope.spectrum, zoscope.moments])
@pytest.mark.parametrize("name", STEPPED)
def test_every_measurement_says_so(name, command):
    codes = [notice.code for notice in command(problem(STEPPED[name]), device="cpu").warnings]
    assert codes.count("piecewise-constant") == 1
    assert not {"zero-curvature", "kinks"} & set(codes)


@pytest.mark.parametrize("name", STEPPED)
def test_forward_passes_say_so(name):
    found = zoscope.bounds(problem(STEPPED[name]), curvature="forward", max_hvps=100, device="cpu")
    assert "piecewise-constant" in {notice.code for notice in found.warnings}


@pytest.mark.parametrize(("optimizer", "curvature"), [("zo-gd", "hessian"), ("gd", "hessian"), ("zo-gd", "forward")])
def test_a_check_passes_no_step_size_and_says_so(optimizer, curvature):
    options = {"optimizer": optimizer, "lr": 1e-3, "curvature": curvature, "device": "cpu"}
    (found,) = zoscope.check(problem(STEPPED["floor"]), **options).checks
    assert (found.status, found.exit_code, found.largest_lr) == ("warn", 0, None)
    assert "piecewise constant" in found.message
    assert "piecewise constant" in " ".join(found.notices)
    assert found.doubts == ("piecewise-constant",)
    strict = zoscope.check(problem(STEPPED["floor"]), on_warn="fail", **options).checks[0]
    assert (strict.status, strict.exit_code) == ("fail", 1)


def test_a_loss_of_which_a_part_has_jumps_is_measured_as_before():
    codes = {notice.code for notice in zoscope.bounds(problem(SMOOTH["partly a floor"]), device="cpu").warnings}
    assert "piecewise-constant" not in codes
