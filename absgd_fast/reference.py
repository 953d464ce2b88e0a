"""The whole pipeline in plain torch, to be read beside the paper. The oracle of the tests and the last fallback.

Never optimised: every function is the formula of Algorithm 1 of *Attentional-Biased Stochastic Gradient Descent*
(ABSGD), in the log domain, for any floating dtype and any device, differentiable by autograd. Equation numbers refer
to that paper.
"""

from __future__ import annotations

import math
from contextlib import contextmanager

import torch
from torch import Tensor

NORMALIZERS = ("moving", "batch", "none")
KINDS = ("ce", "focal", "gce", "sce", "weighted_focal")  # in the order of csrc/math.h Kind
SCE_A = -math.log(1e-4)  # what log 0 is replaced by in the reverse term of SCE


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype losses and sums are computed in: float64 for float64, float32 for everything narrower.

    A loss of 10 rounded to bfloat16 is off by up to 0.03, which an exponential turns into a weight that is off by 3 %.

    >>> real_dtype(torch.bfloat16)
    torch.float32
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    top = x.detach().amax(-1, keepdim=True)
    broken = top - top  # a NaN or a +inf among the logits makes the row NaN, as everywhere in torch
    x = x - torch.where(top.isfinite(), top, 0.0)  # near the maximum no digit is lost to large logits
    x_y = x.gather(-1, y)
    distance = (x - x_y).masked_fill(is_label, -math.inf)
    on_top = (distance <= 0).all(-1)  # the label is a maximum, so r <= C - 1 and p >= 1 / C
    r = torch.where(on_top.unsqueeze(-1), distance, torch.full_like(x, -math.inf)).exp().sum(-1)
    n = torch.where(on_top, r.log1p(), x.logsumexp(-1) - x_y.squeeze(-1))
    n = n * (1 + broken.squeeze(-1))
    rest = torch.where(on_top, r / (1 + r), 1 - torch.exp(-n))  # 1 - p
    w = v[y.squeeze(-1)]
    if kind == "ce":
        loss = (1 - label_smoothing) * w * n
        if label_smoothing:
            loss = loss + label_smoothing / x.shape[-1] * _weighted(v, x.logsumexp(-1, keepdim=True) - x)
    elif kind == "focal":
        loss = w * _power(rest, gamma) * n
    elif kind == "weighted_focal":
        m = w * n
        loss = _power(_one_minus_exp(m), gamma) * m
    elif kind == "gce":
        cut = 0.0 if k is None else -math.expm1(q * math.log(k)) / q
        loss = w * (_one_minus_exp(q * n) / q - cut)
        if prune and k is not None:
            valid = valid & ~(n >= -math.log(k))
    else:
        loss = w * (alpha * n + beta * SCE_A * rest)
    return torch.where(valid, loss, torch.zeros_like(loss))


def _adjusted(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    x = x if scale is None else x * scale.to(x)
    return x if shift is None else x + shift.to(x)


def _weighted(weights: Tensor, terms: Tensor) -> Tensor:
    """sum over classes; a class of weight 0 takes no part, whatever its term."""
    return torch.where(weights == 0, torch.zeros_like(terms), weights * torch.where(weights == 0, 0.0, terms)).sum(-1)


def _soft_cross_entropy(x: Tensor, t: Tensor, v: Tensor, label_smoothing: float) -> Tensor:
    """sum_k ((1 - e) t_k + e / C) v_k (-log softmax(x)_k)"""
    shares = ((1 - label_smoothing) * t + label_smoothing / x.shape[-1]) * v
    return _weighted(shares, x.logsumexp(-1, keepdim=True) - x)


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


def _scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    value = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    return value.detach().to(device, dtype)


def _split(losses: Tensor, score: Tensor, lam: Tensor, log_s: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """z = score / lambda, which valid rows are usable, and which are not (NaN, inf, or beyond the state's range)."""
    z = score / lam
    valid = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask
    limit = min(torch.finfo(z.dtype).max, torch.finfo(log_s.dtype).max)
    finite = losses.isfinite() & score.isfinite() & (z.abs() <= limit)
    return z, valid & finite, valid & ~finite


def _next_log_s(log_g: Tensor, log_s: Tensor, gamma: float, alpha: float, init: str, normalizer: str) -> Tensor:
    """Step 5 of Algorithm 1: what the weights are divided by, in logarithms, from the log of the batch's mean."""
    alone = math.log(alpha) + log_g
    if normalizer == "none":
        return torch.zeros_like(log_g)
    if normalizer == "batch":
        return alone
    past = (math.log1p(-gamma) if gamma < 1 else -math.inf) + log_s.to(log_g.dtype)
    start = torch.isneginf(log_s)
    moving = torch.where(start, math.log(gamma) + alone, torch.logaddexp(past, math.log(gamma) + alone))
    return torch.where(start, alone, moving) if init == "first" else moving


def robust_weights(
    losses: Tensor,
    log_s: float | Tensor,
    lam: float | Tensor,
    *,
    gamma: float = 0.9,
    alpha: float = 1.0,
    init: str = "first",
    normalizer: str = "moving",
    max_weight: float = math.inf,
    score: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Steps 3-5 of Algorithm 1 in the log domain: the robust weights and the next log s.

        z_i     = L_i / lambda
        log g   = logsumexp(z) - log n                                       (over the n valid, finite rows)
        log s'  = logaddexp(log(1 - gamma) + log s, log(gamma alpha) + log g)
        W_i     = exp(z_i - log s')

    A departure from the paper, which starts from s = 0: with `init="first"` the first batch sets log s' = log(alpha) +
    log g, because gamma g alone would make its weights 1 / gamma too large. `init="zero"` is the paper's start.

    Args:
        losses: any shape, per-sample losses L_i.
        log_s: 0-d; log of the moving average s, -inf before the first batch.
        lam: 0-d; lambda > 0 attends to large losses, < 0 to small ones, +-inf gives W = 1 and leaves log s alone.
        gamma: share of this batch in the moving average, in (0, 1].
        alpha: multiplier on the batch mean, in (0, 1].
        init: "first" or "zero".
        normalizer: "moving" (the paper), "batch" (log s' = log(alpha) + log g), "none" (log s' = 0).
        max_weight: upper bound of W_i; the state does not see it.
        score: like losses; z_i = score_i / lambda instead.
        mask: like losses, bool; False = ignored, weight 0.

    Returns:
        weights (like losses, in `real_dtype`), new log s (0-d). Rows with a NaN or infinite loss have weight NaN, do not
        enter the other weights, and keep log s where it was.

    >>> weights, log_s = robust_weights(torch.tensor([0.0, 1.0]), -math.inf, 1.0)
    >>> weights / 2  # on a first batch: softmax(L / lambda)
    tensor([0.2689, 0.7311])
    """
    losses = losses.to(real_dtype(losses.dtype))
    state = log_s.dtype if isinstance(log_s, Tensor) else losses.dtype
    log_s = _scalar(log_s, state, losses.device)
    lam = _scalar(lam, losses.dtype, losses.device)
    z, good, bad = _split(losses, losses if score is None else score.to(losses.dtype), lam, log_s, mask)
    n = good.sum()
    kept = torch.where(good, z, torch.full_like(z, -math.inf)).flatten()
    kept = torch.where(n > 0, kept, torch.zeros_like(kept))  # nothing to sum: keeps NaN out of a gradient nobody uses
    log_g = kept.logsumexp(0) - n.clamp(min=1).to(z.dtype).log()
    next_log_s = _next_log_s(log_g, log_s, gamma, alpha, init, normalizer)
    plain = lam.isinf()
    weights = torch.where(good, z - torch.where(plain, 0.0, next_log_s), torch.zeros_like(z)).exp()
    weights = torch.where(plain, weights, weights.clamp(max=max_weight))
    weights = torch.where(good, weights, torch.zeros_like(weights))
    broken = torch.where(bad, losses, torch.zeros_like(losses)) * torch.zeros_like(losses).masked_fill(bad, math.nan)
    weights = torch.where(bad, broken, weights)  # NaN, and so is its own gradient
    moves = (n > 0) & ~bad.any() & ~plain
    return weights, torch.where(moves, next_log_s.to(state), log_s)


# The robust loss in three stages, which rows of several processes, micro-batches or chunks go through together:
# totals of each, settle on them all, apply to each.

REACH = 60.0  # csrc/math.h kReach


def totals(
    losses: Tensor,
    log_s: float | Tensor,
    lam: float | Tensor,
    *,
    score: Tensor | None = None,
    mask: Tensor | None = None,
    top: float | Tensor | None = None,
) -> Tensor:
    """What rows come to: (3) float64, log sum exp(z) over the n usable ones, n, and how many valid rows are not usable.

    Args:
        losses, lam, score, mask: as for `robust_weights`. log_s: only its dtype counts, which bounds |z|.
        top: a larger z is not usable either.

    >>> totals(torch.tensor([0.0, 0.0, math.nan]), -math.inf, 1.0)  # log 2
    tensor([0.6931, 2.0000, 1.0000], dtype=torch.float64)
    """
    losses, lam, log_s = _state(losses, lam, log_s)
    z, good, bad = _split(losses, losses if score is None else score.to(losses.dtype), lam, log_s, mask)
    if top is not None:
        good, bad = good & (z <= top), bad | (good & (z > top))
    kept = torch.where(good, z, -math.inf).double().flatten()
    return torch.stack([kept.logsumexp(0), good.sum().double(), bad.sum().double()])


def settle(
    rows: Tensor,
    log_s: float | Tensor,
    lam: float | Tensor,
    *,
    gamma: float = 0.9,
    alpha: float = 1.0,
    init: str = "first",
    normalizer: str = "moving",
    share: float = 1.0,
    reference: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log s' from the `totals` of all rows together.

    Args:
        rows: (K, 3 or more) float64, the totals of K parts in the first three columns.
        share: how many processes average their gradients, times what a framework divides the loss by.
        reference: (1 or more) float64, the m of deferred normalisation: gradients are sums of exp(z_i - m) dL_i so far.

    Returns:
        (6) float64: log s' (0 at |lam| = inf); what turns sums into the mean over all, share / n, times exp(m - log s') with
        a reference; the largest z that may come later, log s' + 60; the totals of all. And the next state (0-d).

    >>> settled, log_s = settle(torch.tensor([[0.0, 1.0, 0.0], [2.0, 1.0, 0.0]], dtype=torch.float64), -math.inf, 1.0)
    >>> log_s  # log mean(e^0, e^2)
    tensor(1.4338, dtype=torch.float64)
    """
    lam = _scalar(lam, torch.float64, rows.device)
    log_s = _scalar(log_s, log_s.dtype if isinstance(log_s, Tensor) else torch.float64, rows.device)
    n, bad = rows[:, 1].sum(), rows[:, 2].sum()
    log_sum = torch.where(rows[:, 1] > 0, rows[:, 0], -math.inf).logsumexp(0)
    some = n > 0
    log_g = torch.where(some, log_sum - n.clamp(min=1).log(), 0.0)
    next_log_s = _next_log_s(log_g, log_s, gamma, alpha, init, normalizer)
    used = torch.where(some & ~lam.isinf(), next_log_s, 0.0)
    scale = torch.where(some, share / n.clamp(min=1), 0.0)
    if reference is not None:
        scale = torch.where(some, scale * (reference.flatten()[0] - used).exp(), scale)
    moves = some & (bad == 0) & ~lam.isinf()
    top = torch.where(some, used + REACH, torch.finfo(torch.float64).max)
    return torch.stack([used, scale, top, log_sum, n, bad]), torch.where(moves, next_log_s.to(log_s.dtype), log_s)


def apply(
    losses: Tensor,
    settled: Tensor,
    log_s: float | Tensor,
    lam: float | Tensor,
    *,
    mix: float = 0.0,
    max_weight: float = math.inf,
    sample_weight: Tensor | None = None,
    score: Tensor | None = None,
    mask: Tensor | None = None,
    bounded: bool = False,
) -> tuple[Tensor, Tensor]:
    """Step 6 of Algorithm 1 with a normaliser that is known: W_i = exp(z_i - log s'), scale sum_i t_i (W_i + mix) L_i.

    At |lam| = inf it is scale sum_i t_i L_i. Only the L_i are differentiated.

    Args:
        settled: of `settle`. bounded: rows whose z is beyond its third number count as non-finite.
        sample_weight: like losses, t_i, default 1. mix: weight of a plain mean term; 1 reproduces the authors' code for
            noisy labels. The rest as for `robust_weights`.

    Returns:
        loss (0-d), weights (like losses; 0 for rows that do not count, NaN for rows that are not usable).

    >>> settled, _ = settle(totals(torch.tensor([1.0, 3.0]), 0.0, math.inf)[None], 0.0, math.inf)
    >>> apply(torch.tensor([1.0, 3.0]), settled, 0.0, math.inf)
    (tensor(2.), tensor([1., 1.]))
    """
    losses, lam, log_s = _state(losses, lam, log_s)
    # detached, because no_grad does not stop a tangent of forward-mode AD
    score = score if score is None else score.detach()
    factor, weights, valid = _factors(
        losses.detach(), settled, log_s, lam, mix=mix, max_weight=max_weight, sample_weight=sample_weight, score=score,
        mask=mask, bounded=bounded,
    )  # fmt: skip
    return torch.where(valid, factor * losses, 0.0).sum(), weights


@torch.no_grad()
def _factors(
    losses, settled, log_s, lam, *, mix=0.0, max_weight=math.inf, sample_weight=None, score=None, mask=None, bounded=False
) -> tuple[Tensor, Tensor, Tensor]:
    """d loss / d L_i = scale t_i (W_i + mix) of `apply`, 0 where ignored, NaN for a bad row; the weights; which rows are valid."""
    z, good, bad = _split(losses, losses if score is None else score.to(losses.dtype), lam, log_s, mask)
    if bounded:
        good, bad = good & (z <= settled[2]), bad | (good & (z > settled[2]))
    weights = torch.where(good, z.double() - settled[0], 0.0).exp()
    weights = torch.where(lam.isinf(), weights, weights.clamp(max=max_weight)).to(losses.dtype)
    weights = torch.where(good, weights, 0.0).masked_fill(bad, math.nan)
    factor = torch.where(lam.isinf(), weights, weights + mix)
    if sample_weight is not None:
        factor = factor * sample_weight.to(losses.dtype)
    factor = torch.where(good, factor * settled[1].to(losses.dtype), 0.0).masked_fill(bad, math.nan)
    return factor, weights, good | bad


def _state(losses: Tensor, lam: float | Tensor, log_s: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    losses = losses.to(real_dtype(losses.dtype))
    dtype = log_s.dtype if isinstance(log_s, Tensor) else losses.dtype
    return losses, _scalar(lam, losses.dtype, losses.device), _scalar(log_s, dtype, losses.device)


def robust_loss(
    losses: Tensor,
    log_s: float | Tensor,
    lam: float | Tensor,
    *,
    score: Tensor | None = None,
    mask: Tensor | None = None,
    mix: float = 0.0,
    max_weight: float = math.inf,
    sample_weight: Tensor | None = None,
    **options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss whose gradient is the paper's weighted gradient: (1/n) sum_i t_i (W_i + mix) L_i, W detached (Eq. 2).

    The three stages on one batch by itself. `options` go to `settle`, the others to the stages that have them.

    Returns:
        loss (0-d), weights (like losses), new log s (0-d), bad (0-d bool: a valid row had no finite loss).

    >>> loss, weights, log_s, bad = robust_loss(torch.tensor([1.0, 3.0]), -math.inf, math.inf)
    >>> loss
    tensor(2.)
    """
    with torch.no_grad():
        rows = dict(score=None if score is None else score.detach(), mask=mask)
        settled, new_log_s = settle(totals(losses.detach(), log_s, lam, **rows)[None], log_s, lam, **options)
    loss, weights = apply(
        losses, settled, log_s, lam, mix=mix, max_weight=max_weight, sample_weight=sample_weight, **rows
    )  # fmt: skip
    return loss, weights, new_log_s, settled[5] > 0


def rectified(products: Tensor) -> Tensor:
    """The weights of L2RW from the products u_i = <grad f_i, grad g> of a sample's gradient with that of a clean batch.

        w_i = max(u_i, 0) / (S + 1[S = 0]),    S = sum_j max(u_j, 0) over the finite u

    They sum to 1, or are all 0 where nothing is positive; a u that is not finite has w = NaN. Half precision is computed in
    float32. A sum that overflows is made once more in units of 2^64.

    >>> rectified(torch.tensor([1.0, -2.0, 3.0, math.inf]))
    tensor([0.2500, 0.0000, 0.7500,    nan])

    Source: Ren et al. 2018, "Learning to Reweight Examples for Robust Deep Learning", Eq. 8 and 9.
    """
    u = products.to(real_dtype(products.dtype))
    kept = u.clamp(min=0).where(u.isfinite(), 0.0)
    kept = kept * torch.where(kept.sum().isinf(), 2.0**-64, 1.0).to(kept.dtype)
    total = kept.sum()
    weights = kept / torch.where(total == 0, 1.0, total)
    return weights.masked_fill(~u.isfinite(), math.nan).to(products.dtype)


# ---- steps (Algorithm 1, step 6; Sec. 3.4) ------------------------------------------------------------------------


@contextmanager
def _real_values(param: Tensor, *others: Tensor | None):
    """The tensors as real numbers, without autograd: complex ones as pairs; a half-precision parameter in float32, and written
    back at the end."""
    with torch.no_grad():
        views = [torch.view_as_real(t.resolve_conj()) if t is not None and t.is_complex() else t for t in (param, *others)]
        half = param.dtype in (torch.bfloat16, torch.float16)
        if half:
            views[:2] = [t.float() for t in views[:2]]
        yield views
        if half:
            param.copy_(views[0])


def _slope(w: Tensor, grad: Tensor, weight_decay: float, maximize: bool) -> Tensor:
    """The gradient as the rules see it: G = grad + weight_decay * w, with -grad where the objective is maximized."""
    g = -grad if maximize else grad
    return g.add(w, alpha=weight_decay) if weight_decay else g


def momentum_step_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor | None],
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    heavy_ball: bool = False,
) -> list[Tensor | None]:
    """Step 6 of Algorithm 1, in place: momentum SGD in torch's form, or the paper's own (Eq. 2) with `heavy_ball`.

        G = grad + weight_decay * w                            (-grad with `maximize`)
        torch's form:  b = momentum * b + (1 - dampening) * G   (b = G at first),   w -= lr * b   (nesterov: G + momentum * b)
        Eq. 2:         d = momentum * d - lr * G                (d = w_t - w_{t-1}),   w += d

    The two agree until lr changes: Eq. 2 keeps the past steps at the lr they were taken with.

    Args:
        params, grads: lists of tensors of equal shapes.
        momentum_buffers: per parameter b (or d), or None before its first step.

    Returns:
        the momentum buffers (None where momentum = 0).

    >>> w = torch.tensor([1.0])
    >>> buffers = momentum_step_([w], [torch.tensor([2.0])], [None], lr=0.1, momentum=0.9)
    >>> w
    tensor([0.8000])
    """
    out: list[Tensor | None] = []
    for w, grad, buffer in zip(params, grads, momentum_buffers):
        with _real_values(w, grad, buffer) as (x, g, b):
            g = _slope(x, g, weight_decay, maximize)
            if heavy_ball:
                b = torch.zeros_like(x) if b is None else b
                b.mul_(momentum).sub_(lr * g)
                x.add_(b)
            else:
                if momentum:
                    if b is None:
                        b = g.clone()
                    else:
                        b.mul_(momentum).add_(g, alpha=1 - dampening)
                    g = g.add(b, alpha=momentum) if nesterov else b
                x.sub_(lr * g)
        if buffer is None and b is not None and momentum:
            buffer = torch.view_as_complex(b) if w.is_complex() else b
        out.append(buffer if momentum else None)
    return out


@torch.no_grad()
def weighted_momentum_step_(
    params: list[Tensor],
    momentum_buffers: list[Tensor | None],
    per_sample_grads: list[Tensor],
    losses: Tensor,
    log_s: float | Tensor,
    lam: float | Tensor,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    heavy_ball: bool = False,
    mix: float = 0.0,
    max_weight: float = math.inf,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
    **options,
) -> Tensor:
    """Steps 3-6 of Algorithm 1 from per-sample gradients, in place: the weights, their weighted mean of the gradients (the
    gradient of `robust_loss`), and `momentum_step_` with it.

        G = (1/n) sum_i t_i (W_i + mix) g_i

    A row whose factor is 0 (masked, say) takes no part, whatever its gradient holds. Where a row is bad (a NaN or infinite
    loss) nothing is written.

    Args:
        per_sample_grads: per parameter (B, *shape).
        momentum_buffers: per parameter b (or d, with `heavy_ball`), zeros before the first step; None where momentum = 0.
        losses: (B).
        options: of `settle`.

    Returns:
        new log s (0-d).

    >>> w, grads = torch.tensor([1.0]), torch.tensor([[2.0], [4.0]])
    >>> log_s = weighted_momentum_step_([w], [None], [grads], torch.tensor([1.0, 3.0]), -math.inf, math.inf, lr=0.1)
    >>> w  # the plain mean
    tensor([0.7000])
    """
    losses, lam, log_s = _state(losses, lam, log_s)
    settled, new_log_s = settle(totals(losses, log_s, lam, mask=mask)[None], log_s, lam, **options)
    if settled[5] > 0:
        return new_log_s
    factor, *_ = _factors(
        losses, settled, log_s, lam, mix=mix, max_weight=max_weight, sample_weight=sample_weight, mask=mask
    )  # fmt: skip
    means = []
    for g in per_sample_grads:
        f = factor.view(-1, *[1] * (g.dim() - 1))
        means.append(torch.where(f == 0, 0.0, f * g.to(f.dtype)).sum(0))
    momentum_step_(
        params, means, momentum_buffers, lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay,
        nesterov=nesterov, maximize=maximize, heavy_ball=heavy_ball,
    )  # fmt: skip
    return new_log_s


def adam_step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor | None],
    steps: list[Tensor],
    *,
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    paper_form: bool = False,
) -> None:
    """Adam, in place (Kingma & Ba 2015, Alg. 1), on G = grad + weight_decay * w, t = step + 1:

        v = beta_1 v + (1 - beta_1) G,    u = beta_2 u + (1 - beta_2) G^2,    u_max = max(u_max, u)    (amsgrad)
        w = w - lr (v / (1 - beta_1^t)) / (sqrt(u / (1 - beta_2^t)) + eps)

    decoupled_weight_decay (AdamW): G = grad, and w = w - lr weight_decay w besides. paper_form (ABSGD paper, Eq. 9): the
    same without the two corrections, eps = G_0.

    Args:
        exp_avgs, exp_avg_sqs: v and u of each parameter. max_exp_avg_sqs: u_max, or None: not amsgrad.
        steps: one number each, how many steps the parameter took; one more afterwards.

    >>> w, v, u = torch.ones(1), torch.zeros(1), torch.zeros(1)
    >>> adam_step_([w], [torch.tensor([2.0])], [v], [u], [None], [torch.zeros(())], lr=0.1)
    >>> w
    tensor([0.9000])
    """
    for param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, step in zip(
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps
    ):
        with _real_values(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq) as (w, g, v, u, u_max):
            step += 1
            decoupled = decoupled_weight_decay or paper_form
            g = _slope(w, g, 0.0 if decoupled else weight_decay, maximize)
            v.lerp_(g, 1 - betas[0])
            u.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
            if u_max is not None:
                u = u_max.copy_(torch.maximum(u_max, u))
            t = step.double().to(w.device)
            first, second = (1.0, 1.0) if paper_form else (1 - betas[0] ** t, 1 - betas[1] ** t)
            change = (v / first) / ((u / second).sqrt() + eps)
            if decoupled and weight_decay:
                change = change + weight_decay * w
            w.sub_(lr * change)


def rmsprop_step_(
    params: list[Tensor],
    grads: list[Tensor],
    square_avgs: list[Tensor],
    momentum_buffers: list[Tensor | None],
    grad_avgs: list[Tensor | None],
    steps: list[Tensor],
    *,
    lr: float | Tensor = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    maximize: bool = False,
) -> None:
    """RMSprop, in place (Tieleman & Hinton 2012; centered: Graves 2013, Eq. 38 to 45), on G = grad + weight_decay * w:

        u = alpha u + (1 - alpha) G^2,    m = alpha m + (1 - alpha) G,    d = G / (sqrt(u - m^2) + eps)    (m: centered)
        w = w - lr d;    with momentum  b = momentum b + d,  w = w - lr b

    Args:
        square_avgs: u of each parameter. momentum_buffers, grad_avgs: b and m, or None: no momentum, not centered.
        steps: one number each, one more afterwards.

    >>> w, u = torch.ones(1), torch.zeros(1)
    >>> rmsprop_step_([w], [torch.tensor([2.0])], [u], [None], [None], [torch.zeros(())], lr=0.01)
    >>> w
    tensor([0.9000])
    """
    for param, grad, square_avg, buffer, grad_avg, step in zip(params, grads, square_avgs, momentum_buffers, grad_avgs, steps):
        with _real_values(param, grad, square_avg, buffer, grad_avg) as (w, g, u, b, m):
            step += 1
            g = _slope(w, g, weight_decay, maximize)
            u.mul_(alpha).addcmul_(g, g, value=1 - alpha)
            if m is not None:
                m.lerp_(g, 1 - alpha)
                u = u - m * m
            d = g / (u.sqrt() + eps)
            if b is not None:
                d = b.mul_(momentum).add_(d)
            w.sub_(lr * d)


def adagrad_step_(
    params: list[Tensor],
    grads: list[Tensor],
    sums: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float | Tensor = 1e-2,
    lr_decay: float = 0.0,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """AdaGrad, in place (Duchi et al. 2011), on G = grad + weight_decay * w, t = step + 1:

        u = u + G^2,    w = w - lr / (1 + (t - 1) lr_decay) G / (sqrt(u) + eps)

    Args:
        sums: u of each parameter. steps: one number each, one more afterwards.

    >>> w, u = torch.ones(1), torch.zeros(1)
    >>> adagrad_step_([w], [torch.tensor([2.0])], [u], [torch.zeros(())], lr=0.1)
    >>> w
    tensor([0.9000])
    """
    for param, grad, total, step in zip(params, grads, sums, steps):
        with _real_values(param, grad, total) as (w, g, u):
            step += 1
            g = _slope(w, g, weight_decay, maximize)
            u.addcmul_(g, g)
            rate = lr / (1 + (step.double().to(w.device) - 1) * lr_decay)
            w.sub_(rate * (g / (u.sqrt() + eps)))
