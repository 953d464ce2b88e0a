"""Robust weights of a vector of losses (MATH §1).

This is the twin of csrc/cuda/weights.cu. Up to ONE_LAUNCH losses are weighed by one program
(weigh.py). More losses take two launches. In the first, up to MOST_PARTIALS programs sum a range each, and the last of them to
finish settles log s'. The second makes the weights. "real" is float64 for float64, and float32 for all other dtypes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._codes import NORMALIZERS
from . import launch
from .launch import parts
from .math import number, robust_weight_vjp
from .weigh import apply, commit, last_program, partial_sums, settle, solve_target, state_of_target, weigh

# ---- kernels -----------------------------------------------------------------------------------------------------------
#
# An optional tensor may be None. Triton does not compile a kernel for each value of a number that changes from call to call.


@triton.jit(do_not_specialize=["count", "update"])
def robust_loss_fwd_kernel(
    losses,  # (count) real
    score, sample_weight,  # (count) real, or None
    valid,  # (count) bool, or None
    log_s, nonfinite, lam,  # one number each
    loss,  # () real, or None
    weights,  # (count) real; or None and
    sample_stats,  # (3, count) real: losses, weights, validity
    grad,  # (count) real, or None
    state_out, dlog_s_out,  # (), (2) float64; or None: the state is written in place
    count, update, gamma, gamma_low, alpha, alpha_low, mix, mix_low, max_weight, max_weight_low,
    NORMALIZER: tl.constexpr, INIT_FIRST: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Robust weights, loss and next state of up to ONE_LAUNCH losses, by one program (weigh.weigh has the steps)."""
    T: tl.constexpr = losses.dtype.element_ty
    weigh(
        losses, score, sample_weight, valid, log_s, nonfinite, lam, loss, weights, sample_stats, grad, None, state_out,
        dlog_s_out, count, update, number(gamma, gamma_low, tl.float64), number(alpha, alpha_low, tl.float64),
        number(mix, mix_low, T), number(max_weight, max_weight_low, T), NORMALIZER, INIT_FIRST, LIMIT, BLOCK, "",
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "per_program", "update"])
def robust_sums_fwd_kernel(
    losses, score, valid, log_s, nonfinite, lam, state_out, dlog_s_out,  # as above; valid also (count) real
    # (3 + 5 programs) float64: log s', 1 / n, extreme score of a target; then max z, sum, finite samples, nonfinite samples and
    # loss of each program
    scratch,
    done,  # launch.counter
    count, per_program, update, gamma, gamma_low, alpha, alpha_low,
    NORMALIZER: tl.constexpr, INIT_FIRST: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr, FENCE: tl.constexpr,
    PARTIALS: tl.constexpr,
):  # fmt: skip
    """The first of two launches: log s' of more than ONE_LAUNCH losses.

    1. Each program sums exp(z) of its range of losses, and stores its sums in scratch.
    2. The program that finishes last adds up the sums of all.
    3. It settles log s', and stores log s', 1 / n and the next state.
    """
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    begin = program * per_program
    lam = tl.load(lam).to(losses.dtype.element_ty)
    z_max, sumexp, n, n_nonfinite = partial_sums(
        losses, score, valid, lam, None, begin, tl.minimum(begin + per_program, count), LIMIT, BLOCK, ""
    )
    place = scratch + 3 + program
    tl.store(place, z_max)
    tl.store(place + programs, sumexp)
    tl.store(place + 2 * programs, n)
    tl.store(place + 3 * programs, n_nonfinite)
    if last_program(done, FENCE):
        j = tl.arange(0, PARTIALS)
        inside = j < programs
        theirs = scratch + 3 + j
        maxima = tl.load(theirs, mask=inside, other=float("-inf"), cache_modifier=".cg")
        sumexps = tl.load(theirs + programs, mask=inside, other=0.0, cache_modifier=".cg")
        n = tl.sum(tl.load(theirs + 2 * programs, mask=inside, other=0.0, cache_modifier=".cg"), 0)
        n_nonfinite = tl.sum(tl.load(theirs + 3 * programs, mask=inside, other=0.0, cache_modifier=".cg"), 0)
        z_max = tl.max(maxima, 0)
        sumexp = tl.sum(sumexps * tl.exp(maxima - z_max), 0)  # NaN if no sample is finite; `settle` does not use it then
        before = tl.load(log_s).to(tl.float64)
        norm, new_log_s, dlog_s, dlog_s_state, inverse_n = settle(
            z_max,
            sumexp,
            n,
            n_nonfinite,
            before,
            tl.abs(lam) == float("inf"),
            number(gamma, gamma_low, tl.float64),
            number(alpha, alpha_low, tl.float64),
            NORMALIZER,
            INIT_FIRST,
        )
        tl.store(scratch, norm)
        tl.store(scratch + 1, inverse_n)
        commit(new_log_s, n_nonfinite, dlog_s, dlog_s_state, update, log_s, nonfinite, state_out, dlog_s_out)


@triton.jit(do_not_specialize=["count", "update"])
def robust_target_fwd_kernel(
    losses,
    score,
    valid,
    log_s,
    nonfinite,
    lam,
    scratch,
    count,
    update,
    share,
    share_low,
    alpha,
    alpha_low,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first of two launches with a target for the effective sample size, by one program: the search needs all scores.

    1. It solves for lambda.
    2. It sums exp(z) and settles log s', and stores log s', 1 / n, the extreme score and the next state.
    """
    share, alpha = number(share, share_low, tl.float64), number(alpha, alpha_low, tl.float64)
    lam, shift = solve_target(losses, score, valid, share, lam, count, LIMIT, BLOCK, "")
    z_max, sumexp, n, n_nonfinite = partial_sums(losses, score, valid, lam, shift, 0, count, LIMIT, BLOCK, "")
    unweighted = tl.abs(lam) == float("inf")
    norm, new_log_s, dlog_s, dlog_s_state, inverse_n = settle(
        z_max, sumexp, n, n_nonfinite, tl.load(log_s).to(tl.float64), unweighted, share, alpha, "target", False
    )
    new_log_s = state_of_target(new_log_s, n, n_nonfinite, unweighted, shift, lam)
    tl.store(scratch, norm)
    tl.store(scratch + 1, inverse_n)
    tl.store(scratch + 2, shift.to(tl.float64))
    commit(new_log_s, n_nonfinite, dlog_s, dlog_s_state, update, log_s, nonfinite, None, None)


@triton.jit(do_not_specialize=["count", "per_program"])
def robust_apply_fwd_kernel(
    losses, score, sample_weight, valid, lam, loss, weights, sample_stats, grad,  # as above
    stats,  # (4, count) real, as in losses.py; or None
    scratch, done, count, per_program, mix, mix_low, max_weight, max_weight_low,
    TARGET: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr, FENCE: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """The second of two launches: weights and loss of more than ONE_LAUNCH losses.

    1. Each program reads log s' and 1 / n from scratch, and makes the weights and factors of its range of losses.
    2. It stores its part of the loss. The program that finishes last adds up the parts.
    """
    T: tl.constexpr = losses.dtype.element_ty
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    begin = program * per_program
    shift = tl.load(scratch + 2).to(T) if TARGET else None
    value = apply(
        losses, score, sample_weight, valid, tl.load(lam).to(T), shift, tl.load(scratch), tl.load(scratch + 1),
        number(mix, mix_low, T), number(max_weight, max_weight_low, T), weights, sample_stats, grad, stats, count.to(tl.int64),
        begin, tl.minimum(begin + per_program, count), LIMIT, BLOCK, "",
    )  # fmt: skip
    if loss is not None:
        values = scratch + 3 + 4 * programs
        tl.store(values + program, value.to(tl.float64))
        if last_program(done, FENCE):
            j = tl.arange(0, PARTIALS)
            over_all = tl.sum(tl.load(values + j, mask=j < programs, other=0.0, cache_modifier=".cg"), 0)
            tl.store(loss, over_all.to(T))


@triton.jit
def weighted_sum(weights, upstream, begin, end, BLOCK: tl.constexpr):
    """The sum of W_i d_i over samples [begin, end), in float64. A nonfinite sample has weight NaN, and takes no part."""
    T: tl.constexpr = weights.dtype.element_ty
    sums = tl.zeros([BLOCK], T)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        w = tl.load(weights + i, mask=i < end, other=0.0)
        sums += tl.where(w == w, w * tl.load(upstream + i, mask=i < end, other=0.0), 0.0)
    return tl.sum(sums, 0).to(tl.float64)


@triton.jit(do_not_specialize=["count", "per_program"])
def robust_dots_bwd_kernel(weights, upstream, dots, count, per_program, BLOCK: tl.constexpr):
    """The first of two backward launches for more than ONE_LAUNCH losses: each program sums W_i d_i of its range."""
    program = tl.program_id(0).to(tl.int64)
    begin = program * per_program
    tl.store(dots + program, weighted_sum(weights, upstream, begin, tl.minimum(begin + per_program, count), BLOCK))


@triton.jit(do_not_specialize=["count", "per_program"])
def robust_weights_bwd_kernel(
    weights,
    upstream,  # (count) real
    upstream_log_s,
    lam,
    dlog_s,  # (), (), (2) float64
    dots,  # (programs) float64: the sum of W_i d_i of each program; None: there is one program, which makes the sum itself
    grad,  # (count) real
    count,
    per_program,
    BLOCK: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """The vjp of robust weights and log s' (math.robust_weight_vjp).

    1. Each program makes the sum of W_i d_i over all samples, from `dots` or from the weights.
    2. It writes the gradient of its range of losses.
    """
    T: tl.constexpr = weights.dtype.element_ty
    if dots is None:
        dot = weighted_sum(weights, upstream, 0, count, BLOCK)
    else:
        j = tl.arange(0, PARTIALS)
        dot = tl.sum(tl.load(dots + j, mask=j < tl.num_programs(0), other=0.0), 0)
    inverse_lam = (1 / tl.load(lam).to(tl.float64)).to(T)
    to_weights, to_state, u = tl.load(dlog_s).to(T), tl.load(dlog_s + 1).to(T), tl.load(upstream_log_s).to(T)
    begin = tl.program_id(0).to(tl.int64) * per_program
    end = tl.minimum(begin + per_program, count)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        w = tl.load(weights + i, mask=i < end, other=0.0)
        d = tl.load(upstream + i, mask=i < end, other=0.0)
        tl.store(grad + i, robust_weight_vjp(w, d, dot.to(T), u, to_weights, to_state, inverse_lam), mask=i < end)


KERNELS = (
    robust_loss_fwd_kernel,
    robust_sums_fwd_kernel,
    robust_target_fwd_kernel,
    robust_apply_fwd_kernel,
    robust_dots_bwd_kernel,
    robust_weights_bwd_kernel,
)


# ---- launchers -----------------------------------------------------------------------------------------------------------

_BLOCK = 1024  # losses that a program of 4 warps takes at a time: 8 for each thread, which has as many loads under way


def limit(dtype: torch.dtype, log_s: Tensor) -> float:
    """The largest |z| that counts as finite. A larger one would not fit the state."""
    return torch.finfo(torch.float64 if dtype == log_s.dtype == torch.float64 else torch.float32).max


def is_target(normalizer: int) -> bool:
    """Whether lambda is solved for. normalizer: a place in _codes.NORMALIZERS."""
    return NORMALIZERS[normalizer] == "target"


def without_samples(lam: Tensor, normalizer: int) -> None:
    """What a batch without samples writes: with a target, lambda is inf."""
    if is_target(normalizer):
        lam.fill_(float("inf"))


def shared(count: int) -> tuple[int, int]:
    """The number of programs that share `count` losses, and the number of losses that each takes."""
    blocks = -(-count // _BLOCK)
    per_program = -(-blocks // launch.MOST_PARTIALS) * _BLOCK
    return -(-count // per_program), per_program


def weigh_many(losses, score, sample_weight, valid, log_s, nonfinite, lam, loss, weights, sample_stats, grad, stats, state_out,
               dlog_s, gamma, alpha, mix, max_weight, normalizer, init_first, update):  # fmt: skip
    """The robust weights of more than ONE_LAUNCH losses, in two launches."""
    count = losses.numel()
    programs, per_program = shared(count)
    scratch = losses.new_empty(3 + 5 * programs, dtype=torch.float64)
    done, bound = launch.counter(losses), limit(losses.dtype, log_s)
    target = is_target(normalizer)
    if target:
        launch.launch(
            robust_target_fwd_kernel,
            1,
            losses,
            losses,
            score,
            valid,
            log_s,
            nonfinite,
            lam,
            scratch,
            count,
            int(update),
            *parts(gamma, alpha),
            LIMIT=bound,
            BLOCK=2 * _BLOCK,
            num_warps=16,
        )
    else:
        launch.launch(
            robust_sums_fwd_kernel, programs, losses, losses, score, valid, log_s, nonfinite, lam, state_out, dlog_s, scratch,
            done, count, per_program, int(update), *parts(gamma, alpha),
            NORMALIZER=NORMALIZERS[normalizer], INIT_FIRST=init_first, LIMIT=bound, BLOCK=_BLOCK, FENCE=4 * launch.FENCE,
            PARTIALS=launch.MOST_PARTIALS,
        )  # fmt: skip
    launch.launch(
        robust_apply_fwd_kernel, programs, losses, losses, score, sample_weight, valid, lam, loss, weights, sample_stats, grad,
        stats, scratch, done, count, per_program, *parts(mix, max_weight), TARGET=target,
        LIMIT=bound, BLOCK=_BLOCK, FENCE=4 * launch.FENCE, PARTIALS=launch.MOST_PARTIALS,
    )  # fmt: skip


def _weigh(losses, score, sample_weight, valid, log_s, nonfinite, lam, loss, weights, sample_stats, grad, state_out, dlog_s,
           gamma, alpha, mix, max_weight, normalizer, init_first, update):  # fmt: skip
    """The robust weights of a vector of losses, in as many launches as its length takes."""
    count = losses.numel()
    if count > launch.ONE_LAUNCH:
        weigh_many(losses, score, sample_weight, valid, log_s, nonfinite, lam, loss, weights, sample_stats, grad, None, state_out,
                   dlog_s, gamma, alpha, mix, max_weight, normalizer, init_first, update)  # fmt: skip
        return
    # A single program has as many threads as have something to do, with 4 losses each. 8 in float64 would not fit the registers.
    warps = 4 if count <= 512 else 16
    launch.launch(
        robust_loss_fwd_kernel, 1, losses, losses, score, sample_weight, valid, log_s, nonfinite, lam, loss, weights,
        sample_stats, grad, state_out, dlog_s, count, int(update), *parts(gamma, alpha, mix, max_weight),
        NORMALIZER=NORMALIZERS[normalizer],
        INIT_FIRST=init_first, LIMIT=limit(losses.dtype, log_s), BLOCK=128 * warps, num_warps=warps,
    )  # fmt: skip


def robust_loss(
    losses: Tensor,
    score: Tensor | None,
    sample_weight: Tensor | None,
    mask: Tensor | None,
    log_s: Tensor,
    nonfinite: Tensor,
    lam: Tensor,
    gamma: float,
    alpha: float,
    mix: float,
    max_weight: float,
    *,
    normalizer: int,
    init_first: bool,
    update: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The robust loss of a batch of losses (MATH §1.1). With `update` log_s moves, or nonfinite is raised by 1.

    Args:
        losses: any shape, contiguous, float32 or float64.
        score, sample_weight: like losses, or None.
        mask: bool, of the shape of losses, or None.
        log_s, lam: one number each, float32 or float64.
        nonfinite: one number, int64.
        normalizer: a place in _codes.NORMALIZERS: 0 moving, 1 batch, 2 none, 3 target. With 3, gamma is the share with the sign
            of lambda, and lam is written.

    Returns:
        loss (); sample_stats (3, ...): losses (0 where masked), weights, validity; grad like losses, or (0) without `with_grad`.
    """
    sample_stats = losses.new_empty((3, *losses.shape))
    grad = torch.empty_like(losses) if with_grad else losses.new_empty(0)
    if not losses.numel():
        without_samples(lam, normalizer)
        return losses.new_zeros(()), sample_stats, grad
    loss = losses.new_empty(())
    _weigh(losses, score, sample_weight, mask, log_s, nonfinite, lam, loss, None, sample_stats, grad if with_grad else None, None,
           None, gamma, alpha, mix, max_weight, normalizer, init_first, update)  # fmt: skip
    return loss, sample_stats, grad


def robust_weights(
    losses: Tensor,
    log_s: Tensor,
    lam: Tensor,
    mask: Tensor | None,
    gamma: float,
    alpha: float,
    *,
    normalizer: int,
    init_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Robust weights, without a loss (MATH §1.1).

    Returns:
        weights, like losses; the next log s (); (2) float64: the c of d log s' / d z_j = c W_j, for the weights and the state.
    """
    weights, state = torch.empty_like(losses), log_s.new_empty(())
    dlog_s = losses.new_empty(2, dtype=torch.float64)
    if not losses.numel():
        return weights, state.copy_(log_s.view(())), dlog_s.zero_()
    _weigh(losses, None, None, mask, log_s, None, lam, None, weights, None, None, state, dlog_s, gamma, alpha, 0.0,
           float("inf"), normalizer, init_first, False)  # fmt: skip
    return weights, state, dlog_s


def robust_weights_backward(weights: Tensor, grad_weights: Tensor, grad_log_s: Tensor, lam: Tensor, dlog_s: Tensor) -> Tensor:
    """The vjp of `robust_weights` with respect to the losses (MATH §1.3)."""
    grad, count = torch.empty_like(weights), weights.numel()
    if not count:
        return grad
    dots, programs, per_program, warps = None, 1, count, 4 if count <= _BLOCK else 16
    if count > launch.ONE_LAUNCH:
        programs, per_program = shared(count)
        dots, warps = weights.new_empty(programs, dtype=torch.float64), 4
        launch.launch(robust_dots_bwd_kernel, programs, weights, weights, grad_weights, dots, count, per_program, BLOCK=_BLOCK)
    launch.launch(
        robust_weights_bwd_kernel,
        programs,
        weights,
        weights,
        grad_weights,
        grad_log_s,
        lam,
        dlog_s,
        dots,
        grad,
        count,
        per_program,
        BLOCK=_BLOCK // 4 * warps,
        PARTIALS=launch.MOST_PARTIALS,
        num_warps=warps,
    )
    return grad
