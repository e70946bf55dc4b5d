"""How results become JSON."""

import json
import math
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

import zoscope
from zoscope import Estimate
from zoscope.result import JsonObject, encode, pick


@dataclass
class Inner(JsonObject):
    value: float
    hidden: object = field(default=None, repr=False)


@dataclass
class Outer(JsonObject):
    keys = "name=title inner value=inner.value twice gone? kept?"

    title: str
    inner: Inner | None
    gone: int | None = None
    kept: int | None = 0

    @property
    def twice(self) -> str:
        return 2 * self.title


@dataclass
class Foreign:
    pair: tuple[float, float]
    name: str = "a name"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.5, 1.5),
        (math.inf, None),
        (math.nan, None),
        (np.float64(-math.inf), None),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array([[1.0, math.nan]]), [[1.0, None]]),
        ({"a": (1, "two", None)}, {"a": [1, "two", None]}),
        (Estimate(2.0, 0.1, ends=(1.0, 4.0)), {"value": 2.0, "stderr": 0.1, "quadrature": 0.0}),
        (Foreign((0.0, math.inf)), {"pair": [0.0, None], "name": "a name"}),
        (Inner(1.0, hidden=object()), {"value": 1.0}),
    ],
)
def test_values_become_plain_json(value: object, expected: object) -> None:
    found = encode(value)
    assert found == expected
    assert type(found) is type(expected)


def test_keys_rename_reach_into_attributes_and_leave_out_what_is_none() -> None:
    expected = {"name": "a", "inner": {"value": 1.0}, "value": 1.0, "twice": "aa", "kept": 0}
    assert list(Outer("a", Inner(1.0)).to_dict().items()) == list(expected.items())
    assert Outer("a", None).to_dict() == expected | {"inner": None, "value": None}


def test_an_unknown_key_is_a_mistake() -> None:
    with pytest.raises(AttributeError, match="gone"):
        pick(Inner(1.0), "gone?")


def parabola(x: torch.Tensor) -> torch.Tensor:
    return x.square().sum()


def problem() -> zoscope.Problem:
    return zoscope.Problem.from_function(parabola, torch.ones(2))


def test_results_become_json_text() -> None:
    result = zoscope.bounds(problem(), optimizers=["gd"], device="cpu")
    assert json.loads(result.to_json(indent=2)) == result.to_dict()
    assert "\n" not in result.to_json()


def test_results_become_data_frames_with_a_row_for_what_they_list() -> None:
    pytest.importorskip("pandas")
    found = zoscope.bounds(problem(), optimizers=["gd", "adam"], device="cpu")
    frame = found.to_frame()
    assert list(frame["name"]) == ["gd", "adam"]
    assert frame["zo.horizon.lower"][0] == found.optimizers["gd"].horizon.lower
    tracked = zoscope.track(problem(), optimizer="gd", lr=0.1, steps=4, every=2, device="cpu")
    assert list(tracked.to_frame()["step"]) == [0, 2, 4]


def test_without_pandas_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(zoscope.UsageError, match="pip install pandas"):
        zoscope.bounds(problem(), optimizers=["gd"], device="cpu").to_frame()


def test_functions_of_python_take_a_function_or_a_spec(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = zoscope.bounds(problem(), optimizers=["gd"], device="cpu")
    found = zoscope.bounds(problem, optimizers=["gd"], device="cpu")
    assert found.optimizers["gd"].exact == expected.optimizers["gd"].exact
    assert found.spec == "problem"
    (tmp_path / "model.py").write_text(
        "import torch, zoscope\nproblem = zoscope.Problem.from_function(lambda x: x.square().sum(), torch.ones(2))\n"
    )
    monkeypatch.chdir(tmp_path)
    for spec in ("model.py", tmp_path / "model.py"):
        assert zoscope.moments(spec, device="cpu").moments.trace.value == pytest.approx(4.0)
    assert zoscope.StabilityMonitor("model.py:problem", "gd", device="cpu").step(lr=0.5).ratio == pytest.approx(0.5)
    with pytest.raises(zoscope.UsageError, match="no_such_file"):
        zoscope.spectrum("no_such_file.py")
    with pytest.raises(zoscope.SpecError, match="returned None"):
        zoscope.bounds(lambda: None)
    with pytest.raises(ValueError, match=r"must be a zoscope.Problem, got Linear"):
        zoscope.bounds(torch.nn.Linear(2, 2))
