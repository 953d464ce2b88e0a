"""linear_robust_loss: the pure function, with the arguments of torch.nn.functional.linear_cross_entropy."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from .. import _checks, ops
from .. import functional as F
from .._compiled import outside_graphs
from ..losses import fused_spec
from ..reference import real_dtype
from ..robust.normalizer import Samples
from .chunks import in_rows
from .loss import LinearABLoss


@outside_graphs  # it makes a module, and the chunks are a loop of Python
def linear_robust_loss(
    input: Tensor,  # noqa: A002  # torch's name
    linear_weight: Tensor,
    target: Tensor,
    log_s: float | Tensor,
    lam: float | Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    gamma: float = 0.9,
    alpha: float = 1.0,
    init: str = "first",
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The robust loss of cross-entropy on logits = input linear_weight^T + linear_bias, which are not stored, and the next log s.

        L_i = cross_entropy(logits_i, target_i),    W_i = exp(L_i / lam - log s'),    loss = (1/n) sum_i W_i L_i

    The arguments up to `target`, and those from `linear_bias` to `options`, have the names, places and defaults of
    torch.nn.functional.linear_cross_entropy; the others are those of `functional.robust_weights`. It is `LinearABLoss` as a pure
    function, with W constant for autograd (docs/MATH.md §1.1 and §6).

    Args:
        input: (n, d) or (..., d), the inputs of the head. linear_weight: (C, d). linear_bias: (C) or None. One dtype: float32,
            float64 or bfloat16.
        target: (...) labels, int64 or int32, or (..., C) probabilities.
        log_s: number or 0-d tensor; -inf before the first batch. It is a constant for autograd.
        lam: number or 0-d tensor, not 0. +-inf is the plain mean, which is torch's value if there are no class weights.
        weight: (C) class weights. The mean is over the n samples that count; torch divides by the sum of their class weights.
        reduction: "mean". The other values of torch are refused, because W depends on all samples.
        ignore_index: samples with this label do not count; None: -100.
        label_smoothing: in [0, 1].
        options: None, or torch.nn.LinearCrossEntropyOptions, of which batch_chunk_size is used. Its other fields choose between
            precision and memory of torch's sums; here sums of bfloat16 are float32 always.
        gamma, alpha, init: as for `functional.robust_weights`.
        mask: (...) bool; a sample with False does not count.
        backend: as for `LinearABLoss`.

    Returns:
        The loss, 0-d, differentiable by input, linear_weight, linear_bias and probabilities; and the new log s, 0-d (of the dtype
        of log_s if that is a float32 or float64 tensor, else of the loss). A nonfinite loss leaves log s as it was.

    Raises:
        ValueError: another reduction, options with a chunking_method, log_s is NaN; the others as for `LinearABLoss`.
        RuntimeError: ignore_index together with probabilities, as in torch; weight or lam requires grad.

    >>> input, head = torch.zeros(3, 8, requires_grad=True), torch.nn.Linear(8, 5)
    >>> loss, log_s = linear_robust_loss(input, head.weight, torch.tensor([0, 4, -100]), float("-inf"), 0.5)
    >>> loss
    tensor(1.6094, grad_fn=<LinearLossGradBackward>)
    """
    _checks.floating(input, "input", "shape (..., d)")
    if reduction != "mean":
        raise ValueError(
            f"reduction: got {reduction!r}, expected 'mean': the weights are relative to all samples; for single losses use"
            " LinearABLoss and its last.losses and last.weights"
        )
    if ignore_index is not None and isinstance(target, Tensor) and target.is_floating_point():
        raise RuntimeError("ignore_index: got a number with probabilities, expected None: only labels can be ignored; use mask")
    lam, log_s, chunk = _checks.lam(lam), F.checked_log_s(log_s), _chunk(options)
    hidden = input
    if not torch.is_grad_enabled():
        hidden, linear_weight, target, linear_bias, weight = map(_detached, (input, linear_weight, target, linear_bias, weight))
    criterion = nn.CrossEntropyLoss(
        weight,
        ignore_index=-100 if ignore_index is None else _checks.ignore_index(ignore_index),
        reduction="none",
        label_smoothing=_checks.smoothing(label_smoothing),
    )
    if ops.transformed():
        logits = nnf.linear(hidden, linear_weight, linear_bias)
        losses, valid = _losses(criterion, logits, target, mask, backend)
        weights, log_s = F.robust_weights(losses, log_s, lam, gamma=gamma, alpha=alpha, init=init, mask=valid, backend=backend)
        return (weights.detach() * losses).where(valid, 0.0).sum() / valid.sum().clamp(min=1), log_s
    with input.device:
        robust = LinearABLoss(
            criterion, lam=lam, gamma=gamma, alpha=alpha, init=init, process_group=None, chunk=chunk, backend=backend
        )
    state = F.state_of(log_s, real_dtype(input.dtype), input.device)
    robust.to(state.dtype).log_s.copy_(state)
    with torch.enable_grad():  # without it log s would stay
        return robust(hidden, linear_weight, target, linear_bias, mask=mask), robust.log_s


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _losses(
    criterion: nn.CrossEntropyLoss, logits: Tensor, target: Tensor, mask: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    """The losses of stored logits (..., C), and which count (bool)."""
    spec = fused_spec(criterion, logits)
    assert spec is not None  # it is torch's cross-entropy
    rows, targets, samples = in_rows(logits, target, Samples(mask=mask), logits.shape[-1])
    rows, targets = ops.masked_inputs(rows, targets, samples.mask, spec)
    losses, valid = F.losses_and_validity(rows, targets, spec, backend)
    return losses, valid > 0 if samples.mask is None else (valid > 0) & samples.mask


def _chunk(options: Any) -> int | None:
    """The rows of a chunk that torch.nn.LinearCrossEntropyOptions ask for; None: as many as is good."""
    method = getattr(options, "chunking_method", None)
    if options is not None and not hasattr(options, "batch_chunk_size"):
        raise TypeError(f"options: got {type(options).__name__}, expected torch.nn.LinearCrossEntropyOptions or None")
    if method not in (None, "auto"):
        raise ValueError(
            f"options: got chunking_method={method!r}, expected 'auto' or None; give the size of a chunk as batch_chunk_size"
        )
    chunk: int | None = getattr(options, "batch_chunk_size", None)
    return chunk
