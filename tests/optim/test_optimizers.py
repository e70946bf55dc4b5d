import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zoscope.optim.optimizers as module
from zoscope import ZOGD, ZOGDM, AutoLR, ZOAdam, ZONormalized, ZOSignSGD
from zoscope.optim.optimizers import ZeroOrderOptimizer
from zoscope.optim.rules import GD, GDM, new_state
from zoscope.registry import DIRECTIONS

OPTIMIZERS = [ZOGD, ZOGDM, ZOAdam, ZOSignSGD, ZONormalized]


def closure_of(net: nn.Module, batch: tuple[Tensor, Tensor]):
    return lambda: nn.functional.mse_loss(net(batch[0]), batch[1])


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in net.parameters()])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_zero_step_size_leaves_the_parameters_bit_for_bit(kind, net, batch):
    before = flat(net)
    optimizer = kind(net.parameters(), lr=0.0)
    for _ in range(200):
        optimizer.step(closure_of(net, batch))
    assert torch.equal(flat(net), before)


@pytest.mark.slow
@pytest.mark.parametrize("restore", ["snapshot", "fixed-point"])
def test_ten_thousand_perturbations_leave_no_drift(restore):
    generator = torch.Generator().manual_seed(0)
    # Magnitudes from far below to far above μ: where in-place addition and subtraction lose most.
    scales = 10.0 ** torch.linspace(-12, 3, 400)
    parameter = nn.Parameter(torch.randn(400, generator=generator) * scales)
    optimizer = ZOGD([parameter], lr=0.0, queries=2, restore=restore)
    optimizer.step(lambda: 0.0)
    first = parameter.detach().clone()
    for _ in range(5000):
        optimizer.step(lambda: 0.0)
    assert torch.equal(parameter.detach(), first)


def test_naive_in_place_perturbation_drifts():
    # Why the restore strategies exist.
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(400, generator=generator) * 0.01
    moved = theta.clone()
    for _ in range(1000):
        step = 1e-3 * torch.randn(400, generator=generator)
        moved.add_(step).sub_(2 * step).add_(step)
    assert not torch.equal(moved, theta)


def test_fixed_point_moves_the_parameters_once_by_less_than_float32_resolves_at_the_perturbed_point():
    parameter = nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 0.01)
    before = parameter.detach().clone()
    ZOGD([parameter], lr=0.0, mu=1e-3, restore="fixed-point").step(lambda: 0.0)
    bound = 16 * 2.0**-10
    spacing = torch.finfo(torch.float32).eps * (before.abs() + bound)
    assert ((parameter.detach() - before).abs() <= spacing).all()


@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS if kind is not ZOSignSGD])  # rounding turns signs
def test_small_blocks_and_fixed_point_take_the_same_steps(kind, directions, net, batch, monkeypatch):
    def run(**options):
        model = copy.deepcopy(net).double()
        data = (batch[0].double(), batch[1].double())
        optimizer = kind(model.parameters(), lr=1e-3, queries=3, directions=directions, **options)
        for _ in range(5):
            optimizer.step(closure_of(model, data))
        return flat(model)

    whole = run(restore="snapshot")
    gridded = run(restore="fixed-point")
    # δ is rounded by up to μ/128 per entry: about that relative change in u, and in what it leads to.
    torch.testing.assert_close(gridded, whole, atol=2e-2 * (whole - flat(net)).abs().max().item(), rtol=0)
    monkeypatch.setattr(module, "BLOCK_SIZE", 16)
    cut_exact, cut_gridded = run(restore="snapshot"), run(restore="fixed-point")
    torch.testing.assert_close(cut_gridded, cut_exact, atol=2e-2 * (cut_exact - flat(net)).abs().max().item(), rtol=0)


def test_a_direction_drawn_again_equals_one_that_is_kept(net, monkeypatch):
    from zoscope.optim.directions import Direction, new_generator, partition

    blocks = partition(list(net.parameters()), block_size=16)
    for law in DIRECTIONS:
        kept = Direction(blocks, new_generator(3), law=law, keep=True)
        drawn = Direction(blocks, new_generator(3), law=law, keep=False)
        for index in [*range(len(blocks)), *reversed(range(len(blocks)))]:
            for a, b in zip(kept.part(index), drawn.part(index), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_sphere_directions_have_radius_root_d(net):
    from zoscope.optim.directions import Direction, new_generator, partition

    blocks = partition(list(net.parameters()), block_size=16)
    direction = Direction(blocks, new_generator(0), law="sphere", keep=False)
    square = sum(float(u.double().square().sum()) for i in range(len(blocks)) for u in direction.part(i))
    d = sum(p.numel() for p in net.parameters())
    assert math.isclose(square, d, rel_tol=1e-6)


def test_the_estimate_is_unbiased_for_the_gradient():
    target = torch.linspace(-1, 1, 10, dtype=torch.float64)
    parameter = nn.Parameter(torch.zeros(10, dtype=torch.float64))
    moves = []
    optimizer = ZOGD([parameter], lr=1.0, queries=64)
    for _ in range(400):
        parameter.data.zero_()
        optimizer.step(lambda: parameter @ target)
        moves.append(-parameter.detach().clone())
    samples = torch.stack(moves)
    stderr = samples.std(0) / math.sqrt(len(moves))
    assert ((samples.mean(0) - target).abs() < 4 * stderr).all()


@pytest.mark.parametrize(
    ("kind", "reference"),
    [
        (ZOGD, lambda p: torch.optim.SGD(p, lr=0.1)),
        (ZOGDM, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        (ZOAdam, lambda p: torch.optim.Adam(p, lr=0.1)),
    ],
)
def test_in_one_dimension_sphere_directions_give_the_optimizer_of_torch(kind, reference):
    # d = 1: u = ±1, so the estimate of a quadratic's gradient is the gradient.
    ours = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    theirs = nn.Parameter(ours.detach().clone())
    optimizer, other = kind([ours], lr=0.1, directions="sphere"), reference([theirs])
    for _ in range(20):
        optimizer.step(lambda: 1.5 * ours.square().sum())
        other.zero_grad()
        (1.5 * theirs.square().sum()).backward()
        other.step()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_resumed_run_is_identical(kind, net, batch, tmp_path):
    straight, resumed = copy.deepcopy(net), copy.deepcopy(net)
    optimizer = kind(straight.parameters(), lr=1e-3, seed=7)
    for _ in range(10):
        optimizer.step(closure_of(straight, batch))

    first = kind(resumed.parameters(), lr=1e-3, seed=7)
    for _ in range(4):
        first.step(closure_of(resumed, batch))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = kind(resumed.parameters(), lr=5.0, seed=99)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(6):
        second.step(closure_of(resumed, batch))
    assert torch.equal(flat(straight), flat(resumed))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_same_seed_gives_the_same_run_and_another_seed_another(kind, net, batch):
    def run(seed):
        model = copy.deepcopy(net)
        optimizer = kind(model.parameters(), lr=1e-3, seed=seed)
        for _ in range(3):
            optimizer.step(closure_of(model, batch))
        return flat(model)

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))
    assert torch.equal(run(np.random.SeedSequence(3)), run(3))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_learning_rate_schedulers_work(kind, net, batch):
    optimizer = kind(net.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)
    optimizer.step(closure_of(net, batch))
    scheduler.step()
    if kind is ZOGD:
        before = flat(net)
        optimizer.step(closure_of(net, batch))
        assert torch.equal(flat(net), before)
    assert optimizer.param_groups[0]["lr"] == 0.0


def test_groups_have_their_own_step_size_and_frozen_parameters_stay(net, batch):
    net[0].bias.requires_grad_(False)
    optimizer = ZOGD([{"params": net[0].parameters(), "lr": 1e-2}, {"params": net[2].parameters(), "lr": 0.0}], lr=1e-3)
    before = copy.deepcopy(net)
    optimizer.step(closure_of(net, batch))
    assert not torch.equal(net[0].weight, before[0].weight)
    assert torch.equal(net[0].bias, before[0].bias)
    assert torch.equal(net[2].weight, before[2].weight)


def test_training_lowers_the_loss_without_touching_gradients_or_the_global_generator(net, batch):
    closure = closure_of(net, batch)
    start = closure().item()
    state = torch.get_rng_state()
    optimizer = ZOGD(net.parameters(), lr=5e-3)
    for _ in range(300):
        optimizer.step(closure)
    assert closure().item() < 0.9 * start
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("restore", ["snapshot", "fixed-point"])
@pytest.mark.parametrize("call", [1, 2])
def test_a_closure_that_raises_leaves_the_parameters_as_they_were(restore, call, net, batch):
    optimizer = ZOGD(net.parameters(), lr=1e-3, restore=restore)
    optimizer.step(closure_of(net, batch))
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step(closure_of(net, batch))
    before, calls = flat(net), []

    def failing():
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing)
    assert torch.equal(flat(net), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back_exactly(dtype, net):
    net.to(dtype)
    before = flat(net)
    ZOGD(net.parameters(), lr=0.0).step(lambda: 0.0)
    assert torch.equal(flat(net), before)


@pytest.mark.parametrize("restore", ["snapshot", "fixed-point"])
def test_a_non_finite_loss_is_data(restore, net):
    optimizer = ZOGD(net.parameters(), lr=1e-3, restore=restore)
    losses = iter([float("inf"), 1.0, 1.0, 1.0])
    optimizer.step(lambda: next(losses))
    optimizer.step(lambda: next(losses))
    assert not torch.isfinite(flat(net)).all()


def test_parameters_that_are_not_contiguous_move(batch):
    weight = nn.Parameter(torch.randn(8, 6).t())
    before = weight.detach().clone()
    for restore in ("snapshot", "fixed-point"):
        ZOAdam([weight], lr=1e-3, restore=restore).step(lambda: (batch[0] @ weight).square().mean())
    assert not torch.equal(weight.detach(), before)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": 1.0, "mu": 0.0}, "mu"),
        ({"lr": 1.0, "queries": 0}, "queries"),
        ({"lr": 1.0, "directions": "cube"}, "directions"),
    ],
)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_bad_arguments_are_refused(kind, options, name, net):
    with pytest.raises(ValueError, match=name):
        kind(net.parameters(), **options)


def test_bad_momenta_and_a_missing_closure_are_refused(net):
    with pytest.raises(ValueError, match="beta"):
        ZOGDM(net.parameters(), lr=1.0, beta=1.0)
    with pytest.raises(ValueError, match="betas"):
        ZOAdam(net.parameters(), lr=1.0, betas=(0.9, 1.5))
    with pytest.raises(ValueError, match="closure"):
        ZOGD(net.parameters(), lr=1.0).step()
    assert issubclass(ZOGD, ZeroOrderOptimizer)


def test_an_optimizer_in_half_precision_cannot_be_asked_for_a_grid(net):
    with pytest.raises(ValueError, match="snapshot"):
        ZOGD(net.half().parameters(), lr=1.0, restore="fixed-point").step(lambda: 0.0)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (GD(weight_decay=0.1), {"weight_decay": 0.1}),
        (GDM(0.9, 0.0, 0.1), {"momentum": 0.9, "weight_decay": 0.1}),
    ],
)
def test_weight_decay_is_that_of_torch(rule, options):
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64)) for _ in range(2))
    other, state = torch.optim.SGD([theirs], lr=0.1, **options), new_state(rule, [ours])
    for step in range(1, 5):
        theirs.grad = 2.0 * theirs.detach()
        other.step()
        with torch.no_grad():
            rule.update([ours], [2.0 * ours], state, lr=0.1, step=step)
    torch.testing.assert_close(ours, theirs)


def test_dampening_scales_what_enters_the_momentum():
    plain, damped = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    for parameter, rule in ((plain, GDM(0.9)), (damped, GDM(0.9, 0.75))):
        state = new_state(rule, [parameter])
        with torch.no_grad():
            for step in range(1, 5):
                rule.update([parameter], [torch.ones(3)], state, lr=0.1, step=step)
    torch.testing.assert_close(damped.detach(), 0.25 * plain.detach())


@pytest.mark.parametrize("restore", ["snapshot", "fixed-point"])
def test_one_sided_differences_add_half_mu_times_the_curvature_along_the_direction(restore):
    curvature = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)
    parameter = nn.Parameter(torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64))
    calls = []

    def closure():
        calls.append(parameter.detach().clone())
        return 0.5 * (curvature * parameter * parameter).sum()

    optimizer = ZOGD([parameter], lr=1.0, mu=0.25, queries=2, one_sided=True, restore=restore)
    before = float(closure())
    calls.clear()
    assert optimizer.step(closure) == pytest.approx(before, rel=1e-12)
    start, *points = calls
    directions = [(point - start) / 0.25 for point in points]
    slopes = [float((curvature * start * u).sum() + 0.125 * (curvature * u * u).sum()) for u in directions]
    moved = start - sum(c * u for c, u in zip(slopes, directions, strict=True)) / 2
    torch.testing.assert_close(parameter.detach(), moved)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
@pytest.mark.parametrize("kind", [ZOGD, ZOGDM, ZOAdam, ZOSignSGD, ZONormalized])
def test_a_copy_goes_on_as_the_original(kind, twin) -> None:
    def stepped(optimizer, steps: int) -> list[float]:
        (x,) = optimizer.param_groups[0]["params"]
        return [optimizer.step(lambda: (x - 1).square().sum()) for _ in range(steps)]

    original = kind([torch.nn.Parameter(torch.arange(6.0))], lr=1e-3, queries=2, mu=1e-2, seed=3)
    stepped(original, 3)
    other = twin(original)
    assert other.param_groups[0]["params"][0] is not original.param_groups[0]["params"][0]
    assert stepped(other, 3) == stepped(original, 3)
    torch.optim.lr_scheduler.LambdaLR(other, lambda step: 0.5)
    assert stepped(other, 1)[0] > 0


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_has_the_step_sizes_that_set_themselves(twin) -> None:
    def loss(auto: AutoLR, optimizer: ZOGD) -> float:
        (x,) = optimizer.param_groups[0]["params"]
        return auto.step(lambda: x.square().sum())

    optimizer = ZOGD([torch.nn.Parameter(torch.ones(5))], lr=1e-2)
    auto = AutoLR(optimizer, steps=50)
    for _ in range(5):
        loss(auto, optimizer)
    other, other_auto = twin((optimizer, auto))
    assert other.control is not None
    assert loss(other_auto, other) == loss(auto, optimizer)
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("closure", "said"),
    [
        (torch.tensor(1.0), r"step got a Tensor: expected a function .* step\(lambda: loss\(model, batch\)\)"),
        (lambda: None, "the closure returned nothing: expected one number"),
        (lambda: (torch.tensor(1.0), {}), "the closure returned a tuple: expected one number"),
    ],
)
def test_what_is_no_loss_is_said(closure, said) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    for step in (
        ZOGD([parameter], lr=0.1).step,
        AutoLR(ZOGD([parameter], lr=1.0), steps=5).step,
    ):
        with pytest.raises(TypeError, match=said):
            step(closure)
        assert torch.equal(parameter.detach(), torch.ones(3))
