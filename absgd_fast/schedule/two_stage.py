"""TwoStage: the plain mean first, then a lambda."""

from __future__ import annotations

import math

from torch.optim import Optimizer

from .. import _checks
from ..robust import ABLoss, RelativeLam, TargetESS
from .counted import check_start
from .lam import LamSchedule


class TwoStage(LamSchedule):
    """Two-stage lambda (ABSGD paper, Sec. 3.6; docs/MATH.md §2.5): learn features with the plain mean, then reweight.

        lambda = inf for the first `start` calls of step(), then `lam`

    The change is abrupt. With a small |lam| it can collapse the training, and single runs differ much
    (docs/choosing-lambda.md). `Ramp` reaches the same lambda in small steps.

    The constructor sets lambda = inf at once. When lambda changes, log s starts anew (`ABLoss.set_lam`). To resume a training,
    construct the criterion and the schedule, and then load the state_dict of the criterion, which has the count too. The
    schedule's own state_dict may be loaded before or after it. If the criterion was loaded before the schedule was made, load the
    schedule's too. A lambda that you had set by hand may become that of its stage: set it again after loading.

    Args:
        criterion: the `ABLoss`.
        lam: lambda of the second stage, `TargetESS(share)` or `RelativeLam(r)`.
        start: the number of calls of step() in the first stage; 0: `lam` from the beginning.
        unit: whether you call step() once per "epoch" or once per "step". The schedule only stores it.
        optimizer: the optimizer of the training, or None. Frameworks ask for it (docs/losses.md), but the schedule leaves it
            alone. It may be set later: `schedule.optimizer = optimizer`.

    Raises:
        TypeError: criterion is no `ABLoss`.
        ValueError: lam is 0 or NaN, or a TargetESS whose options the criterion lacks; start is negative, or unit is unknown.

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
        lam: float | RelativeLam | TargetESS,
        start: int,
        unit: str = "epoch",
        *,
        optimizer: Optimizer | None = None,
    ):
        self.start = check_start(start)
        self.lam = lam if isinstance(lam, (RelativeLam, TargetESS)) else _checks.lam(lam)
        super().__init__(criterion, unit, optimizer)

    def _begin(self) -> None:
        self.criterion.check_lam(self.lam)
        self.criterion.set_lam(self.lam if self.start == 0 else math.inf)

    def _enter(self, count: int) -> None:
        self._replaced = None
        if count == self.start:
            self.criterion.set_lam(self.lam)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue at the saved count.

        This sets lambda if the criterion is in the other stage. log s belongs to the state_dict of the criterion. But if the
        criterion had this count when the schedule was made, it gets back the lambda and log s that the constructor has replaced.
        """
        self._put_back(int(state_dict["count"]))
        super().load_state_dict(state_dict)

    def continue_at(self, count: int) -> None:
        """As described in `CountedSchedule`, without a new start of log s."""
        criterion, second = self.criterion, count >= self.start
        if isinstance(self.lam, TargetESS):  # the state does not say whether its lambda is that of one batch
            if second != (criterion.target is not None):
                criterion.set_lam(self.lam if second else math.inf, reset=False)
            self._replaced, self.count = None, count
            return
        is_plain = not criterion.lam.is_meta and bool(criterion.lam.isinf())
        is_unknown = criterion.lam_is_open and criterion.relative_lam is None  # open, and loaded in the first stage
        if second == is_plain or is_unknown:
            criterion.set_lam(self.lam if second else math.inf, reset=False)  # if this raises, the count stays
        self._replaced, self.count = None, count
