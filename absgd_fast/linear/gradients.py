"""The gradients of a linear head (docs/MATH.md §6).

The forward pass makes each of them up to one factor, because log s' is known only at its end; backward multiplies by the factor.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .. import ops
from ..ops import COUNT, LOG_S, SCALE
from ..reference import real_dtype
from ..robust.state import RobustState
from .chunks import Chunks
from .products import add_product

RESCALE_GAP = 20.0  # how far log mean exp(z) of a chunk may lie above the reference point before the sums are rescaled


class Unfinished(NamedTuple):
    """The gradients as the forward pass leaves them, each without its last factor."""

    hidden: Tensor | None  # (n, d): G weight: the rows of dH without the weights of the samples
    sample_factor: Tensor | None  # (n) real: d loss / d L_i, by which the rows of hidden and target are multiplied
    target: Tensor | None  # (n, C) real: the derivatives of the losses by soft targets, likewise without the weights
    weight: Tensor | None  # (C, d) real: dW relative to the reference point
    bias: Tensor | None  # (C) real: db, likewise
    reference: Tensor  # (6) float64, the normaliser of the chunk that gave the reference point; its scale is 1


class RelativeGradients:
    """The sums of gradients over the chunks, relative to a reference point m.

    With G the gradients of each row's own loss, which overwrite the logits of a chunk:

        dW = sum G^T (diag(w) H),    db = sum G^T w,    w_i = sample_weight_i exp(z_i - m)

    The gradient of hidden, diag(W / n) (G weight), follows once log s' is known.

    m starts as log mean exp(z) of the first chunk with a sample (0 with normalizer="none"). It moves to that of a later chunk
    which lies more than RESCALE_GAP above it.
    """

    def __init__(self, state: RobustState, operators: ops.Operators, chunks: Chunks, wanted: list[bool]):
        """wanted: which of hidden, weight, bias and target need a gradient."""
        self.state, self.operators, self.chunks = state, operators, chunks
        real = real_dtype(chunks.hidden.dtype)
        self.hidden = torch.empty_like(chunks.hidden) if wanted[0] else None
        self.weight, self.bias = (
            t.new_zeros(t.shape, dtype=real) if on and t is not None else None
            for t, on in zip((chunks.weight, chunks.bias), wanted[1:3])
        )
        self.target = chunks.target_slopes = torch.empty_like(chunks.target) if wanted[3] else None
        self.reference = torch.zeros(6, dtype=torch.float64, device=chunks.hidden.device)

    def losses_and_validity(self) -> tuple[Tensor, Tensor]:
        """Losses and validity (bool) of all samples; the walk makes the gradients."""
        return self.chunks.losses(self._add)

    def unfinished(self, sample_factor: Tensor) -> Unfinished:
        """The gradients so far. sample_factor: (n) d loss / d L_i, from robust_apply."""
        return Unfinished(self.hidden, sample_factor, self.target, self.weight, self.bias, self.reference)

    def _add(self, part: slice, grad: Tensor, losses: Tensor, valid: Tensor) -> None:
        """Add the gradients of a chunk to the sums: dW += G^T (diag(w) H), db += G^T w; the rows of dH are G weight."""
        products = self.chunks.products
        if self.hidden is not None:
            products.of_hidden(grad, self.hidden[part])
        if self.weight is None and self.bias is None:
            return
        weights = self._relative_weights(part, losses, valid).unsqueeze(1)
        if self.weight is not None:
            add_product(self.weight, grad.t(), (products.rows(part) * weights).to(grad.dtype))
        if self.bias is not None:
            add_product(self.bias.unsqueeze(1), grad.t(), weights.to(grad.dtype))

    def _relative_weights(self, part: slice, losses: Tensor, valid: Tensor) -> Tensor:
        """w_i = sample_weight_i exp(z_i - m) of a chunk; 0 for a sample that does not count.

        Before that, m moves to the chunk if the chunk lies far above it, and the sums are rescaled. The host waits for nothing.
        """
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
                operators.scale_(total, ratio)  # by a ratio of 1 it returns without reading the sum
        self.reference = torch.where(moves, here, point)
        return operators.robust_apply(
            losses, score, sample_weight, valid, self.reference, log_s, lam, False, 0.0, state.max_weight, ops.WITH_GRAD
        )[2]


def refuse_second_derivative() -> NoReturn:
    """RuntimeError."""
    raise RuntimeError(
        "LinearABLoss: got backward with create_graph=True, which needs the logits, but they were not stored; use"
        " backend='reference', or ABLoss on hidden @ weight.T"
    )


class LinearLossGrad(torch.autograd.Function):
    """The loss as a function of hidden, weight, bias and target, whose gradients are known up to a factor each."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        made: tuple[Tensor, Unfinished, Tensor],
    ) -> Tensor:
        """The loss. made: the loss, its gradients, and the settled normaliser."""
        loss, ctx.grads, ctx.settled = made
        ctx.dtype, ctx.target_dtype = hidden.dtype, target.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None]:
        """The gradients of the inputs, by the factors that are known only now; in place unless the graph is kept."""
        if torch.is_grad_enabled():
            refuse_second_derivative()
        grads, kept = ctx.grads, ops.graph_is_kept()
        if grads is None:
            raise RuntimeError("LinearABLoss: got a second backward, expected retain_graph=True in the first")

        def finished(grad: Tensor | None, factor: Tensor | None, dtype: torch.dtype = ctx.dtype) -> Tensor | None:
            if grad is None or factor is None:
                return None
            factor = factor.to(grad.dtype) if grad.dtype == torch.float64 else factor.float()
            return (grad * factor if kept else grad.mul_(factor)).to(dtype)

        reference, settled = grads.reference, ctx.settled
        # If no sample counts the sums are 0, or NaN because of nonfinite losses; a factor of 1 leaves them so.
        moved = torch.where(reference[COUNT] > 0, (reference[LOG_S] - settled[LOG_S]).exp(), 1.0)
        factor = upstream.double() * settled[SCALE] * moved
        of_sample = None if grads.hidden is None and grads.target is None else (upstream * grads.sample_factor).unsqueeze(1)
        of_target = finished(grads.target, of_sample, ctx.target_dtype)
        made = finished(grads.hidden, of_sample), finished(grads.weight, factor), finished(grads.bias, factor), of_target, None
        if not kept:
            ctx.grads = None
        return made
