"""Robust weights of losses, the loss they make, and its three stages (Algorithm 1, steps 3 to 6)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dtypes import real_dtype


def _scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    value = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    return value.detach().to(device, dtype)


def _split(losses, score, lam, log_s, mask, z_max=None) -> tuple[Tensor, Tensor, Tensor]:
    """z = score / lambda, which valid rows are finite, and which are not: NaN, inf, beyond the state's range or above z_max."""
    z = score / lam
    valid = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask
    limit = min(torch.finfo(z.dtype).max, torch.finfo(log_s.dtype).max)
    usable = losses.isfinite() & score.isfinite() & (z.abs() <= limit)
    if z_max is not None:
        usable = usable & (z <= z_max)
    return z, valid & usable, valid & ~usable


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
        gamma: weight of this batch in the moving average, in (0, 1].
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
    z, finite, nonfinite = _split(losses, losses if score is None else score.to(losses.dtype), lam, log_s, mask)
    n = finite.sum()
    kept = torch.where(finite, z, torch.full_like(z, -math.inf)).flatten()
    kept = torch.where(n > 0, kept, torch.zeros_like(kept))  # nothing to sum: keeps NaN out of a gradient nobody uses
    log_g = kept.logsumexp(0) - n.clamp(min=1).to(z.dtype).log()
    next_log_s = _next_log_s(log_g, log_s, gamma, alpha, init, normalizer)
    is_plain_mean = lam.isinf()
    weights = torch.where(finite, z - torch.where(is_plain_mean, 0.0, next_log_s), torch.zeros_like(z)).exp()
    weights = torch.where(is_plain_mean, weights, weights.clamp(max=max_weight))
    weights = torch.where(finite, weights, torch.zeros_like(weights))
    broken = torch.where(nonfinite, losses, torch.zeros_like(losses)) * torch.zeros_like(losses).masked_fill(nonfinite, math.nan)
    weights = torch.where(nonfinite, broken, weights)  # NaN, and so is its own gradient
    moves = (n > 0) & ~nonfinite.any() & ~is_plain_mean
    return weights, torch.where(moves, next_log_s.to(state), log_s)


# ---- the robust loss in three stages --------------------------------------------------------------------------------
#
# Rows of several processes, micro-batches or chunks go through them together: partial_stats of each, settle on them all, apply to
# each.

# The six numbers that `settle` returns, by their places.
LOG_S, SCALE, Z_MAX, LOG_SUM, COUNT, NONFINITE = range(6)
PARTIAL_STATS = slice(LOG_SUM, NONFINITE + 1)  # those that `partial_stats` returns, here of all rows together

MAX_Z_GAP = 60.0  # how far a later z may lie above log s' (csrc/math.h has the same)


def partial_stats(
    losses: Tensor,
    log_s: float | Tensor,
    lam: float | Tensor,
    *,
    score: Tensor | None = None,
    mask: Tensor | None = None,
    z_max: float | Tensor | None = None,
) -> Tensor:
    """What some of the rows contribute: (3) float64, log sum exp(z) over the n finite ones, n, and how many valid rows are not
    finite.

    Args:
        losses, lam, score, mask: as for `robust_weights`. log_s: only its dtype counts, which bounds |z|.
        z_max: a larger z counts as non-finite too.

    >>> partial_stats(torch.tensor([0.0, 0.0, math.nan]), -math.inf, 1.0)  # log 2
    tensor([0.6931, 2.0000, 1.0000], dtype=torch.float64)
    """
    losses, lam, log_s = state_of(losses, lam, log_s)
    z, finite, nonfinite = _split(losses, losses if score is None else score.to(losses.dtype), lam, log_s, mask, z_max)
    kept = torch.where(finite, z, -math.inf).double().flatten()
    return torch.stack([kept.logsumexp(0), finite.sum().double(), nonfinite.sum().double()])


def settle(
    partials: Tensor,
    log_s: float | Tensor,
    lam: float | Tensor,
    *,
    gamma: float = 0.9,
    alpha: float = 1.0,
    init: str = "first",
    normalizer: str = "moving",
    grad_multiplier: float = 1.0,
    reference: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log s' from the `partial_stats` of all rows together.

    Args:
        partials: (K, 3 or more) float64, the `partial_stats` of K parts in the first three columns.
        grad_multiplier: how many processes average their gradients, times what a framework divides the loss by.
        reference: (1 or more) float64, the m of deferred normalisation: gradients are sums of exp(z_i - m) dL_i so far.

    Returns:
        (6) float64, and the next state (0-d). Of the six numbers
            LOG_S      is what the weights are divided by, in logarithms (0 at |lam| = inf),
            SCALE      turns sums into the mean over all rows: grad_multiplier / n, times exp(m - log s') with a reference,
            Z_MAX      is the largest z that may come later, log s' + MAX_Z_GAP,
            LOG_SUM, COUNT, NONFINITE  are the partial stats of all rows together.

    >>> settled, log_s = settle(torch.tensor([[0.0, 1.0, 0.0], [2.0, 1.0, 0.0]], dtype=torch.float64), -math.inf, 1.0)
    >>> log_s  # log mean(e^0, e^2)
    tensor(1.4338, dtype=torch.float64)
    """
    lam = _scalar(lam, torch.float64, partials.device)
    log_s = _scalar(log_s, log_s.dtype if isinstance(log_s, Tensor) else torch.float64, partials.device)
    log_sums, counts, nonfinites = partials[:, :3].unbind(1)
    n, nonfinite = counts.sum(), nonfinites.sum()
    log_sum = torch.where(counts > 0, log_sums, -math.inf).logsumexp(0)
    some = n > 0
    log_g = torch.where(some, log_sum - n.clamp(min=1).log(), 0.0)
    next_log_s = _next_log_s(log_g, log_s, gamma, alpha, init, normalizer)
    used = torch.where(some & ~lam.isinf(), next_log_s, 0.0)
    scale = torch.where(some, grad_multiplier / n.clamp(min=1), 0.0)
    if reference is not None:
        scale = torch.where(some, scale * (reference.flatten()[0] - used).exp(), scale)
    moves = some & (nonfinite == 0) & ~lam.isinf()
    z_max = torch.where(some, used + MAX_Z_GAP, torch.finfo(torch.float64).max)
    settled = torch.stack([used, scale, z_max, log_sum, n, nonfinite])
    return settled, torch.where(moves, next_log_s.to(log_s.dtype), log_s)


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
        settled: of `settle`. bounded: rows whose z is beyond its Z_MAX count as non-finite.
        sample_weight: like losses, t_i, default 1. mix: weight of a plain mean term; 1 reproduces the authors' code for
            noisy labels. The rest as for `robust_weights`.

    Returns:
        loss (0-d), weights (like losses; 0 for rows that do not count, NaN for rows that are not finite).

    >>> settled, _ = settle(partial_stats(torch.tensor([1.0, 3.0]), 0.0, math.inf)[None], 0.0, math.inf)
    >>> apply(torch.tensor([1.0, 3.0]), settled, 0.0, math.inf)
    (tensor(2.), tensor([1., 1.]))
    """
    losses, lam, log_s = state_of(losses, lam, log_s)
    # detached, because no_grad does not stop a tangent of forward-mode AD
    score = score if score is None else score.detach()
    factor, weights, valid = weigh(
        losses.detach(),
        settled,
        log_s,
        lam,
        mix=mix,
        max_weight=max_weight,
        sample_weight=sample_weight,
        score=score,
        mask=mask,
        bounded=bounded,
    )
    return torch.where(valid, factor * losses, 0.0).sum(), weights


@torch.no_grad()
def weigh(
    losses, settled, log_s, lam, *, mix=0.0, max_weight=math.inf, sample_weight=None, score=None, mask=None, bounded=False
) -> tuple[Tensor, Tensor, Tensor]:
    """d loss / d L_i = scale t_i (W_i + mix) of `apply`, 0 where ignored, NaN for a non-finite
    row; the weights; which rows are valid."""
    z_max = settled[Z_MAX] if bounded else None
    z, finite, nonfinite = _split(losses, losses if score is None else score.to(losses.dtype), lam, log_s, mask, z_max)
    weights = torch.where(finite, z.double() - settled[LOG_S], 0.0).exp()
    weights = torch.where(lam.isinf(), weights, weights.clamp(max=max_weight)).to(losses.dtype)
    weights = torch.where(finite, weights, 0.0).masked_fill(nonfinite, math.nan)
    factor = torch.where(lam.isinf(), weights, weights + mix)
    if sample_weight is not None:
        factor = factor * sample_weight.to(losses.dtype)
    factor = torch.where(finite, factor * settled[SCALE].to(losses.dtype), 0.0).masked_fill(nonfinite, math.nan)
    return factor, weights, finite | nonfinite


def state_of(losses: Tensor, lam: float | Tensor, log_s: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The losses in the dtype they are computed in, and lambda and log s as tensors beside them."""
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
        loss (0-d), weights (like losses), new log s (0-d), nonfinite (0-d bool: a valid row had no finite loss).

    >>> loss, weights, log_s, nonfinite = robust_loss(torch.tensor([1.0, 3.0]), -math.inf, math.inf)
    >>> loss
    tensor(2.)
    """
    with torch.no_grad():
        given = dict(score=None if score is None else score.detach(), mask=mask)
        settled, new_log_s = settle(partial_stats(losses.detach(), log_s, lam, **given)[None], log_s, lam, **options)
    loss, weights = apply(losses, settled, log_s, lam, mix=mix, max_weight=max_weight, sample_weight=sample_weight, **given)
    return loss, weights, new_log_s, settled[NONFINITE] > 0


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
