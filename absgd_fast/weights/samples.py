"""The common part of the rules: from losses to float64 values of the samples that count, and from their weights back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks, ops
from ..reference import real_dtype

VANISHED = 1e4  # exp(-VANISHED) is 0 in every dtype


def prepared(losses: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Losses and mask, checked and contiguous, as the kernels read them."""
    losses = _checks.losses(losses).detach()
    return losses.to(real_dtype(losses.dtype)).contiguous(), _checks.per_sample(mask, "mask", losses, torch.bool)


def kernels_for(losses: Tensor, backend: str | None) -> ops.Operators | None:
    """The operators of the backend if it has kernels for the rules, which only the CPU has; else None.

    128 losses take 4 to 9 us in these kernels, and 140 (CVaR) to 280 us (chi-squared) in torch's operators.
    """
    operators = ops.serving(losses.device, backend)
    return operators if operators.has_rules else None


class Samples:
    """The losses of the samples that count, and the way back from their weights.

    Args:
        losses, mask: as `prepared` returns them.

    Attributes:
        x: (B) float64, the losses; 0 for a sample that does not count.
        finite, nonfinite: (B) bool: the valid samples with a finite loss, which are those that count, and the other valid ones.
        n: 0-d float64, the number of samples that count.
    """

    def __init__(self, losses: Tensor, mask: Tensor | None):
        self.shape, self.dtype = losses.shape, losses.dtype
        x = losses.flatten().double()
        valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.flatten()
        self.finite, self.nonfinite = valid & x.isfinite(), valid & ~x.isfinite()
        self.x = x.where(self.finite, 0.0)
        self.n = self.finite.sum().double()

    def place(self) -> Tensor:
        """The places in `descending`: 0, 1, ..., B - 1, float64.

        The samples that do not count have the places from n on. The dtype is float64 because integers, divided by a number, would
        become float32.
        """
        return torch.arange(len(self.x), device=self.x.device, dtype=torch.float64)

    def descending(self) -> Tensor:
        """The losses less the largest one, in descending order; -inf for the samples that do not count, which come last."""
        ordered = self.x.where(self.finite, -math.inf).sort(descending=True).values
        return torch.where(ordered.isfinite(), ordered - ordered[:1], -math.inf)

    def relative(self) -> Tensor:
        """The losses less the largest one, in their own order; 0 for the samples that do not count."""
        if not len(self.x):
            return self.x
        return (self.x - self.x.where(self.finite, -math.inf).max()).where(self.finite, 0.0)

    def weights(self, w: Tensor) -> Tensor:
        """The weights in the shape and dtype of the losses: 0 for ignored samples, NaN for non-finite ones."""
        return w.where(self.finite, 0.0).masked_fill(self.nonfinite, math.nan).to(self.dtype).reshape(self.shape)
