"""Runs of adaptive rules on a quadratic, as long as it takes, against the floor that theory gives them."""

import math

import numpy as np
import pytest
import torch

from zoscope.optim.directions import fill_rows
from zoscope.optim.rules import new_state, rule_from_options
from zoscope.registry import OPTIMIZERS
from zoscope.theory.quadratic import gradient_floor
from zoscope.theory.rules import estimator_moments, floor_factor, update_rule

LR, MODES, REPLICAS = 1e-3, 200, 16
CONSTANTS = {"betas": (0.9, 0.99), "eps": 1e-12}
ADAPTIVE = [name for name, record in OPTIMIZERS.items() if record.adapts]


def stalled(name, *, queries, noise=0.0, law="gaussian", start, steps):
    """Root mean square of the gradient norm over the second half of a run, by replica."""
    random = torch.Generator().manual_seed(queries)
    eigenvalues = torch.linspace(0.5, 1.5, MODES, dtype=torch.float64)

    def normal():
        return torch.randn(REPLICAS, MODES, generator=random, dtype=torch.float64)

    x = normal()
    x *= start / (x * eigenvalues).norm(dim=1, keepdim=True)
    rule = rule_from_options(name, CONSTANTS)
    state, squares = new_state(rule, [x]), []
    for step in range(1, steps + 1):
        g = x * eigenvalues
        if step > steps // 2:
            squares.append(g.square().sum(1))
        g = g + noise / math.sqrt(MODES) * normal()
        directions = [fill_rows(torch.empty_like(x), law=law, streams=[random] * REPLICAS) for _ in range(queries)]
        slopes = [(u * g).sum(1) for u in directions]
        estimate = sum(c[:, None] * u for c, u in zip(slopes, directions, strict=True)) / queries
        if rule.normalizes:
            estimate /= (sum(c.square() for c in slopes) / queries).sqrt()[:, None]
        rule.update([x], [estimate], state, lr=LR, step=step)
    return torch.stack(squares).mean(0).sqrt().numpy()


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_run_stalls_at_the_floor(name, queries):
    kappa = floor_factor(update_rule(name).adapts, estimator_moments(queries=queries))
    floor = gradient_floor(0.5 * kappa * LR * MODES)
    seen = stalled(name, queries=queries, start=floor, steps=2000) / floor
    # What is left out is the curvature along the gradient, at most 1.5, beside the Tr H / q of the noise.
    left_out = 1.5 * queries / MODES
    assert seen.mean() == pytest.approx(1.0, abs=4 * seen.std(ddof=1) / math.sqrt(REPLICAS) + left_out)


@pytest.mark.parametrize("queries", [1, 2, 3])
def test_the_sign_of_an_average_of_entries_of_one_size_has_a_floor_of_its_own(queries):
    kappa = floor_factor("sign", estimator_moments("rademacher", queries=queries))
    floor = gradient_floor(0.5 * kappa * LR * MODES)
    seen = stalled("signsgd", queries=queries, law="rademacher", start=floor, steps=2000) / floor
    left_out = 1.5 * queries / MODES
    assert seen.mean() == pytest.approx(1.0, abs=4 * seen.std(ddof=1) / math.sqrt(REPLICAS) + left_out)


def test_the_noise_of_mini_batches_raises_the_floor():
    pull = 0.5 * floor_factor("slopes", estimator_moments()) * LR * MODES
    floor = gradient_floor(pull, noise_sq=(3 * pull) ** 2)
    assert floor > 1.7 * pull
    seen = stalled("normalized", queries=1, noise=3 * pull, start=floor, steps=4000) / floor
    assert seen.mean() == pytest.approx(1.0, abs=4 * seen.std(ddof=1) / math.sqrt(REPLICAS) + 1.5 / MODES)


def test_one_query_gives_the_factors_of_sign_steps():
    one = estimator_moments()
    found = [floor_factor(adapts, one) for adapts in ("second-moment", "slopes", "sign")]
    np.testing.assert_allclose(found, [1.0, math.sqrt(math.pi / 2), math.pi / 2])
