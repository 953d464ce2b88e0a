"""The conventions of the ABSGD authors' research code. Those of their package are in `compat.losses` and `compat.optimizers`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypedDict

from torch import Tensor

from .. import _checks, robust
from ..losses import LogitLoss

if TYPE_CHECKING:
    import torch.distributed as dist
    from typing_extensions import Unpack

PLAIN_MEAN_FROM = 200.0  # the research code takes a lambda of 200 or more as the plain mean


class Focal(LogitLoss):
    """Focal loss with the class weight inside the probability (docs/MATH.md §2.2).

        m = w (-log p),    u = exp(-m),    l = (1 - u)^gamma m

    `absgd_fast.Focal` has the weight outside, as in Lin et al. 2017, Eq. 5. If all class weights are 1, the two agree.

    Args:
        gamma: >= 0.
        weight: (C) class weights; default all 1.
        ignore_index, reduction, backend: see `absgd_fast.losses.LogitLoss`.

    >>> import torch
    >>> x, y = torch.zeros(1, 2), torch.tensor([0])
    >>> Focal(2.0)(x, y), Focal(2.0, torch.tensor([2.0, 1.0]))(x, y)  # 0.25 log 2, 0.5625 log 4
    (tensor([0.1733]), tensor([0.7798]))
    """

    def __init__(
        self,
        gamma: float = 2.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "none",
        backend: str | None = None,
    ):
        super().__init__("weighted_focal", weight, ignore_index, reduction, backend, gamma=gamma)


class Options(TypedDict, total=False):
    """Arguments of `absgd_fast.ABLoss` that this `ABLoss` hands on."""

    gamma: float
    alpha: float
    normalizer: str
    max_weight: float | None
    rule: Callable[..., Tensor] | None
    process_group: dist.ProcessGroup | str | None
    deferred: bool
    loss_divisor: float
    backend: str | None


def ABLoss(
    lam: float,
    criterion: Callable[..., Tensor] | None = None,
    noisy: bool = False,
    *,
    init: str = "zero",
    **options: Unpack[Options],
) -> robust.ABLoss:
    """`absgd_fast.ABLoss` with the numbers of the research code (docs/MATH.md §1.1 and §1.2).

    lambda >= 200 is the plain mean.

    Args:
        lam: lambda, not 0.
        criterion: as for `absgd_fast.ABLoss`.
        noisy: True: add the plain mean to the robust loss (mix=1), which is the "+ 1/B" on every weight of the research code.
        init: "zero" (the research code) or "first".
        options: further arguments of `absgd_fast.ABLoss`.

    >>> ABLoss(200.0).lam, ABLoss(-1.0, noisy=True).mix
    (tensor(inf), 1.0)
    """
    known = _checks.lam(lam)
    return robust.ABLoss(
        criterion, lam=math.inf if known >= PLAIN_MEAN_FROM else known, mix=1.0 if noisy else 0.0, init=init, **options
    )
