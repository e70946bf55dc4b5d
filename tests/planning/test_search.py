"""The search over step sizes, on runs whose edges are known."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from zoscope.planning.search import Edge, Run, Search

EDGES = np.array([0.9, 1.0, 1.1, 1.05])


def one(end: float) -> Run:
    return Run(None if math.isfinite(end) else 5, np.array([0.0, 10.0]), np.array([2.0, end]))


def runner(lr: float, runs: Sequence[int], enough: int) -> dict[int, Run]:
    return {run: one(math.inf if lr > EDGES[run] else math.log(lr / 0.3) ** 2 + 1.0) for run in runs}


@pytest.mark.parametrize("guess", [1e-3, 0.5, 40.0])
def test_edges_and_the_lowest_loss_are_found_from_any_guess(guess):
    search = Search(runner, len(EDGES))
    low, high = search.bracket(guess)
    search.refine(low, high, rtol=0.1)
    edge = search.settle(rtol=0.05)
    assert edge.lr == pytest.approx(float(np.exp(np.log(EDGES).mean())), rel=0.05)
    assert edge.ci95[0] < edge.lr < edge.ci95[1]
    best = search.lowest(edge.at_risk(0.05))
    assert best.lr == pytest.approx(0.3, rel=0.25)
    assert np.isfinite(best.ends).all()


def test_the_risk_rises_from_nothing_past_a_half_at_the_edge():
    brackets = np.array([[0.9, 1.0], [1.0, 1.1], [0.95, 1.05]])
    edge = Edge(brackets, brackets)
    assert edge.risk(edge.lr) == pytest.approx(0.5)
    assert edge.risk(0.2 * edge.lr) < 0.01 < edge.risk(0.9 * edge.lr) < 0.5
    assert edge.risk(edge.at_risk(0.05)) == pytest.approx(0.05, rel=1e-6)


def test_a_run_is_made_once_and_not_where_its_fate_is_known():
    asked: list[tuple[float, list[int]]] = []

    def told(lr, runs, enough):
        asked.append((lr, list(runs)))
        return runner(lr, runs, enough)

    search = Search(told, 2)
    search.trial(0.5)
    search.trial(0.50000001)
    search.replicas = 4
    search.trial(0.5)
    assert asked == [(0.5, [0, 1]), (0.5, [2, 3])]
    assert search.half_leave(1.02)  # runs 0 and 1 leave there, 2 and 3 stay
    assert search.fates(0.3) == [False] * 4
    assert search.fates(1.04) == [True, True, None, None]
    assert search.fates(0.8) == [None, None, False, False]
    asked.clear()
    assert search.half_leave(1.04)
    assert not search.half_leave(0.8)
    assert asked == [(0.8, [0, 1])]


def test_runs_given_up_when_half_have_left_are_made_where_they_matter():
    def hasty(lr, runs, enough):
        found = runner(lr, runs, enough)
        gone = [run for run in runs if found[run].left is not None]
        return {run: found[run] for run in gone[:enough]} if len(gone) >= enough else found

    search = Search(hasty, 4)
    assert search.half_leave(2.0)
    assert search.fates(2.0).count(None) == 2
    low, high = search.bracket(2.0)
    search.refine(low, high, rtol=0.1)
    edge = search.settle(rtol=0.05)
    assert np.isfinite(edge.brackets).all()
    assert (edge.brackets[:, 0] <= EDGES).all()
    assert (edge.brackets[:, 1] >= EDGES).all()


def test_a_step_size_that_only_few_runs_liked_gives_way_to_one_that_all_like():
    def treacherous(lr, runs, enough):
        return {run: one(9.0 if run > 1 and lr > 0.4 else 1 / lr) for run in runs}

    search = Search(treacherous, 2)
    for lr in (0.1, 0.25, 0.5):
        search.trial(lr)
    search.replicas = 4
    best = search.trial(0.5)
    assert best.mean > 5
    assert search.lower(best, 1.0).lr == 0.25
    assert len(search.trials[0.25].runs) == 4


def test_runs_that_never_leave_have_no_edge():
    search = Search(lambda lr, runs, enough: {run: one(1.0) for run in runs}, 3)
    low, high = search.bracket(1.0)
    assert high is None
    assert search.edge().lr is None
    assert search.edge().risk(low) == 0.0


def test_a_loss_that_only_rises_is_given_up_where_nothing_can_be_gained():
    def rising(lr, runs, enough):
        return {run: one(2.0 + lr + lr**2) for run in runs}

    search = Search(rising, 2)
    assert search.lowest(1.0).mean > 2.0
    assert len(search.trials) < 25


def test_a_dip_far_below_is_found_all_the_same():
    def dipping(lr, runs, enough):
        return {run: one(2.0 - 0.3 * lr + 10 * lr**2) for run in runs}

    search = Search(dipping, 2)
    assert search.lowest(1.0).lr == pytest.approx(0.015, rel=0.2)


def test_more_runs_narrow_the_interval():
    brackets = np.array([[0.7, 0.8], [1.2, 1.3], [0.95, 1.05]])
    wide = Edge(brackets, brackets)
    assert math.log(wide.ci95[1] / wide.lr) == pytest.approx(wide.half_width)
    assert Edge(np.repeat(brackets, 3, axis=0), np.repeat(brackets, 3, axis=0)).half_width < 0.5 * wide.half_width
    assert Edge(brackets[:1], brackets[:1]).half_width == math.inf


def test_runs_that_leave_and_stay_further_up_raise_the_risk():
    """Each run leaves at random at a step size, and at each on its own: the share of those that left is the risk."""
    lrs = np.exp(np.linspace(-0.6, 0.6, 25))

    def fate(lr, run):
        chance = float(stats.norm.cdf(math.log(lr) / 0.15))
        return np.random.default_rng([run, round(1e4 * lr)]).random() < chance

    def made(lr, runs, enough):
        return {run: Run(1 if fate(lr, run) else None, np.array([0, 1]), np.array([1.0, 0.5])) for run in runs}

    search = Search(made, 60)
    for lr in lrs:
        search.trial(float(lr))
    edge = search.edge()
    assert edge.lr == pytest.approx(1.0, rel=0.1)
    assert (edge.spans[:, 0] <= edge.brackets[:, 0]).all()
    assert (edge.spans[:, 1] >= edge.brackets[:, 1]).all()
    for lr in (0.8, 0.9, 1.1):
        true = float(stats.norm.cdf(math.log(lr) / 0.15))
        assert edge.risk(lr) == pytest.approx(true, abs=3 * math.sqrt(true * (1 - true) / 60))
