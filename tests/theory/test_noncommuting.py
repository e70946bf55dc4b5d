"""A preconditioner that does not commute with H, against the second-moment operator."""

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import ortho_group

from zoscope.theory.rules import estimator_moments, update_rule
from zoscope.theory.spectrum import Spectrum
from zoscope.theory.stability import ModeCoupling, StabilityCondition

from .second_moment_oracle import Quadratic, SecondMoments


def problem(seed, commute=False):
    rng = np.random.default_rng(seed)
    basis = ortho_group.rvs(4, random_state=rng)
    hessian = (basis * np.array([3.0, 1.0, 0.4, 0.1])) @ basis.T
    p = np.geomspace(0.3, 3.0, 4)
    preconditioner = (basis * p) @ basis.T if commute else np.diag(p)
    return hessian, preconditioner


def coupling_of(hessian, preconditioner):
    values, vectors = np.linalg.eigh(preconditioner)
    root = (vectors * values**-0.5) @ vectors.T
    eigenvalues, modes = np.linalg.eigh(root @ hessian @ root)
    coupling = (modes.T @ np.linalg.inv(preconditioner) @ modes) * (modes.T @ preconditioner @ modes)
    return ModeCoupling(eigenvalues, coupling)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_threshold_is_exact(seed, beta1, queries):
    hessian, preconditioner = problem(seed)
    rule, moments = update_rule("adam", betas=(beta1, 0.999)), estimator_moments(queries=queries)
    found = coupling_of(hessian, preconditioner).threshold(rule=rule, moments=moments)
    quadratic = Quadratic(hessian, np.linalg.inv(preconditioner), np.zeros(4))
    exact = brentq(
        lambda lr: SecondMoments(quadratic, rule, moments, lr).radius - 1, 0.9 * found, 1.1 * found, xtol=1e-13
    )
    assert found == pytest.approx(exact, rel=1e-9)
    commuting = StabilityCondition(rule, moments).threshold(
        Spectrum.of(coupling_of(hessian, preconditioner).eigenvalues)
    )
    assert found < 0.99 * commuting


def test_it_is_the_usual_one_where_they_commute():
    coupled = coupling_of(*problem(3, commute=True))
    np.testing.assert_allclose(coupled.coupling, np.eye(4), atol=1e-12)
    rule, moments = update_rule("adam"), estimator_moments()
    usual = StabilityCondition(rule, moments).threshold(Spectrum.of(coupled.eigenvalues))
    assert coupled.threshold(rule=rule, moments=moments) == pytest.approx(usual, rel=1e-12)
