"""Trace, norm and the largest eigenvalue alone."""

import numpy as np
import pytest
import torch
from torch import nn

import zoscope
from zoscope import UsageError, moments
from zoscope.curvature import moments as apart
from zoscope.curvature.moments import measure_moments, pieces_apart
from zoscope.curvature.operators import DenseOperator, HessianOperator
from zoscope.curvature.slq import measure

from .matrices import network_like, rotated
from .test_graphs import problem

EIGENVALUES = network_like(negative=0.4)


def network(*, rows: int = 64, batches: int = 1) -> zoscope.Problem:
    """Examples that bend the loss in similar directions."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 8, generator=generator) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 3))
        y = model(x).detach()
    y += 0.1 * torch.randn(y.shape, generator=generator)
    pairs = list(zip(x.chunk(batches), y.chunk(batches), strict=True))
    return zoscope.Problem.from_criterion(model, pairs, nn.MSELoss())


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces however small their graphs are."""
    monkeypatch.setattr(apart, "LEAST_APART", {"cpu": 0})
    monkeypatch.setattr(apart, "VECTORS_APART", 1e-3)


def test_they_take_fewer_products_than_a_spectrum_and_are_covered():
    def precision(spectrum):
        trace, norm = spectrum.trace_of(lambda x: x), spectrum.trace_of(np.square)
        return max(trace.half_width / trace.value, norm.half_width / norm.value / 3)

    op = DenseOperator(rotated(EIGENVALUES, seed=1))
    found = [measure_moments(op, rtol=0.03, max_hvps=2000, seed=seed) for seed in range(40)]
    whole = [
        measure(op, method="deflated-slq", precision=precision, rtol=0.03, max_hvps=2000, seed=seed)
        for seed in range(5)
    ]
    assert 1.5 * np.median([f.num_hvps for f in found]) < np.median([w.num_hvps for w in whole])
    for name, f in (("trace", lambda x: x), ("frobenius_sq", np.square)):
        truth = f(EIGENVALUES.numpy()).sum()
        inside = sum(lo <= truth <= hi for lo, hi in (getattr(m, name).interval for m in found))
        assert inside >= 34  # P(fewer of 40) < 1 % at a true coverage of 95 %
    assert all(f.lambda_max.value == pytest.approx(float(EIGENVALUES.max()), rel=0.01) for f in found)
    assert all(f.error <= 0.03 and f.pieces == 1 for f in found)


@pytest.mark.slow
def test_pieces_of_the_data_take_fewer_products_and_are_covered(small_pieces, monkeypatch):
    with network().prepare(dtype="float32") as objective:
        matrix = HessianOperator(objective).dense().double()
        own = [measure_moments(HessianOperator(objective), rtol=0.02, seed=seed) for seed in range(20)]
        monkeypatch.setattr(moments, "PAYS", 0.0)
        shared = [measure_moments(HessianOperator(objective), rtol=0.02, seed=seed) for seed in range(5)]
    assert np.median([m.pieces for m in own]) >= 4
    assert {m.pieces for m in shared} == {1}
    assert 1.2 * np.median([m.num_hvps for m in own]) < np.median([m.num_hvps for m in shared])
    for name, truth in (("trace", matrix.trace()), ("frobenius_sq", matrix.square().sum())):
        inside = sum(lo <= float(truth) <= hi for lo, hi in (getattr(m, name).interval for m in own))
        assert inside >= 16  # P(fewer of 20) < 0.3 % at a true coverage of 95 %
    scatter = [(m.trace.value - float(matrix.trace())) / m.trace.stderr for m in own]
    assert abs(np.mean(scatter)) < 3 / np.sqrt(20)


def test_products_of_pieces_add_up_to_those_of_the_whole(small_pieces):
    with network().prepare(dtype="float64") as objective:
        operator, vectors = HessianOperator(objective), torch.randn(3, objective.num_params, dtype=torch.float64)
        whole = operator.matmat(vectors)
        before, pieces = operator.num_hvps, pieces_apart(objective)
        assert pieces is not None
        parts = [weight * products for weight, _, products in operator.apart(pieces, lambda: vectors)]
        torch.testing.assert_close(sum(parts), whole)
        assert operator.num_hvps == before + 3


def test_pieces_that_do_not_bend_the_loss_are_no_reason_to_fail(small_pieces):
    whole = network()
    (x, y), flat = whole.batches[0], torch.zeros(16, 8)
    batch = torch.cat([flat, x]), torch.cat([torch.full((16, 3), torch.nan), y])  # the first quarter counts for nothing

    def loss(model, pair):
        known = ~pair[1].isnan()
        return torch.where(known, model(pair[0]) - pair[1].nan_to_num(), 0.0).square().mean()

    found = zoscope.moments(zoscope.Problem(whole.model, [batch], loss), rtol=0.05).moments
    assert found.error <= 0.05


def test_larger_pieces_are_sums_of_smaller_ones():
    generator = torch.Generator().manual_seed(0)
    products = [torch.randn(2, 5, generator=generator) for _ in range(8)]
    found = apart.variances(products, count=16, dimension=7)
    assert list(found) == [16, 8, 4]
    pairs = [one + two for one, two in zip(products[::2], products[1::2], strict=True)]
    assert found[8] == pytest.approx(2 * 7 * sum(float(p.square().sum()) for p in pairs) / 2 * 2)


def test_batches_are_pieces_already_and_many_of_them_are_put_together(small_pieces):
    with network(batches=8).prepare() as objective:
        assert [len(piece) for piece in pieces_apart(objective) or ()] == [1] * 32
    with network(rows=80, batches=80).prepare() as objective:
        pieces = pieces_apart(objective)
        assert pieces is not None
        assert len(pieces) == 32
        assert [shard for piece in pieces for shard in piece] == list(objective.shards)


def test_data_that_cannot_be_cut_or_is_too_little_has_no_pieces(small_pieces, monkeypatch):
    with problem(flat=True).prepare() as objective:  # more targets than inputs
        assert pieces_apart(objective) is None
    with network(rows=3).prepare() as objective:
        assert pieces_apart(objective) is None
    monkeypatch.setattr(apart, "LEAST_APART", {"cpu": 2**30})
    with network().prepare() as objective:
        assert pieces_apart(objective) is None


def test_a_loss_that_is_not_a_mean_over_examples_has_no_pieces(small_pieces):
    with network().prepare() as objective:
        plain = objective._loss

        def contrastive(model, batch):  # by a little, so that nothing before notices
            return plain(model, batch) + 0.1 * model(batch[0]).var(dim=0).sum()

        objective._loss = contrastive
        assert pieces_apart(objective) is None


def test_a_small_problem_is_known_exactly():
    matrix = rotated(torch.linspace(-1, 3, 12, dtype=torch.float64), seed=0)
    found = measure_moments(DenseOperator(matrix))
    assert found.trace.value == pytest.approx(float(matrix.trace()), rel=1e-12)
    assert found.trace.half_width == 0
    assert found.frobenius_sq.value == pytest.approx(float(matrix.square().sum()), rel=1e-12)


def test_the_same_seed_finds_the_same(small_pieces):
    with network().prepare() as objective:
        one, two = (measure_moments(HessianOperator(objective), seed=4) for _ in range(2))
    assert (one.trace, one.frobenius_sq, one.num_hvps) == (two.trace, two.frobenius_sq, two.num_hvps)


def test_a_budget_is_kept():
    op = DenseOperator(rotated(EIGENVALUES, seed=1))
    found = measure_moments(op, rtol=1e-5, max_hvps=50)
    assert found.num_hvps <= 50
    assert found.error > 1e-5


def test_what_cannot_be_asked_for():
    op = DenseOperator(rotated(EIGENVALUES, seed=1))
    with pytest.raises(ValueError, match="rtol"):
        measure_moments(op, rtol=0.0)
    with pytest.raises(UsageError, match="--max-hvps 10"):
        measure_moments(op, max_hvps=10)


def test_a_norm_of_many_outliers_is_covered_after_a_short_chain(monkeypatch):
    """Where the trace asks for nothing, the chain ends while outliers inside of the spectrum are not known yet."""
    both = apart._Measurement._vectors_for
    monkeypatch.setattr(apart._Measurement, "_vectors_for", lambda self, beyond: (0, both(self, beyond)[1]))
    outliers = torch.cat([80 * 0.8 ** torch.arange(12.0), torch.tensor([3.0, 4.0, 5.0])])
    eigenvalues = torch.cat([outliers, 0.2 * torch.rand(700, generator=torch.Generator().manual_seed(0))])
    op, truth = DenseOperator(torch.diag(eigenvalues)), float(eigenvalues.double().square().sum())
    found = [measure_moments(op, seed=seed) for seed in range(100)]
    inside = sum(lo <= truth <= hi for lo, hi in (m.frobenius_sq.interval for m in found))
    assert inside >= 89  # P(fewer of 100) < 1 % at a true coverage of 95 %
    assert all(m.frobenius_sq.half_width <= 0.0301 * m.frobenius_sq.value for m in found)
