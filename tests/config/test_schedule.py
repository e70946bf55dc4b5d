"""Step sizes of every step of a run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoscope.config.load import Piecewise, Schedule, parse_step_sizes


def test_a_number_is_a_constant():
    assert parse_step_sizes("1e-3") == Schedule("constant", 1e-3)


def test_numbers_from_a_step_on():
    found = parse_step_sizes("0.001, 20000:0.007,3e4:0.008")
    assert found == Piecewise((0, 20000, 30000), (0.001, 0.007, 0.008))
    assert [found.lr_at(step, steps=80000) for step in (0, 19999, 20000, 29999, 30000)] == [
        0.001,
        0.001,
        0.007,
        0.007,
        0.008,
    ]
    assert found.peak == 0.008
    assert found.changes(steps=25000) == (20000,)


@pytest.mark.parametrize(
    "text",
    ["", "x", "0.1,0.2", "5:0.1", "0.1,5:x", "0.1,1.5:0.2", "0.1,5:0.2,5:0.3", "0.1,9:0.2,5:0.3", "0", "-1", "nan"],
)
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011 - the command line adds what it was
        parse_step_sizes(text)


@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(1, 400),
    st.one_of(st.floats(0, 0.9), st.integers(1, 500).map(float)),
)
def test_every_step_has_a_size_above_zero_and_none_passes_the_peak(kind, steps, warmup):
    schedule = Schedule(kind, 0.3, warmup)
    sizes = [schedule.lr_at(step, steps=steps) for step in range(steps)]
    assert all(0 < size <= 0.3 * (1 + 1e-12) for size in sizes)
    start = schedule.warmup_steps(steps)
    assert sizes[:start] == sorted(sizes[:start])
    if start < steps:
        assert sizes[start] == pytest.approx(0.3)
        assert sizes[start:] == sorted(sizes[start:], reverse=True)


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(1e-8, 10)), max_size=5, unique_by=lambda pair: pair[0]))
def test_what_a_configuration_holds_reads_back(later):
    later = sorted(later)
    sizes = Piecewise((0, *(start for start, _ in later)), (0.5, *(value for _, value in later)))
    back = parse_step_sizes(sizes.to_config())
    assert [back.lr_at(s, steps=10**7) for s in (0, *sizes.starts)] == [
        sizes.lr_at(s, steps=10**7) for s in (0, *sizes.starts)
    ]
