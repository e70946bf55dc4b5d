"""The libraries compared, each through its own interface and with the estimators that serve it best."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import zoscope

from . import budgets
from .budgets import Budget
from .sketches import DRAWS
from .standin import Diagonal
from .workloads import Workload

Values = dict[str, float]
Plan = dict[str, Budget]


class Session(Protocol):
    """A tool set up on a workload."""

    def product(self) -> None:
        """One Hessian-vector product, by the tool's own operator."""
        ...

    def moments(self, plan: Plan, *, seed: int) -> Values:
        """λ_max, trace and ‖H‖_F² as planned; what draws on torch's global generator finds it seeded."""
        ...

    def density(self, steps: int) -> object:
        """One run of stochastic Lanczos quadrature."""
        ...


class Peer(Protocol):
    """A library to compare with."""

    name: str
    package: str

    def plan(self, diagonal: Diagonal) -> Plan:
        """The cheapest estimators of λ_max, trace and ‖H‖_F² that meet the targets."""
        ...

    def open(self, workload: Workload) -> Session:
        """Set the tool up."""
        ...


class Curvlinops:
    """curvlinops: forward-over-reverse products, vmapped over blocks; XTrace, Hutch++, Hutchinson, and SciPy's eigsh.

    ‖H‖_F² is its Frobenius estimator on H or one of its trace estimators on ``H @ H``, whichever takes less.
    """

    name, package = "curvlinops", "curvlinops-for-pytorch"

    def plan(self, diagonal: Diagonal) -> Plan:
        plan = {"lambda_max": _plan_eigsh(diagonal)}
        for key, power, target in (("trace", 1, budgets.TRACE), ("frobenius_sq", 2, budgets.FROBENIUS)):
            plain = budgets.hutchinson(diagonal, power=power, target=target, cost=1)  # ‖Hz‖² takes one product, too
            plan[key] = _cheapest_sketch(plain, (budgets.hutchpp, budgets.xtrace), diagonal, power=power, target=target)
        return plan

    def open(self, workload: Workload) -> Session:
        return _CurvlinopsSession(workload)


class _CurvlinopsSession:
    def __init__(self, workload: Workload) -> None:
        from curvlinops import HessianLinearOperator

        class Chunked(HessianLinearOperator):
            """Block products in pieces: a whole block vmapped at once takes too much memory on a convolution."""

            chunk = 1

            def _matmat(self, M: list[Tensor]) -> list[Tensor]:
                pieces = zip(*(part.split(self.chunk, dim=-1) for part in M), strict=True)
                done = [super(Chunked, self)._matmat(list(piece)) for piece in pieces]
                return [torch.cat(columns, dim=-1) for columns in zip(*done, strict=True)]

        parameters = [p for p in workload.model.parameters() if p.requires_grad]
        self.operator = Chunked(
            workload.model, workload.criterion, parameters, [workload.batch], check_deterministic=False
        )

    @property
    def chunk(self) -> int:
        return self.operator.chunk

    @chunk.setter
    def chunk(self, size: int) -> None:
        self.operator.chunk = size

    def product(self) -> None:
        self.operator @ torch.randn(self.operator.shape[1], self.chunk, device=self.operator.device)

    def moments(self, plan: Plan, *, seed: int) -> Values:
        from curvlinops import hutchinson_squared_fro, hutchinson_trace, hutchpp_trace, xtrace

        op = self.operator
        estimators: dict[str, Callable[[Any, int], Tensor]] = {
            "xtrace": lambda a, n: xtrace(a, 2 * n),
            "hutch++": lambda a, n: hutchpp_trace(a, 3 * n),
            "hutchinson": hutchinson_trace,
        }
        trace, norm = plan["trace"], plan["frobenius_sq"]
        start = np.random.default_rng(seed).standard_normal(op.shape[0]).astype(np.float32)
        if norm.method == "hutchinson":
            frobenius = hutchinson_squared_fro(op, norm.size)
        else:
            frobenius = estimators[norm.method](op @ op, norm.size)
        return {
            "lambda_max": _eigsh(op.to_scipy(np.float32), plan["lambda_max"].size, start)[0],
            "trace": float(estimators[trace.method](op, trace.size)),
            "frobenius_sq": float(frobenius),
        }

    def density(self, steps: int) -> object:
        from curvlinops.papyan2020traces.spectrum import fast_lanczos

        return fast_lanczos(self.operator, steps)


def _cheapest_sketch(
    plain: Budget, others: Sequence[Callable[..., Budget | None]], diagonal: Diagonal, *, power: int, target: float
) -> Budget:
    """The estimator with the fewest products; each is only searched where it would win."""
    best = plain
    for search in others:
        best = search(diagonal, power=power, target=target, most=best.products - 1) or best
    return best


def _plan_eigsh(diagonal: Diagonal, *, seed: int = 0) -> Budget:
    """Krylov vectors of eigsh (its ``ncv``): the fewest products with 95 % of the starts within the target."""
    from scipy.sparse.linalg import LinearOperator

    nodes = diagonal.distinct[0].astype(np.float32)
    operator = LinearOperator((len(nodes),) * 2, matvec=lambda v: nodes * v.ravel(), dtype=np.float32)
    starts = diagonal.starts(DRAWS, np.random.default_rng(seed)).astype(np.float32)
    tried: list[Budget] = []
    for krylov in (2, 3, 4, 5, 6, 8, 10, 12, 16, 20):
        if krylov < len(nodes):
            found = [_eigsh(operator, krylov, start) for start in starts]
            worst = float(np.quantile([abs(value / nodes.max() - 1) for value, _ in found], 0.95))
            if worst <= budgets.LAMBDA_MAX:
                products = math.ceil(np.mean([count for _, count in found]))
                tried.append(Budget("eigsh", products, krylov, worst / budgets.WITHIN))
    return budgets.cheapest(tried)


def _eigsh(operator: Any, krylov: int, start: np.ndarray) -> tuple[float, int]:
    """Largest eigenvalue, to a tolerance that suits the target, and the products it took."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    count = 0

    def matvec(v: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return operator.matvec(v)

    counted = LinearOperator(operator.shape, matvec=matvec, dtype=np.float32)
    values = eigsh(counted, k=1, which="LA", ncv=krylov, tol=0.05, v0=start, return_eigenvectors=False)
    return float(values[0]), count


class Eigenthings:
    """hessian-eigenthings: double backward on a fresh graph each time; Lanczos, Hutch++ and Hutchinson.

    It knows no norm: ‖H‖_F² is its trace estimator on ``v ↦ H(Hv)``.
    """

    name, package = "hessian-eigenthings", "hessian-eigenthings"

    def plan(self, diagonal: Diagonal) -> Plan:
        plan = {"lambda_max": budgets.lanczos(diagonal)}
        for key, power, target in (("trace", 1, budgets.TRACE), ("frobenius_sq", 2, budgets.FROBENIUS)):
            plain = budgets.hutchinson(diagonal, power=power, target=target, cost=power)
            plan[key] = _cheapest_sketch(plain, (budgets.hutchpp,), diagonal, power=power, target=target)
        return plan

    def open(self, workload: Workload) -> Session:
        return _EigenthingsSession(workload)


class _EigenthingsSession:
    def __init__(self, workload: Workload) -> None:
        from hessian_eigenthings import HessianOperator, LambdaOperator, supervised_loss

        self.operator = HessianOperator(workload.model, [workload.batch], supervised_loss(workload.criterion))
        self.device = workload.device
        self.squared = LambdaOperator(lambda v: self.operator @ (self.operator @ v), self.operator.size)

    def product(self) -> None:
        self.operator @ torch.randn(self.operator.size, device=self.device)

    def moments(self, plan: Plan, *, seed: int) -> Values:
        from hessian_eigenthings import hutch_plus_plus, hutchinson, lanczos

        # Without a seed it would take the same one each time.
        seeds = dict(zip(plan, map(int, np.random.SeedSequence(seed).generate_state(len(plan))), strict=True))

        def trace(operator: Any, key: str) -> float:
            size, own = plan[key].size, seeds[key]
            if plan[key].method == "hutchinson":
                return hutchinson(operator, num_samples=size, seed=own).estimate
            return hutch_plus_plus(operator, num_matvecs=3 * size, seed=own).estimate

        steps, own = plan["lambda_max"].size, seeds["lambda_max"]
        top = lanczos(self.operator, k=1, max_iter=steps, which="LA", tol=0.0, seed=own)
        return {
            "lambda_max": float(top.eigenvalues[0]),
            "trace": trace(self.operator, "trace"),
            "frobenius_sq": trace(self.squared, "frobenius_sq"),
        }

    def density(self, steps: int) -> object:
        from hessian_eigenthings import spectral_density

        return spectral_density(self.operator, num_runs=1, lanczos_steps=steps)


class PyHessian:
    """PyHessian on a single batch, the fastest way it has: double backward, the gradient's graph kept.

    It knows no norm; its density with two Lanczos steps a run gives zᵀHz and ‖Hz‖² of its probes.
    """

    name, package = "pyhessian", "pyhessian"

    def plan(self, diagonal: Diagonal) -> Plan:
        norm = budgets.hutchinson(diagonal, power=2, target=budgets.FROBENIUS, cost=2)
        trace = budgets.hutchinson(diagonal, power=1, target=budgets.TRACE, cost=1)
        if trace.size <= norm.size:
            trace = Budget("with ‖H‖²", 0, norm.size, trace.rmse)
        return {"lambda_max": budgets.power_iteration(diagonal), "trace": trace, "frobenius_sq": norm}

    def open(self, workload: Workload) -> Session:
        return _PyHessianSession(workload)


class _PyHessianSession:
    def __init__(self, workload: Workload) -> None:
        import pyhessian

        workload.model.zero_grad()
        cuda = workload.device.type == "cuda"
        self.hessian = pyhessian.hessian(workload.model, workload.criterion, data=workload.batch, cuda=cuda)

    def product(self) -> None:
        from pyhessian.utils import hessian_vector_product

        vectors = [torch.randn_like(p) for p in self.hessian.params]
        hessian_vector_product(self.hessian.gradsH, self.hessian.params, vectors)

    def moments(self, plan: Plan, *, seed: int) -> Values:
        (largest,), _ = self.hessian.eigenvalues(maxIter=plan["lambda_max"].size, tol=0.0)
        nodes, weights = self.density(2, runs=plan["frobenius_sq"].size)
        traces = [np.dot(w, x) for x, w in zip(nodes, weights, strict=True)]
        if plan["trace"].products:
            found = np.mean(self.hessian.trace(maxIter=plan["trace"].size, tol=0.0))
        else:
            found = self.dim * np.mean(traces)
        squares = [np.dot(w, np.square(x)) for x, w in zip(nodes, weights, strict=True)]
        return {"lambda_max": largest, "trace": float(found), "frobenius_sq": self.dim * float(np.mean(squares))}

    @property
    def dim(self) -> int:
        return sum(p.numel() for p in self.hessian.params)

    def density(self, steps: int, *, runs: int = 1) -> Any:
        with _eig():
            return self.hessian.density(iter=steps, n_v=runs)


@contextlib.contextmanager
def _eig() -> Iterator[None]:
    """PyHessian 0.1 calls ``torch.eig``, which torch no longer has: lend it the one for symmetric matrices."""

    def eig(matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], dim=1), vectors

    torch.eig = eig
    try:
        yield
    finally:
        torch.eig = None


PEERS: tuple[Peer, ...] = (Curvlinops(), Eigenthings(), PyHessian())
MODULES = {"curvlinops": "curvlinops", "hessian-eigenthings": "hessian_eigenthings", "pyhessian": "pyhessian"}


def installed(names: list[str]) -> tuple[list[Peer], dict[str, str]]:
    """The peers among ``names`` that import here, and for each of the others why not."""
    found, absent = [], {}
    for peer in PEERS:
        if peer.name not in names:
            continue
        try:
            version(peer.package)
            assert find_spec(MODULES[peer.name]) is not None
            __import__(MODULES[peer.name])
            found.append(peer)
        except (PackageNotFoundError, ImportError, AssertionError) as error:
            absent[peer.name] = f"{type(error).__name__}: {error}"
    return found, absent


def versions(names: list[str]) -> dict[str, str]:
    """Exact versions of what takes part."""
    packages = ["torch", "numpy", "scipy", *(p.package for p in PEERS if p.name in names)]
    found = {"zoscope": zoscope.__version__}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@contextlib.contextmanager
def twice_differentiable_attention() -> Iterator[None]:
    """The attention kernel that has a second derivative, for tools that do not choose it by themselves."""
    with sdpa_kernel(SDPBackend.MATH):
        yield
