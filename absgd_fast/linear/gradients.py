"""The gradients of a linear head: made in the forward pass up to one factor each, multiplied by it in backward."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops import COUNT, LOG_S, SCALE
from ..reference import real_dtype
from ..robust.state import RobustState
from .chunks import Chunks

RESCALE_GAP = 20.0  # how far above the reference point a chunk may lie before the sums so far are rescaled to it
CLASS_BLOCK = 8192  # classes whose part of a half-precision weight gradient is added at once


class Unfinished(NamedTuple):
    """Gradients up to a factor each."""

    hidden: Tensor | None  # (n, d): G weight, the rows of dH without their weights
    sample_factor: Tensor | None  # (n) real: d loss / d L_i, these weights
    weight: Tensor | None  # (C, d) real: dW relative to the reference point
    bias: Tensor | None  # (C) real: db, likewise
    reference: Tensor  # (6) float64, settled by the chunk that the reference point is from; its scale is 1


class RelativeGradients:
    """The sums that a walk over the chunks makes, relative to a reference point that follows the chunks."""

    def __init__(self, state: RobustState, operators: ops.Operators, chunks: Chunks, wanted: list[bool]):
        """wanted: of hidden, weight, bias."""
        self.state, self.operators, self.chunks = state, operators, chunks
        real = real_dtype(chunks.hidden.dtype)
        self.hidden = torch.empty_like(chunks.hidden) if wanted[0] else None
        self.weight, self.bias = (
            t.new_zeros(t.shape, dtype=real) if on else None for t, on in zip((chunks.weight, chunks.bias), wanted[1:])
        )
        self.reference = torch.zeros(6, dtype=torch.float64, device=chunks.hidden.device)

    def losses_and_validity(self) -> tuple[Tensor, Tensor]:
        """The walk: losses and validity of all samples; the gradients are made on the way."""
        return self.chunks.losses(self._add)

    def unfinished(self, sample_factor: Tensor) -> Unfinished:
        return Unfinished(self.hidden, sample_factor, self.weight, self.bias, self.reference)

    def _add(self, part: slice, grad: Tensor, losses: Tensor, valid: Tensor) -> None:
        if self.hidden is not None:
            torch.mm(grad, self.chunks.weight, out=self.hidden[part])
        if self.weight is None and self.bias is None:
            return
        weights = self._relative_weights(part, losses, valid).unsqueeze(1)
        if self.weight is not None:
            _add_product(self.weight, grad.t(), (self.chunks.hidden[part] * weights).to(grad.dtype))
        if self.bias is not None:
            _add_product(self.bias.unsqueeze(1), grad.t(), weights.to(grad.dtype))

    def _relative_weights(self, part: slice, losses: Tensor, valid: Tensor) -> Tensor:
        """sample_weight_i exp(z_i - m) of a chunk, 0 where a sample does not count. First m is brought near the chunk, and the sums
        to it. All on the device."""
        state, operators = self.state, self.operators
        log_s, nonfinite, lam, *_ = state.operands(False, 0)
        sample_weight, _, score = (None if t is None else t[part] for t in self.chunks.samples)
        bits = ops.flags("none" if state.normalizer == "none" else "batch", "first")
        partial_stats = operators.robust_partial_stats(losses, score, valid, log_s, lam, None)
        here = operators.robust_settle(partial_stats.unsqueeze(0), log_s, nonfinite, lam, None, 1.0, 1.0, 1.0, bits)
        here[SCALE] = 1.0
        point, some = self.reference, self.reference[COUNT] > 0
        moves = (here[COUNT] > 0) & (~some | (here[LOG_S] > point[LOG_S] + RESCALE_GAP))
        ratio = torch.where(moves & some, (point[LOG_S] - here[LOG_S]).exp(), 1.0).to(losses.dtype)
        for total in (self.weight, self.bias):
            if total is not None:
                operators.scale_(total, ratio)  # by 1: nothing is read
        self.reference = torch.where(moves, here, point)
        return operators.robust_apply(
            losses, score, sample_weight, valid, self.reference, log_s, lam, False, 0.0, state.max_weight, ops.WITH_GRAD
        )[2]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b: in float32 for bfloat16."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif adds_in_float32(total.device):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        for block in range(0, len(total), CLASS_BLOCK):
            of = slice(block, block + CLASS_BLOCK)
            total[of] += a[of] @ b


@cache
def adds_in_float32(device: torch.device) -> bool:
    """Whether torch adds a product of bfloat16 matrices to a float32 one. CUDA does; the CPU does not as of torch 2.13."""
    some = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
    try:
        total = some.float()
        torch.addmm(total, some, some, out_dtype=torch.float32, out=total)  # the overload that is used
    except (RuntimeError, TypeError):  # NotImplementedError is the first; torch 2.11's decomposition for `meta` raises the second
        return False
    return True


class LinearLossGrad(torch.autograd.Function):
    """The loss, whose gradients are known up to a factor each."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, made):
        loss, ctx.grads, ctx.settled = made
        ctx.dtype = hidden.dtype
        return loss

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "LinearABLoss: got backward with create_graph=True, which needs the logits that were never stored; use"
                " backend='reference', or ABLoss on hidden @ weight.T"
            )
        grads, kept = ctx.grads, ops.graph_is_kept()
        if grads is None:
            raise RuntimeError("LinearABLoss: got a second backward, expected retain_graph=True in the first")

        def finished(grad: Tensor | None, factor: Tensor) -> Tensor | None:
            if grad is None:
                return None
            factor = factor.to(grad.dtype) if grad.dtype == torch.float64 else factor.float()
            return (grad * factor if kept else grad.mul_(factor)).to(ctx.dtype)

        reference, settled = grads.reference, ctx.settled
        # without a sample that counts the sums are 0, or NaN from bad ones, and stay so
        moved = torch.where(reference[COUNT] > 0, (reference[LOG_S] - settled[LOG_S]).exp(), 1.0)
        factor = upstream.double() * settled[SCALE] * moved
        of_sample = None if grads.hidden is None else (upstream * grads.sample_factor).unsqueeze(1)
        made = finished(grads.hidden, of_sample), finished(grads.weight, factor), finished(grads.bias, factor)
        if not kept:
            ctx.grads = None
        return (*made, None)
