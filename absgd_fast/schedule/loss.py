"""DRW and TLA: schedules of class weights and of class vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _checks
from ..losses import VS, LogitLoss
from .counted import CountedSchedule, check_start


class SwitchAt(CountedSchedule):
    """Base class of schedules that switch something on after `start` calls of step()."""

    def __init__(self, loss: LogitLoss, start: int, optimizer: Optimizer | None):
        self.loss, self.start = loss, check_start(start)
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
