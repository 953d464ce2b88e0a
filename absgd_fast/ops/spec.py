"""`LossSpec`: the loss on logits that an operator is asked for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _codes, reference


class LossSpec(NamedTuple):
    """A loss on logits (docs/MATH.md §2) as the six arguments that operators take beside the logits and the target."""

    class_weight: Tensor | None  # (C)
    adjust: Tensor | None  # (3, C): the class vectors S, D, M
    hyper_a: float  # the names of these two depend on the kind: _codes.HYPERPARAMETERS
    hyper_b: float
    ignore_index: int
    bits: int  # the kind, PRUNE and HARD

    @property
    def soft(self) -> bool:
        """Whether targets may be probabilities: for cross-entropy without a margin, because a margin belongs to one label."""
        return self.bits < _codes.HARD

    @property
    def smoothing(self) -> float:
        """The label smoothing; 0 for every kind but cross-entropy."""
        return self.hyper_a if self.bits < _codes.KIND else 0.0

    def recoverable(self, logits: Tensor, target: Tensor) -> bool:
        """Whether a second derivative may recover the logits from the stored gradient of a robust loss.

        Not for bfloat16 with label smoothing or soft targets: the rounding of p_k sum_j u_j - u_k hides a small p_k (docs/MATH.md
        §2.6), so the graph keeps these logits.
        """
        return logits.dtype is not torch.bfloat16 or not (self.smoothing or target.is_floating_point())

    def recompute(self, logits: Tensor, target: Tensor) -> Tensor:
        """The losses in plain torch, which can be differentiated any number of times."""
        return reference.logit_loss(logits, target, **self._options())

    def logits_of(self, grad: Tensor, target: Tensor, losses: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
        """Logits that `recompute` cannot tell from those of this gradient, factor_i * d losses_i / d logits_i."""
        return reference.logits_of_gradient(grad, target, losses, factor, **self._options())

    def unpruned(self) -> LossSpec:
        """The same loss without pruning, for callers that know which rows are pruned."""
        return self._replace(bits=self.bits & ~_codes.PRUNE)

    def _options(self) -> dict[str, Any]:
        """This loss as the arguments of reference.logit_loss."""
        kind = _codes.KINDS[self.bits // _codes.KIND]
        options: dict[str, Any] = dict(zip(_codes.HYPERPARAMETERS[kind], (self.hyper_a, self.hyper_b)))
        if kind == "gce":
            options |= {"k": self.hyper_b or None, "prune": bool(self.bits & _codes.PRUNE)}
        if self.adjust is not None:
            options |= dict(zip(("scale", "shift", "margin"), self.adjust))
        return options | {"kind": kind, "weight": self.class_weight, "ignore_index": self.ignore_index}

    def target_slope(self, logits: Tensor, target: Tensor) -> Tensor:
        """The derivative of each loss by its soft target, like the logits, in plain torch (docs/MATH.md §7)."""
        vectors = {} if self.adjust is None else dict(zip(("scale", "shift"), self.adjust))
        return reference.soft_target_slope(logits, target, weight=self.class_weight, label_smoothing=self.smoothing, **vectors)

    def valid(self, target: Tensor, losses: Tensor) -> Tensor:
        """Which of the losses of `recompute` count (bool)."""
        valid = torch.ones_like(losses, dtype=torch.bool) if target.is_floating_point() else target != self.ignore_index
        return valid & (losses != 0) if self.bits & _codes.PRUNE else valid  # the loss of a row that is not pruned is below 0


def masked_target(target: Tensor, mask: Tensor | None, spec: LossSpec) -> Tensor:
    """The target with `ignore_index` as the label of masked rows, which may hold any label. Probabilities stay as they are."""
    if mask is None or target.is_floating_point():
        return target
    if target.dtype == torch.int32 and not -(2**31) <= spec.ignore_index < 2**31:
        target = target.long()  # int32 cannot hold ignore_index
    return target.masked_fill(~mask, spec.ignore_index)


def masked_inputs(logits: Tensor, target: Tensor, mask: Tensor | None, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """Logits and target as `recompute` needs them, so that masked rows may hold anything and get gradients of 0."""
    if mask is None or not target.is_floating_point():
        return logits, masked_target(target, mask, spec)
    ignored = ~mask.unsqueeze(1)
    return logits.masked_fill(ignored, 0.0), target.masked_fill(ignored, 0.0)
