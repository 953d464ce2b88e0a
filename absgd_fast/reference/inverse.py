"""Logits recovered from the gradient of their loss (docs/MATH.md §2.6).

A graph that keeps the gradient therefore need not keep the logits for a second derivative.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .dtypes import real_dtype
from .losses import SCE_A, class_weights

NEWTON_STEPS = 40  # far from the root of SCE a step moves n by 1, and at n = 37 float64 cannot tell the losses apart


@torch.no_grad()
def logits_of_gradient(
    grad: Tensor,
    target: Tensor,
    losses: Tensor | None = None,
    factor: Tensor | None = None,
    *,
    kind: str = "ce",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    margin: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    **numbers: Any,
) -> Tensor:
    """Logits with the same losses, and the same derivatives of every order, as those that had this gradient (docs/MATH.md §2.6).

    They differ from those by one number per row. With g_k the gradient of a row's loss by a_k = S_k x_k + D_k - M_y 1[k = y]:

        p_k = (g_k + u_k) / sum_j u_j                      soft targets or label smoothing; u_k: what class k weighs in the loss
        p_k = (1 - p_y) g_k / sum_{j != y} g_j,  k != y    all other losses; p_y follows from the loss

    Args:
        grad: (B, C) or (B, C, d1, ...), factor_i times the gradient of the loss of row i.
        losses: (B) or (B, d1, ...). They may be None for cross-entropy, which then takes the first line.
        factor: as losses; None: 1. A row with the factor 0 gets any finite logits.
        target, kind, scale, shift, margin, weight, label_smoothing, ignore_index, **numbers: as for `logit_loss`; no scale is 0.

    Returns:
        Logits of the shape of grad, in `real_dtype`.

    Raises:
        RuntimeError: a scale is 0, so that the gradient does not show p_k.

    >>> logits_of_gradient(torch.tensor([[-0.25, 0.25]]), torch.tensor([0])).softmax(1)
    tensor([[0.7500, 0.2500]])
    """
    g = grad.movedim(1, -1).to(real_dtype(grad.dtype))
    if g.numel() == 0:
        return torch.zeros_like(grad, dtype=g.dtype)
    scale, shift = (g.new_tensor(d) if v is None else v.to(g) for v, d in ((scale, 1.0), (shift, 0.0)))
    if (scale == 0).any():
        raise RuntimeError("second derivative: got a class vector S with a 0, expected none, or backend='reference'")
    g = g / scale
    if factor is not None:
        none = factor.abs() < torch.finfo(g.dtype).tiny
        g = g / torch.where(none, 1.0, factor).to(g.dtype).unsqueeze(-1)
    v = torch.ones_like(g[(0,) * (g.dim() - 1)]) if weight is None else weight.to(g)
    if target.is_floating_point():
        return ((_from_class_weights(g, target.movedim(1, -1).to(g), v, label_smoothing) - shift) / scale).movedim(-1, 1)
    y = torch.where(target != ignore_index, target, 0).long().unsqueeze(-1)
    is_label = torch.zeros_like(g, dtype=torch.bool).scatter(-1, y, True)
    if kind == "ce" and (label_smoothing or losses is None):
        a = _from_class_weights(g, is_label.to(g.dtype), v, label_smoothing)
    else:
        assert losses is not None  # what the caller promises
        slope = -g.gather(-1, y).squeeze(-1).double()
        precision = torch.finfo(losses.dtype).eps / torch.finfo(grad.dtype).eps
        n = _nll(kind, losses.double(), v[y.squeeze(-1)].double(), slope, precision, **numbers)
        a = _from_label(g, is_label, n)
    if margin is not None:
        a = a + torch.where(is_label, margin.to(a), 0.0)
    return ((a - shift) / scale).movedim(-1, 1)


def _from_class_weights(g: Tensor, t: Tensor, v: Tensor, label_smoothing: float) -> Tensor:
    """log p (..., C) of cross-entropy with the probabilities t: g_k = p_k sum_j u_j - u_k."""
    u = class_weights(t, v, label_smoothing)
    total = u.sum(-1, keepdim=True)
    return ((g + u) / torch.where(total == 0, 1.0, total)).clamp(torch.finfo(g.dtype).tiny, 1).log()


def _from_label(g: Tensor, is_label: Tensor, n: Tensor) -> Tensor:
    """log p_k - log(1 - p_y) for every class (..., C). n: -log p_y, float64."""
    tiny = torch.finfo(g.dtype).tiny
    others = g.masked_fill(is_label, 0.0)
    total = others.sum(-1, keepdim=True)
    share = torch.where(total.abs() < tiny, 1.0, others / total)
    log_odds = -n - (-torch.expm1(-n)).log()  # log(p_y / (1 - p_y))
    log_odds = log_odds.clamp(math.log(tiny), -math.log(tiny)).to(g.dtype)
    return torch.where(is_label, log_odds.unsqueeze(-1), share.clamp(min=tiny).log())


def _nll(
    kind: str,
    losses: Tensor,
    w: Tensor,
    slope: Tensor,
    precision: float,
    *,
    gamma: float = 2.0,
    q: float = 0.7,
    k: float | None = None,
    prune: bool = False,
    alpha: float = 0.1,
    beta: float = 1.0,
) -> Tensor:
    """n = -log p_y from the losses: the inverse of `logit_loss` without label smoothing.

    slope: c (1 - p_y), which the gradient shows (c as in docs/MATH.md §2.2). precision: eps of the losses / eps of the gradient.
    """
    weightless = w == 0  # the gradient is 0 whatever p is
    w, losses = torch.where(weightless, 1.0, w), torch.where(weightless, math.log(2), losses)
    if kind == "weighted_focal":
        return _focal_root(losses, gamma) / w
    losses, slope = losses / w, slope / w
    if kind == "focal":
        return _focal_root(losses, gamma)
    if kind == "gce":
        cut = 0.0 if k is None else -math.expm1(q * math.log(k)) / q
        n = -torch.log1p(-(q * (losses + cut)).clamp(0, 1)) / q
        # As p -> 0 the loss goes to a limit, and only the gradient p^q (1 - p) still shows p.
        fades = (n > math.log(2)) & ((-q * n).exp() < precision)
        return torch.where(fades, -(slope / -torch.expm1(-n)).log() / q, n)
    if kind == "sce":
        n = losses / max(alpha + beta * SCE_A, torch.finfo(losses.dtype).tiny)
        for _ in range(NEWTON_STEPS):
            value, slope = alpha * n - beta * SCE_A * torch.expm1(-n), alpha + beta * SCE_A * (-n).exp()
            n = (n - (value - losses) / slope).clamp(0, 700)
        return n
    assert kind == "ce", kind
    return losses


def _focal_root(losses: Tensor, gamma: float) -> Tensor:
    """n with (1 - e^-n)^gamma n = losses, by Newton's method on logarithms: there the function is concave, and the start is left
    of the root."""
    goal = losses.clamp(min=torch.finfo(losses.dtype).tiny).log()
    log_n = goal
    for _ in range(NEWTON_STEPS):
        n = log_n.exp()
        log_n = log_n - (gamma * (-torch.expm1(-n)).log() + log_n - goal) / (1 + gamma * n / torch.expm1(n))
    return log_n.exp()
