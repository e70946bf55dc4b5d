"""Independent oracle: the second moment of (x, m) as dense matrices in a rotated basis; no spectral formula."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.stats import ortho_group

from zoscope.theory.rules import EstimatorMoments, UpdateRule
from zoscope.theory.spectrum import Spectrum


def symmetric(matrix):
    """What rounding leaves of an antisymmetric part is no second moment, and long recursions amplify it."""
    return 0.5 * (matrix + matrix.T)


@dataclass(frozen=True)
class Quadratic:
    """``½ xᵀHx + gᵀx`` and a preconditioner that commutes with H, both rotated away from the axes."""

    hessian: np.ndarray
    inverse_preconditioner: np.ndarray
    gradient: np.ndarray

    @classmethod
    def random(cls, eigenvalues, rng, *, preconditioned=False):
        d = len(eigenvalues)
        basis = ortho_group.rvs(d, random_state=rng) if d > 1 else np.ones((1, 1))
        scales = rng.uniform(0.5, 2.0, d) if preconditioned else np.ones(d)
        return cls((basis * eigenvalues) @ basis.T, (basis / scales) @ basis.T, rng.standard_normal(d))

    @property
    def dimension(self):
        return len(self.hessian)

    @cached_property
    def spectrum(self):
        """Spectrum of ``P⁻¹H``, the theory's input."""
        product = self.inverse_preconditioner @ self.hessian
        return Spectrum.of(np.linalg.eigvalsh(0.5 * (product + product.T)))


@dataclass(frozen=True)
class SecondMoments:
    """One optimizer step on ``X = E xxᵀ``, ``C = E xmᵀ``, ``V = E mmᵀ``; the momentum is kept as ``lr·m``."""

    problem: Quadratic
    rule: UpdateRule
    moments: EstimatorMoments
    lr: float

    def step(self, X, C, V, *, feedback=True, source=0.0):
        """``m ← βm + s ĝ; x ← x - lr P⁻¹ m``, ``E ĝĝᵀ = a HXH + (b Tr(HXH) + source) I``; trace only with feedback."""
        H, D, d = self.problem.hessian, self.problem.inverse_preconditioner, self.problem.dimension
        beta, gain = self.rule.momentum, self.lr * self.rule.lr_scale
        signal = H @ X @ H
        noise = self.moments.b * np.trace(signal) * feedback + source
        moment = self.moments.a * signal + noise * np.eye(d)
        V = beta**2 * V + beta * gain * (C.T @ H + H @ C) + gain**2 * moment
        C = beta * C + gain * X @ H
        X = X - C @ D - D @ C.T + D @ V @ D
        return symmetric(X), C - D @ V, symmetric(V)

    @property
    def zero(self):
        return tuple(np.zeros((self.problem.dimension, self.problem.dimension)) for _ in range(3))

    @cached_property
    def operator(self):
        """Matrix of ``step`` on the symmetric second moments of the joint state (x, m)."""
        d, size = self.problem.dimension, 2 * self.problem.dimension
        pairs = [(i, j) for i in range(size) for j in range(i, size)]
        columns = []
        for i, j in pairs:
            joint = np.zeros((size, size))
            joint[i, j] = joint[j, i] = 1.0
            X, C, V = self.step(joint[:d, :d], joint[:d, d:], joint[d:, d:])
            image = np.block([[X, C], [C.T, V]])
            columns.append([image[k, m] for k, m in pairs])
        return np.array(columns).T

    @property
    def radius(self):
        return float(np.abs(np.linalg.eigvals(self.operator)).max())

    @property
    def distance_sign(self):
        """Sign of ``det(I - L)``: +1 while every eigenvalue is inside the circle, flips as the largest passes 1."""
        return float(np.linalg.slogdet(np.eye(len(self.operator)) - self.operator)[0])

    def response(self, steps):
        """K(τ), τ < steps: the ``b Tr(HXH)`` that unit gradient noise causes τ steps after it has entered."""
        H, state, kernel = self.problem.hessian, self.zero, []
        for step in range(steps):
            state = self.step(*state, feedback=False, source=float(step == 0))
            kernel.append(self.moments.b * np.trace(H @ state[0] @ H))
        return np.array(kernel)


def expected_losses(problem, rule, moments, *, lr, loss, steps):
    """Loss of the quadratic from x = 0, by the recursion of ``E x, E m`` and of second moments around the origin."""
    H, g, beta, gain = problem.hessian, problem.gradient, rule.momentum, lr * rule.lr_scale
    d = problem.dimension
    x, m = np.zeros(d), np.zeros(d)
    X, C, V = (np.zeros((d, d)) for _ in range(3))
    losses = [loss]
    for _ in range(steps):
        mean = H @ x + g
        signal = H @ X @ H + np.outer(H @ x, g) + np.outer(g, H @ x) + np.outer(g, g)
        x_gradient, m_gradient = X @ H + np.outer(x, g), C.T @ H + np.outer(m, g)
        V = beta**2 * V + beta * gain * (m_gradient + m_gradient.T)
        V = V + gain**2 * (moments.a * signal + moments.b * np.trace(signal) * np.eye(d))
        C = beta * C + gain * x_gradient
        X, C, V = symmetric(X - C - C.T + V), C - V, symmetric(V)
        m = beta * m + gain * mean
        x = x - m
        losses.append(loss + g @ x + 0.5 * np.trace(H @ X))
    return np.array(losses)
