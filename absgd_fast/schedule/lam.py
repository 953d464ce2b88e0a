"""LamSchedule: what TwoStage and Ramp have in common, which drive the lambda of a criterion."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from .. import _checks
from ..robust import ABLoss, RelativeLam, TargetESS
from .counted import CountedSchedule


class LamSchedule(CountedSchedule):
    """Base class of schedules of lambda.

    A framework may make a schedule after it has loaded the criterion. But a new schedule starts lambda and log s anew. So it
    keeps what it replaced until its own state_dict says that the training goes on.
    """

    lam: float | Tensor | RelativeLam | TargetESS

    def __init__(self, criterion: ABLoss, unit: str, optimizer: Optimizer | None):
        if not isinstance(criterion, ABLoss):
            raise TypeError(f"criterion: got {type(criterion).__name__}, expected an ABLoss")
        self.unit = _checks.choice(unit, "unit", ("epoch", "step"))
        self.criterion = criterion
        count = getattr(criterion, self.COUNT)  # of a checkpoint that was loaded before, or of an earlier schedule
        state = {name: getattr(criterion, name).clone() for name in criterion.STATE}
        numbers = {name: getattr(criterion, name) for name in criterion.NUMBERS}
        self._begin()  # if this raises, the criterion is as it was
        self._replaced = None if count is None or criterion.lam.is_meta else (count, state, numbers)
        super().__init__(criterion, optimizer)

    def _begin(self) -> None:
        """Give the criterion the lambda of count 0, and start log s anew."""
        raise NotImplementedError

    def _put_back(self, count: int) -> bool:
        """Give the criterion back what the constructor replaced, if it had this count then; whether it had."""
        if self._replaced is None or self._replaced[0] != count:
            return False
        _, state, numbers = self._replaced
        self.criterion.put_back(state)
        for name, value in numbers.items():
            setattr(self.criterion, name, value)
        return True
