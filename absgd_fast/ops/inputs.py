"""The gradients of the inputs beside the logits: sample weights and soft targets (docs/MATH.md §7).

A value gets them on top of the gradient that autograd.py attached to it, so the kernels of the forward pass know nothing of
them. The operators in plain torch need none of this: autograd differentiates them by these inputs too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..reference import soft_target_slope
from .backends import Operators
from .spec import LossSpec


def is_learned(x: Tensor) -> bool:
    """Whether somebody asks for a gradient of an input."""
    return x.requires_grad and torch.is_grad_enabled()


def needs_attaching(operators: Operators, x: Tensor) -> bool:
    """Whether somebody asks for a gradient of an input that kernels take as a constant."""
    return operators.has_kernels and is_learned(x)


class _SampleWeightGradient(torch.autograd.Function):
    """A value that is linear in the sample weights: d value / d sample_weight = slope."""

    @staticmethod
    def forward(ctx, sample_weight: Tensor, value: Tensor, slope: Tensor, slope_again: Callable[[], Tensor] | None) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.slope_again = slope_again
        return value.clone()  # torch.compile takes no output that is an input

    @staticmethod
    def backward(ctx, upstream: Tensor):
        again = torch.is_grad_enabled() and ctx.slope_again is not None
        slope = ctx.slope_again() if again else ctx.saved_tensors[0]
        return upstream * slope, upstream, None, None


class _TargetGradient(torch.autograd.Function):
    """Losses of soft targets, whose derivative by the targets is made in backward from the logits."""

    @staticmethod
    def forward(ctx, target: Tensor, losses: Tensor, logits: Tensor, class_weight, scale, shift, smoothing: float) -> Tensor:
        ctx.save_for_backward(logits, target, class_weight, scale, shift)
        ctx.smoothing = smoothing
        return losses.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        logits, target, weight, scale, shift = ctx.saved_tensors
        slope = soft_target_slope(logits, target, weight=weight, scale=scale, shift=shift, label_smoothing=ctx.smoothing)
        of_row = upstream.unsqueeze(1)
        slope = torch.where(of_row == 0, slope.nan_to_num(0.0, 0.0, 0.0), slope)  # a row that does not count may hold NaN
        return of_row * slope, upstream, *[None] * 5


def attach_sample_weight(
    value: Tensor, sample_weight: Tensor, slope: Tensor, slope_again: Callable[[], Tensor] | None = None
) -> Tensor:
    """Makes a robust loss a function of the sample weights, in which it is linear.

    Args:
        value: the robust loss, 0-d.
        sample_weight: as the operators read it.
        slope: like sample_weight; d value / d sample_weight.
        slope_again: the slope as a function of the other inputs, for a second derivative; None: it depends on none of them.
    """
    return _SampleWeightGradient.apply(sample_weight, value, slope, slope_again)


def attach_target(losses: Tensor, target: Tensor, logits: Tensor, spec: LossSpec) -> Tensor:
    """Makes the losses of logits functions of their soft targets too. The arguments are as the operators read them."""
    scale, shift = (None, None) if spec.adjust is None else spec.adjust[:2]
    return _TargetGradient.apply(target, losses, logits, spec.class_weight, scale, shift, spec.smoothing)
