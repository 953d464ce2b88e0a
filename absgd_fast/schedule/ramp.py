"""Ramp: lambda comes in gradually, from the plain mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _checks, _numbers
from ..robust import ABLoss, RelativeLam
from ..robust.lam import RampedLam
from .lam import LamSchedule


class Ramp(LamSchedule):
    """A ramp of lambda: from the plain mean to `lam`, evenly in 1/lambda (docs/MATH.md §2.5).

        1 / lambda_t = min(1, t / length) / lam                        t: the number of calls of step()

    The constructor sets lambda = inf. Weights go with exp(L / lambda), so equal steps of 1/lambda strengthen them evenly, and no
    step is abrupt, as that of `TwoStage` is. While lambda moves, log s is carried over to the new lambda, as far as it is known:

        log s <- (log s - log alpha) lambda_old / lambda_new + log alpha

    This is exact where all losses are equal. Elsewhere the mean weight strays from 1 while lambda moves, the more the smaller
    gamma is: use gamma >= 0.5. (In a training on digits it was 0.88 to 1.06 with gamma = 0.9, and 0.44 to 1.32 with 0.1.)

    step() never waits for a GPU and exchanges nothing. In deferred mode call it between two optimizer steps. A lambda that you
    set by `set_lam` holds until the next step() of a ramp that still rises. That step starts log s anew. After the end of the
    ramp your lambda stays. A criterion has one schedule of lambda: several overwrite each other's.

    Resuming works as with `TwoStage`: the state_dict of the criterion has the count and what a RelativeLam has become. If
    `length` or `lam` is another than before, lambda is that of the new ramp at the saved count. log s is carried over to a new
    length, and starts anew with a new lam.

    Args:
        criterion: the `ABLoss` or `LinearABLoss`.
        lam: lambda at the end: a number, or `RelativeLam(r)`. The first training batch fixes that, and is trained with the plain
            mean if it comes before the first step().
        length: the number of calls of step() until lambda is `lam`, at least 1.
        unit: whether you call step() once per "epoch" or once per "step". The schedule only stores it.
        optimizer: as for `TwoStage`.

    Raises:
        TypeError: criterion is no `ABLoss`, or lam is neither a number nor a RelativeLam.
        ValueError: lam is 0 or NaN, length is less than 1, or unit is unknown.
        RuntimeError: the criterion has a rule, or is in the middle of a deferred step, in which step() raises too.

    >>> criterion = ABLoss(lam=-0.5)
    >>> schedule = Ramp(criterion, lam=-0.5, length=4)
    >>> for _ in range(5):
    ...     print(criterion.lam)
    ...     schedule.step()
    tensor(inf)
    tensor(-2.)
    tensor(-1.)
    tensor(-0.6667)
    tensor(-0.5000)
    """

    COUNT = "ramp_count"

    lam: float | RelativeLam

    def __init__(
        self,
        criterion: ABLoss,
        lam: float | Tensor | RelativeLam,
        length: int,
        unit: str = "epoch",
        *,
        optimizer: Optimizer | None = None,
    ):
        self.lam = _end(lam)
        self.length = _checks.at_least(length, "length", 1)
        super().__init__(criterion, unit, optimizer)

    def _at(self, count: int) -> RampedLam:
        return RampedLam(self.lam, min(count, self.length) / self.length)

    def _begin(self) -> None:
        self.criterion.set_lam(math.inf)
        self.criterion.ramp_end = math.nan if isinstance(self.lam, RelativeLam) else None
        self.criterion.take_ramp(self._at(0))

    def _refuse_open(self) -> None:
        """RuntimeError in the middle of a deferred step."""
        step = self.criterion.deferred_step
        if step is not None:
            step.check("set_lam")

    def _enter(self, count: int) -> None:
        self._refuse_open()
        self._replaced = None
        if count <= self.length:
            self.criterion.take_ramp(self._at(count))

    def state_dict(self) -> dict[str, int | float]:  # type: ignore[override]  # with a float
        """The number of calls so far; with a RelativeLam also what it has become, if that is known."""
        end = self.criterion.ramp_end if isinstance(self.lam, RelativeLam) else None
        return {"count": self.count} if end is None or math.isnan(end) else {"count": self.count, "end": end}

    def load_state_dict(self, state_dict: dict[str, int | float]) -> None:  # type: ignore[override]  # as `state_dict`
        """Continue at the saved count, with its lambda. log s belongs to the state_dict of the criterion.

        If the criterion had this count when the schedule was made, it gets back what the constructor has replaced.
        """
        self._refuse_open()
        count = int(state_dict["count"])
        put_back = self._put_back(count)
        if isinstance(self.lam, RelativeLam) and ("end" in state_dict or not put_back):
            self.criterion.ramp_end = float(state_dict.get("end", math.nan))
        if put_back:
            self.continue_at(count)
        elif count != self.count or self.criterion.is_ramped:  # else lambda was set by hand at this count
            self._replaced, self.count = None, count
            self.criterion.take_ramp(self._at(count), carry=False)

    def continue_at(self, count: int) -> None:
        """As described in `CountedSchedule`. A lambda that was loaded holds if it had been set by hand.

        The lambda of a ramp becomes that of this one. log s is carried over if only the length was another.
        """
        self._replaced, self.count = None, count
        criterion, ramped = self.criterion, self._at(count)
        if criterion.lam.is_meta or math.isnan(loaded := float(criterion.lam)):
            criterion.take_ramp(ramped, carry=False)
            return
        end, share = (math.nan if x is None else x for x in (criterion.ramp_end, criterion.ramp_share))
        saved = RampedLam(self.lam, share)
        is_mine = _same(loaded, saved.number(end))
        if is_mine:
            criterion.take_ramp(saved, carry=False)
        else:  # it was set by hand, or is of a ramp to another lambda
            criterion.set_lam(loaded, reset=False)
        if not math.isnan(share) and not (is_mine and saved == ramped):
            criterion.take_ramp(ramped)


def _end(lam: float | Tensor | RelativeLam) -> float | RelativeLam:
    """The lambda at the end of a ramp: a number, or one that the first batch fixes."""
    if isinstance(lam, RelativeLam):
        return lam
    if not (isinstance(lam, Tensor) or _numbers.is_real(lam)):
        raise TypeError(
            f"lam: got {type(lam).__name__}, expected a number or RelativeLam(r), towards which 1/lam can grow;"
            " a lambda that is chosen anew in each batch goes to ABLoss(lam=...) without a ramp"
        )
    if isinstance(lam, Tensor) and lam.is_meta:
        raise ValueError("lam: got a tensor on the meta device, which has no value; expected a number or a tensor with a value")
    return float(_checks.lam(lam))


def _same(a: float, b: float) -> bool:
    """Whether two lambdas are the same number in float32, in which one of them may have been saved."""
    pair = torch.tensor([a, b], dtype=torch.float32, device="cpu")
    return bool(pair[0] == pair[1])
