"""Independent oracle: the second moment of (x, m) under mini-batches, from the Hessians of the examples."""

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from zoscope.theory.rules import EstimatorMoments, UpdateRule


@dataclass(frozen=True)
class Examples:
    """Hessians of n examples, ``(n, d, d)``; their mean is positive definite."""

    hessians: np.ndarray

    @classmethod
    def random(cls, rng, *, examples, dimension, rank, indefinite=False, scales=None):
        """Sums of ``rank`` outer products each; indefinite ones differ by symmetric matrices that add up to zero."""
        scales = np.ones(dimension) if scales is None else scales
        roots = scales[:, None] * rng.standard_normal((examples, dimension, rank))
        hessians = roots @ roots.transpose(0, 2, 1) / rank
        if indefinite:
            extra = rng.standard_normal(hessians.shape)
            extra = 0.3 * (extra + extra.transpose(0, 2, 1)) * np.sqrt(scales[:, None] * scales)
            hessians = hessians + extra - extra.mean(axis=0)
        return cls(hessians)

    @cached_property
    def mean(self):
        return self.hessians.mean(axis=0)

    def expectation(self, function, batch_size):
        """``E f(H_B)`` over all batches without replacement, for f quadratic in H_B."""
        n = len(self.hessians)
        s = 0.0 if n == 1 else (n - batch_size) / (batch_size * (n - 1))
        return (1 - s) * function(self.mean) + s * np.mean([function(h) for h in self.hessians], axis=0)

    def enumerated(self, function, batch_size):
        """The same by listing every batch."""
        batches = combinations(range(len(self.hessians)), batch_size)
        return np.mean([function(self.hessians[list(batch)].mean(axis=0)) for batch in batches], axis=0)


@dataclass(frozen=True)
class MiniBatchMoments:
    """One step on ``X = E xxᵀ``, ``C = E xmᵀ``, ``V = E mmᵀ``, the momentum kept as ``lr·m``, as a matrix on vec."""

    examples: Examples
    batch_size: int
    rule: UpdateRule
    moments: EstimatorMoments
    lr: float

    @cached_property
    def _kron(self):
        return self.examples.expectation(lambda h: np.kron(h, h), self.batch_size)

    @cached_property
    def square(self):
        return self.examples.expectation(lambda h: h @ h, self.batch_size)

    def step(self, X, C, V, *, feedback=True, source=0.0):
        H, d, w = self.examples.mean, len(self.examples.mean), self.rule.weight_decay
        pull = H + w * np.eye(d)  # of the mean: weight decay brings no noise
        beta, gain = self.rule.momentum, self.lr * self.rule.lr_scale
        signal = (self._kron @ X.reshape(-1)).reshape(d, d)
        noise = self.moments.b * np.trace(self.square @ X) * feedback + source
        V = beta**2 * V + beta * gain * (C.T @ pull + pull @ C)
        V = V + gain**2 * (self.moments.a * signal + w * (H @ X + X @ H) + w**2 * X + noise * np.eye(d))
        C = beta * C + gain * X @ pull
        X = X - C - C.T + V
        return 0.5 * (X + X.T), C - V, 0.5 * (V + V.T)

    @cached_property
    def operator(self):
        d = len(self.examples.mean)
        columns = []
        for index in range(3 * d * d):
            unit = np.zeros(3 * d * d)
            unit[index] = 1
            columns.append(np.concatenate([part.reshape(-1) for part in self.step(*unit.reshape(3, d, d))]))
        return np.array(columns).T

    @property
    def radius(self):
        return float(np.abs(np.linalg.eigvals(self.operator)).max())

    def response(self, steps):
        """K(τ), τ < steps: the ``b Tr(C Σ)`` that unit gradient noise causes τ steps after it has entered."""
        d = len(self.examples.mean)
        state, kernel = (np.zeros((d, d)),) * 3, []
        for step in range(steps):
            state = self.step(*state, feedback=False, source=float(step == 0))
            kernel.append(self.moments.b * np.trace(self.square @ state[0]))
        return np.array(kernel)


def explicit_threshold(examples, batch_size, rule, moments, *, guess, steps=None):
    """Bisection for the step size at which the operator's radius, or the sum of its response, passes 1."""

    def unstable(lr):
        model = MiniBatchMoments(examples, batch_size, rule, moments, lr)
        return model.radius >= 1 if steps is None else model.response(steps).sum() >= 1

    low, high = guess, guess
    while unstable(low):
        low /= 1.2
    while not unstable(high):
        high *= 1.2
    while high / low > 1.004:
        middle = np.sqrt(low * high)
        low, high = (low, middle) if unstable(middle) else (middle, high)
    return float(np.sqrt(low * high))
