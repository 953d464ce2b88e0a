"""Per-sample losses on logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._codes import KINDS
from .dtypes import real_dtype

SCE_A = -math.log(1e-4)  # what log 0 is replaced by in the reverse term of SCE


def logit_loss(
    logits: Tensor,
    target: Tensor,
    *,
    kind: str = "ce",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    margin: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    gamma: float = 2.0,
    q: float = 0.7,
    k: float | None = None,
    prune: bool = False,
    alpha: float = 0.1,
    beta: float = 1.0,
) -> Tensor:
    """Per-sample losses on logits x (see `functional.logit_loss` for what the names stand for and where they come from).

        a_k = S_k x_k + D_k - M_y 1[k = y],    p = softmax(a)_y,    n = -log p,    w = v_y
        ce               w n;  with label smoothing e: (1 - e) w n + (e / C) sum_k v_k (-log softmax(a)_k)
        focal            w (1 - p)^gamma n
        gce              w (1 - p^q) / q,  truncated at k: w (k^q - p^q) / q
        sce              w (alpha n + beta A (1 - p)),  A = -log 1e-4
        weighted_focal   m = w n, u = exp(-m): (1 - u)^gamma m

    With r = sum_{k != y} exp(a_k - a_y), summed without the label: n = log1p(r) and 1 - p = r / (1 + r), so that neither
    cancels as p -> 1.

    Args:
        logits: (B, C) or (B, C, d1, ...), any floating dtype.
        target: (B) or (B, d1, ...), integer labels in [0, C) or `ignore_index`; or probabilities (B, C, d1, ...), for "ce".
        scale, shift, margin: (C) class vectors S, D, M, default 1, 0, 0.
        weight: (C) class weights v, default all 1.

    Returns:
        (B) or (B, d1, ...) losses, in `real_dtype(logits.dtype)`. With `prune`, rows with p <= k are 0, as ignored ones.

    >>> logit_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor([0.6931])
    >>> logit_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([1]), kind="gce", q=1.0)
    tensor([0.5000])
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {KINDS}")
    x = logits.movedim(1, -1).to(real_dtype(logits.dtype))
    if x.shape[-1] == 0:
        return x.sum(-1)  # without classes every row is ignored
    v = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device) if weight is None else weight.to(x)
    if target.is_floating_point():
        return _soft_cross_entropy(_adjusted(x, scale, shift), target.movedim(1, -1).to(x), v, label_smoothing)
    valid = target != ignore_index
    y = torch.where(valid, target, 0).long().unsqueeze(-1)
    x = torch.where(valid.unsqueeze(-1), x, torch.zeros_like(x))  # ignored rows may hold anything
    is_label = torch.zeros_like(x, dtype=torch.bool).scatter(-1, y, True)
    x = _adjusted(x, scale, shift)
    if margin is not None:
        x = x - torch.where(is_label, margin.to(x), 0.0)
    x, n, one_minus_p = _row_statistics(x, y, is_label)
    w = v[y.squeeze(-1)]
    if kind == "ce":
        loss = (1 - label_smoothing) * w * n
        if label_smoothing:
            loss = loss + label_smoothing / x.shape[-1] * _class_sum(v, x.logsumexp(-1, keepdim=True) - x)
    elif kind == "focal":
        loss = w * _power(one_minus_p, gamma) * n
    elif kind == "weighted_focal":
        m = w * n
        loss = _power(_one_minus_exp(m), gamma) * m
    elif kind == "gce":
        cut = 0.0 if k is None else -math.expm1(q * math.log(k)) / q
        loss = w * (_one_minus_exp(q * n) / q - cut)
        if prune and k is not None:
            valid = valid & ~(n >= -math.log(k))
    else:
        assert kind == "sce", kind
        loss = w * (alpha * n + beta * SCE_A * one_minus_p)
    return torch.where(valid, loss, torch.zeros_like(loss))


def _row_statistics(x: Tensor, y: Tensor, is_label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x less the maximum of its row, n = -log p and 1 - p. y (..., 1): the label, where `is_label` is true."""
    row_max = x.detach().amax(-1, keepdim=True)
    broken = row_max - row_max  # a NaN or a +inf among the logits makes the row NaN, as everywhere in torch
    x = x - torch.where(row_max.isfinite(), row_max, 0.0)  # near the maximum no digit is lost to large logits
    x_y = x.gather(-1, y)
    distance = (x - x_y).masked_fill(is_label, -math.inf)
    is_max = (distance <= 0).all(-1)  # the label is a maximum, so r <= C - 1 and p >= 1 / C
    r = torch.where(is_max.unsqueeze(-1), distance, torch.full_like(x, -math.inf)).exp().sum(-1)
    n = torch.where(is_max, r.log1p(), x.logsumexp(-1) - x_y.squeeze(-1))
    n = n * (1 + broken.squeeze(-1))
    one_minus_p = torch.where(is_max, r / (1 + r), 1 - torch.exp(-n))
    return x, n, one_minus_p


def _adjusted(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    x = x if scale is None else x * scale.to(x)
    return x if shift is None else x + shift.to(x)


def _class_sum(weights: Tensor, terms: Tensor) -> Tensor:
    """sum over classes; a class of weight 0 takes no part, whatever its term."""
    return torch.where(weights == 0, torch.zeros_like(terms), weights * torch.where(weights == 0, 0.0, terms)).sum(-1)


def _soft_cross_entropy(x: Tensor, t: Tensor, v: Tensor, label_smoothing: float) -> Tensor:
    """sum_k ((1 - e) t_k + e / C) v_k (-log softmax(x)_k)"""
    class_weights = ((1 - label_smoothing) * t + label_smoothing / x.shape[-1]) * v
    return _class_sum(class_weights, x.logsumexp(-1, keepdim=True) - x)


def _one_minus_exp(x: Tensor) -> Tensor:
    """1 - exp(-x) for x >= 0, neither cancelling near 0 nor, in its derivative, far from it (that of expm1 is result + 1)."""
    near = x < 1
    return torch.where(near, -torch.expm1(-torch.where(near, x, 0.0)), 1 - torch.exp(-torch.where(near, 1.0, x)))


def _power(base: Tensor, exponent: float) -> Tensor:
    """base^exponent for base >= 0, whose gradient at base = 0 is 0 and not inf (the factor beside it is 0 there)."""
    if exponent == 0:
        return torch.ones_like(base)
    positive = base > 0
    return torch.where(positive, torch.where(positive, base, 1.0) ** exponent, base * 0)
