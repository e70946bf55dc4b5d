"""Every optimizer and every law of directions, one record each; all lists of them are read from here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Adaptivity = Literal["second-moment", "sign", "slopes"]
"""What the estimate is divided by: the root of its second moment, its absolute value, or the size of its slopes."""


@dataclass(frozen=True)
class OptimizerRecord:
    """One optimizer, zeroth-order (``zo-NAME``) and, where ``first_order`` says so, fed by the gradient (``NAME``).

    To add one: a record in `OPTIMIZERS`; in ``zoscope/optim/rules.py`` a class of the name in ``rule`` that moves the
    parameters, its fields being the ``options``; in ``zoscope/optim/optimizers.py`` a class of the name in ``public``
    for users' own loops. That is all: command line, files, messages, ``bounds``, ``probe``, ``track`` and ``check``
    read the record. What theory says of it follows from ``options``, ``preconditioned`` and ``adapts``.

    Args:
        name: Name of the family.
        label: The same in prose.
        rule: Class of ``zoscope.optim.rules``.
        public: Class of ``zoscope``.
        options: The constants that it has, by their name in the table of options. ``beta``, or the first of ``betas``,
            is the momentum of theory; with ``betas`` it is an average, ``m ← β₁m + (1−β₁)g``.
        preconditioned: Whether it acts through ``P⁻¹H`` with Adam's P, which theory takes as frozen.
        adapts: What its steps are divided by. Such a run stalls at a floor, and without ``preconditioned`` it has no
            other theory: no step size makes it blow up on a quadratic.
        first_order: Whether it also follows the gradient itself.
        aliases: Names of the zeroth-order one in other programs' files.
        gradient_aliases: Names of the first-order one there.
    """

    name: str
    label: str
    rule: str
    public: str
    options: tuple[str, ...] = ()
    preconditioned: bool = False
    adapts: Adaptivity | None = None
    first_order: bool = True
    aliases: tuple[str, ...] = ()
    gradient_aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Its names as an option takes them."""
        return (self.name, f"zo-{self.name}") if self.first_order else (f"zo-{self.name}",)

    def settings(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of some values that it depends on, as JSON has them; Adam's P is told by ``preconditioner``.

        Dampening and weight decay are left out where they are 0.
        """
        names = (*self.options, "preconditioner") if self.preconditioned else self.options
        found = {name: values[name] for name in names if name in values and (values[name] or name not in OFF)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


OFF = ("dampening", "weight_decay")
"""Constants that are not there where they are 0."""

ADAMW = ("torch", "torch_fused", "torch_xla", "torch_npu_fused", "anyprecision", "hf")

OPTIMIZERS: dict[str, OptimizerRecord] = {
    record.name: record
    for record in (
        OptimizerRecord(
            "gd", "GD", "GD", "ZOGD", ("weight_decay",), aliases=("zo", "zo_sgd"), gradient_aliases=("sgd",)
        ),
        OptimizerRecord("gdm", "GDM", "GDM", "ZOGDM", ("beta", "dampening", "weight_decay"), aliases=("zo_sgd_mmt",)),
        OptimizerRecord(
            "adam",
            "Adam",
            "Adam",
            "ZOAdam",
            ("betas", "eps"),
            preconditioned=True,
            adapts="second-moment",
            aliases=("zo_adam",),
            gradient_aliases=("adam", "adamw", *(f"adamw_{name}" for name in ADAMW)),
        ),
        OptimizerRecord(
            "signsgd", "SignSGD", "SignSGD", "ZOSignSGD", adapts="sign", first_order=False, aliases=("zo_sign_opt",)
        ),
        OptimizerRecord("normalized", "Normalized", "Normalized", "ZONormalized", adapts="slopes", first_order=False),
    )
}

FAMILIES: tuple[str, ...] = tuple(OPTIMIZERS)
NAMES: tuple[str, ...] = (
    *(record.name for record in OPTIMIZERS.values() if record.first_order),
    *(f"zo-{name}" for name in FAMILIES),
)
"""Names of optimizers as options take them."""

DEFAULT_FAMILIES: tuple[str, ...] = ("gd", "gdm", "adam")
"""What ``bounds`` tells of where no optimizer is named."""


def family_of(name: str) -> str:
    """``adam`` for ``zo-adam`` and for ``adam``."""
    return name.removeprefix("zo-")


def is_zeroth_order(name: str) -> bool:
    """Whether a name is that of a zeroth-order optimizer."""
    return name.startswith("zo-")


def optimizer_name(name: str) -> str:
    """``ZO-Adam`` for ``zo-adam``."""
    label = OPTIMIZERS[family_of(name)].label
    return f"ZO-{label}" if is_zeroth_order(name) else label


def term_of(optimizer: str) -> str:
    """What the step size allows, as a formula."""
    options = OPTIMIZERS[family_of(optimizer)].options
    if is_zeroth_order(optimizer):
        return "2(1−β)/η" if "beta" in options else "2/η"
    return "2(1+β)/η" if "beta" in options else "2(1+β₁)/((1−β₁)η)" if "betas" in options else "2/η"


def optimizer_record(name: str) -> OptimizerRecord:
    """The record of a family.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(FAMILIES)}, got {name!r}")
    return OPTIMIZERS[name]


Directions = Literal["gaussian", "sphere", "rademacher"]
"""Names of the laws; the one list of them that type checkers read."""


Differences = Literal["central", "one-sided"]
"""``(f(θ+μu) − f(θ−μu))/(2μ)``, or ``(f(θ+μu) − f(θ))/μ``."""


@dataclass(frozen=True)
class DirectionLaw:
    """A law of directions u with ``E u uᵀ = I``.

    To add one: a record in `DIRECTIONS` and its name in `Directions`; how it is drawn, in
    ``zoscope/optim/directions.py``.

    Args:
        name: Its name.
        kappa: κ of ``E[u uᵀ G u uᵀ] = κ (2G + Tr(G) I)``, by the dimension.
        needs_dimension: Whether κ depends on the dimension.
        binary: Whether entries are ±1. Then ``E[u uᵀ G u uᵀ]`` has ``-2 diag G`` besides, which depends on the basis
            and is left out: thresholds lie between the one printed and 2/Tr H, by 0.2 to 0.5 % above it on networks.
    """

    name: Directions
    kappa: Callable[[int], float]
    needs_dimension: bool = False
    binary: bool = False


DIRECTIONS: dict[str, DirectionLaw] = {
    law.name: law
    for law in (
        DirectionLaw("gaussian", lambda _: 1.0),
        DirectionLaw("sphere", lambda dimension: dimension / (dimension + 2), needs_dimension=True),
        DirectionLaw("rademacher", lambda _: 1.0, binary=True),
    )
}
