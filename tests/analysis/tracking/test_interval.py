"""When a run is measured."""

import itertools

import pytest

import zoscope
from zoscope import Record
from zoscope.analysis.track_loop import MEASURING_SHARE, PASSES_PER_HVP, MeasurementSchedule, automatic_interval
from zoscope.analysis.track_results import TrackRequest
from zoscope.config.load import Schedule

from .problems import network


def request(**options):
    return TrackRequest.of(**{"optimizer": "zo-gd", "lr": Schedule("constant", 1e-3), "steps": 10**6, **options})


def share(interval, *, hvps, passes_per_step):
    return hvps * PASSES_PER_HVP / (interval * passes_per_step)


@pytest.mark.parametrize(
    ("options", "hvps", "passes"),
    [
        ({}, 150, 2),
        ({"queries": 4}, 150, 8),
        ({"optimizer": "gd"}, 150, 3),
        ({"optimizer": "zo-adam"}, 158, 2),
        ({"max_hvps": 30}, 30, 2),
        ({"batch_size": 10}, 150, 0.2),
    ],
)
def test_measuring_takes_a_fifth_of_the_passes_at_most(options, hvps, passes):
    interval = automatic_interval(request(**options), dimension=10**5, examples=100)
    assert MEASURING_SHARE / 2 <= share(interval, hvps=hvps, passes_per_step=passes) <= MEASURING_SHARE


def test_a_small_problem_is_dense_and_cheap():
    assert automatic_interval(request(), dimension=10, examples=100) == 150


def test_a_short_run_is_measured_in_the_middle_too():
    assert automatic_interval(request(steps=100), dimension=10**5, examples=100) == 50
    assert automatic_interval(request(steps=1), dimension=10**5, examples=100) == 1


def at(step, ratio):
    return Record(step=step, loss=1.0, lr=ratio, lr_next=ratio, exact=1.0)


def test_the_end_is_always_measured():
    clock = MeasurementSchedule(30, 100)
    due = []
    while clock.due < 100:
        clock.measured(at(clock.due, 0.5))
        due.append(clock.due)
    assert due == [30, 60, 90, 100]


def test_an_adaptive_interval_shrinks_while_the_ratio_moves_and_grows_while_it_does_not():
    clock = MeasurementSchedule(100, 10**6, adaptive=True)
    clock.measured(at(0, 0.1))
    for ratio in (0.2, 0.4, 0.8):
        clock.measured(at(clock.due, ratio))
    assert clock.interval == 25
    for _ in range(8):
        clock.measured(at(clock.due, 0.8))
    assert clock.interval == 400


def test_a_point_without_a_threshold_changes_nothing():
    clock = MeasurementSchedule(100, 10**6, adaptive=True)
    clock.measured(at(0, 0.1))
    clock.measured(Record(step=100, loss=1.0, lr=0.5, lr_next=0.5))
    assert clock.interval == 100


def test_an_adaptive_run_measures_more_often_where_the_step_size_jumps():
    result = zoscope.track(network(), lr="0.001,400:0.01", steps=800, every="adaptive", max_hvps=30)
    steps = [record.step for record in result.records]
    gaps = [later - earlier for earlier, later in itertools.pairwise(steps)]
    around = next(n for n, record in enumerate(result.records) if record.lr_next > record.lr or record.lr == 0.01)
    assert gaps[around] < gaps[around - 1]
    assert steps[-1] == 800
