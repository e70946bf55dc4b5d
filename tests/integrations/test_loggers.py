"""Where numbers of a run go: TensorBoard itself, and stand-ins for packages that may not be here."""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import zoscope
from zoscope.cli.app import run
from zoscope.integrations.loggers import MLflow, TensorBoard, WandB

CURVATURES = torch.tensor([5.0, 2.0, 1.0])


def problem() -> zoscope.Problem:
    return zoscope.Problem.from_function(lambda x: 0.5 * (CURVATURES * x * x).sum(), torch.ones(3))


class Kept:
    """A log of one's own."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []

    def __call__(self, values: Mapping[str, float], step: int) -> None:
        self.lines.append((step, dict(values)))

    def of(self, name: str) -> list[tuple[int, float]]:
        return [(step, values[name]) for step, values in self.lines if name in values]


class FakeWandB:
    """As much of the package as is used."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged = Kept()
        self.finished = 0

    def init(self, **options: Any) -> SimpleNamespace:
        self.begun.append(options)

        def finish() -> None:
            self.finished += 1

        return SimpleNamespace(log=lambda values, step: self.logged(values, step), finish=finish)


class FakeMLflow:
    """As much of the package as is used."""

    def __init__(self) -> None:
        self.active: dict[str, Any] | None = None
        self.logged = Kept()

    def active_run(self) -> dict[str, Any] | None:
        return self.active

    def start_run(self, **options: Any) -> None:
        self.active = options

    def end_run(self) -> None:
        self.active = None

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        assert self.active is not None
        self.logged(values, step)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandB:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMLflow:
    fake = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    return fake


def test_a_tracked_run_hands_over_measurements_and_losses_of_steps_in_order() -> None:
    log = Kept()
    result = zoscope.track(problem(), lr=0.01, steps=40, every=10, device="cpu", loggers=[log])
    steps = [step for step, _ in log.lines]
    assert steps == sorted(steps)
    assert log.of("zoscope/trace") == [(record.step, pytest.approx(8.0)) for record in result.records]
    assert log.of("zoscope/ratio")[-1] == (40, result.records[-1].ratio)
    assert [step for step, _ in log.of("zoscope/step_loss")] == list(range(1, 41))
    assert all(math.isfinite(value) for _, values in log.lines for value in values.values())


def test_auto_lr_hands_over_what_it_knows_every_so_often() -> None:
    log = Kept()
    x = torch.nn.Parameter(torch.ones(3))
    auto = zoscope.AutoLR(zoscope.ZOGD([x], lr=1.0), steps=25, loggers=[log], log_every=10)
    losses = [auto.step(lambda: 0.5 * (CURVATURES * x * x).sum()) for _ in range(25)]
    assert [step for step, _ in log.lines] == [1, 11, 21, 25]
    assert log.of("zoscope/loss") == [(step, losses[step - 1]) for step in (1, 11, 21, 25)]
    assert auto.last is not None
    assert log.of("zoscope/lr")[-1] == (25, auto.last.lr)
    with pytest.raises(ValueError, match="log_every"):
        zoscope.AutoLR(steps=1, log_every=0)


def test_tensorboard_has_the_scalars_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first in (0, 3):
        log = TensorBoard(tmp_path)
        for step in range(first, 5):
            log({"zoscope/trace": 10.0 * first + step}, step)
        log.close()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("zoscope/trace")]
    assert found == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 33.0), (4, 34.0)]


def test_wandb_gets_a_run_of_its_own_or_the_one_that_goes_on(wandb: FakeWandB) -> None:
    log = WandB(project="mezo")
    log({"zoscope/trace": 8.0}, 3)
    log.close()
    assert (wandb.begun, wandb.finished) == ([{"project": "mezo"}], 1)
    assert wandb.logged.lines == [(3, {"zoscope/trace": 8.0})]
    WandB(run=SimpleNamespace(log=None, finish=None)).close()
    assert (len(wandb.begun), wandb.finished) == (1, 1)


def test_mlflow_gets_a_run_of_its_own_or_the_active_one(mlflow: FakeMLflow) -> None:
    log = MLflow(run_name="first")
    log({"zoscope/trace": 8.0}, 3)
    log.close()
    assert mlflow.active is None
    assert mlflow.logged.lines == [(3, {"zoscope/trace": 8.0})]
    mlflow.start_run(run_name="the user's")
    MLflow().close()
    assert mlflow.active == {"run_name": "the user's"}


def test_the_command_line_names_loggers(
    wandb: FakeWandB, mlflow: FakeMLflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_pictures: None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(
        "import torch, zoscope\nproblem = zoscope.Problem.from_function(lambda x: (x * x).sum(), torch.ones(3))\n"
    )
    options = ["--lr", "0.01", "--steps", "20", "--every", "10", "--quiet", "--run", "run"]
    assert run(["track", "model.py", *options, "--logger", "wandb", "--logger", "mlflow", "--tensorboard"]) == 0
    assert wandb.finished == 1
    assert mlflow.active is None
    assert wandb.logged.lines == mlflow.logged.lines
    assert [step for step, _ in wandb.logged.of("zoscope/trace")] == [0, 10, 20]
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_a_logger_that_there_is_not_is_refused_before_the_spec_loads(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["track", "nowhere.py", "--lr", "0.1", "--logger", "wanb"]) == 2
    assert "--logger: unknown value 'wanb'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "make"), [("wandb", WandB), ("mlflow", MLflow), ("tensorboard", lambda: TensorBoard("events"))]
)
def test_a_package_that_is_missing_is_named(name: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(zoscope.UsageError, match=f"needs {name}, which is not installed. Install it with: pip install"):
        make()
