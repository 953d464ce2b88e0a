"""The sums and weights of losses inside a kernel (MATH §1), which the kernels of weights.py and losses.py share.

A sample is an element of a vector of losses. Sums are made in a fixed order, so a run repeats bit for bit. log s' itself is
computed in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import divide, log_mean_exp, next_log_s, reference_point, robust_weight, sample_factor


@triton.jit
def last_program(done, FENCE: tl.constexpr):
    """Whether every other program has finished. This program may then read what they stored, with cache_modifier=".cg"."""
    # The barrier puts the stores of all threads before the atomic of one thread. The release of that atomic, at the scope of the
    # GPU, then covers all of them. (Triton 3.5 and 3.9 put a barrier there by themselves, but do not promise it.) The loads of
    # the last program bypass the L1 cache, which is not kept coherent and may hold older lines.
    # On AMD a barrier does not wait for stores that are on their way to the L2 cache, and a release waits for the stores of its
    # own wave only. So every wave makes a release there (FENCE threads; FENCE is 0 on other GPUs).
    if FENCE > 0:
        tl.atomic_add(done + tl.zeros([FENCE], tl.int32), tl.zeros([FENCE], tl.int32), sem="release", scope="gpu")
    tl.debug_barrier()
    last = tl.atomic_add(done, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1
    if last:
        tl.store(done, 0)
    return last


@triton.jit
def read_losses(losses, score, valid, i, inside, lam, LIMIT: tl.constexpr, CACHE: tl.constexpr):
    """The losses, their z, which samples are valid, and which of these are finite. lam is a scalar of the losses' dtype."""
    loss = tl.load(losses + i, mask=inside, other=0.0, cache_modifier=CACHE)
    s = loss if score is None else tl.load(score + i, mask=inside, other=0.0)
    z = divide(s, lam)
    counted = inside
    if valid is not None:
        counted &= tl.load(valid + i, mask=inside, other=0, cache_modifier=CACHE) != 0
    # A NaN makes every comparison false. An infinite score has z = inf, or z = NaN if lam is infinite, too.
    finite = counted & (tl.abs(z) <= LIMIT)
    if score is not None:
        finite &= loss - loss == 0
    return loss, z, counted, finite


@triton.jit
def partial_sums(losses, score, valid, lam, begin, end, LIMIT: tl.constexpr, BLOCK: tl.constexpr, CACHE: tl.constexpr):
    """The sums of samples [begin, end), in one pass.

    Each lane keeps a maximum of its own, so no lane waits for another before the end.

    Returns:
        max z; sum of exp(z - max); number of finite samples; number of valid samples that are not finite. All in float64.
    """
    T: tl.constexpr = losses.dtype.element_ty
    z_max, sumexp = tl.full([BLOCK], float("-inf"), T), tl.zeros([BLOCK], T)
    finites, nonfinites = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        _loss, z, counted, finite = read_losses(losses, score, valid, i, i < end, lam, LIMIT, CACHE)
        z = tl.where(finite, z, float("-inf"))
        new_max = tl.maximum(z_max, z)
        point = reference_point(new_max)
        sumexp = sumexp * tl.exp(z_max - point) + tl.exp(z - point)
        z_max = new_max
        finites += finite.to(tl.int32)
        nonfinites += (counted & (finite == 0)).to(tl.int32)
    block_max = tl.max(z_max, 0)
    sumexp = tl.sum(sumexp * tl.exp(z_max - reference_point(block_max)), 0)
    n, n_nonfinite = tl.sum(finites.to(tl.int64), 0), tl.sum(nonfinites.to(tl.int64), 0)
    return block_max.to(tl.float64), sumexp.to(tl.float64), n.to(tl.float64), n_nonfinite.to(tl.float64)


@triton.jit
def settle(z_max, sumexp, n, n_nonfinite, log_s, unweighted, gamma, alpha, NORMALIZER: tl.constexpr, INIT_FIRST: tl.constexpr):
    """log s' and the next state, from the sums of a whole batch (csrc/math/weights.h next_weight_update). Scalars, float64.

    Returns:
        log s' for the weights; the next state; c of d log s' / d z_j = c W_j for the weights; the same for the state; 1 / n.
    """
    moves = (n > 0) & (unweighted == 0)  # The plain mean (|lambda| = inf) has z = 0 and log s' = 0, so W = 1.
    clean = moves & (n_nonfinite == 0)  # A batch with a nonfinite sample must not move the state.
    inverse_n = tl.where(n > 0, 1 / n, 0.0)
    norm, dlog_s = tl.zeros_like(log_s), tl.zeros_like(log_s)
    if NORMALIZER != "none":
        if NORMALIZER == "batch":
            alone = True
        elif INIT_FIRST:
            alone = log_s == float("-inf")
        else:
            alone = False
        norm = tl.where(moves, next_log_s(log_s, log_mean_exp(z_max, sumexp, n), gamma, alpha, alone), 0.0)
        dlog_s = tl.where(moves, tl.where(alone, alpha, gamma * alpha) * inverse_n, 0.0)
    return norm, tl.where(clean, norm, log_s), dlog_s, tl.where(clean, dlog_s, 0.0), inverse_n


@triton.jit
def commit(new_log_s, n_nonfinite, dlog_s, dlog_s_state, update, log_s, nonfinite, state_out, dlog_s_out):
    """Write the next state, in place (log_s, nonfinite) or, for robust_weights, to new tensors."""
    tl.debug_barrier()  # Another warp may not have read log_s yet.
    if state_out is not None:
        tl.store(state_out, new_log_s.to(state_out.dtype.element_ty))
        tl.store(dlog_s_out, dlog_s)
        tl.store(dlog_s_out + 1, dlog_s_state)
    elif update != 0:
        if n_nonfinite > 0:
            tl.store(nonfinite, tl.load(nonfinite) + 1)
        else:
            tl.store(log_s, new_log_s.to(log_s.dtype.element_ty))


@triton.jit
def apply(
    losses, score, sample_weight, valid, lam, norm, inverse_n, mix, max_weight, weights, sample_stats, grad, stats, count, begin,
    end, LIMIT: tl.constexpr, BLOCK: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Write the weights of samples [begin, end), and return their part of the loss, the sum of factor_i * loss_i.

    The factors d loss / d L_i are stored in `grad`, or multiply the numbers of each row's gradient in `stats` (losses.py).
    sample_stats (3, count), if it is given, gets losses, weights and validity. norm is log s'.
    """
    T: tl.constexpr = losses.dtype.element_ty
    unweighted = tl.abs(lam) == float("inf")  # the plain mean: W = 1, without mix and without a clamp
    mix = tl.where(unweighted, 0.0, mix).to(T)
    max_weight = tl.where(unweighted, 1.0, max_weight).to(T)
    high = norm.to(T)
    low = (norm - high.to(tl.float64)).to(T)
    inverse_n = inverse_n.to(T)
    value = tl.zeros([BLOCK], T)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < end
        loss, z, counted, finite = read_losses(losses, score, valid, i, inside, lam, LIMIT, CACHE)
        without_loss = tl.where(counted, float("nan"), 0.0).to(T)  # the weight of a sample without a finite loss
        w = tl.where(finite, robust_weight(z, high, low, max_weight), without_loss)
        tl.store((sample_stats + count if weights is None else weights) + i, w, mask=inside)
        if grad is not None or stats is not None or sample_stats is not None:
            t = tl.full([BLOCK], 1.0, T) if sample_weight is None else tl.load(sample_weight + i, mask=inside, other=0.0)
            factor = tl.where(finite, sample_factor(w, mix, t, inverse_n), without_loss)
            value += tl.where(counted, factor * loss, 0.0)
            if sample_stats is not None:
                tl.store(sample_stats + i, tl.where(counted, loss, 0.0), mask=inside)
                tl.store(sample_stats + 2 * count + i, counted.to(T), mask=inside)
            if grad is not None:
                tl.store(grad + i, factor, mask=inside)
            if stats is not None:
                for k in tl.static_range(1, 4):  # scale, at_label, smoothing_coef
                    place = stats + k * count + i
                    saved = tl.load(place, mask=inside, other=0.0, cache_modifier=CACHE)
                    tl.store(place, saved * factor, mask=inside)
    return tl.sum(value, 0)


@triton.jit
def weigh(
    losses, score, sample_weight, valid, log_s, nonfinite, lam, loss, weights, sample_stats, grad, stats, state_out, dlog_s_out,
    count, update, gamma, alpha, mix, max_weight,
    NORMALIZER: tl.constexpr, INIT_FIRST: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """The robust weights of all samples, by one program.

    1. It reads the losses and makes their sums (partial_sums).
    2. It settles log s' and the next state (settle).
    3. It reads the losses again, and writes weights and factors (apply).
    4. It stores the loss and the next state (commit).
    """
    lam = tl.load(lam).to(losses.dtype.element_ty)
    before = tl.load(log_s).to(tl.float64)
    z_max, sumexp, n, n_nonfinite = partial_sums(losses, score, valid, lam, 0, count, LIMIT, BLOCK, CACHE)
    unweighted = tl.abs(lam) == float("inf")
    norm, new_log_s, dlog_s, dlog_s_state, inverse_n = settle(
        z_max, sumexp, n, n_nonfinite, before, unweighted, gamma, alpha, NORMALIZER, INIT_FIRST
    )
    value = apply(
        losses, score, sample_weight, valid, lam, norm, inverse_n, mix, max_weight, weights, sample_stats, grad, stats, count, 0,
        count, LIMIT, BLOCK, CACHE,
    )  # fmt: skip
    if loss is not None:
        tl.store(loss, value)
    commit(new_log_s, n_nonfinite, dlog_s, dlog_s_state, update, log_s, nonfinite, state_out, dlog_s_out)
