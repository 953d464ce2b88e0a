"""What a second derivative of a robust loss needs: the loss in plain torch, and the logits that the graph did not keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops import LossSpec
from .base import RobustLoss
from .weighting import weighted_sum


class Again(NamedTuple):
    """What a forward leaves for `derivative`, beside its sample stats."""

    criterion: RobustLoss
    spec: LossSpec
    target: Tensor
    mask: Tensor | None
    sample_weight: Tensor | None
    weighing: Tensor | None
    lam: Tensor


def derivative(
    sample_stats: Tensor,
    criterion: RobustLoss,
    spec: LossSpec,
    target: Tensor,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    weighing: Tensor | None,
    lam: Tensor,
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """(recompute, recover) of a forward, as ops.attach takes them, from its sample stats and its `Again`."""

    def factors() -> Tensor:
        return factors_of(criterion, sample_stats, weighing, lam)

    def recompute(logits: Tensor) -> Tensor:
        return weighted_sum(factors(), losses_again(spec, logits, target, mask), sample_weight)

    def recover(grad: Tensor) -> Tensor:
        constant = None if sample_weight is None else sample_weight.detach()
        return spec.logits_of(grad, target, sample_stats[0], slopes(factors(), constant))

    return recompute, recover


def losses_again(spec: LossSpec, logits: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """The losses in plain torch, for a caller that knows which rows are pruned. Only a second derivative asks for them."""
    return spec.unpruned().recompute(*ops.masked_inputs(logits, target, mask, spec))


@torch.no_grad()
def factors_of(criterion: RobustLoss, sample_stats: Tensor, weighing: Tensor | None, lam: Tensor) -> Tensor:
    """(W_i + mix) / n of a forward, 0 for ignored samples (docs/MATH.md §1.1)."""
    weights, valid = ops.weights_of(sample_stats, weighing), sample_stats[2] > 0
    counted = (valid & ~weights.isnan()).sum().clamp(min=1)
    return torch.where(valid, weights + criterion.mix * (~lam.isinf()).to(weights.dtype), 0.0) / counted


def slopes(factors: Tensor, sample_weight: Tensor | None) -> Tensor:
    """d loss / d L_i = t_i f_i; 0 for ignored samples, whose sample weight may be anything."""
    return factors if sample_weight is None else torch.where(factors != 0, factors * sample_weight, 0.0)
