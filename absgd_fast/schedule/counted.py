"""What all schedules have in common: the interface of torch's learning-rate schedulers, and a count in the driven module."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .. import _checks
from .._scheduled import Scheduled


def check_start(start: int) -> int:
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
