"""Schedules of the robust loss and of the losses for imbalance, stepped like torch's learning-rate schedulers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks
from .losses import VS, LogitLoss, adrw_weights
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
        if self.count + 1 == self.start:
            self.criterion.set_lam(self.lam)  # or it raises, and the call does not count
        self.count += 1

    def state_dict(self) -> dict:
        return {"count": self.count}

    def load_state_dict(self, state: dict) -> None:
        """Continue at the saved count. lambda follows where it is another stage's; log s is the criterion's to restore."""
        self.count = int(state["count"])
        second, is_plain = self.count >= self.start, bool(self.criterion.lam.isinf())
        if second == is_plain and not (second and self.criterion.lam_is_open):
            self.criterion.set_lam(self.lam if second else math.inf, reset=False)


class SwitchAt:
    """Something about a loss that is off for the first `start` calls of step(), and on from then on."""

    def __init__(self, loss: LogitLoss, start: int):
        if isinstance(start, bool) or not isinstance(start, int) or start < 0:
            raise ValueError(f"start: got {start!r}, expected a number of epochs >= 0")
        self.loss, self.start, self.count = loss, start, 0
        self._switch(start == 0)

    def _switch(self, on: bool) -> None:
        raise NotImplementedError

    def step(self) -> None:
        """Count one epoch; the `start`-th call switches on."""
        self.count += 1
        self._switch(self.count >= self.start)

    def state_dict(self) -> dict:
        return {"count": self.count}

    def load_state_dict(self, state: dict) -> None:
        """Continue at the saved count, in the stage that belongs to it."""
        self.count = int(state["count"])
        self._switch(self.count >= self.start)


class DRW(SwitchAt):
    """Deferred re-weighting (Cao et al. 2019, Alg. 1): class weights 1 until epoch `start`, then `weight`. With
    `adrw_weights` it is ADRW (Wang et al. 2023, Sec. 3.3).

    Args:
        loss: one of the losses on logits; inside an `ABLoss`, its criterion.
        weight: (C) class weights, e.g. `class_balanced_weights(cls_num_list)`.
        start: the first epoch (0-based) that has them; 0 = from the beginning.

    >>> from absgd_fast import CrossEntropy
    >>> loss = CrossEntropy()
    >>> schedule = DRW(loss, torch.tensor([0.5, 1.5]), start=1)
    >>> loss.weight
    tensor([1., 1.])
    >>> schedule.step()
    >>> loss.weight
    tensor([0.5000, 1.5000])
    """

    def __init__(self, loss: LogitLoss, weight: Tensor, start: int):
        if not isinstance(loss, LogitLoss):
            raise TypeError(f"loss: got {type(loss).__name__}, expected one of the losses on logits (the criterion of an ABLoss)")
        weight = torch.as_tensor(weight).detach()
        if weight.dim() != 1 or not weight.is_floating_point():
            raise ValueError(f"weight: got shape {tuple(weight.shape)} {weight.dtype}, expected one float weight per class, (C,)")
        if loss.weight is not None and loss.weight.shape != weight.shape:
            raise ValueError(f"weight: got {len(weight)} classes, the loss has weights for {len(loss.weight)}")
        self.weight = weight.clone()
        super().__init__(loss, start)

    def _switch(self, on: bool) -> None:
        # always a tensor, so that a checkpoint of either stage loads into the other
        before = self.loss.weight
        device = self.weight.device if before is None else before.device
        self.loss.weight = (self.weight if on else torch.ones_like(self.weight)).to(device, copy=True)


class TLA(SwitchAt):
    """Truncated logit adjustment (Wang et al. 2023, Sec. 3.3): the multiplicative vector S_k of a `VS` or `CDT` loss until
    epoch `start`, then S_k = 1; the additive part stays.

    Args:
        loss: a `VS` or `CDT` loss.
        start: the first epoch (0-based) with S_k = 1; 0 = from the beginning.

    >>> from absgd_fast import CDT
    >>> loss = CDT([4, 1], gamma=0.5)
    >>> schedule, x, y = TLA(loss, start=1), torch.tensor([[0.0, 2.0]]), torch.tensor([1])
    >>> loss(x, y)  # log(1 + exp(-1))
    tensor([0.3133])
    >>> schedule.step()
    >>> loss(x, y)  # log(1 + exp(-2))
    tensor([0.1269])
    """

    def __init__(self, loss: VS, start: int):
        if not isinstance(loss, VS):
            raise TypeError(f"loss: got {type(loss).__name__}, expected VS or CDT, which scale the logits")
        super().__init__(loss, start)

    def _switch(self, on: bool) -> None:
        self.loss.scaled = not on


class ChainedSchedules:
    """Several schedules stepped as one."""

    def __init__(self, *parts):
        self.parts = parts

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict) -> None:
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)


def vs_tla_adrw(
    cls_num_list: Sequence[int], *, start: int, gamma: float = 0.3, tau: float = 1.0, nu: float = 1.0, **options
) -> tuple[VS, ChainedSchedules]:
    """Algorithm 1 of Wang et al. 2023: a VS loss with TLA and ADRW, both from epoch `start` (their T0) on.

    Args:
        cls_num_list: numbers of samples per class.
        start: T0.
        gamma, tau: of `VS`. nu: of `adrw_weights`. (The paper tunes tau and nu per data set; nu among 0.15 to 3.)
        options: of `VS` (reduction, ignore_index, backend).

    Returns:
        the loss, and a schedule with step() at the end of each epoch, state_dict() and load_state_dict().

    >>> loss, schedule = vs_tla_adrw([100, 10], start=1)
    >>> schedule.step()
    >>> loss.weight, loss.scaled
    (tensor([0.1818, 1.8182]), False)
    """
    loss = VS(cls_num_list, gamma, tau, **options)
    return loss, ChainedSchedules(TLA(loss, start), DRW(loss, adrw_weights(cls_num_list, nu), start))
