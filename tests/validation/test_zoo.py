"""Intervals on many kinds of small networks hold the truth: see zoo.py."""

import math
from functools import cache

import pytest
import torch

from .coverage import LEAST, MOST_SIGMAS
from .zoo import METHODS, NETWORKS, Judged, Subject, Whole, differences, judge_all, measure, table

SEEDS = 2
"""Measurements of each network: of some seventy intervals seven miss too often by chance."""

KEYS = [(method, name) for method, names in METHODS.items() for name in names]


@cache
def judged() -> Judged:
    return judge_all(list(NETWORKS), seeds=SEEDS)


def test_there_are_sixty_networks_and_more() -> None:
    assert len(NETWORKS) >= 60


@pytest.mark.slow
@pytest.mark.parametrize(("method", "name"), KEYS, ids=[" ".join(key) for key in KEYS])
def test_intervals_hold_the_truth_of_networks(method: str, name: str) -> None:
    entries = judged()[method, name]
    assert sum(entry.covered for entry in entries) >= LEAST * len(entries), table(judged())


@pytest.mark.slow
@pytest.mark.parametrize(("method", "name"), KEYS, ids=[" ".join(key) for key in KEYS])
def test_no_network_is_off_by_more_than_six_of_its_own_standard_errors(method: str, name: str) -> None:
    assert [str(entry) for entry in judged()[method, name] if entry.sigmas > MOST_SIGMAS] == []


def test_one_network_gives_every_quantity_a_number_and_a_truth() -> None:
    subject = Subject(NETWORKS["tensor-factors"])
    found = measure(subject.network)
    for key in KEYS:
        assert math.isfinite(subject.truth[key][0])
        assert not math.isnan(found[key][0]), key


@pytest.mark.parametrize("name", ["layer-norm", "gated-units"])  # torch.func is wrong on the first, right on the second
def test_the_truth_is_that_of_first_derivatives(name: str) -> None:
    whole = Whole(NETWORKS[name]())
    found = whole.hessian()
    torch.testing.assert_close(found, differences(whole.gradient, whole.start), rtol=1e-6, atol=1e-8)


def test_differences_are_of_fourth_order() -> None:
    start = torch.tensor([0.3, -1.2], dtype=torch.float64)
    torch.testing.assert_close(differences(torch.sin, start), start.cos().diag(), rtol=1e-11, atol=1e-12)
