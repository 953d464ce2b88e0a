"""Steps 3 to 6 of Algorithm 1: the robust weights of losses, and the loss whose gradient they weigh (docs/MATH.md §1).

paper      here          meaning
L_i        losses        the loss of sample i
lambda     lam           temperature: > 0 attends to large losses, < 0 to small ones, +-inf weighs all alike
g~         exp(log g)    step 3: the mean of exp(L / lambda) over the batch
s          exp(log_s)    step 4: the moving average of g~, which is the only state
p~_i       W_i           step 5: the robust weight of sample i, exp(L_i / lambda) / s
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from .dtypes import real_dtype

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number or a 0-d tensor as a 0-d tensor of this dtype on this device, without its history."""
    value = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")
    return value.detach().to(device, dtype)


def _split(
    losses: Tensor, score: Tensor, lam: Tensor, log_s: Tensor, mask: Tensor | None, z_max: Tensor | float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """z = score / lambda, which valid samples are finite, and which valid samples are not (MATH §1.4).

    A sample is non-finite if its loss or score is NaN or infinite, or if its z is beyond the range of the state or above z_max.
    """
    z = score / lam
    valid = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask
    limit = min(torch.finfo(z.dtype).max, torch.finfo(log_s.dtype).max)
    usable = losses.isfinite() & score.isfinite() & (z.abs() <= limit)
    if z_max is not None:
        usable = usable & (z <= z_max)
    return z, valid & usable, valid & ~usable


def _next_log_s(log_g: Tensor, log_s: Tensor, gamma: float, alpha: float, init: str, normalizer: str) -> Tensor:
    """Step 4 of Algorithm 1 in the log domain: log s' from log g, the logarithm of the batch mean (MATH §1.1 and §1.2)."""
    batch_alone = math.log(alpha) + log_g
    if normalizer == "none":
        return torch.zeros_like(log_g)
    if normalizer == "batch":
        return batch_alone
    past = (math.log1p(-gamma) if gamma < 1 else -math.inf) + log_s.to(log_g.dtype)
    present = math.log(gamma) + batch_alone
    is_start = torch.isneginf(log_s)
    moving = torch.where(is_start, present, torch.logaddexp(past, present))
    return torch.where(is_start, batch_alone, moving) if init == "first" else moving


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
    """Steps 3 to 5 of Algorithm 1 in the log domain: the robust weights (Eq. 8) and the next log s.

        z_i     = L_i / lambda
        log g   = logsumexp(z) - log n                                       step 3, over the n valid and finite samples
        log s'  = logaddexp(log(1 - gamma) + log s, log(gamma alpha) + log g)       step 4
        W_i     = exp(z_i - log s')                                          step 5

    These are the formulas of docs/MATH.md §1.1; §1.2 has the options. The start departs from the paper, which begins with
    s = 0. There the first batch gives s' = gamma g, which makes its weights too large by the factor
    1 / (gamma alpha). With `init="first"` the
    first batch gives log s' = log(alpha) + log g instead. `init="zero"` is the paper's start.

    Args:
        losses: per-sample losses L_i, of any shape.
        log_s: number or 0-d tensor; the logarithm of the moving average s, -inf before the first batch.
        lam: number or 0-d tensor; lambda > 0 attends to large losses, < 0 to small ones. At +-inf W = 1, and log s stays.
        gamma: weight of this batch in the moving average, in (0, 1].
        alpha: multiplier on the batch mean, in (0, 1].
        init: "first" or "zero".
        normalizer: "moving" (the paper), "batch" (log s' = log(alpha) + log g) or "none" (log s' = 0).
        max_weight: upper bound of W_i. It does not affect log s'.
        score: as losses; with it z_i = score_i / lambda.
        mask: as losses, bool; a sample with False is ignored and has weight 0.

    Returns:
        weights (as losses, in `real_dtype`) and the new log s (0-d). A sample with a NaN or infinite loss has weight NaN and
        does not affect the other weights. A batch with such a sample leaves log s as it was.

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
    kept = torch.where(n > 0, kept, torch.zeros_like(kept))  # an empty sum would put NaN into the gradient
    log_g = kept.logsumexp(0) - n.clamp(min=1).to(z.dtype).log()
    next_log_s = _next_log_s(log_g, log_s, gamma, alpha, init, normalizer)
    is_plain_mean = lam.isinf()
    weights = torch.where(finite, z - torch.where(is_plain_mean, 0.0, next_log_s), torch.zeros_like(z)).exp()
    weights = torch.where(is_plain_mean, weights, weights.clamp(max=max_weight))
    weights = torch.where(finite, weights, torch.zeros_like(weights))
    broken = torch.where(nonfinite, losses, torch.zeros_like(losses)) * torch.zeros_like(losses).masked_fill(nonfinite, math.nan)
    weights = torch.where(nonfinite, broken, weights)  # a non-finite sample has weight NaN, and its gradient is NaN too
    moves = (n > 0) & ~nonfinite.any() & ~is_plain_mean
    return weights, torch.where(moves, next_log_s.to(state), log_s)


# ---- the robust loss in three stages (MATH §1.6, §5) ----------------------------------------------------------------
#
# A normaliser can belong to the samples of several processes, micro-batches or chunks. Then `partial_stats` summarises each part,
# `settle` makes log s' from all of these summaries together, and `apply` weighs each part by it.

# The places of the six numbers that `settle` returns (MATH §8).
LOG_S, SCALE, Z_MAX, LOG_SUM, COUNT, NONFINITE = range(6)
PARTIAL_STATS = slice(LOG_SUM, NONFINITE + 1)  # the three that `partial_stats` returns too, here for all samples together

MAX_Z_GAP = 60.0  # how far a later z may lie above log s' (kMaxZGap in csrc/math/weights.h)


class SettleOptions(TypedDict, total=False):
    """The keyword arguments of `settle`."""

    gamma: float
    alpha: float
    init: str
    normalizer: str
    grad_multiplier: float
    reference: Tensor | None


def partial_stats(
    losses: Tensor,
    log_s: float | Tensor,
    lam: float | Tensor,
    *,
    score: Tensor | None = None,
    mask: Tensor | None = None,
    z_max: float | Tensor | None = None,
) -> Tensor:
    """First stage: a summary of some of the samples, (3) float64.

    The three numbers are log sum exp(z) over the n finite samples, n, and the number of valid samples that are not finite
    (docs/MATH.md §1.6 and §8).

    Args:
        losses, lam, score, mask: as for `robust_weights`.
        log_s: as for `robust_weights`. Only its dtype is used: it bounds |z|.
        z_max: a sample with a larger z counts as non-finite too.

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
    """Second stage: log s' from the `partial_stats` of all samples together (docs/MATH.md §1.6, §5 and §8).

    Args:
        partials: (K, 3 or more) float64; the first three columns are the `partial_stats` of K parts.
        log_s, lam, gamma, alpha, init, normalizer: as for `robust_weights`.
        grad_multiplier: the number of processes that average their gradients, times the number by which a framework divides the
            loss before backward.
        reference: (1 or more) float64; its first number is the reference point m of deferred normalisation. The gradients
            so far are then sums of exp(z_i - m) dL_i.

    Returns:
        The six settled numbers, (6) float64, and the next state (0-d). The six numbers are

            LOG_S      the logarithm of what the weights are divided by (0 at |lam| = inf),
            SCALE      the factor that turns sums over samples into the mean over all samples: grad_multiplier / n, with a
                       reference times exp(m - log s'),
            Z_MAX      the largest z that a later sample may have, log s' + MAX_Z_GAP,
            LOG_SUM, COUNT, NONFINITE  the partial statistics of all samples together.

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
    """Third stage: the weighted loss of some of the samples, with the log s' of `settle` (step 5, and the sum of Eq. 2).

        W_i  = exp(z_i - LOG_S)
        loss = SCALE sum_i t_i (W_i + mix) L_i             at |lam| = inf: SCALE sum_i t_i L_i

    The L_i and the t_i are differentiated; the W_i are constants (docs/MATH.md §1.1 and §7).

    Args:
        losses, log_s, lam, score, mask, max_weight: as for `robust_weights`.
        settled: the six numbers of `settle`.
        mix: weight of an added plain mean. 1 reproduces the authors' code for noisy labels.
        sample_weight: as losses; the t_i, default 1.
        bounded: True: a sample whose z lies above Z_MAX counts as non-finite.

    Returns:
        loss (0-d) and weights (as losses). Ignored samples have weight 0, non-finite ones NaN.

    >>> settled, _ = settle(partial_stats(torch.tensor([1.0, 3.0]), 0.0, math.inf)[None], 0.0, math.inf)
    >>> apply(torch.tensor([1.0, 3.0]), settled, 0.0, math.inf)
    (tensor(2.), tensor([1., 1.]))
    """
    losses, lam, log_s = state_of(losses, lam, log_s)
    # Detached, because no_grad does not stop a tangent of forward-mode AD.
    score = score if score is None else score.detach()
    factor, weights, valid = weigh(
        losses.detach(),
        settled,
        log_s,
        lam,
        mix=mix,
        max_weight=max_weight,
        score=score,
        mask=mask,
        bounded=bounded,
    )
    terms = factor * torch.where(valid, losses, 0.0)
    if sample_weight is not None:
        terms = terms * torch.where(valid, sample_weight.to(losses.dtype), 0.0)
    return terms.sum(), weights


@torch.no_grad()
def weigh(
    losses: Tensor,
    settled: Tensor,
    log_s: Tensor,
    lam: Tensor,
    *,
    mix: float = 0.0,
    max_weight: float = math.inf,
    sample_weight: Tensor | None = None,
    score: Tensor | None = None,
    mask: Tensor | None = None,
    bounded: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The factor of each sample in the gradient of `apply`, its weight, and whether it is valid.

    The factor is d loss / d L_i = SCALE t_i (W_i + mix): 0 for ignored samples, NaN for non-finite ones.
    """
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
    """The losses in `real_dtype`, lambda in the same dtype, and log s in its own, as tensors on one device."""
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
    **options: Unpack[SettleOptions],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss whose gradient is the weighted gradient of Eq. 2: the three stages on one batch (docs/MATH.md §1.1).

        loss = (1/n) sum_i t_i (W_i + mix) L_i               the W_i are constants

    Args:
        losses, log_s, lam, score, mask, max_weight: as for `robust_weights`.
        mix, sample_weight: as for `apply`.
        options: gamma, alpha, init, normalizer, ..., as for `settle`.

    Returns:
        loss (0-d), weights (as losses), new log s (0-d), nonfinite (0-d bool: True if a valid sample is not finite).

    >>> loss, weights, log_s, nonfinite = robust_loss(torch.tensor([1.0, 3.0]), -math.inf, math.inf)
    >>> loss
    tensor(2.)
    """
    score = None if score is None else score.detach()
    with torch.no_grad():
        partials = partial_stats(losses.detach(), log_s, lam, score=score, mask=mask)[None]
        settled, new_log_s = settle(partials, log_s, lam, **options)
    loss, weights = apply(
        losses, settled, log_s, lam, mix=mix, max_weight=max_weight, sample_weight=sample_weight, score=score, mask=mask
    )
    return loss, weights, new_log_s, settled[NONFINITE] > 0


def rectified(products: Tensor) -> Tensor:
    """The weights of L2RW from the products u_i = <grad f_i, grad g> of a sample's gradient with that of a clean batch.

        w_i = max(u_i, 0) / (S + 1[S = 0]),    S = sum_j max(u_j, 0) over the finite u_j

    The weights sum to 1, or are all 0 if no product is positive (docs/MATH.md §4.5). A product that is not finite has w = NaN.
    Half precision is computed in float32. If the sum overflows, it is computed again in units of 2^64.

    >>> rectified(torch.tensor([1.0, -2.0, 3.0, math.inf]))
    tensor([0.2500, 0.0000, 0.7500,    nan])

    Source: Ren et al. 2018, "Learning to Reweight Examples for Robust Deep Learning", Eq. 8 and 9.
    """
    u = products.to(real_dtype(products.dtype))
    kept = u.clamp(min=0).where(u.isfinite(), 0.0)
    kept = torch.where(kept.sum().isinf(), kept * 2.0**-64, kept)
    total = kept.sum()
    weights = kept / torch.where(total == 0, 1.0, total)
    return weights.masked_fill(~u.isfinite(), math.nan).to(products.dtype)
