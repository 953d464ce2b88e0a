"""Schedules of the robust loss, stepped like torch's learning-rate schedulers."""

from __future__ import annotations

import math

from . import _checks
from .robust import ABLoss, RelativeLam


class TwoStage:
    """Two-stage lambda (ABSGD paper, Sec. 3.6): learn a representation with the plain mean, then reweight.

        lambda = inf for the first `start` calls of step(), then `lam`

    Making it sets lambda = inf at once. A change of lambda starts log s anew (`ABLoss.set_lam`).

    Args:
        criterion: the `ABLoss`.
        lam: the second stage's lambda, or `RelativeLam(r)`.
        start: how many calls of step() come first; 0 = `lam` from the beginning.
        unit: what a call of step() stands for, "epoch" or "step".

    Load the criterion's and the schedule's state_dict after making both, in any order.

    >>> criterion = ABLoss(lam=0.5)
    >>> schedule = TwoStage(criterion, lam=0.5, start=1)
    >>> criterion.lam
    tensor(inf)
    >>> schedule.step()
    >>> criterion.lam
    tensor(0.5000)
    """

    def __init__(self, criterion: ABLoss, lam: float | RelativeLam, start: int, unit: str = "epoch"):
        if not isinstance(criterion, ABLoss):
            raise TypeError(f"criterion: got {type(criterion).__name__}, expected an ABLoss")
        if isinstance(start, bool) or not isinstance(start, int) or start < 0:
            raise ValueError(f"start: got {start!r}, expected a number of steps >= 0")
        if not isinstance(lam, RelativeLam):
            _checks.lam(lam)
        self.unit = _checks.choice(unit, "unit", ("epoch", "step"))
        self.criterion, self.lam, self.start = criterion, lam, start
        self.count = 0
        criterion.set_lam(lam if start == 0 else math.inf)

    def step(self) -> None:
        """Count one epoch or step; the `start`-th call switches lambda on."""
        self.count += 1
        if self.count == self.start:
            self.criterion.set_lam(self.lam)

    def state_dict(self) -> dict:
        return {"count": self.count}

    def load_state_dict(self, state: dict) -> None:
        """Continue at the saved count. lambda follows where it is another stage's; log s is the criterion's to restore."""
        self.count = int(state["count"])
        second, is_plain = self.count >= self.start, bool(self.criterion.lam.isinf())
        if second == is_plain and not (second and self.criterion._lam_is_open):
            self.criterion.set_lam(self.lam if second else math.inf, reset=False)
