"""Problem: what a user hands over."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from zoscope.errors import SpecError
from zoscope.problem import data
from zoscope.problem.data import CriterionLoss, LossFunction, Metric
from zoscope.problem.distributed import prepared
from zoscope.problem.model import Selection, select, unwrapped
from zoscope.problem.objective import Notice, Objective
from zoscope.problem.session import AUTOCAST, PrepareOptions
from zoscope.runtime import HALF, collective, without_autocast


class Problem:
    """A model, its batches and a loss.

    The batches are read on first use, once, and kept as a list. The model is never changed for good.

    Args:
        model: On any device, in train or eval mode; the mode is respected.
        batches: A list of batches, any iterable of batches (such as a DataLoader), or tensors in memory such as
            ``(inputs, targets)`` together with ``batch_size``.
        loss: ``loss(model, batch)`` returns the mean loss of the batch, a scalar tensor.
        params: Regular expression (``re.search``) on parameter names; None takes those with ``requires_grad``.
        batch_size: Examples per batch where ``batches`` is a dataset in memory.
        batch_size_of: Number of examples of a batch, its weight in the mean. By default the leading dimension of the
            first tensor in it; a batch without tensors counts as one example.
        metrics: Functions ``metric(model, batch)`` by name, each the mean of something over a batch, such as the
            accuracy; `zoscope.track` follows them.

    Raises:
        SpecError: If the model is not a module, or the loss or a metric cannot be called.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Any,
        loss: LossFunction,
        *,
        params: str | None = None,
        batch_size: int | None = None,
        batch_size_of: Callable[[Any], int] | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            given = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
            raise SpecError(
                f"model is {given}: expected an instance of torch.nn.Module; for a function of one tensor use "
                "Problem.from_function(f, x0)."
            )
        if not callable(loss):
            raise SpecError(
                f"loss is a {type(loss).__name__}: expected a function loss(model, batch) that returns a scalar."
            )
        for metric, function in (metrics or {}).items():
            if not callable(function):
                raise SpecError(
                    f"The metric {metric!r} is a {type(function).__name__}: expected a function metric(model, batch) "
                    "that returns a number, its mean over the batch."
                )
        self.model = model
        self.loss = loss
        self.metrics = dict(metrics or {})
        self.criterion: Callable[[Any, Any], Tensor] | None = None
        self.name: str | None = None
        self.params = params
        self.batch_size_of = batch_size_of
        self.notices: tuple[Notice, ...] = ()  # what a reader of every result should know
        self.own_device_only = False
        self.shared: Problem | None = None  # the one that all ranks of a job have loaded
        self._source, self._place = batches, data.called_from()
        self._batch_size = batch_size

    @classmethod
    def from_criterion(
        cls,
        model: nn.Module,
        batches: Any,
        criterion: Callable[[Any, Any], Tensor],
        *,
        params: str | None = None,
        batch_size: int | None = None,
        batch_size_of: Callable[[Any], int] | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> Self:
        """A problem with the loss ``criterion(model(x), y)`` over batches ``(x, y)``, which has a GGN matrix.

        Args:
            model: As for :class:`Problem`.
            batches: Pairs ``(inputs, targets)``, otherwise as for :class:`Problem`.
            criterion: Mean loss of a batch, such as ``nn.CrossEntropyLoss()``.
            params: As for :class:`Problem`.
            batch_size: As for :class:`Problem`.
            batch_size_of: As for :class:`Problem`.
            metrics: As for :class:`Problem`.
        """
        if not callable(criterion) or isinstance(criterion, type):
            raise SpecError(
                f"criterion is {criterion!r}: expected something to call as criterion(outputs, targets), such as "
                "nn.CrossEntropyLoss()."
            )
        problem = cls(
            model,
            batches,
            CriterionLoss(criterion),
            params=params,
            batch_size=batch_size,
            batch_size_of=batch_size_of,
            metrics=metrics,
        )
        problem.criterion = criterion
        return problem

    @classmethod
    def from_function(cls, f: Callable[[Tensor], Tensor | float], x0: Tensor) -> Self:
        """A problem without model and data: minimise ``f`` from ``x0``.

        Args:
            f: Takes a tensor like ``x0``, returns a scalar tensor. Where no derivative is taken, as with
                ``curvature="forward"``, it may return a number instead: NumPy, another program, a simulator. It must
                not keep or change its argument, which moves on.
            x0: Floating-point tensor of any shape; it is copied.
        """
        if not callable(f):
            raise SpecError(
                f"f is a {type(f).__name__}: expected a function of one tensor that returns a scalar tensor."
            )
        if not isinstance(x0, Tensor) or not x0.is_floating_point():
            kind = str(x0.dtype) if isinstance(x0, Tensor) else type(x0).__name__
            raise SpecError(f"x0 is {kind}: expected a floating-point torch.Tensor.")
        problem = cls(Point(x0), [None], PointLoss(f))
        problem.own_device_only = True  # f closes over tensors that cannot be moved along
        return problem

    @cached_property
    def batches(self) -> list[Any]:
        """All batches, as the user made them.

        Raises:
            SpecError: If there are none, or a second pass over a loader gives others.
        """
        return data.materialise(self._source, batch_size=self._batch_size, place=self._place)

    @cached_property
    def counts(self) -> list[int]:
        """Examples of each batch, or what else its loss is weighted by."""
        return data.count_examples(self.batches, self.batch_size_of)

    @property
    def num_examples(self) -> int:
        """Examples over all batches."""
        return data.number_of_examples(self.batches, self.counts, self.batch_size_of)

    @property
    def num_params(self) -> int:
        """Number of scalars that are varied; tied weights count once."""
        return self.selection().num_params

    def selection(self) -> Selection:
        """Which parameters are varied."""
        with unwrapped(self.model) as model:
            return select(model, self.params)

    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters that are varied, in the order of the flat vector."""
        with unwrapped(self.model) as model:
            return tuple(model.get_parameter(name) for name in select(model, self.params).names)

    def with_params(self, regex: str | None) -> Problem:
        """The same problem with other parameters varied; None takes those with ``requires_grad``."""
        _ = self.batches  # read now: two problems cannot share a one-shot iterator
        twin = copy.copy(self)
        twin.params = regex
        return twin

    def prepare(
        self,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        micro_batch: int | None = None,
        check: bool = True,
        differentiable: bool = True,
        trains: bool = False,
        max_memory: int | None = None,
    ) -> AbstractContextManager[Objective]:
        """Enter a session in which the loss can be evaluated and differentiated twice.

        The model is used in place where it already is on ``device`` and in ``dtype``, else a copy is. On exit
        parameters, buffers, modes, ``requires_grad``, ``.grad``, hooks and the global generators are as they were.

        Args:
            device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:i"``.
            dtype: ``"auto"`` (that of the model, at least float32), a name such as ``"float64"``, or ``"own"``, which
                leaves every tensor as it is.
            micro_batch: Largest number of examples evaluated at once; None keeps the batches as they are.
            check: Evaluate the loss on entry and refuse what cannot be measured.
            differentiable: Whether derivatives will be taken. False leaves the checks of them out, lets the loss return
                a number, takes the memory of inference and no more, and lets attention use its fused kernels.
            trains: Whether training steps are taken. They keep a dtype in half precision, and autocast; otherwise a
                derivative is taken in float32 at least, of a copy. What is measured between the steps is for
                `zoscope.problem.core.Measurable`.
            max_memory: Bytes that the process may hold in all; batches are cut, and vectors kept, accordingly.

        Raises:
            SpecError: On entry, for a loss or a model that cannot be measured.
            NumericalError: On entry, for a loss that is not finite, or if one example does not fit into memory.
        """
        options = PrepareOptions(device, dtype, micro_batch, check, differentiable, trains, max_memory)
        return prepared(self, options)

    def __repr__(self) -> str:
        kind = type(self.model).__name__
        return f"Problem({kind}{f', name={self.name!r}' if self.name else ''})"


class Point(nn.Module):
    """A model that is nothing but its parameter ``x``."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x.detach().clone())


class PointLoss:
    """A function of one tensor as a loss of the model `Point`."""

    def __init__(self, f: Callable[[Tensor], Tensor | float]) -> None:
        self._f = f

    def __call__(self, model: nn.Module, _: Any) -> Tensor:
        """The value where the model stands."""
        # Not get_parameter: torch.func puts plain tensors in its place. Whether a number will do is checked on entry.
        return cast("Tensor", self._f(cast("Point", model).x))


class Measurable:
    """A problem that trains, in a form that can be differentiated twice.

    Args:
        objective: Prepared with ``trains=True``.
        twin: The same problem in float32, likewise, where ``objective`` is in half precision.
    """

    def __init__(self, objective: Objective, twin: Objective | None = None) -> None:
        self._objective, self._twin = objective, twin

    @property
    def num_params(self) -> int:
        """``d``."""
        return self._objective.num_params

    @property
    def apart(self) -> bool:
        """Whether a copy is measured."""
        return self._twin is not None

    @contextmanager
    def at(self, theta: Tensor | None = None) -> Iterator[Objective]:
        """What to measure at the parameters where training stands, or at ``(d,)`` others; without autocast.

        It is not to be used after the context, nor are the steps of training within it.
        """
        training, found = self._objective, self._twin or self._objective
        before = training.read() if theta is not None and self._twin is None else None
        if self._twin is not None:
            _follow(training, self._twin)
        if theta is not None:
            found.write(theta)
        try:
            with without_autocast(lambda: training.notify("autocast", AUTOCAST)), _others(found):
                yield found
        finally:
            if before is not None:
                found.write(before)
            if self._twin is not None:  # what was noticed belongs to the result
                for notice in self._twin.warnings:
                    training.notify(notice.code, notice.message)


@contextmanager
def measurable(problem: Problem, objective: Objective, **options: Any) -> Iterator[Measurable]:
    """What is measured of a problem that is being trained.

    Args:
        problem: The problem.
        objective: Prepared of it with ``trains=True``.
        **options: Of `Problem.prepare`: device, micro-batch and memory.

    Raises:
        SpecError, NumericalError: If the copy in float32 that half precision needs cannot be had.
    """
    if objective.dtype not in HALF:
        yield Measurable(objective)
        return
    with problem.prepare(dtype="float32", trains=True, **options) as twin:
        twin.warnings[:] = [notice for notice in twin.warnings if notice.code != "upcast"]
        name = str(objective.dtype).removeprefix("torch.")
        objective.notify(
            "half-precision",
            f"Training steps are in {name}. What is measured on the way is measured in float32, on a copy: second "
            f"derivatives in {name} carry about 1 % of noise each.",
        )
        yield Measurable(objective, twin)


@torch.no_grad()
def _follow(training: Objective, twin: Objective) -> None:
    torch._foreach_copy_(list(twin.params), list(training.params))
    for own, other in zip(twin.model.buffers(), training.model.buffers(), strict=True):
        own.copy_(other)


@contextmanager
def _others(objective: Objective) -> Iterator[None]:
    """The other ranks do without autocast too."""
    _autocast(objective, False)
    try:
        yield
    finally:
        if objective.ranks.in_step:
            _autocast(objective, True)


_contexts: list[AbstractContextManager[None]] = []  # entered on another rank


@collective
def _autocast(objective: Objective, allowed: bool) -> None:
    """Have the other ranks do without autocast, or let it be again."""
    if objective.ranks.leads:
        return
    if allowed:
        _contexts.pop().__exit__(None, None, None)
    else:
        _contexts.append(without_autocast())
        _contexts[-1].__enter__()
