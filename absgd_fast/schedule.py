"""Schedules of lambda, class weights and class vectors (docs/MATH.md §2.5).

Each schedule has the interface of torch's learning-rate schedulers, so it can stand among them in a framework's list. The
state_dict of the criterion or loss that it drives has its count too. So a checkpoint of the model and its criterion resumes it,
without one of the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypedDict

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from . import _checks
from ._scheduled import Scheduled
from .class_weights import adrw_weights
from .losses import VS, LogitLoss
from .robust import ABLoss, RelativeLam

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _check_start(start: int) -> int:
    """An integer >= 0 as an int; ValueError for anything else."""
    return _checks.at_least(start, "start", 0)


class LossSchedule(LRScheduler):
    """Base class of schedules that change a loss, and that frameworks take for schedulers of learning rates.

    Lightning and accelerate ask for torch's class, compare `optimizer` with the optimizers of the training, and read the learning
    rates. torch's __init__ is not called: it would write into the optimizer, whose learning rates are none of our business.
    """

    optimizer: Optimizer | None = None  # type: ignore[assignment]  # torch's schedulers always have one
    _step_count = 1  # accelerate adds to it while gradients accumulate; only torch's own schedulers read it

    @property
    def last_epoch(self) -> int:  # an attribute of torch's schedulers
        """The number of calls of step() so far, under the name that torch's schedulers have for it."""
        return self._calls()

    @last_epoch.setter
    def last_epoch(self, value: int) -> None:
        raise AttributeError(
            f"last_epoch: got {value!r}, but {type(self).__name__} counts the calls of step() itself;"
            " to continue at a count, use load_state_dict(...). torch's SequentialLR sets last_epoch, so it cannot hold this"
            " schedule: step it beside that one"
        )

    def _calls(self) -> int:
        """The number of calls of step() so far."""
        raise NotImplementedError

    def get_last_lr(self) -> list[float | Tensor]:
        """The learning rates of the groups of `optimizer`, tensors as copies; an empty list without an optimizer."""
        rates = [] if self.optimizer is None else [group["lr"] for group in self.optimizer.param_groups]
        return [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]


class CountedSchedule(LossSchedule):
    """Base class of schedules that count the calls of step() and drive one module, whose state_dict has the count too."""

    COUNT: ClassVar[str]  # the name of the count in the module

    def __init__(self, driven: Scheduled, optimizer: Optimizer | None):
        self._driven, self.optimizer = driven, optimizer
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

    def _calls(self) -> int:
        return self._count

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy, whose module does not know it yet
        self.__dict__.update(state)
        self._driven.driven_by(self)

    def step(self) -> None:  # type: ignore[override]  # without torch's deprecated argument, as its ChainedScheduler
        """Count one epoch or step, and switch to what belongs to the new count."""
        self._enter(self.count + 1)  # if this raises, the call is not counted
        self.count += 1

    def _enter(self, count: int) -> None:
        """Switch to what belongs to this count."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, int]:
        """The number of calls so far."""
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue at the saved count, and switch to what belongs to it."""
        self.continue_at(int(state_dict["count"]))

    def continue_at(self, count: int) -> None:
        """Continue at this count, and switch to what belongs to it. The module calls it when a count is loaded into it."""
        self._enter(count)
        self.count = count


class TwoStage(CountedSchedule):
    """Two-stage lambda (ABSGD paper, Sec. 3.6; docs/MATH.md §2.5): learn features with the plain mean, then reweight.

        lambda = inf for the first `start` calls of step(), then `lam`

    The constructor sets lambda = inf at once. When lambda changes, log s starts anew (`ABLoss.set_lam`). To resume a training,
    construct the criterion and the schedule, and then load the state_dict of the criterion, which has the count too. The
    schedule's own state_dict may be loaded before or after it. If the criterion was loaded before the schedule was made, load the
    schedule's too.

    Args:
        criterion: the `ABLoss`.
        lam: lambda of the second stage, or `RelativeLam(r)`.
        start: the number of calls of step() in the first stage; 0: `lam` from the beginning.
        unit: whether you call step() once per "epoch" or once per "step". The schedule only stores it.
        optimizer: the optimizer of the training, or None. Frameworks ask for it (docs/losses.md), but the schedule leaves it
            alone. It may be set later: `schedule.optimizer = optimizer`.

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

    def __init__(
        self,
        criterion: ABLoss,
        lam: float | RelativeLam,
        start: int,
        unit: str = "epoch",
        *,
        optimizer: Optimizer | None = None,
    ):
        if not isinstance(criterion, ABLoss):
            raise TypeError(f"criterion: got {type(criterion).__name__}, expected an ABLoss")
        start = _check_start(start)
        self.unit = _checks.choice(unit, "unit", ("epoch", "step"))
        count = criterion.two_stage_count  # of a checkpoint that was loaded before, or of an earlier schedule
        replaced = {name: getattr(criterion, name).clone() for name in criterion.STATE}
        self._replaced = None if count is None or criterion.lam.is_meta else (count, replaced)
        self.lam: float | Tensor | RelativeLam = lam if isinstance(lam, RelativeLam) else _checks.lam(lam)
        self.criterion, self.start = criterion, start
        super().__init__(criterion, optimizer)
        criterion.set_lam(self.lam if start == 0 else math.inf)

    def _enter(self, count: int) -> None:
        self._replaced = None
        if count == self.start:
            self.criterion.set_lam(self.lam)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue at the saved count.

        This sets lambda if the criterion is in the other stage. log s belongs to the state_dict of the criterion. But if the
        criterion had this count when the schedule was made, it gets back the lambda and log s that the constructor has replaced.
        """
        if self._replaced is not None and self._replaced[0] == int(state_dict["count"]):
            self.criterion.put_back(self._replaced[1])
        super().load_state_dict(state_dict)

    def continue_at(self, count: int) -> None:
        """As described in `CountedSchedule`, without a new start of log s."""
        self._replaced, self.count = None, count
        criterion, second = self.criterion, self.count >= self.start
        is_plain = not criterion.lam.is_meta and bool(criterion.lam.isinf())
        is_unknown = criterion.lam_is_open and criterion.relative_lam is None  # open, and loaded in the first stage
        if second == is_plain or is_unknown:
            criterion.set_lam(self.lam if second else math.inf, reset=False)


class SwitchAt(CountedSchedule):
    """Base class of schedules that switch something on after `start` calls of step()."""

    def __init__(self, loss: LogitLoss, start: int, optimizer: Optimizer | None):
        self.loss, self.start = loss, _check_start(start)
        super().__init__(loss, optimizer)
        self._switch(self.start == 0)

    def _switch(self, on: bool) -> None:
        """Switch it on or off in the loss."""
        raise NotImplementedError

    def _enter(self, count: int) -> None:
        self._switch(count >= self.start)


class DRW(SwitchAt):
    """Deferred re-weighting (Cao et al. 2019, Alg. 1; docs/MATH.md §2.5): no class weights at first, then `weight`.

        class weights = 1 for the first `start` calls of step(), then `weight`

    With the weights of `adrw_weights` this is ADRW (Wang et al. 2023, Sec. 3.3).

    Args:
        loss: one of the losses on logits. For an `ABLoss`, give its criterion.
        weight: (C) class weights, a tensor, an array or a list, for example `class_balanced_weights(cls_num_list)`.
        start: the first epoch, counted from 0, that uses them; 0: from the beginning.
        optimizer: as for `TwoStage`.

    Raises:
        TypeError: loss is none of the losses on logits.
        ValueError: weight is not one finite float per class, or start is negative.

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

    _on: bool | None = None  # the stage that it has switched the loss to

    def __init__(self, loss: LogitLoss, weight: Tensor | Sequence[float], start: int, *, optimizer: Optimizer | None = None):
        if not isinstance(loss, LogitLoss):
            raise TypeError(
                f"loss: got {type(loss).__name__}, expected one of the losses on logits; for an ABLoss, give its criterion"
            )
        weight = _checks.given_class_weight(weight)
        if loss.weight is not None and loss.weight.shape != weight.shape:
            raise ValueError(f"weight: got {len(weight)} classes, expected {len(loss.weight)} as in the weights of the loss")
        self.weight = weight
        super().__init__(loss, start, optimizer)

    def _switch(self, on: bool) -> None:
        # a tensor in both stages: a checkpoint of one stage can then be loaded in the other
        before = self.loss.weight
        device = self.weight.device if before is None or before.is_meta else before.device
        wanted = (self.weight if on else torch.ones_like(self.weight)).to(device)
        if self._on is not on or before is None or not _same(before, wanted):
            self.loss.set_weight(wanted)
        self._on = on


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two vectors have the same dtype, device and numbers. Tensors without values are not the same."""
    if a.dtype != b.dtype or a.device != b.device or a.shape != b.shape or not (_checks.has_values(a) and _checks.has_values(b)):
        return False
    return torch.equal(a.double(), b.double())  # torch has no equal for float8


class TLA(SwitchAt):
    """Truncated logit adjustment (Wang et al. 2023, Sec. 3.3; docs/MATH.md §2.5) of a `VS` or `CDT` loss.

        S_k = (N_k / N_max)^gamma for the first `start` calls of step(), then S_k = 1; the additive part D stays

    Args:
        loss: a `VS` or `CDT` loss. For an `ABLoss`, give its criterion.
        start: the first epoch, counted from 0, with S_k = 1; 0: from the beginning.
        optimizer: as for `TwoStage`.

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

    def __init__(self, loss: VS, start: int, *, optimizer: Optimizer | None = None):
        if not isinstance(loss, VS):
            raise TypeError(f"loss: got {type(loss).__name__}, expected VS or CDT, which scale the logits")
        super().__init__(loss, start, optimizer)

    def _switch(self, on: bool) -> None:
        self.loss.scaled = not on


class Schedule(Protocol):
    """The methods of a schedule. Those of this module have them, and torch's learning-rate schedulers."""

    def step(self) -> None:
        """Count one epoch or step."""

    def state_dict(self) -> dict[str, Any]:
        """The state, to be saved."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at a saved state."""


class ChainedSchedules(LossSchedule):
    """Several schedules that are stepped, saved and loaded as one. They may be of losses and of learning rates.

    Args:
        parts: the schedules, in the order in which they are stepped. torch's ReduceLROnPlateau cannot be one, because its step()
            needs a metric.
        optimizer: as for `TwoStage`; None: that of the first part that has one, at any time.

    Raises:
        TypeError: a part is a ReduceLROnPlateau.

    >>> criterion = ABLoss(lam=0.5)
    >>> optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=1.0)
    >>> decay = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
    >>> schedule = ChainedSchedules(decay, TwoStage(criterion, lam=0.5, start=2))
    >>> schedule.last_epoch, schedule.get_last_lr(), schedule.optimizer is optimizer
    (0, [1.0], True)
    """

    def __init__(self, *parts: Schedule, optimizer: Optimizer | None = None):
        for part in parts:
            if isinstance(part, ReduceLROnPlateau):
                raise TypeError(
                    f"parts: got a {type(part).__name__}, expected schedules whose step() takes no argument;"
                    " ReduceLROnPlateau needs a metric, so step it beside the ChainedSchedules"
                )
        self.parts = parts
        self._given_optimizer = optimizer

    @property  # type: ignore[override]  # torch's schedulers always have one
    def optimizer(self) -> Optimizer | None:
        """The optimizer that was given or set; without one, that of the first part that has one."""
        if self._given_optimizer is not None:
            return self._given_optimizer
        return next((o for o in (getattr(part, "optimizer", None) for part in self.parts) if o is not None), None)

    @optimizer.setter
    def optimizer(self, value: Optimizer | None) -> None:
        self._given_optimizer = value

    def _calls(self) -> int:
        return max((getattr(part, "last_epoch", 0) for part in self.parts), default=0)

    def step(self) -> None:  # type: ignore[override]  # as in `CountedSchedule`
        """Count one epoch or step in every schedule."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, list[dict[str, Any]]]:
        """The states of the schedules."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, list[dict[str, Any]]]) -> None:
        """Continue every schedule at its saved state."""
        for part, saved in zip(self.parts, state_dict["parts"], strict=True):
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
