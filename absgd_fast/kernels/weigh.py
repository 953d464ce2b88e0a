"""The sums and weights of losses inside a kernel (MATH §1), which the kernels of weights.py and losses.py share.

A sample is an element of a vector of losses. Sums are made in a fixed order, so a run repeats bit for bit. log s' itself is
computed in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import (
    divide,
    log_mean_exp,
    next_log_s,
    reference_point,
    robust_weight,
    sample_factor,
    target_next,
    target_start,
    target_terms,
)


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
def read_losses(losses, score, valid, i, inside, lam, shift, LIMIT: tl.constexpr, CACHE: tl.constexpr):
    """The losses, their z, which samples are valid, and which of these are finite.

    lam is a scalar of the losses' dtype, or None: then the scores take the place of z. shift is such a scalar, or None for 0.
    """
    loss = tl.load(losses + i, mask=inside, other=0.0, cache_modifier=CACHE)
    s = loss if score is None else tl.load(score + i, mask=inside, other=0.0)
    if lam is None:
        z = s
    elif shift is None:
        z = divide(s, lam)
    else:
        z = divide(s - shift, lam)
    counted = inside
    if valid is not None:
        counted &= tl.load(valid + i, mask=inside, other=0, cache_modifier=CACHE) != 0
    # A NaN makes every comparison false. An infinite score has z = inf, or z = NaN if lam is infinite, too.
    finite = counted & (tl.abs(z if shift is None else s) <= LIMIT)
    if score is not None:
        finite &= loss - loss == 0
    return loss, z, counted, finite


@triton.jit
def partial_sums(losses, score, valid, lam, shift, begin, end, LIMIT: tl.constexpr, BLOCK: tl.constexpr, CACHE: tl.constexpr):
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
        _loss, z, counted, finite = read_losses(losses, score, valid, i, i < end, lam, shift, LIMIT, CACHE)
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
        if NORMALIZER == "batch" or NORMALIZER == "target":
            alone = True
        elif INIT_FIRST:
            alone = log_s == float("-inf")
        else:
            alone = False
        norm = tl.where(moves, next_log_s(log_s, log_mean_exp(z_max, sumexp, n), gamma, alpha, alone), 0.0)
        dlog_s = tl.where(moves, tl.where(alone, alpha, gamma * alpha) * inverse_n, 0.0)
    return norm, tl.where(clean, norm, log_s), dlog_s, tl.where(clean, dlog_s, 0.0), inverse_n


@triton.jit
def solve_target(losses, score, valid, share, lam, count, LIMIT: tl.constexpr, BLOCK: tl.constexpr, CACHE: tl.constexpr):
    """Lambda of a target for the effective sample size, by one program, which also stores it (csrc/cuda/target.cuh).

    1. It reads the scores and makes their range, and again for the moments of d = |extreme score - score|.
    2. It reads them once for each u = 1 / |lambda| that the search tries.

    Returns:
        lambda as it is stored, and the extreme score, in the dtype of the losses.
    """
    T: tl.constexpr = losses.dtype.element_ty
    inf: tl.constexpr = float("inf")
    low, high, counts = tl.full([BLOCK], inf, T), tl.full([BLOCK], -inf, T), tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        _loss, x, _counted, finite = read_losses(losses, score, valid, i, i < count, None, None, LIMIT, CACHE)
        low, high = tl.minimum(low, tl.where(finite, x, inf)), tl.maximum(high, tl.where(finite, x, -inf))
        counts += finite.to(tl.int32)
    lowest, highest = tl.min(low, 0), tl.max(high, 0)
    n = tl.sum(counts.to(tl.int64), 0).to(tl.float64)
    shift = tl.where(n > 0, tl.where(share > 0, highest, lowest), 0.0)
    unit = (1 / (highest.to(tl.float64) - lowest.to(tl.float64))).to(T)
    first, second = tl.zeros([BLOCK], T), tl.zeros([BLOCK], T)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        _loss, x, _counted, finite = read_losses(losses, score, valid, i, i < count, None, None, LIMIT, CACHE)
        d = tl.where(finite, tl.abs(x - shift) * unit, 0.0)
        first += d
        second += d * d
    target = tl.abs(share)
    again, u, low_u, high_u, wanted = target_start(
        target,
        lowest.to(tl.float64),
        highest.to(tl.float64),
        n,
        tl.sum(first, 0).to(tl.float64),
        tl.sum(second, 0).to(tl.float64),
        T,
    )
    again &= n > 0
    distance, high_was_tried, left = tl.full([], inf, tl.float64), tl.full([], 0, tl.int32), tl.full([], 60, tl.int32)
    while again:
        s1, s2, d1, d2 = tl.zeros([BLOCK], T), tl.zeros([BLOCK], T), tl.zeros([BLOCK], T), tl.zeros([BLOCK], T)
        for start in range(0, count, BLOCK):
            i = start + tl.arange(0, BLOCK)
            _loss, x, _counted, finite = read_losses(losses, score, valid, i, i < count, None, None, LIMIT, CACHE)
            e, e2, de, de2 = target_terms(tl.where(finite, tl.abs(x - shift), inf), u.to(T))
            s1, s2, d1, d2 = s1 + e, s2 + e2, d1 + de, d2 + de2
        again, low_u, high_u, u, distance, high_was_tried, left = target_next(
            tl.sum(s1, 0).to(tl.float64),
            tl.sum(s2, 0).to(tl.float64),
            tl.sum(d1, 0).to(tl.float64),
            tl.sum(d2, 0).to(tl.float64),
            target,
            n,
            wanted,
            low_u,
            high_u,
            u,
            distance,
            high_was_tried,
            left,
        )
    solved = tl.where((u > 0) & (n > 0), tl.minimum(1 / tl.where(u > 0, u, 1.0), LIMIT), inf)
    stored = tl.where((share > 0) | (solved == inf), solved, -solved).to(lam.dtype.element_ty)
    tl.store(lam, stored)
    return stored.to(T), shift


@triton.jit
def state_of_target(new_log_s, n, n_nonfinite, unweighted, shift, lam):
    """The next state: log mean exp(score / lambda), from log s' of z = (score - shift) / lambda. 0 at |lambda| = inf."""
    moved = tl.where(unweighted, 0.0, new_log_s + shift.to(tl.float64) / lam.to(tl.float64))
    return tl.where((n > 0) & (n_nonfinite == 0), moved, new_log_s)


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
    losses, score, sample_weight, valid, lam, shift, norm, inverse_n, mix, max_weight, weights, sample_stats, grad, stats, count,
    begin, end, LIMIT: tl.constexpr, BLOCK: tl.constexpr, CACHE: tl.constexpr,
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
        loss, z, counted, finite = read_losses(losses, score, valid, i, inside, lam, shift, LIMIT, CACHE)
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

    1. With a target for the effective sample size it solves for lambda (solve_target).
    2. It reads the losses and makes their sums (partial_sums).
    3. It settles log s' and the next state (settle).
    4. It reads the losses again, and writes weights and factors (apply).
    5. It stores the loss and the next state (commit).
    """
    before = tl.load(log_s).to(tl.float64)
    if NORMALIZER == "target":
        lam, shift = solve_target(losses, score, valid, gamma, lam, count, LIMIT, BLOCK, CACHE)
    else:
        lam = tl.load(lam).to(losses.dtype.element_ty)
        shift = None
    z_max, sumexp, n, n_nonfinite = partial_sums(losses, score, valid, lam, shift, 0, count, LIMIT, BLOCK, CACHE)
    unweighted = tl.abs(lam) == float("inf")
    norm, new_log_s, dlog_s, dlog_s_state, inverse_n = settle(
        z_max, sumexp, n, n_nonfinite, before, unweighted, gamma, alpha, NORMALIZER, INIT_FIRST
    )
    if NORMALIZER == "target":
        new_log_s = state_of_target(new_log_s, n, n_nonfinite, unweighted, shift, lam)
    value = apply(
        losses, score, sample_weight, valid, lam, shift, norm, inverse_n, mix, max_weight, weights, sample_stats, grad, stats,
        count, 0, count, LIMIT, BLOCK, CACHE,
    )  # fmt: skip
    if loss is not None:
        tl.store(loss, value)
    commit(new_log_s, n_nonfinite, dlog_s, dlog_s_state, update, log_s, nonfinite, state_out, dlog_s_out)
