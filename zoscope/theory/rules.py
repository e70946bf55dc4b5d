"""Update rules as theory sees them: heavy ball with a scale. A new optimizer is one row of ``update_rule``."""

from dataclasses import dataclass

from zoscope.theory.validate import require_positive

OPTIMIZERS: tuple[str, ...] = ("gd", "gdm", "adam")


@dataclass(frozen=True)
class UpdateRule:
    """The iteration ``m ← βm + g; x ← x - (lr_scale·lr) m`` on the spectrum of M.

    Args:
        name: Name of the optimizer.
        momentum: Heavy-ball β in ``[0, 1)``.
        lr_scale: Factor from the user's learning rate to the step along ``m``.
        preconditioned: Whether M is ``P^-1/2 H P^-1/2`` with a frozen preconditioner P, not the Hessian itself.

    Raises:
        ValueError: If β is outside ``[0, 1)`` or ``lr_scale`` is not positive.
    """

    name: str
    momentum: float = 0.0
    lr_scale: float = 1.0
    preconditioned: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum!r}")
        require_positive("lr_scale", self.lr_scale)


def update_rule(name: str, *, beta: float = 0.9, betas: tuple[float, float] = (0.9, 0.999)) -> UpdateRule:
    """The row of an optimizer.

    Args:
        name: ``"gd"``, ``"gdm"`` (the convention of ``torch.optim.SGD(momentum=β)``) or ``"adam"``.
        beta: Momentum of ``"gdm"``.
        betas: Adam's ``(β₁, β₂)``; only β₁ enters, because P is frozen.

    Returns:
        The heavy-ball form; Adam's ``m ← β₁m + (1-β₁)g`` is the same iteration with ``lr_scale = 1 - β₁``.

    Raises:
        ValueError: If the name is unknown or a used β is outside ``[0, 1)``.

    Source: arXiv:2604.14669.
    """
    if name == "gd":
        return UpdateRule("gd")
    if name == "gdm":
        return UpdateRule("gdm", momentum=beta)
    if name == "adam":
        if not all(0 <= value < 1 for value in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas!r}")
        return UpdateRule("adam", momentum=betas[0], lr_scale=1 - betas[0], preconditioned=True)
    raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
