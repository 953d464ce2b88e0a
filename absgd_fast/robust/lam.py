"""Lambdas that the losses fix: RelativeLam by those of the first training batch, TargetESS by those of each batch. RampedLam: the
lambda of a Ramp at one of its counts."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .. import _checks, _numbers


class RelativeLam:
    """A lambda that is proportional to the losses: lam = r times the plain mean loss of the first training batch.

    Use it as `ABLoss(lam=RelativeLam(r))` when the size of your losses is not known in advance. The first training batch fixes
    lam; with several processes it is the mean over all of them. From then on lam stays as it is, and it is saved in the
    state_dict. If the mean is 0 or not finite, the next training batch is asked. Until lam is fixed it reads NaN, and forwards
    that do not train return the plain mean.

    It is about the size of lambda, and not about when lambda begins. Used from the first step, r = -0.5 cost 11.3 points of
    accuracy on scikit-learn's digits where no label was wrong, and gained 2.6 to 29.2 where 20 to 60 % were wrong. So warm up:
    `Ramp(criterion, RelativeLam(-0.5), length)`. See docs/MATH.md §1.5 and docs/choosing-lambda.md.

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


class RampedLam(NamedTuple):
    """The lambda of a `Ramp` at one of its counts: end / share (docs/MATH.md §2.5)."""

    end: float | RelativeLam
    share: float  # t / length, in [0, 1]; 0: the plain mean

    @property
    def r(self) -> float | None:
        """The r of a relative end, else None."""
        return self.end.r if isinstance(self.end, RelativeLam) else None

    def number(self, fixed: float) -> float:
        """Lambda as a number. fixed: what a relative end has become; NaN while it is open, and then lambda is unknown too."""
        if self.share == 0:
            return math.inf
        lam = (fixed if isinstance(self.end, RelativeLam) else self.end) / self.share
        return math.copysign(math.inf, lam) if abs(lam) > torch.finfo(torch.float32).max else lam


class TargetESS:
    """A lambda for each batch, such that the weights have an effective sample size of `share` times the number of samples.

    Use it as `ABLoss(lam=TargetESS())` under class imbalance: nobody has to know the size of the losses, or how it changes in a
    training. lambda solves

        (sum_i W_i)^2 / (n sum_i W_i^2) = share,    W_i = exp(L_i / lambda) / mean exp(L / lambda)

    over the n samples that count and have a finite loss, of all processes together (docs/MATH.md §1.7). The weights stay the same
    if all losses are multiplied by a positive number, or one number is added to all. There is no moving average, so every batch
    and every micro-batch has its own lambda, also in eval mode. If ties at the largest loss (sign=-1: the smallest) are more than
    `share` of the samples, they get all of the weight. If all losses are equal up to rounding, lambda is inf and every W_i is 1.
    The criterion refuses it together with gamma, alpha, init, normalizer="none" and deferred=True, which have no meaning here.

    Args:
        share: in (0, 1). The closer to 1, the more equal the weights. With 0.95 the accuracy was within 0.3 points of the best
            fixed lambda of a grid on five long tails, or above it, and lost at most 0.2 points to plain SGD where nothing was
            wrong. 0.7 gained more on digits, and cost up to 1.2 points elsewhere (docs/choosing-lambda.md).
        sign: +1 attends to large losses (imbalance), -1 to small ones (label noise).

    Raises:
        ValueError: share is not in (0, 1), or sign is neither +1 nor -1.
        RuntimeError: one of them is a tensor that requires grad.

    >>> from absgd_fast import ABLoss
    >>> criterion = ABLoss(lam=TargetESS(0.7))
    >>> logits = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0], [0.0, 4.0]])
    >>> _ = criterion(logits, torch.tensor([0, 0, 0, 0]))
    >>> criterion.last.ess / 4, criterion.last.lam
    (tensor(0.7000), tensor(1.4858))
    """

    def __init__(self, share: float = 0.95, sign: float = 1):
        _checks.not_learned(share, "share")
        _checks.not_learned(sign, "sign")
        numbers = [_numbers.real(value, tensors=True) for value in (share, sign)]
        if numbers[0] is None or not 0 < numbers[0] < 1:
            raise ValueError(f"share: got {share!r}, expected a number in (0, 1): the effective sample size per sample")
        if numbers[1] not in (1, -1):
            raise ValueError(f"sign: got {sign!r}, expected +1 (large losses count more) or -1 (small losses count more)")
        self.share, self.sign = numbers[0], int(numbers[1])

    @property
    def signed_share(self) -> float:
        """The share with the sign of lambda, as the operators take it."""
        return self.share * self.sign

    def __repr__(self) -> str:
        return f"TargetESS({self.share})" if self.sign > 0 else f"TargetESS({self.share}, sign=-1)"
