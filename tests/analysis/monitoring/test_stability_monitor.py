"""``zoscope.StabilityMonitor`` in a loop of one's own."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import zoscope
from zoscope import NumericalError, UsageError
from zoscope.curvature.operators import HessianOperator


def network() -> tuple[nn.Module, zoscope.Problem]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2))
    data = torch.randn(32, 4), torch.randn(32, 2)
    return model, zoscope.Problem.from_criterion(model, data, nn.MSELoss())


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("zo-gd", lambda p: zoscope.ZOGD(p, 0.01)),
        ("zo-gdm", lambda p: zoscope.ZOGDM(p, 0.002, beta=0.8)),
        ("zo-adam", lambda p: zoscope.ZOAdam(p, 0.001)),
    ],
)
def test_a_loop_with_the_same_optimizer_sees_what_track_sees(name: str, make) -> None:
    model, problem = network()
    optimizer = make(model.parameters())
    lr = optimizer.param_groups[0]["lr"]
    tracked = zoscope.track(problem, optimizer=name, lr=lr, steps=30, every=10, beta=0.8, device="cpu")
    monitor = zoscope.StabilityMonitor(problem, optimizer, every=10, steps=30, device="cpu")
    (batch,) = problem.batches
    monitor.step()
    for _ in range(30):
        loss = optimizer.step(lambda: problem.loss(model, batch))
        monitor.step(loss=loss)
    for seen, expected in zip(monitor.records, tracked.records, strict=True):
        assert seen.step == expected.step
        for field in ("loss", "trace", "lambda_max", "exact", "ratio", "lower", "upper", "threshold"):
            assert getattr(seen, field) == pytest.approx(getattr(expected, field), rel=1e-5), field
    horizons = [record.horizon for record in monitor.records[:-1]]  # nothing remains at the end
    assert horizons == [pytest.approx(record.horizon, rel=1e-5) for record in tracked.records[:-1]]
    losses = [record.loss_mean for record in monitor.records[1:]]
    assert losses == pytest.approx([record.loss_mean for record in tracked.records[1:]], rel=1e-5)


def test_torch_optimizers_are_recognised_with_their_state() -> None:
    model, problem = network()
    for optimizer, name in (
        (torch.optim.SGD(model.parameters(), lr=0.1), "gd"),
        (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), "gdm"),
        (torch.optim.AdamW(model.parameters(), lr=1e-3), "adam"),
    ):
        monitor = zoscope.StabilityMonitor(problem, optimizer, every=2, device="cpu")
        for _ in range(3):
            optimizer.zero_grad()
            problem.loss(model, problem.batches[0]).backward()
            optimizer.step()
            monitor.step()
        assert monitor.optimizer == name
        assert [record.step for record in monitor.records] == [0, 2]
        assert all(record.ratio is not None and record.ratio > 0 for record in monitor.records)


def test_measuring_leaves_the_model_and_the_global_generator_alone() -> None:
    model, problem = network()
    before, state = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
    zoscope.StabilityMonitor(problem, "zo-gd", device="cpu").step(lr=0.01)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_records_go_to_a_file_and_a_run_that_blew_up_is_a_record_too(tmp_path: Path) -> None:
    model, problem = network()
    monitor = zoscope.StabilityMonitor(problem, "zo-gd", every=1, file=tmp_path / "metrics.jsonl", device="cpu")
    monitor.step(lr=0.01)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    assert monitor.step(lr=0.01).trace is None
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert lines[1]["loss"] is None


def test_a_strict_monitor_keeps_the_record_that_it_refuses() -> None:
    _, problem = network()
    options = {"method": "deflated-slq", "rtol": 1e-6, "max_hvps": 20, "device": "cpu"}
    assert zoscope.StabilityMonitor(problem, "zo-gd", **options).step(lr=0.01).precision > 1e-6
    monitor = zoscope.StabilityMonitor(problem, "zo-gd", **options, strict=True)
    with pytest.raises(NumericalError, match="--rtol"):
        monitor.step(lr=0.01)
    assert len(monitor.records) == 1


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    model, problem = network()
    with pytest.raises(ValueError, match="lr is missing"):
        zoscope.StabilityMonitor(problem, "zo-gd").step()
    with pytest.raises(ValueError, match="Nesterov"):
        zoscope.StabilityMonitor(problem, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True))
    with pytest.raises(ValueError, match="expected SGD"):
        zoscope.StabilityMonitor(problem, torch.optim.Rprop(model.parameters()))
    with pytest.raises(ValueError, match="optimizer must be"):
        zoscope.StabilityMonitor(problem, "lion")
    with pytest.raises(UsageError, match=r"monitor\.records"):
        zoscope.StabilityMonitor(problem, "zo-gd", file=tmp_path / "no" / "file", device="cpu").step(lr=0.01)


def test_a_schedule_may_begin_and_end_at_zero() -> None:
    model, problem = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (0.0, 0.5, 0.25, 0.0)[min(step, 3)])
    monitor = zoscope.StabilityMonitor(problem, optimizer, every=4, device="cpu")
    for _ in range(5):
        monitor.step()
        optimizer.step()
        schedule.step()
    assert [record.lr for record in monitor.records] == [0.1, 0.025]


def grouped(model: nn.Module, lr: float, other: float, kind=torch.optim.SGD) -> torch.optim.Optimizer:
    return kind([{"params": model[0].parameters(), "lr": lr}, {"params": model[2].parameters(), "lr": other}])


def test_groups_with_their_own_step_sizes_are_a_preconditioner() -> None:
    model, problem = network()
    lr, other = 0.1, 0.025
    monitor = zoscope.StabilityMonitor(problem, grouped(model, lr, other), device="cpu", dtype="float64")
    record = monitor.step()
    assert record is not None
    with problem.prepare(device="cpu", dtype="float64") as objective:
        hessian = HessianOperator(objective).dense()
    sizes = [lr] * 30 + [other] * 14
    root = torch.diag(torch.tensor(sizes, dtype=torch.float64).sqrt())
    steepest = float(torch.linalg.eigvalsh(root @ hessian @ root)[-1])  # of the step map 1 - diag(η)H
    assert record.ratio == pytest.approx(steepest / 2, rel=1e-6)
    assert record.operator == "preconditioned_hessian"
    assert [notice.code for notice in monitor.warnings] == ["parameter-groups"]


def test_groups_with_one_step_size_change_nothing() -> None:
    model, problem = network()
    one = zoscope.StabilityMonitor(problem, torch.optim.SGD(model.parameters(), lr=0.1), device="cpu").step()
    monitor = zoscope.StabilityMonitor(problem, grouped(model, 0.1, 0.1), device="cpu")
    two = monitor.step()
    assert one is not None
    assert two is not None
    assert one.to_dict() == two.to_dict()
    assert not monitor.warnings


def test_constants_that_differ_are_said() -> None:
    model, problem = network()
    optimizer = grouped(model, 0.1, 0.1)
    optimizer.param_groups[1]["momentum"] = 0.5
    monitor = zoscope.StabilityMonitor(problem, optimizer, device="cpu")
    monitor.step()
    assert any("differ in momentum" in notice.message for notice in monitor.warnings)


def steepest(problem: zoscope.Problem, params: str, decay: float = 0.0) -> float:
    """λ_max of the block of some parameters, with weight decay."""
    with problem.with_params(params).prepare(device="cpu", dtype="float64") as objective:
        return float(torch.linalg.eigvalsh(HessianOperator(objective).dense())[-1]) + decay


HEAD, BODY = "^2", "^0"


@pytest.mark.parametrize("still", ["left out", "frozen", "lr 0"])
def test_what_does_not_move_is_not_measured(still: str) -> None:
    model, problem = network()
    if still == "left out":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model[2].parameters(), lr=0.05)
    else:
        optimizer = grouped(model, 0.0 if still == "lr 0" else 0.5, 0.05)
    problem = problem.with_params(".")  # also what is frozen
    model[0].requires_grad_(still != "frozen")
    monitor = zoscope.StabilityMonitor(problem, optimizer, device="cpu", dtype="float64")
    record = monitor.step()
    assert record is not None
    assert record.lr == 0.05
    assert record.ratio == pytest.approx(0.05 * steepest(problem, HEAD) / 2, rel=1e-6)
    assert [notice.code for notice in monitor.warnings] == ["not-trained"]
    assert "0.weight" in monitor.warnings[0].message


def test_a_layer_that_thaws_is_measured_from_then_on() -> None:
    model, problem = network()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.05)
    monitor = zoscope.StabilityMonitor(problem, optimizer, every=1, device="cpu", dtype="float64")
    monitor.step()
    optimizer.add_param_group({"params": model[0].parameters()})
    monitor.step()
    found = [record.lambda_max for record in monitor.records]
    assert found == pytest.approx([steepest(problem, HEAD), steepest(problem, ".")], rel=1e-6)
    assert not monitor.warnings


def test_an_optimizer_that_moves_more_than_the_problem_varies_is_said() -> None:
    model, problem = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = zoscope.StabilityMonitor(problem.with_params(HEAD), optimizer, device="cpu")
    monitor.step()
    assert [notice.code for notice in monitor.warnings] == ["not-measured"]


def test_an_optimizer_of_a_copy_is_refused() -> None:
    model, problem = network()
    other = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.05)
    with pytest.raises(ValueError, match="none of the 4 parameter tensors"):
        zoscope.StabilityMonitor(problem, other)
    monitor = zoscope.StabilityMonitor(problem, other, name="gd", device="cpu")
    assert monitor.step().lr == 0.05
    assert [notice.code for notice in monitor.warnings] == ["other-parameters"]


def test_of_several_optimizers_those_count_that_hold_the_parameters() -> None:
    model, problem = network()
    body, head = (torch.optim.SGD(model[n].parameters(), lr=lr) for n, lr in ((0, 0.4), (2, 0.05)))
    one = zoscope.StabilityMonitor(problem.with_params(HEAD), [body, head], device="cpu", dtype="float64").step()
    assert one.lr == 0.05
    assert one.ratio == pytest.approx(0.05 * steepest(problem, HEAD) / 2, rel=1e-6)
    both = zoscope.StabilityMonitor(problem, [body, head], device="cpu").step()
    groups = zoscope.StabilityMonitor(problem, grouped(model, 0.4, 0.05), device="cpu").step()
    assert both.ratio == pytest.approx(groups.ratio)
    adam = torch.optim.Adam(model[2].parameters())
    with pytest.raises(ValueError, match="several rules"):
        zoscope.StabilityMonitor(problem, [body, adam])


def test_weight_decay_is_part_of_the_ratio() -> None:
    model, problem = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, weight_decay=0.7, momentum=0.5)
    record = zoscope.StabilityMonitor(problem, optimizer, device="cpu", dtype="float64").step()
    assert record.ratio == pytest.approx(0.3 * steepest(problem, ".", decay=0.7) / 3, rel=1e-6)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_weight_decay_of_adam_is_said_where_it_matters(kind) -> None:
    model, problem = network()
    codes = []
    for decay in (0.0, 1e-9, 30.0):
        optimizer = kind(model.parameters(), lr=1e-3, weight_decay=decay)
        monitor = zoscope.StabilityMonitor(problem, optimizer, device="cpu")
        monitor.step()
        codes.append([notice.code for notice in monitor.warnings if notice.code == "weight-decay"])
    assert codes == [[], [], ["weight-decay"]]


def test_weight_decay_of_groups_with_other_step_sizes_is_said() -> None:
    model, problem = network()
    for lr, expected in ((0.3, []), (0.001, ["weight-decay"])):
        optimizer = grouped(model, lr, 0.3)
        for group in optimizer.param_groups:
            group["weight_decay"] = 3.0
        monitor = zoscope.StabilityMonitor(problem, optimizer, device="cpu", dtype="float64")
        record = monitor.step()
        sizes = torch.tensor([lr] * 30 + [0.3] * 14, dtype=torch.float64)
        with problem.prepare(device="cpu", dtype="float64") as objective:
            hessian = HessianOperator(objective).dense() + 3.0 * torch.eye(44, dtype=torch.float64)
        true = float(torch.linalg.eigvalsh(sizes.sqrt()[:, None] * hessian * sizes.sqrt())[-1]) / 2
        assert [notice.code for notice in monitor.warnings if notice.code == "weight-decay"] == expected
        assert abs(true - record.ratio) <= 1e-6 + 3.0 * (0.3 - lr) / 2


@pytest.mark.parametrize("late", [0, 2])
def test_layers_that_join_adam_later_have_a_bias_correction_of_their_own(late: int) -> None:
    model, problem = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-4)
    for first in (False, True):
        model[late].requires_grad_(first)
        for _ in range(20 - 15 * first):
            optimizer.zero_grad()
            problem.loss(model, problem.batches[0]).backward()
            optimizer.step()
    record = zoscope.StabilityMonitor(problem, optimizer, device="cpu", dtype="float64").step()
    scale = []
    for p in model.parameters():
        state, (first, second) = optimizer.state[p], optimizer.defaults["betas"]
        t = float(state["step"])
        scale.append((1 - first**t) * ((state["exp_avg_sq"] / (1 - second**t)).sqrt() + 1e-4).flatten().double())
    root = torch.cat(scale).rsqrt()
    with problem.prepare(device="cpu", dtype="float64") as objective:
        hessian = HessianOperator(objective).dense()
    assert record.lambda_max == pytest.approx(
        float(torch.linalg.eigvalsh(root[:, None] * hessian * root)[-1]), rel=1e-4
    )


def test_amsgrad_divides_by_the_largest_second_moment() -> None:
    model, problem = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, amsgrad=True)
    problem.loss(model, problem.batches[0]).backward()
    optimizer.step()
    monitor = zoscope.StabilityMonitor(problem, optimizer, device="cpu", every=1)
    before = monitor.step().preconditioner
    for state in optimizer.state.values():
        state["max_exp_avg_sq"] *= 100
    assert monitor.step().preconditioner[0] > 2 * before[0]


def test_steps_of_ones_own_need_a_name() -> None:
    class Sharp(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model, problem = network()
    with pytest.raises(ValueError, match="step\\(\\) is its own"):
        zoscope.StabilityMonitor(problem, Sharp(model.parameters(), lr=0.1))
    assert (
        zoscope.StabilityMonitor(problem, Sharp(model.parameters(), lr=0.1), name="gd", device="cpu").step().lr == 0.1
    )
    with pytest.raises(ValueError, match="maximize"):
        zoscope.StabilityMonitor(problem, torch.optim.SGD(model.parameters(), lr=0.1, maximize=True))


def test_clipped_gradients_are_said() -> None:
    model, problem = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = zoscope.StabilityMonitor(problem, optimizer, max_grad_norm=1e-3, device="cpu")
    monitor.step()
    assert [notice.code for notice in monitor.warnings] == ["clipped"]


@pytest.mark.parametrize(("factor", "codes"), [(1.0, []), (1.5, []), (6.0, ["other-loss"])])
def test_a_loop_with_another_loss_is_found_out(factor: float, codes: list[str]) -> None:
    model, problem = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = zoscope.StabilityMonitor(problem, optimizer, every=10, device="cpu")
    monitor.step()
    for _ in range(20):
        optimizer.zero_grad()
        loss = factor * problem.loss(model, problem.batches[0])
        loss.backward()
        optimizer.step()
        monitor.step(loss=loss.detach())
    assert [notice.code for notice in monitor.warnings] == codes


def test_an_optimizer_of_accelerate_is_looked_into() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, problem = network()
    bare = torch.optim.AdamW(model.parameters(), lr=1e-3)
    prepared, optimizer = accelerate.Accelerator(cpu=True).prepare(model, bare)
    around = zoscope.Problem.from_criterion(prepared, problem.batches, nn.MSELoss())
    found = [
        zoscope.StabilityMonitor(p, o, device="cpu").step().ratio for p, o in ((problem, bare), (around, optimizer))
    ]
    assert found[0] == pytest.approx(found[1])


def parabola(x: torch.Tensor) -> torch.Tensor:
    return (torch.arange(1.0, 4.0) * x.square()).sum()


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda monitor: pickle.loads(pickle.dumps(monitor))])
def test_monitors_are_copied_with_what_they_watch(twin) -> None:
    problem = zoscope.Problem.from_function(parabola, torch.ones(3))
    optimizer = zoscope.ZOGD(problem.model.parameters(), lr=1e-2, queries=8)
    stable = zoscope.StabilityMonitor(problem, optimizer, every=1, device="cpu")
    stable.step()
    other = twin(stable)
    assert other.step().to_dict() == stable.step().to_dict()
    forward = zoscope.ForwardMonitor(optimizer)
    other = twin(forward)  # with an optimizer and parameters of its own
    assert other.step(lambda: parabola(torch.ones(3))).trace == forward.step(lambda: parabola(torch.ones(3))).trace


def test_with_the_loops_batch_size_the_threshold_is_that_of_mini_batches() -> None:
    """Examples of unequal curvature: a batch of one is far less stable than all of them."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(32, 6, generator=generator) * torch.linspace(0.1, 3, 32)[:, None]
    targets = inputs @ torch.ones(6, 1)
    problem = zoscope.Problem.from_criterion(
        torch.nn.Linear(6, 1, bias=False), [(inputs, targets)], torch.nn.functional.mse_loss
    )
    wanted = zoscope.bounds(problem, optimizers=["gd"], batch_size=2, device="cpu", rtol=0.01).optimizers["gd"]
    assert wanted.minibatch is not None
    assert wanted.minibatch.exact is not None
    optimizer = zoscope.ZOGD(problem.model.parameters(), lr=1e-3)
    everything, batches = (
        zoscope.StabilityMonitor(problem, optimizer, batch_size=size, device="cpu", rtol=0.01).step()
        for size in (None, 2)
    )
    assert everything.exact_batches is None
    assert "exact_batches" not in everything.to_dict()
    assert batches.exact == pytest.approx(everything.exact)
    assert batches.exact_batches == pytest.approx(wanted.minibatch.exact.value, rel=0.1)
    assert batches.exact_batches < 0.8 * batches.exact
    assert batches.ratio == pytest.approx(1e-3 / batches.exact_batches)
    assert zoscope.StabilityMonitor(problem, "gd", batch_size=2, device="cpu").step(lr=1e-3).exact_batches is None
