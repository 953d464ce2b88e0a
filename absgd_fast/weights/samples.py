"""What the rules have in common: their losses in float64, and the way back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks, ops
from ..reference import real_dtype

VANISHED = 1e4  # exp(-VANISHED) is 0 in every dtype


def prepared(losses: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Losses and mask as the kernels read them."""
    losses = _checks.losses(losses).detach()
    return losses.to(real_dtype(losses.dtype)).contiguous(), _checks.per_sample(mask, "mask", losses, torch.bool)


def kernels_for(losses: Tensor, backend: str | None) -> ops.Operators | None:
    """The operators, where they have kernels for the rules: on the CPU. 128 losses take 4 to 9 us there, in torch's operators 140
    (CVaR) to 280 us (chi-squared)."""
    operators = ops.serving(losses.device, backend)
    return operators if operators.has_rules else None


class Samples:
    """The losses that count (as `prepared` makes them), flat and in float64 (0 elsewhere), and the way back from their weights."""

    def __init__(self, losses: Tensor, mask: Tensor | None):
        self.shape, self.dtype = losses.shape, losses.dtype
        x = losses.flatten().double()
        valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.flatten()
        self.finite, self.nonfinite = valid & x.isfinite(), valid & ~x.isfinite()
        self.x = x.where(self.finite, 0.0)
        self.n = self.finite.sum().double()

    def place(self) -> Tensor:
        """0, 1, ... n - 1, and on where rows do not count, which come last in `descending` (float64: integers would make
        float32 of what they are divided by)."""
        return torch.arange(len(self.x), device=self.x.device, dtype=torch.float64)

    def descending(self) -> Tensor:
        """The losses, largest first, relative to the largest: 0, ..., and -inf for the rows that do not count."""
        ordered = self.x.where(self.finite, -math.inf).sort(descending=True).values
        return torch.where(ordered.isfinite(), ordered - ordered[:1], -math.inf)

    def relative(self) -> Tensor:
        """The losses in their own order, relative to the largest; 0 for the rows that do not count."""
        if not len(self.x):
            return self.x
        return (self.x - self.x.where(self.finite, -math.inf).max()).where(self.finite, 0.0)

    def weights(self, w: Tensor) -> Tensor:
        return w.where(self.finite, 0.0).masked_fill(self.nonfinite, math.nan).to(self.dtype).reshape(self.shape)
