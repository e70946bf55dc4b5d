"""What the empirical edge says of a threshold."""

from types import SimpleNamespace

import pytest

from zoscope.analysis.probe_results import Edge, EdgePoint, EndState, ProbedThreshold
from zoscope.analysis.probe_runs import edge_outcome, growth_verdict


def edge(value, *, sharpened=False):
    end = EndState(step=90, threshold=0.4, trace=5.0, lambda_max=1.0, term=2.0)
    points = (EdgePoint(value, 8, 8, 90.0, (200.0, 300.0)),)
    return Edge(value, value, value, 100, None, (value / 0.9, value / 1.0), None, True, points, end, sharpened)


def forecast(*, ci95=None):
    threshold = ProbedThreshold("horizon", 1.0, None, None, (0.9, 1.0), ci95, 0.1)
    return SimpleNamespace(threshold=threshold, few_modes=False)


@pytest.mark.parametrize(
    ("value", "outcome"), [(0.7, "refuted"), (0.8, "confirmed"), (1.1, "confirmed"), (1.2, "refuted")]
)
def test_an_edge_near_the_interval_confirms_it(value, outcome):
    assert edge_outcome(edge(value), forecast())[0] == outcome


def test_the_error_of_the_prediction_counts():
    assert edge_outcome(edge(0.7), forecast(ci95=(0.8, 1.1)))[0] == "confirmed"
    assert edge_outcome(edge(1.25), forecast(ci95=(0.8, 1.1)))[0] == "confirmed"


def test_an_edge_below_where_the_landscape_sharpened_is_inconclusive_and_says_so():
    outcome, reason = edge_outcome(edge(0.7, sharpened=True), forecast())
    assert outcome == "inconclusive"
    assert "22 % below" in reason
    assert "step 90, before the first run diverged, the threshold had come down to 0.4" in reason
    assert edge_outcome(edge(1.2, sharpened=True), forecast())[0] == "refuted"  # sharpening lowers the edge


def test_a_loss_that_the_noise_of_mini_batches_holds_up_is_stable():
    found = SimpleNamespace(diverged=1, stable=2)
    trajectory = SimpleNamespace(left=(None,) * 7 + (30,), capped=False)
    assert growth_verdict(found, trajectory, noisy=True) == "stable"
    assert growth_verdict(found, trajectory) == "inconclusive"
