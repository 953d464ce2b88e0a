"""The plain mean loss as the value of a forward, report="mean". The gradient stays that of the robust loss.

Several processes sum their losses in an exchange of its own, in every training forward. So also in deferred mode they must make
equally many forwards in a step; with report="robust" they need not, because the later micro-batches exchange nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .last import Weighed
from .normalizer import InStages, Own


class _WithGradientOf(torch.autograd.Function):
    """A value whose derivatives of every order are those of a loss."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, value: Tensor) -> Tensor:
        return value.clone()  # torch.compile takes no output that is an input

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream, None


def as_mean(normalizer: Own | InStages, weighed: Weighed) -> Tensor:
    """The plain mean of the losses, with the gradient of the robust loss.

        value = loss_divisor (1/n) sum_i L_i

    Here n counts the rows of all who take part in the normaliser of a training forward. The value is NaN if a row of them is
    nonfinite, and 0 if none counts. It is summed in float64. No host waits for a GPU.
    """
    loss, sample_stats, weighing, _ = weighed
    with torch.no_grad():
        valid = sample_stats[2] > 0
        nonfinite = valid & ops.weights_of(sample_stats, weighing).isnan()
        sums = torch.stack([sample_stats[0].where(valid, 0.0).double().sum(), valid.sum().double(), nonfinite.sum().double()])
        (total, n, bad), divisor = normalizer.totals(sums)
        mean = torch.where(bad > 0, math.nan, total / n.clamp(min=1) * divisor).to(loss.dtype)
    if ops.transformed():  # these differentiate no Function of this kind; a nonfinite loss makes the sum NaN
        return mean + (loss - loss.detach())
    return _WithGradientOf.apply(loss, mean) if loss.requires_grad else mean
