"""The search over step sizes, on runs whose edges are known."""

import math

import numpy as np
import pytest

from zoscope.planning.search import Edge, Search, Trial

EDGES = np.array([0.9, 1.0, 1.1, 1.05])


def runner(lr: float) -> Trial:
    gone = lr > EDGES
    ends = np.where(gone, np.inf, (math.log(lr / 0.3)) ** 2 + 1.0)
    left = tuple(5 if out else None for out in gone)
    return Trial(lr, ends, left, np.array([0.0, 10.0]), np.stack([np.full(4, 2.0), ends]))


@pytest.mark.parametrize("guess", [1e-3, 0.5, 40.0])
def test_edges_and_the_lowest_loss_are_found_from_any_guess(guess):
    search = Search(runner)
    low, high = search.bracket(guess)
    search.refine(low, high, rtol=0.1)
    edge = search.settle(rtol=0.05)
    assert edge.lr == pytest.approx(float(np.exp(np.log(EDGES).mean())), rel=0.05)
    assert edge.ci95[0] < edge.lr < edge.ci95[1]
    best = search.lowest(edge.at_risk(0.05))
    assert best.lr == pytest.approx(0.3, rel=0.25)
    assert not best.gone.any()


def test_the_risk_rises_from_nothing_past_a_half_at_the_edge():
    edge = Edge(np.array([[0.9, 1.0], [1.0, 1.1], [0.95, 1.05]]))
    assert edge.risk(edge.lr) == pytest.approx(0.5)
    assert edge.risk(0.2 * edge.lr) < 0.01 < edge.risk(0.9 * edge.lr) < 0.5
    assert edge.risk(edge.at_risk(0.05)) == pytest.approx(0.05, rel=1e-6)


def test_a_trial_is_run_once():
    asked = []
    search = Search(lambda lr: asked.append(lr) or runner(lr))
    search.trial(0.5)
    search.trial(0.50000001)
    assert asked == [0.5]


def test_runs_that_never_leave_have_no_edge():
    def calm(lr: float) -> Trial:
        return Trial(lr, np.ones(3), (None,) * 3, np.array([0.0]), np.ones((1, 3)))

    search = Search(calm)
    low, high = search.bracket(1.0)
    assert high is None
    assert search.edge().lr is None
    assert search.edge().risk(low) == 0.0
