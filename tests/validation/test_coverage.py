"""95 % intervals hold the truth as often as they say, and no run is confidently wrong: see coverage.py."""

import json
import math
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from .coverage import MOST_SIGMAS, QUANTITIES, Outcome, judge, main, measure, run
from .families import FAMILIES, explicit, linear_regression
from .truths import STEPS, dense

SEEDS = 100


@cache
def outcome(family: str) -> Outcome:
    return run(family, seeds=SEEDS, jobs=os.cpu_count() or 1)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_intervals_hold_the_truth_as_often_as_they_say(family: str) -> None:
    found = outcome(family)
    assert all(score.covered >= 0.9 * SEEDS for score in found.scores.values()), str(found)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_no_run_is_off_by_more_than_six_of_its_own_standard_errors(family: str) -> None:
    found = outcome(family)
    assert all(score.worst <= MOST_SIGMAS for score in found.scores.values()), str(found)


def test_truth_of_equal_eigenvalues_is_the_closed_form() -> None:
    truth = explicit(np.full(50, 2.0)).truth
    assert truth.values["trace"] == pytest.approx(100)
    assert truth.values["norm²"] == pytest.approx(200)
    assert truth.values["infinite"] == pytest.approx(2 / (100 + 2 * 2))
    assert truth.values["descent"] == pytest.approx(2 / (100 + 2 * 2))


def test_truth_of_a_wide_regression_is_that_of_its_whole_hessian() -> None:
    subject = linear_regression(5, 40, decay=0.5, dtype=torch.float64)
    (inputs, _), (row, *_) = subject.problem.batches[0], subject.problem.model.parameters()
    values, vectors = torch.linalg.eigh(2 / 5 * inputs.T @ inputs)
    truth = subject.truth
    assert truth.spectrum.trace == pytest.approx(float(values.sum()))
    assert truth.spectrum.weights.sum() == row.numel()
    residuals = subject.problem.model(inputs) - subject.problem.batches[0][1]
    gradient = (2 / 5 * inputs.T @ residuals).detach()[:, 0]
    rayleigh = float((gradient @ vectors).square() @ values / gradient.square().sum())
    assert float(truth.gradient.weights @ truth.gradient.nodes / truth.gradient.weights.sum()) == pytest.approx(
        rayleigh
    )


def test_truth_of_a_network_is_the_same_by_both_ways_where_they_agree() -> None:
    # With a linear model the Gauss-Newton matrix is the Hessian.
    subject = linear_regression(5, 40, decay=0.0, dtype=torch.float64)
    other = dense(subject.problem)
    for name, value in subject.truth.values.items():
        assert other.values[name] == pytest.approx(value, rel=1e-9), name


def test_an_interval_is_judged_on_the_side_of_the_truth() -> None:
    assert judge((10.0, 9.0, 14.0), 12.0, 0.0) == (True, pytest.approx(1.96 * 2 / 4))
    assert judge((10.0, 9.0, 14.0), 8.0, 0.0) == (False, pytest.approx(1.96 * 2))
    assert judge((10.0, 10.0, 10.0), 10.1, 0.0) == (False, math.inf)
    assert judge((10.0, 10.0, 10.0), 10.1, 0.2) == (True, 0.0)
    assert judge((math.inf, math.inf, math.inf), 3.0, 0.0) == (False, math.inf)
    assert judge((math.inf, 2.0, math.inf), 3.0, 0.0) == (True, 0.0)
    assert judge((0.5, 0.2, 1.0), math.inf, 0.0) == (False, pytest.approx(1.96 * 2))  # the inverse is 2 ± 1, not 0
    assert judge((0.5, 0.2, math.inf), math.inf, 0.0) == (True, pytest.approx(1.96))


def test_one_seed_gives_every_quantity() -> None:
    record = measure(explicit(np.r_[np.linspace(10, 20, 5), np.linspace(0, 1, 45)]), 0)
    assert {*QUANTITIES} - {"ends"} <= {*record.found}
    assert record.products[0] > 0
    assert STEPS == 1000


@pytest.mark.slow
def test_seeds_in_several_processes_are_those_of_one(tmp_path: Path) -> None:
    assert main(["--family", "dim-50", "--seeds", "2", "--jobs", "2", "--json", str(tmp_path / "two.jsonl")]) in (0, 1)
    (line,) = (tmp_path / "two.jsonl").read_text().splitlines()
    alone = run("dim-50", seeds=2)
    for ours, theirs in zip(json.loads(line)["runs"], alone.to_dict()["runs"], strict=True):
        assert ours["found"]["trace"] == list(theirs["found"]["trace"])
