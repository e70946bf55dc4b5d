"""How results become JSON."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest

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
        (Estimate(2.0, 0.1, least=1.0), {"value": 2.0, "stderr": 0.1, "quadrature": 0.0}),
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
