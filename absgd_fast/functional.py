"""Pure functions: nothing is mutated, the new state is returned."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, ops, reference
from .reference import real_dtype


def logit_loss(
    logits: Tensor,
    target: Tensor,
    *,
    kind: str = "ce",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor:
    """Per-sample losses on logits, one fused pass; `kind="ce"` is cross-entropy.

        l_i = (1 - e) v_y (-log p_y) + (e / C) sum_k v_k (-log p_k),    p = softmax(logits_i)

    Args:
        logits: (B, C) or (B, C, d1, ...), float32, float64, bfloat16 or float16, any strides.
        target: (B) or (B, d1, ...), int64 or int32 labels in [0, C), or `ignore_index`.
        weight: (C) class weights v; default all 1.
        label_smoothing: e in [0, 1].
        ignore_index: rows with this label have loss 0 and gradient 0.
        backend: None (the fastest that can run), "cpu" or "reference".

    Returns:
        (B) or (B, d1, ...) losses: float64 for float64 logits, else float32 (a bfloat16 loss is too coarse to be
        exponentiated). The gradient has the logits' dtype.

    Raises:
        TypeError: labels that are not integers. ValueError: shapes, label_smoothing, kind.
        IndexError: a label out of range (first value and row), on the CPU.

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]], requires_grad=True)
    >>> losses = logit_loss(logits, torch.tensor([0, -100]))
    >>> losses.detach()
    tensor([0.1269, 0.0000])

    The formula is torch.nn.functional.cross_entropy's; -log p is computed as log1p(sum_{k != y} exp(x_k - x_y)), which
    keeps the label's gradient exact as p -> 1 (csrc/math.h).
    """
    _checks.choice(kind, "kind", reference.KINDS)
    _checks.target(logits, target)
    _checks.smoothing(label_smoothing)
    weight = _checks.class_weight(weight, logits)
    if not ops.native(logits.device, backend):
        if target.device.type == "cpu" and not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
            ops.check_labels(target, logits.shape[1], ignore_index)
        return reference.logit_loss(logits, target, weight=weight, label_smoothing=label_smoothing, ignore_index=ignore_index)
    with_grad = logits.requires_grad and torch.is_grad_enabled()
    try:
        losses, grad = torch.ops.absgd_fast.logit_loss(logits, target, weight, label_smoothing, ignore_index, with_grad)
    except RuntimeError as error:
        raise ops.translated(error) from None
    return ops.attach(logits, losses, grad) if with_grad else losses


def robust_weights(
    losses: Tensor,
    log_s: float | Tensor,
    lam: float | Tensor,
    *,
    gamma: float = 0.9,
    alpha: float = 1.0,
    init: str = "first",
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Robust weights of any per-sample losses and the next log s (ABSGD paper, Alg. 1, steps 3-5, in the log domain).

        log s' = logaddexp(log(1 - gamma) + log s, log(gamma alpha) + log mean exp(L / lambda))
        W_i    = exp(L_i / lambda - log s')

    Args:
        losses: any shape; differentiable (also through log s').
        log_s: number or 0-d tensor; -inf before the first batch.
        lam: number or 0-d tensor, not 0; > 0 attends to large losses, < 0 to small ones, +-inf gives W = 1.
        gamma, alpha: in (0, 1].
        init: "first": the first batch sets s alone; "zero": s starts at 0, as in the paper.
        mask: like losses, bool; False = ignored (W = 0).
        backend: None, "cpu" or "reference".

    Returns:
        weights (like losses; float64 for float64 losses, else float32), new log s (0-d; dtype of log_s if a tensor).
        A NaN or infinite loss has W = NaN, leaves the other weights alone and log s where it was.

    Raises:
        ValueError: lam = 0 or NaN, gamma or alpha outside (0, 1], mask of another shape.

    >>> weights, log_s = robust_weights(torch.tensor([1.0, 1000.0]), float("-inf"), 1.0)
    >>> weights, log_s  # no overflow: W <= B / (gamma alpha)
    (tensor([0., 2.]), tensor(999.3068))
    """
    _checks.share(gamma, "gamma")
    _checks.share(alpha, "alpha")
    _checks.lam(lam)
    _checks.scalar(log_s, "log_s")
    _checks.choice(init, "init", ("first", "zero"))
    real = real_dtype(losses.dtype)
    mask = _checks.per_sample(mask, "mask", losses, torch.bool)
    state = log_s.dtype if isinstance(log_s, Tensor) else real
    if not ops.native(losses.device, backend):
        return reference.robust_weights(losses, log_s, lam, gamma=gamma, alpha=alpha, init=init, mask=mask)
    log_s = torch.as_tensor(log_s, dtype=state, device=losses.device).detach()
    lam = torch.as_tensor(lam, dtype=real, device=losses.device).detach()
    flags = ops.flags("moving", init)
    return ops.robust_weights(losses.to(real).contiguous(), log_s, lam, mask, float(gamma), float(alpha), flags)
