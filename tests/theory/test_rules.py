import numpy as np
import pytest

from zoscope.registry import DEFAULT_FAMILIES
from zoscope.theory.rules import UpdateRule, update_rule


@pytest.mark.parametrize("name", DEFAULT_FAMILIES)
def test_heavy_ball_form_reproduces_the_optimizer(name):
    beta, lr, gradients = 0.7, 0.1, np.random.default_rng(0).standard_normal(20)
    rule = update_rule(name, beta=beta, betas=(beta, 0.999))
    x = m = y = v = 0.0
    for g in gradients:
        v = {"gd": g, "gdm": beta * v + g, "adam": beta * v + (1 - beta) * g}[name]
        y -= lr * v
        m = rule.momentum * m + g
        x -= rule.lr_scale * lr * m
    assert x == pytest.approx(y, rel=1e-13)


def test_only_adam_is_preconditioned():
    assert [update_rule(name).preconditioned for name in DEFAULT_FAMILIES] == [False, False, True]


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "sgd"},
        {"name": "gdm", "beta": 1.0},
        {"name": "gdm", "beta": -0.1},
        {"name": "gdm", "beta": float("nan")},
        {"name": "adam", "betas": (1.0, 0.9)},
        {"name": "adam", "betas": (0.9, float("nan"))},
    ],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        update_rule(**arguments)


def test_a_rule_refuses_a_scale_that_is_not_positive():
    with pytest.raises(ValueError, match="lr_scale"):
        UpdateRule("gd", lr_scale=0.0)
