import copy
import math

import pytest
import torch
from torch import Tensor, nn

from zoscope import ZOGD, ZOGDM, AutoLR, NumericalError, SpecError, ZOAdam, ZONormalized, ZOSignSGD
from zoscope.optim.step_size import StepSizeController

ALL = [ZOGD, ZOGDM, ZOAdam, ZONormalized, ZOSignSGD]


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in net.parameters()])


class Data:
    """Regression on random features, in mini-batches."""

    def __init__(self, net: nn.Module, *, batch: int | None = None, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(120, 6, generator=generator)
        self.y = torch.tanh(self.x[:, :3]) + 0.3 * self.x[:, 3:]
        self.net, self.batch, self.generator, self.factor = net, batch, generator, 1.0
        self.index: Tensor | slice = slice(None)
        self.evaluations = 0

    def draw(self) -> None:
        if self.batch is not None:
            self.index = torch.randperm(len(self.x), generator=self.generator)[: self.batch]

    def loss(self) -> Tensor:
        self.evaluations += 1
        return self.factor * nn.functional.mse_loss(self.net(self.x[self.index]), self.y[self.index])

    @torch.no_grad()
    def whole(self) -> float:
        return float(self.factor * nn.functional.mse_loss(self.net(self.x), self.y))


def train(auto: AutoLR, data: Data, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        data.draw()
        losses.append(auto.step(data.loss))
    return losses


def lr_after(steps: int, *, falls: float, of: int) -> float:
    """Step size where every step lowers the loss by ``falls`` times the damage of its noise; the edge is 1.4e-2."""
    controller, loss = StepSizeController(of), 0.05
    for step in range(steps):
        curvature = 100.0 + 63.0 * (-1) ** step  # Tr H = 100, ‖H‖² = 2,000
        decision = controller.observe([(-1.0) ** step], loss + 1e-9 * (-1) ** (step // 2), [curvature])
        loss -= falls * 0.5 * decision.lr**2 * 100.0
    return decision.lr


def test_the_further_a_loss_falls_the_faster_the_step_grows():
    slow, fast = (lr_after(300, falls=falls, of=3_000) for falls in (0.6, 30.0))
    assert fast > 3.0 * slow


def test_damage_that_there_is_time_to_win_back_is_allowed():
    # A fall of 0.2 D: too little in a short run, enough in a long one.
    assert lr_after(300, falls=0.2, of=600) < 1e-5
    assert lr_after(3_000, falls=0.2, of=50_000) > 1e-3


@pytest.mark.parametrize("batch", [None, 15])
@pytest.mark.parametrize("kind", ALL)
def test_it_trains_without_being_told_a_step_size(kind, batch, net):
    data = Data(net, batch=batch)
    start = data.whole()
    auto = AutoLR(kind(net.parameters(), lr=1.0), steps=400)
    train(auto, data, 400)
    assert data.whole() < 0.6 * start
    assert data.evaluations <= 1.15 * 2 * 400
    assert auto.last is not None
    assert auto.last.step == 400


def test_what_it_measures_is_the_trace_and_the_gradient(net):
    data = Data(net)
    auto = AutoLR(ZOGD(net.parameters(), lr=1.0), steps=10_000)
    auto._controller.resting = 400  # it measures, and does not move
    train(auto, data, 400)
    theta = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    names = [name for name, _ in net.named_parameters()]

    def loss(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [p.numel() for p in net.parameters()])
        tensors = {n: t.view_as(p) for n, t, p in zip(names, parts, net.parameters(), strict=True)}
        return nn.functional.mse_loss(torch.func.functional_call(net, tensors, (data.x,)), data.y)

    hessian = torch.autograd.functional.hessian(loss, theta)
    gradient = torch.autograd.functional.jacobian(loss, theta)
    trace, norm = float(hessian.trace()), float(hessian.square().sum())
    controller = auto._controller
    assert controller.trace.mean == pytest.approx(trace, abs=5 * math.sqrt(2 * norm / 12))
    assert 0.5 * controller.spread.mean == pytest.approx(norm, rel=5 * math.sqrt(12 / 48))
    assert controller.gradient_sq == pytest.approx(float(gradient.square().sum()), rel=5 * math.sqrt(2 / 32))


@pytest.mark.parametrize("restore", ["snapshot", "fixed-point"])
@pytest.mark.parametrize("one_sided", [False, True])
def test_curvatures_are_right_however_parameters_come_back(restore, one_sided):
    theta = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    weights = torch.tensor([3.0, 1.0, 7.0], dtype=torch.float64)
    optimizer = ZOGD([theta], lr=1.0, one_sided=one_sided, restore=restore)
    seen: list[float] = []

    class Look:
        def reach(self) -> float:
            return 0.05

        def choose(self, slopes, loss, curvatures):
            seen.extend(curvatures)
            optimizer.param_groups[0]["lr"] = 0.0
            return slopes

    before = None
    optimizer.control = Look()
    for seed in range(5):
        optimizer.reseed(seed)
        optimizer.step(lambda: 0.5 * (weights * theta**2).sum() + theta.sum())
        u = torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert seen[-1] == pytest.approx(float((weights * u * u).sum()), rel=2e-2 if restore == "fixed-point" else 1e-6)
        before = theta.detach().clone() if before is None else before
        assert torch.equal(theta.detach(), before)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, options) for kind in (ZOGD, ZONormalized, ZOSignSGD) for options in ({}, {"directions": "sphere"})),
        (ZOGD, {"queries": 3}),
        (ZONormalized, {"queries": 3}),
        (ZOGD, {"weight_decay": 0.1}),
    ],
)
def test_steps_are_taken_back_from_their_numbers(kind, options, net):
    net.double()
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    optimizer = kind(net.parameters(), lr=1e-2, **options)
    before, log = flat(net), []
    for seed in range(50):
        optimizer.reseed(seed)
        optimizer.step(lambda: net(x).square().mean())
        log.append((seed, [(f - g) / (2 * optimizer.mu) for f, g in optimizer.evaluations]))
    assert not torch.allclose(flat(net), before, rtol=1e-3)
    for seed, slopes in reversed(log):
        optimizer.undo(seed, slopes, [1e-2])
    assert torch.allclose(flat(net), before, rtol=0, atol=1e-12)


def test_an_optimizer_with_a_memory_says_that_numbers_are_not_enough(net):
    with pytest.raises(ValueError, match="has a memory"):
        ZOAdam(net.parameters(), lr=1e-3).undo(0, [1.0], [1e-3])


@pytest.mark.parametrize("kind", [ZOGD, ZOGDM, ZOAdam])
@pytest.mark.parametrize("seed", range(4))
def test_a_landscape_that_turns_ten_times_as_sharp_at_half_time(kind, seed, net):
    data = Data(net, batch=30, seed=seed)
    auto = AutoLR(kind(net.parameters(), lr=1.0, seed=seed), steps=600)
    train(auto, data, 300)
    before = data.whole()
    data.factor = 10.0
    train(auto, data, 300)
    assert data.whole() / 10.0 < before


@pytest.mark.parametrize("kind", [ZOGD, ZOAdam])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e6])
def test_a_batch_gone_wrong_does_not_end_the_run(kind, bad, net):
    data = Data(net, batch=30)
    start = data.whole()
    auto = AutoLR(kind(net.parameters(), lr=1.0), steps=400)
    train(auto, data, 200)
    theta = flat(net)
    calls = iter([bad, -bad if math.isfinite(bad) else bad, 0.0])
    auto.step(lambda: torch.tensor(next(calls)))
    assert torch.isfinite(flat(net)).all()
    assert (flat(net) - theta).norm() < theta.norm()
    train(auto, data, 199)
    assert data.whole() < 0.6 * start
    assert auto.last is not None
    assert auto.last.clipped if math.isfinite(bad) else auto.rollbacks


def test_a_run_that_is_saved_and_resumed_equals_one_that_was_not(net):
    def runs(kind):
        model = copy.deepcopy(net)
        optimizer = kind(model.parameters(), lr=1.0)
        return model, optimizer, AutoLR(optimizer, steps=200)

    for kind in (ZOGD, ZOGDM, ZOAdam):
        model, _, auto = runs(kind)
        train(auto, Data(model), 200)
        first, optimizer, half = runs(kind)
        train(half, Data(first), 90)
        saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), half.state_dict()))
        second, optimizer, rest = runs(kind)
        second.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        rest.load_state_dict(saved[2])
        train(rest, Data(second), 110)
        assert torch.equal(flat(second), flat(model))


def test_groups_keep_their_proportions(net):
    first, *rest = net.parameters()
    optimizer = ZOGD([{"params": [first], "lr": 0.5}, {"params": rest, "lr": 2.0}], lr=1.0)
    auto = AutoLR(optimizer, steps=100)
    train(auto, Data(net), 50)
    small, large = (group["lr"] for group in optimizer.param_groups)
    assert large == auto.lr > 0
    assert small == pytest.approx(0.25 * large)


@pytest.mark.parametrize(("schedule", "half"), [("linear", 0.5), ("cosine", 0.5)])
def test_the_schedule_is_on_top(schedule, half):
    controller = StepSizeController(1000, schedule=schedule)
    controller.step = 501
    assert controller._factor() == pytest.approx(half)
    controller.step = 1000
    assert controller._factor() < 1e-2


def test_a_loop_of_ones_own(net):
    data = Data(net, batch=30)
    start, mu, steps = data.whole(), 1e-3, 400

    def move(seed: int, amount: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn(p.shape, generator=generator), alpha=amount)

    auto = AutoLR(steps=steps, undo=move)
    with torch.no_grad():
        for seed in range(steps):
            data.draw()
            if seed == 200:
                data.factor = 10.0
            here = float(data.loss()) if auto.wants_loss else None
            move(seed, mu)
            plus = float(data.loss())
            move(seed, -2 * mu)
            minus = float(data.loss())
            move(seed, mu)
            lr = auto.observe(plus, minus, here, mu=mu, seed=seed)
            move(seed, -lr * (plus - minus) / (2 * mu))
    assert data.whole() / 10.0 < 0.6 * start
    with pytest.raises(ValueError, match="without an optimizer"):
        auto.step(data.loss)


def test_near_a_floor_it_does_not_climb():
    # Labels are noise: a batch of 5 pulls the parameters about, and no step size that can be seen helps.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 20, generator=generator)
    y = torch.randn(40, 1, generator=generator)
    ends = []
    for seed in range(8):
        net = nn.Linear(20, 1)
        solution = torch.linalg.lstsq(torch.cat([x, torch.ones(40, 1)], 1), y).solution
        with torch.no_grad():
            net.weight.copy_(solution[:-1].T)
            net.bias.copy_(solution[-1])
        start = float(nn.functional.mse_loss(net(x), y).detach())
        auto = AutoLR(ZOGD(net.parameters(), lr=1.0, seed=seed), steps=300)
        order = torch.Generator().manual_seed(seed)
        for _ in range(300):
            index = torch.randperm(40, generator=order)[:5]
            auto.step(lambda index=index, net=net: nn.functional.mse_loss(net(x[index]), y[index]))
        ends.append(float(nn.functional.mse_loss(net(x), y).detach()) / start)
    assert sum(ends) / len(ends) < 1.03


@pytest.mark.parametrize(
    "options",
    [{"steps": 0}, {"steps": 10, "margin": 0.0}, {"steps": 10, "margin": 1.5}, {"steps": 10, "schedule": "x"}],
)
def test_arguments_out_of_range_are_refused(options, net):
    with pytest.raises(ValueError, match="must"):
        AutoLR(ZOGD(net.parameters(), lr=1.0), **options)


def test_an_optimizer_that_is_not_zeroth_order_is_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"a SGD: expected one of zoscope's.*observe"):
        AutoLR(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1), steps=10)


@pytest.mark.parametrize("varying", ["batch", "dropout"])
def test_a_loss_that_is_another_at_every_call_is_refused(varying, net):
    data = Data(net, batch=15)
    dropout = nn.Dropout(0.3)

    def loss() -> Tensor:
        if varying == "batch":
            data.draw()
            return data.loss()
        return nn.functional.mse_loss(dropout(net(data.x)), data.y)

    before = flat(net)
    with pytest.raises(SpecError, match="same batch in every call"):
        AutoLR(ZOGD(net.parameters(), lr=1.0), steps=100).step(loss)
    assert torch.equal(flat(net), before)


def test_a_loss_that_is_no_number_from_the_start_is_refused(net):
    auto = AutoLR(ZOGD(net.parameters(), lr=1.0), steps=50)
    with pytest.raises(NumericalError, match="the loss of the first batch is nan"):
        auto.step(lambda: torch.tensor(math.nan))


def test_a_run_whose_loss_does_not_come_back_is_given_up_where_it_was_worth_keeping(net):
    auto = AutoLR(ZOGD(net.parameters(), lr=1.0, seed=1), steps=200)
    train(auto, Data(net), 40)
    for _ in range(19):
        auto.step(lambda: torch.tensor(math.nan))
    with pytest.raises(NumericalError, match="not been finite for 20 steps in a row, the last at step 60"):
        auto.step(lambda: torch.tensor(math.nan))
    assert math.isfinite(flat(net).sum())


def test_a_loss_of_several_numbers_is_refused(net):
    auto = AutoLR(ZOGD(net.parameters(), lr=1.0), steps=50)
    with pytest.raises(ValueError, match=r"shape \(3,\): expected one number"):
        auto.step(lambda: torch.ones(3))


def test_a_record_prints_itself_in_short(net):
    auto = AutoLR(ZOGD(net.parameters(), lr=1.0, seed=1), steps=100)
    train(auto, Data(net), 10)
    assert str(auto.last).startswith("step 10: loss ")
    assert len(str(auto.last)) < 100
