"""Per-sample losses on logits as modules. Inside `ABLoss` they run fused with the robust weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import _checks
from . import functional as F
from .reference import real_dtype


class LogitLoss(nn.Module):
    """What the losses on logits share: class weights, ignored rows, the reduction.

    >>> isinstance(CrossEntropy(), LogitLoss)
    True
    """

    def __init__(self, weight: Tensor | None, label_smoothing: float, ignore_index: int, reduction: str, backend: str | None):
        super().__init__()
        if weight is not None:
            weight = torch.as_tensor(weight).detach().clone()
            if weight.dim() != 1 or not weight.is_floating_point():
                raise ValueError(
                    f"weight: got shape {tuple(weight.shape)} {weight.dtype}, expected one float weight per class, (C,)"
                )
        self.register_buffer("weight", weight)
        self.label_smoothing = _checks.smoothing(label_smoothing)
        self.ignore_index = int(ignore_index)
        self.reduction = _checks.choice(reduction, "reduction", ("none", "mean", "sum"))
        self.backend = backend

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B) or (B, d1, ...) losses for reduction="none", else 0-d."""
        losses = F.logit_loss(
            logits,
            target,
            weight=self.weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            backend=self.backend,
        )
        if self.reduction == "none":
            return losses
        if self.reduction == "sum":
            return losses.sum()
        valid = target != self.ignore_index
        losses = losses.where(valid, 0)  # ignored rows have gradient 0 even where nothing is left to divide by
        if self.weight is None:
            return losses.sum() / valid.sum()
        weight = self.weight.to(losses.device, real_dtype(logits.dtype))
        return losses.sum() / (weight[torch.where(valid, target, 0).long()] * valid).sum()

    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"


class CrossEntropy(LogitLoss):
    """Cross-entropy: l = (1 - e) v_y (-log p_y) + (e / C) sum_k v_k (-log p_k), as torch.nn.CrossEntropyLoss.

    Args:
        weight: (C) class weights v. They are part of the loss, so inside `ABLoss` they stand in the exponent, as in the
            ABSGD paper (Sec. 4) and the reference package.
        label_smoothing: e in [0, 1].
        ignore_index: rows with this label do not count.
        reduction: "none" (one loss per sample, the default: what `ABLoss` needs), "mean" or "sum" as torch defines them.
        backend: None, "cpu" or "reference".

    forward(logits, target): logits (B, C) or (B, C, d1, ...), float32, float64, bfloat16 or float16; target (B) or
    (B, d1, ...), int64 or int32. Losses are float32 (float64 for float64 logits). Raises as `functional.logit_loss`.

    >>> CrossEntropy()(torch.zeros(2, 10), torch.tensor([3, 7]))
    tensor([2.3026, 2.3026])
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "none",
        backend: str | None = None,
    ):
        super().__init__(weight, label_smoothing, ignore_index, reduction, backend)


def fused_spec(criterion: object) -> tuple[Tensor | None, float, int] | None:
    """(class weight, label smoothing, ignore index) if the fused operators give the per-sample losses of `criterion`.

    That is our own losses and torch.nn.CrossEntropyLoss, with reduction="none"; None for everything else.

    >>> fused_spec(torch.nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1))
    (None, 0.1, -100)
    """
    kind = type(criterion)
    if not (kind is CrossEntropy or (kind is nn.CrossEntropyLoss and not _has_hooks(criterion))):
        return None
    if criterion.reduction != "none":
        return None
    # _buffers: module.weight goes through nn.Module.__getattr__, 0.4 us
    return criterion._buffers["weight"], criterion.label_smoothing, criterion.ignore_index


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
