"""Schedules of lambda, class weights and class vectors (docs/MATH.md §2.5).

Each schedule has step(), state_dict() and load_state_dict(), as torch's learning-rate schedulers. The state_dict of the criterion
or loss that it drives has its count too. So a checkpoint of the model and its criterion resumes it, without one of the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypedDict

import torch
from torch import Tensor

from . import _checks
from ._scheduled import Scheduled
from .losses import VS, LogitLoss, adrw_weights
from .robust import ABLoss, RelativeLam

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _check_start(start: int) -> None:
    """ValueError unless start is an integer >= 0."""
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        could_be = isinstance(start, Real) and not isinstance(start, bool) and 0 <= start < math.inf
        hint = f", such as int({start})" if could_be else ""
        raise ValueError(f"start: got {start!r}, expected an integer >= 0{hint}")


class CountedSchedule:
    """Base class of schedules that count the calls of step() and drive one module, whose state_dict has the count too."""

    COUNT: ClassVar[str]  # the name of the count in the module

    def __init__(self, driven: Scheduled):
        self._driven = driven
        self.count = 0
        driven.driven_by(self)

    @property
    def count(self) -> int:
        """The number of calls of step() so far."""
        return self._count

    @count.setter
    def count(self, value: int) -> None:
        self._count = value
        setattr(self._driven, self.COUNT, value)

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy, whose module does not know it yet
        self.__dict__.update(state)
        self._driven.driven_by(self)

    def state_dict(self) -> dict[str, int]:
        """The number of calls so far."""
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at the saved count, and switch to what belongs to it."""
        raise NotImplementedError


class TwoStage(CountedSchedule):
    """Two-stage lambda (ABSGD paper, Sec. 3.6; docs/MATH.md §2.5): learn features with the plain mean, then reweight.

        lambda = inf for the first `start` calls of step(), then `lam`

    The constructor sets lambda = inf at once. When lambda changes, log s starts anew (`ABLoss.set_lam`). To resume a training,
    construct the criterion and the schedule, and then load the state_dict of the criterion, which has the count too. The
    schedule's own state_dict may be loaded before or after it.

    Args:
        criterion: the `ABLoss`.
        lam: lambda of the second stage, or `RelativeLam(r)`.
        start: the number of calls of step() in the first stage; 0: `lam` from the beginning.
        unit: whether you call step() once per "epoch" or once per "step". The schedule only stores it.

    Raises:
        TypeError: criterion is no `ABLoss`.
        ValueError: lam is 0 or NaN, start is negative, or unit is unknown.

    >>> criterion = ABLoss(lam=0.5)
    >>> schedule = TwoStage(criterion, lam=0.5, start=1)
    >>> criterion.lam
    tensor(inf)
    >>> schedule.step()
    >>> criterion.lam
    tensor(0.5000)
    """

    COUNT = "two_stage_count"

    def __init__(self, criterion: ABLoss, lam: float | RelativeLam, start: int, unit: str = "epoch"):
        if not isinstance(criterion, ABLoss):
            raise TypeError(f"criterion: got {type(criterion).__name__}, expected an ABLoss")
        _check_start(start)
        if not isinstance(lam, RelativeLam):
            _checks.lam(lam)
        self.unit = _checks.choice(unit, "unit", ("epoch", "step"))
        self.criterion, self.lam, self.start = criterion, lam, start
        super().__init__(criterion)
        criterion.set_lam(lam if start == 0 else math.inf)

    def step(self) -> None:
        """Count one epoch or step. The `start`-th call sets lambda."""
        if self.count + 1 == self.start:
            self.criterion.set_lam(self.lam)  # if this raises, the call is not counted
        self.count += 1

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at the saved count.

        This sets lambda if the criterion is in the other stage. log s belongs to the state_dict of the criterion.
        """
        self.count = int(state["count"])
        criterion, second = self.criterion, self.count >= self.start
        is_plain = not criterion.lam.is_meta and bool(criterion.lam.isinf())
        is_unknown = criterion.lam_is_open and criterion.relative_lam is None  # open, and loaded in the first stage
        if second == is_plain or is_unknown:
            criterion.set_lam(self.lam if second else math.inf, reset=False)


class SwitchAt(CountedSchedule):
    """Base class of schedules that switch something on after `start` calls of step()."""

    def __init__(self, loss: LogitLoss, start: int):
        _check_start(start)
        self.loss, self.start = loss, start
        super().__init__(loss)
        self._switch(start == 0)

    def _switch(self, on: bool) -> None:
        """Switch it on or off in the loss."""
        raise NotImplementedError

    def step(self) -> None:
        """Count one epoch. The `start`-th call switches on."""
        self.count += 1
        self._switch(self.count >= self.start)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at the saved count, and switch to what belongs to it."""
        self.count = int(state["count"])
        self._switch(self.count >= self.start)


class DRW(SwitchAt):
    """Deferred re-weighting (Cao et al. 2019, Alg. 1; docs/MATH.md §2.5): no class weights at first, then `weight`.

        class weights = 1 for the first `start` calls of step(), then `weight`

    With the weights of `adrw_weights` this is ADRW (Wang et al. 2023, Sec. 3.3).

    Args:
        loss: one of the losses on logits. For an `ABLoss`, give its criterion.
        weight: (C) class weights, for example `class_balanced_weights(cls_num_list)`.
        start: the first epoch, counted from 0, that uses them; 0: from the beginning.

    Raises:
        TypeError: loss is none of the losses on logits.
        ValueError: weight is not one float per class, or start is negative.

    >>> from absgd_fast import CrossEntropy
    >>> loss = CrossEntropy()
    >>> schedule = DRW(loss, torch.tensor([0.5, 1.5]), start=1)
    >>> loss.weight
    tensor([1., 1.])
    >>> schedule.step()
    >>> loss.weight
    tensor([0.5000, 1.5000])
    """

    COUNT = "drw_count"

    def __init__(self, loss: LogitLoss, weight: Tensor, start: int):
        if not isinstance(loss, LogitLoss):
            raise TypeError(
                f"loss: got {type(loss).__name__}, expected one of the losses on logits; for an ABLoss, give its criterion"
            )
        weight = _checks.given_class_weight(weight)
        if loss.weight is not None and loss.weight.shape != weight.shape:
            raise ValueError(f"weight: got {len(weight)} classes, expected {len(loss.weight)} as in the weights of the loss")
        self.weight = weight
        super().__init__(loss, start)

    def _switch(self, on: bool) -> None:
        # a tensor in both stages: a checkpoint of one stage can then be loaded in the other
        before = self.loss.weight
        device = self.weight.device if before is None or before.is_meta else before.device
        self.loss.set_weight((self.weight if on else torch.ones_like(self.weight)).to(device, copy=True))


class TLA(SwitchAt):
    """Truncated logit adjustment (Wang et al. 2023, Sec. 3.3; docs/MATH.md §2.5) of a `VS` or `CDT` loss.

        S_k = (N_k / N_max)^gamma for the first `start` calls of step(), then S_k = 1; the additive part D stays

    Args:
        loss: a `VS` or `CDT` loss. For an `ABLoss`, give its criterion.
        start: the first epoch, counted from 0, with S_k = 1; 0: from the beginning.

    Raises:
        TypeError: loss is neither `VS` nor `CDT`.
        ValueError: start is negative.

    >>> from absgd_fast import CDT
    >>> loss = CDT([4, 1], gamma=0.5)
    >>> schedule, x, y = TLA(loss, start=1), torch.tensor([[0.0, 2.0]]), torch.tensor([1])
    >>> loss(x, y)  # log(1 + exp(-1))
    tensor([0.3133])
    >>> schedule.step()
    >>> loss(x, y)  # log(1 + exp(-2))
    tensor([0.1269])
    """

    COUNT = "tla_count"

    loss: VS

    def __init__(self, loss: VS, start: int):
        if not isinstance(loss, VS):
            raise TypeError(f"loss: got {type(loss).__name__}, expected VS or CDT, which scale the logits")
        super().__init__(loss, start)

    def _switch(self, on: bool) -> None:
        self.loss.scaled = not on


class Schedule(Protocol):
    """The methods of a schedule."""

    def step(self) -> None:
        """Count one epoch or step."""

    def state_dict(self) -> dict[str, int]:
        """The state, to be saved."""
        ...

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a saved state."""


class ChainedSchedules:
    """Several schedules that are stepped, saved and loaded as one."""

    def __init__(self, *parts: Schedule):
        self.parts = parts

    def step(self) -> None:
        """Count one epoch or step in every schedule."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, list[dict[str, int]]]:
        """The states of the schedules."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, list[dict[str, int]]]) -> None:
        """Continue every schedule at its saved state."""
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)


class VSOptions(TypedDict, total=False):
    """The keyword arguments that `vs_tla_adrw` hands to `VS`."""

    weight: Tensor | None
    ignore_index: int
    reduction: str
    backend: str | None


def vs_tla_adrw(
    cls_num_list: Sequence[int],
    *,
    start: int,
    gamma: float = 0.3,
    tau: float = 1.0,
    nu: float = 1.0,
    **options: Unpack[VSOptions],
) -> tuple[VS, ChainedSchedules]:
    """A `VS` loss with TLA and ADRW from the same epoch on (Wang et al. 2023, Alg. 1; docs/MATH.md §2.5).

    Args:
        cls_num_list: number of samples of each class, positive.
        start: the first epoch, counted from 0, with TLA and ADRW (T0 of the paper).
        gamma, tau: of `VS`. The paper tunes tau per data set.
        nu: of `adrw_weights`. The paper tunes it per data set, between 0.15 and 3.
        options: reduction, ignore_index and backend, as for `VS`.

    Returns:
        The loss, and a schedule with step(), to be called at the end of each epoch, state_dict() and load_state_dict().

    >>> loss, schedule = vs_tla_adrw([100, 10], start=1)
    >>> schedule.step()
    >>> loss.weight, loss.scaled
    (tensor([0.1818, 1.8182]), False)
    """
    loss = VS(cls_num_list, gamma, tau, **options)
    return loss, ChainedSchedules(TLA(loss, start), DRW(loss, adrw_weights(cls_num_list, nu), start))
