"""Per-sample losses on logits (docs/MATH.md §2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._codes import KINDS
from .dtypes import real_dtype

SCE_A = -math.log(1e-4)  # SCE's A: its reverse cross-entropy replaces log 0 by -A (Wang et al. 2019)


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
    """Per-sample losses on logits x (docs/MATH.md §2.1 and §2.2).

        a_k = S_k x_k + D_k - M_y 1[k = y],    p = softmax(a)_y,    n = -log p,    w = v_y

        "ce"              w n,  with label smoothing e: (1 - e) w n + (e / C) sum_k v_k (-log softmax(a)_k)
        "focal"           w (1 - p)^gamma n                                     Lin et al. 2017, Eq. 5
        "gce"             w (1 - p^q) / q,  truncated at k: w (k^q - p^q) / q   Zhang & Sabuncu 2018, Eq. 6 and 9
        "sce"             w (alpha n + beta A (1 - p)),  A = -log 1e-4          Wang et al. 2019, Eq. 5
        "weighted_focal"  (1 - u)^gamma m,  m = w n,  u = exp(-m)               the ABSGD authors' code

    Both n and 1 - p are made from r = sum_{k != y} exp(a_k - a_y), a sum without the label: n = log1p(r) and
    1 - p = r / (1 + r). So neither loses digits as p -> 1.

    Args:
        logits: (B, C) or (B, C, d1, ...), any floating dtype.
        target: (B) or (B, d1, ...), integer labels in [0, C) or `ignore_index`; for "ce" also probabilities (B, C, d1, ...).
        kind: the loss.
        scale, shift, margin: (C) class vectors S, D, M; default 1, 0, 0.
        weight: (C) class weights v; default all 1.
        label_smoothing, ignore_index, gamma, q, k, alpha, beta: as for `functional.logit_loss`.
        prune: True: a row with p <= k has loss 0, like an ignored one.

    Returns:
        (B) or (B, d1, ...) losses in `real_dtype(logits.dtype)`.

    >>> logit_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor([0.6931])
    >>> logit_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([1]), kind="gce", q=1.0)
    tensor([0.5000])
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {KINDS}")
    x = logits.movedim(1, -1).to(real_dtype(logits.dtype))
    if x.shape[-1] == 0:
        return x.sum(-1)  # without classes there is no label, so every row is ignored
    v = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device) if weight is None else weight.to(x)
    if target.is_floating_point():
        return _soft_cross_entropy(_adjusted(x, scale, shift), target.movedim(1, -1).to(x), v, label_smoothing)
    target = target.long()  # a narrow dtype has no -100
    valid = target != ignore_index
    y = torch.where(valid, target, 0).unsqueeze(-1)
    x = torch.where(valid.unsqueeze(-1), x, torch.zeros_like(x))  # an ignored row may hold NaN
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
    """x less the maximum of its row, n = -log p, and 1 - p (docs/MATH.md §2.1).

    y (..., 1) is the label of each row; is_label has the shape of x and is True at the label.
    """
    row_max = x.detach().amax(-1, keepdim=True)
    broken = row_max - row_max  # NaN if the maximum is not finite: the loss is then NaN, as in torch
    x = x - torch.where(row_max.isfinite(), row_max, 0.0)  # large logits cost no digits near their maximum
    x_y = x.gather(-1, y)
    distance = (x - x_y).masked_fill(is_label, -math.inf)
    is_max = (distance <= 0).all(-1)  # the label has the largest logit, so r <= C - 1 and p >= 1 / C
    r = torch.where(is_max.unsqueeze(-1), distance, torch.full_like(x, -math.inf)).exp().sum(-1)
    n = torch.where(is_max, r.log1p(), x.logsumexp(-1) - x_y.squeeze(-1))
    n = n * (1 + broken.squeeze(-1))
    one_minus_p = torch.where(is_max, r / (1 + r), 1 - torch.exp(-n))
    return x, n, one_minus_p


def _adjusted(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """S_k x_k + D_k."""
    x = x if scale is None else x * scale.to(x)
    return x if shift is None else x + shift.to(x)


def _class_sum(weights: Tensor, terms: Tensor) -> Tensor:
    """The sum over the classes of weight times term. A class of weight 0 adds nothing, even if its term is infinite."""
    return (weights * _finite_where_unused(weights, terms)).sum(-1)


def _finite_where_unused(weights: Tensor, terms: Tensor) -> Tensor:
    """The terms, with 0 for an infinite one whose weight is 0. A finite one stays: it is the derivative by its weight."""
    return torch.where(weights == 0, terms.nan_to_num(0.0, 0.0, 0.0), terms)


def _soft_cross_entropy(x: Tensor, t: Tensor, v: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy with the probabilities t: sum_k ((1 - e) t_k + e / C) v_k (-log softmax(x)_k) (docs/MATH.md §2.4)."""
    return _class_sum(class_weights(t, v, label_smoothing), x.logsumexp(-1, keepdim=True) - x)


def class_weights(t: Tensor, v: Tensor, label_smoothing: float) -> Tensor:
    """What each class weighs in the cross-entropy of the probabilities t: ((1 - e) t_k + e / C) v_k (docs/MATH.md §2.4)."""
    return ((1 - label_smoothing) * t + label_smoothing / t.shape[-1]) * v


def soft_target_slope(
    logits: Tensor,
    target: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The derivative of cross-entropy by its probabilities: d L_i / d t_ik = -(1 - e) v_k log softmax(a_i)_k (docs/MATH.md §7).

    Args:
        logits, target: (B, C) or (B, C, d1, ...); the target are probabilities.
        scale, shift, weight, label_smoothing: as for `logit_loss`.

    Returns:
        as logits, in `real_dtype(logits.dtype)`. It is 0 where log softmax = -inf has the weight 0 in the loss.

    >>> soft_target_slope(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
    tensor([[0.6931, 0.6931]])
    """
    x = _adjusted(logits.movedim(1, -1).to(real_dtype(logits.dtype)), scale, shift)
    v = torch.ones_like(x[..., :1]) if weight is None else weight.to(x)
    in_loss = class_weights(target.movedim(1, -1).to(x), v, label_smoothing)
    log_p = _finite_where_unused(in_loss, x.log_softmax(-1))
    return ((label_smoothing - 1) * v * log_p).movedim(-1, 1)


def _one_minus_exp(x: Tensor) -> Tensor:
    """1 - exp(-x) for x >= 0 without cancellation.

    Below 1 this takes expm1. From 1 on it takes exp: torch computes the derivative of expm1 as result + 1, which cancels there.
    """
    near = x < 1
    return torch.where(near, -torch.expm1(-torch.where(near, x, 0.0)), 1 - torch.exp(-torch.where(near, 1.0, x)))


def _power(base: Tensor, exponent: float) -> Tensor:
    """base^exponent for base >= 0, with gradient 0 at base = 0.

    For exponent < 1 the true gradient there is infinite. The loss multiplies it by n = 0, which would give NaN.
    """
    if exponent == 0:
        return torch.ones_like(base)
    positive = base > 0
    return torch.where(positive, torch.where(positive, base, 1.0) ** exponent, base * 0)
