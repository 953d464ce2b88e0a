"""Conventions of the ABSGD authors' research code, beside those of their package (`compat.losses`, `compat.optimizers`)."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from .. import robust
from ..losses import LogitLoss

PLAIN_MEAN_FROM = 200.0  # a lambda from here on stands for the plain mean


class Focal(LogitLoss):
    """Focal loss with the class weight inside p: m = w (-log p), q = exp(-m), l = (1 - q)^gamma m.

    (`absgd_fast.Focal` has the weight outside, as Lin et al. 2017, Eq. 5.) With equal weights of 1 the two agree.

    Args:
        gamma: >= 0. weight: (C) class weights. ignore_index, reduction, backend: see `absgd_fast.losses.LogitLoss`.

    >>> import torch
    >>> x, y = torch.zeros(1, 2), torch.tensor([0])
    >>> Focal(2.0)(x, y), Focal(2.0, torch.tensor([2.0, 1.0]))(x, y)  # 0.25 log 2, 0.5625 log 4
    (tensor([0.1733]), tensor([0.7798]))
    """

    def __init__(
        self, gamma: float = 2.0, weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "none", backend=None
    ):
        super().__init__("weighted_focal", weight, ignore_index, reduction, backend, gamma=gamma)


def ABLoss(lam: float, criterion: Callable[..., Tensor] | None = None, noisy: bool = False, **options) -> robust.ABLoss:
    """`absgd_fast.ABLoss` with the research code's numbers: lambda >= 200 is the plain mean, and `noisy` adds the plain mean
    to the robust loss (the "+ 1/B" on every weight; mix=1).

    Args:
        lam: lambda. criterion, options: as in `absgd_fast.ABLoss`.

    >>> ABLoss(200.0).lam, ABLoss(-1.0, noisy=True).mix
    (tensor(inf), 1.0)
    """
    if lam >= PLAIN_MEAN_FROM:
        lam = math.inf
    return robust.ABLoss(criterion, lam=lam, mix=1.0 if noisy else 0.0, init=options.pop("init", "zero"), **options)
