"""TensorBoard scalars of a tracked run, read back by TensorBoard itself."""

from pathlib import Path

import pytest
import torch

import zoscope
from zoscope.integrations.tensorboard import TensorBoard

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def test_measurements_are_scalars_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    curvatures = torch.tensor([5.0, 2.0, 1.0])
    problem = zoscope.Problem.from_function(lambda x: 0.5 * (curvatures * x * x).sum(), torch.ones(3))
    result = zoscope.track(
        problem, lr=0.01, steps=40, every=10, device="cpu", observers=[TensorBoard(tmp_path / "events")]
    )
    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    traces = events.Scalars("curvature/trace")
    assert [event.step for event in traces] == [record.step for record in result.records]
    assert [event.value for event in traces] == pytest.approx([8.0] * 5)
    assert events.Scalars("edge/lr over exact threshold")[-1].value == pytest.approx(result.records[-1].ratio)
