"""ChainedSchedules: several schedules as one; vs_tla_adrw: a recipe of two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..class_weights import adrw_weights
from ..losses import VS
from .counted import LossSchedule
from .loss import DRW, TLA

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
