"""RelativeLam: a lambda that the first training batch fixes."""

from __future__ import annotations

import math

import torch

from .. import _checks


class RelativeLam:
    """A lambda that is proportional to the losses: lam = r times the plain mean loss of the first training batch.

    Use it as `ABLoss(lam=RelativeLam(r))` when the size of your losses is not known in advance. The first training batch fixes
    lam; with several processes it is the mean over all of them. From then on lam stays as it is, and it is saved in the
    state_dict. If the mean is 0 or not finite, the next training batch is asked. Until lam is fixed it reads NaN, and forwards
    that do not train return the plain mean.

    r = -0.5 is a good start for label noise: on scikit-learn's digits it came within 2 points of the best lambda of a grid at
    noise rates 0.2, 0.4 and 0.6. See docs/MATH.md §1.5.

    Args:
        r: any finite number other than 0. r > 0 attends to large losses (imbalance), r < 0 to small ones (label noise).

    Raises:
        ValueError: r is 0, NaN or infinite. TypeError: r is not a number.

    >>> from absgd_fast import ABLoss
    >>> criterion = ABLoss(lam=RelativeLam(-0.5))
    >>> _ = criterion(torch.zeros(4, 10, requires_grad=True), torch.arange(4))
    >>> criterion.lam  # -0.5 log(10)
    tensor(-1.1513)
    """

    def __init__(self, r: float):
        _checks.not_learned(r, "r")
        self.r = float(_checks.scalar(r, "r"))
        if not torch.finfo(torch.float32).tiny <= abs(self.r) < math.inf:  # NaN too; less than tiny is 0 in float32
            raise ValueError(f"r: got {r}, expected a finite number other than 0")

    def __repr__(self) -> str:
        return f"RelativeLam({self.r})"
