"""Update rules as theory sees them, and the second moment of a zeroth-order gradient estimate."""

import math
from dataclasses import dataclass

from zoscope.registry import DIRECTIONS, Adaptivity, Directions, optimizer_record
from zoscope.theory.spectrum import require_count, require_finite


@dataclass(frozen=True)
class EstimatorMoments:
    """Constants of ``E[ĝ ĝᵀ] = a·HΣH + b·Tr(HΣH)·I`` for ``f(x) = ½ xᵀHx`` and ``Σ = x xᵀ``.

    Args:
        a: Weight of the signal; dimensionless, > 0.
        b: Weight of the isotropic noise that every mode receives from all others; dimensionless, ≥ 0.
        binary: Whether the entries of directions are ±1: their sign is the entry itself.

    Raises:
        ValueError: If ``a`` is not positive or ``b`` is negative.

    Source: derived in the guide's page on theory.
    """

    a: float
    b: float
    binary: bool = False

    def __post_init__(self) -> None:
        require_finite("> 0", a=self.a)
        require_finite(">= 0", b=self.b)


GAUSSIAN = EstimatorMoments(2.0, 1.0)
"""One two-point query along ``u ~ N(0, I)``."""

FIRST_ORDER = EstimatorMoments(1.0, 0.0)
"""The exact gradient as an estimate: ``E ĝĝᵀ = HΣH``, the limit of infinitely many queries."""


def estimator_moments(
    directions: Directions = "gaussian", *, queries: int = 1, dimension: int | None = None
) -> EstimatorMoments:
    """Constants (a, b) of the average of ``queries`` independent two-point estimates.

    One query gives ``E[u uᵀ G u uᵀ] = κ (2G + Tr(G) I)`` with κ = 1 for Gaussian directions and κ = d/(d+2) for the
    sphere of radius √d; averaging q of them keeps ``(1 - 1/q) G`` from the pairs of different queries.

    Args:
        directions: Law of the perturbation ``u``.
        queries: Number q of independent queries averaged per step.
        dimension: Number of parameters d; needed for ``"sphere"``, ignored for ``"gaussian"``.

    Returns:
        ``(1 + 1/q, 1/q)`` for Gaussian directions and those of entries ±1, ``(1 + (2κ-1)/q, κ/q)`` for the sphere.

    Raises:
        ValueError: If the law is unknown, or ``queries`` or ``dimension`` is not a positive integer.

    Source: derived in the guide's page on theory.
    """
    require_count("queries", queries)
    if directions not in DIRECTIONS:
        raise ValueError(f"directions must be one of {', '.join(DIRECTIONS)}, got {directions!r}")
    law = DIRECTIONS[directions]
    if law.needs_dimension and dimension is None:
        raise ValueError(f"{directions} directions need the dimension d: pass dimension=d")
    if dimension is not None:
        require_count("dimension", dimension)
    kappa = law.kappa(dimension or 1)
    return EstimatorMoments(a=1 + (2 * kappa - 1) / queries, b=kappa / queries, binary=law.binary)


@dataclass(frozen=True)
class UpdateRule:
    """The iteration ``m ← βm + g + wx; x ← x - (lr_scale·lr) m`` on the spectrum of M.

    Args:
        name: Name of the optimizer.
        momentum: Heavy-ball β in ``[0, 1)``.
        lr_scale: Factor from the user's learning rate to the step along ``m``.
        preconditioned: Whether M is ``P^-1/2 H P^-1/2`` with a frozen preconditioner P, not the Hessian itself.
        adapts: What its steps are divided by; see `floor_factor`.
        weight_decay: w, loss/param²: a drift without noise. Descent thresholds, intervals and loss curves leave it
            out.

    Raises:
        ValueError: If β is outside ``[0, 1)``, ``lr_scale`` is not positive, or w is negative.
    """

    name: str
    momentum: float = 0.0
    lr_scale: float = 1.0
    preconditioned: bool = False
    adapts: Adaptivity | None = None
    weight_decay: float = 0.0

    @property
    def is_linear(self) -> bool:
        """Whether a step is linear in the estimate, as the spectral theory assumes; one that is not never blows up."""
        return self.adapts is None or self.preconditioned

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum!r}")
        require_finite("> 0", lr_scale=self.lr_scale)
        require_finite(">= 0", weight_decay=self.weight_decay)


def update_rule(
    name: str,
    *,
    beta: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
    dampening: float = 0.0,
    weight_decay: float = 0.0,
) -> UpdateRule:
    """The rule of an optimizer, from its record.

    Args:
        name: Family of an optimizer; ``"gdm"`` has the convention of ``torch.optim.SGD(momentum=β)``.
        beta: Momentum of ``"gdm"``.
        betas: Adam's ``(β₁, β₂)``; only β₁ enters, because P is frozen.
        dampening: τ of ``m ← βm + (1-τ)g``, which stretches every threshold by ``1/(1-τ)``.
        weight_decay: w of ``g + wx``.

    Returns:
        The heavy-ball form; Adam's ``m ← β₁m + (1-β₁)g`` is the same iteration with ``lr_scale = 1 - β₁``.

    Raises:
        ValueError: If the name is unknown or a used β is outside ``[0, 1)``.

    Source: arXiv:2604.14669.
    """
    record = optimizer_record(name)
    if "betas" in record.options:
        if not all(0 <= value < 1 for value in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas!r}")
        return UpdateRule(name, betas[0], 1 - betas[0], record.preconditioned, record.adapts)
    if not 0 <= dampening < 1:
        raise ValueError(f"dampening must be in [0, 1), got {dampening!r}")
    return UpdateRule(
        name,
        beta if "beta" in record.options else 0.0,
        1 - dampening if "dampening" in record.options else 1.0,
        record.preconditioned,
        record.adapts,
        weight_decay if "weight_decay" in record.options else 0.0,
    )


def floor_factor(adapts: Adaptivity, moments: EstimatorMoments) -> float:
    """κ of the gradient norm ``κ·lr·Tr(H)/2`` at which a run stalls whose steps do not shrink with the gradient.

    With q queries, ``E χ_q`` the mean norm of q standard normal numbers:

    * ``"second-moment"``, Adam: ``1/√q``. Its P is nearly ``‖g‖/√q`` on every parameter;
    * ``"sign"`` of every coordinate: ``√(π/2) / E χ_q``, which is π/2 for one query; ``√(π/(2q))`` where entries of
      directions are ±1;
    * ``"slopes"``, divided by their root mean square: ``1/(√q E χ_q)``, which is ``√(π/2)`` for one query.

    Args:
        adapts: What the steps are divided by.
        moments: Constants of the estimator; ``q = 1/b``, but for the sphere in few dimensions.

    Returns:
        Dimensionless. It leaves out the curvature along the gradient, small beside ``Tr H`` where many modes have some.

    Source: derived in the guide's page on theory.
    """
    queries = 1 / moments.b
    if adapts == "second-moment":
        return 1 / math.sqrt(queries)
    if adapts == "sign" and moments.binary:
        return math.sqrt(math.pi / (2 * queries))
    chi = math.sqrt(2) * math.exp(math.lgamma((queries + 1) / 2) - math.lgamma(queries / 2))
    return math.sqrt(math.pi / 2) / chi if adapts == "sign" else 1 / (math.sqrt(queries) * chi)
