"""Losses on logits, alone and with the robust weights: the twin of the logit_* loops in csrc/cpu/loops.cpp.

The forward pass reads the logits once and keeps four numbers a row; the backward pass reads them once more and writes
the gradient. A program takes a tile of rows x classes of logits (outer, lanes, classes) with any strides: `lanes` is the
batch, or the inner positions of one sample of (B, C, d1, ...). "real" is float64 for float64 logits, else float32.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import parts
from .math import loss_and_slope, multiple, nll, number, reference_point, row_gradient, shared_loss
from .weights import NORMALIZERS, last_program, limit, weigh, weigh_many


# ---- device functions ------------------------------------------------------------------------------------------------


@triton.jit
def tile_rows(
    program, lanes, classes, stride_outer, stride_lane, stride_class,
    ADJACENT: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The rows of a tile: (outer, lane, lanes, classes, offset of each row in the logits, stride of classes)."""
    if ADJACENT == "classes":
        classes, stride_class = multiple(classes, UNIT), 1
        stride_outer, stride_lane = multiple(stride_outer, UNIT), multiple(stride_lane, UNIT)
    elif ADJACENT == "lanes":
        lanes, stride_lane = multiple(lanes, UNIT), 1
        stride_outer, stride_class = multiple(stride_outer, UNIT), multiple(stride_class, UNIT)
    blocks = tl.cdiv(lanes, ROWS)
    outer = (program // blocks).to(tl.int64)
    lane = (program % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return outer, lane, lanes, classes, outer * stride_outer + lane * stride_lane, stride_class


@triton.jit
def label_of(target, row, inside, classes, ignore_index):
    """Label as int32 (-1: none), whether the row counts, and whether the label is out of range. 64 bits are compared."""
    label = tl.load(target + row, mask=inside, other=0).to(tl.int64)
    fits = (label >= 0) & (label < classes)
    counts = inside & (label != ignore_index)
    return tl.where(counts & fits, label, -1).to(tl.int32), counts & fits, counts & (fits == 0)


@triton.jit
def report_label(target, report, row, classes):
    """(label, row, classes, 1) to host memory, unless another program was there before and nobody has read it yet."""
    flag = (report + 3).to(tl.pointer_type(tl.int32), bitcast=True)  # Triton 3.5 has no comparing exchange of 64 bits
    if tl.atomic_cas(flag, 0, 2, sem="relaxed", scope="sys") == 0:
        tl.store(report, tl.load(target + row).to(tl.int64))
        tl.store(report + 1, row)
        tl.store(report + 2, classes.to(tl.int64))
        # a fence at the scope of the system: the flag comes after what it announces
        tl.atomic_xchg(flag, 1, sem="release", scope="sys")


@triton.jit
def soft_place(outer, lane, lanes, classes, col, INNER: tl.constexpr):
    """Where class `col` of each row stands in a contiguous (B, C, d1, ...): soft targets, the gradient."""
    wide = col.to(tl.int64)[None, :]
    return (outer * classes + wide) * lanes + lane[:, None] if INNER else lane[:, None] * classes + wide


@triton.jit
def shares(class_weight, soft, place, col, there, classes, keep, uniform, T: tl.constexpr):
    """What the classes weigh in sum_k weight_k (-log p_k): v_k, with soft targets (keep t_k + uniform) v_k; 0 outside."""
    v = (
        there.to(T)
        if class_weight is None
        else tl.where(there, tl.load(class_weight + col, mask=col < classes, other=0.0)[None, :], 0.0)
    )
    return v if soft is None else v * (keep * tl.load(soft + place, mask=there, other=0.0) + uniform)


@triton.jit
def adjusted(x, adjust, col, classes):
    """S_k x_k + D_k; what lies outside stays -inf."""
    if adjust is not None:  # no early return: Triton compiles what follows one all the same
        s = tl.load(adjust + col, mask=col < classes, other=1.0)[None, :]
        x = s * x + tl.load(adjust + classes + col, mask=col < classes, other=0.0)[None, :]
    return x


@triton.jit
def row_losses(
    logits, target, class_weight, adjust, mask, losses, validity, stats, report, count, lanes, classes, stride_outer, stride_lane,
    stride_class, ignore_index, keep, uniform, first, second, cut, least,
    KIND: tl.constexpr, PRUNE: tl.constexpr, SHARES: tl.constexpr, INNER: tl.constexpr,
    ADJACENT: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Losses of this program's rows, and what their gradient is made of. One pass over the logits. count (int64): all rows.
    SHARES: "none", "smooth" (label smoothing) or "soft" (`target` holds probabilities).

    Returns label, max, scale, at_label, spread of each row (the last three 0 where it does not count)."""
    T: tl.constexpr = losses.dtype.element_ty
    outer, lane, lanes, classes, offset, stride_class = tile_rows(
        tl.program_id(0), lanes, classes, stride_outer, stride_lane, stride_class, ADJACENT, UNIT, ROWS
    )
    inside = lane < lanes
    row = outer * lanes + lane
    if SHARES == "soft":
        y, valid = tl.full([ROWS], -1, tl.int32), inside
    else:
        y, valid, bad = label_of(target, row, inside, classes, ignore_index)
        if report is not None:
            worst = tl.min(tl.where(bad, row, count), 0)
            if worst < count:
                report_label(target, report, worst, classes)
    if mask is not None:
        valid &= tl.load(mask + row, mask=inside, other=0) != 0
    labelled = valid & (y >= 0)
    x_y = tl.load(logits + offset + y.to(tl.int64) * stride_class, mask=labelled, other=0.0).to(T)
    v_y = tl.full([ROWS], 1.0, T) if class_weight is None else tl.load(class_weight + y, mask=labelled, other=0.0)
    margin = tl.zeros([ROWS], T)
    if adjust is not None:
        margin = tl.load(adjust + 2 * classes + y, mask=labelled, other=0.0)
        x_y = (
            tl.load(adjust + y, mask=labelled, other=1.0) * x_y + tl.load(adjust + classes + y, mask=labelled, other=0.0) - margin
        )

    top = tl.full([ROWS], float("-inf"), T)
    rest = tl.zeros([ROWS, BLOCK], T)  # of exp(a - max), without the label
    if SHARES != "none":
        gaps, seen = rest, rest  # of weight (a - max), and of weight
    # Ignored rows of many classes are not read; for few classes that would only make the tile wait for its labels.
    stop = tl.max(tl.where(valid, classes, 0), 0) if SKIP else classes
    for start in range(0, stop, BLOCK):
        col = start + tl.arange(0, BLOCK)
        there = (col < classes)[None, :]  # not `stop`: of `classes` the compiler knows by what it can be divided
        x = tl.load(
            logits + offset[:, None] + col.to(tl.int64)[None, :] * stride_class, mask=inside[:, None] & there, other=float("-inf")
        ).to(T)
        x = adjusted(x, adjust, col, classes)
        own_column = col[None, :] == y[:, None]
        # with a margin the label's logit is another: it joins after the loop
        new = tl.maximum(top, tl.max(x if adjust is None else tl.where(own_column, float("-inf"), x), 1))
        point = reference_point(new)
        e = tl.exp(x - point[:, None])
        rest = rest * tl.exp(top - point)[:, None] + tl.where(own_column, 0.0, e)
        if SHARES != "none":
            if SHARES == "soft":
                place = soft_place(outer, lane, lanes, classes, col, INNER)
                v = shares(class_weight, target, place, col, inside[:, None] & there, classes, keep, uniform, T)
            else:
                v = shares(class_weight, None, 0, col, there, classes, keep, uniform, T)
            gaps += seen * (reference_point(top) - point)[:, None] + tl.where(v != 0, v * (x - point[:, None]), 0.0)
            seen += v
        top = new
    rest = tl.sum(rest, 1)
    total, gap_sum = (tl.sum(seen, 1), tl.sum(gaps, 1)) if SHARES != "none" else (tl.zeros([ROWS], T), tl.zeros([ROWS], T))
    if adjust is not None:
        high = tl.where(labelled, tl.maximum(top, x_y), top)
        rest *= tl.exp(reference_point(top) - reference_point(high))
        # a margin moves the label's own term; the reference of the sum moves with the maximum
        gap_sum += total * (reference_point(top) - reference_point(high)) - tl.where(margin != 0, v_y * margin, 0.0)
        top = high
    gap = top - x_y
    own = tl.exp(-gap)
    loss, c = tl.zeros([ROWS], T), tl.zeros([ROWS], T)
    if SHARES == "soft":
        gap, own = loss, loss
    else:
        loss, c = loss_and_slope(gap, rest, own, v_y, keep, first, second, cut, KIND)
    spread = uniform * 0
    if SHARES != "none":
        spread = uniform if SHARES == "smooth" else spread + 1
        loss += spread * shared_loss(gap, rest, own, total, gap_sum)
    if PRUNE:
        valid &= (nll(gap, rest, own) >= least) == 0
    tl.store(losses + row, tl.where(valid, loss, 0.0), mask=inside)
    if validity is not None:
        tl.store(validity + row, valid.to(T), mask=inside)
    scale, at_label = row_gradient(rest, own, c, spread, total)
    scale, at_label, spread = tl.where(valid, scale, 0.0), tl.where(valid, at_label, 0.0), tl.where(valid, spread, 0.0)
    if stats is not None:
        tl.store(stats + row, top, mask=inside)
        tl.store(stats + count + row, scale, mask=inside)
        tl.store(stats + 2 * count + row, at_label, mask=inside)
        tl.store(stats + 3 * count + row, spread, mask=inside)
    return y, top, scale, at_label, spread


@triton.jit
def block_gradient(
    logits, target, class_weight, adjust, grad, outer, lane, lanes, classes, offset, stride_class, col, y, top, scale, at_label,
    spread, keep, uniform, SOFT: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """grad_k = S_k (exp(a_k - max) scale - spread weight_k) off the label, S_y (at_label - spread weight_y) on it, for the
    classes `col`. grad may be logits: what is written has been read just before."""
    T: tl.constexpr = scale.dtype
    there = (lane < lanes)[:, None] & (col < classes)[None, :]
    # a row without a slope is not read: it may hold anything, and exp(NaN) * 0 is not 0
    x = tl.load(
        logits + offset[:, None] + col.to(tl.int64)[None, :] * stride_class,
        mask=there & (scale != 0)[:, None],
        other=float("-inf"),
    ).to(T)
    e = tl.exp(adjusted(x, adjust, col, classes) - top[:, None])
    g = tl.where(col[None, :] == y[:, None], at_label[:, None], tl.where((scale != 0)[:, None], e * scale[:, None], 0.0))
    place = soft_place(outer, lane, lanes, classes, col, INNER)
    if SOFT:
        g -= spread[:, None] * shares(class_weight, target, place, col, there, classes, keep, uniform, T)
    elif class_weight is None:
        g -= spread[:, None]
    else:  # read where something is smoothed
        stop = tl.where(tl.max(tl.abs(spread), 0) > 0, classes, 0)
        g -= spread[:, None] * tl.load(class_weight + col, mask=col < stop, other=0.0)[None, :]
    if adjust is not None:
        g *= tl.load(adjust + col, mask=col < classes, other=1.0)[None, :]
    tl.store(grad + place, g.to(grad.dtype.element_ty), mask=there)


# ---- kernels -----------------------------------------------------------------------------------------------------------
#
# Optional tensors are None. Sizes and strides are not specialized on; what matters of them is in ADJACENT and UNIT.

_SIZES = ["count", "lanes", "classes", "stride_outer", "stride_lane", "stride_class", "ignore_index"]


@triton.jit(do_not_specialize=_SIZES)
def logit_loss_fwd_kernel(
    logits,  # (outer, lanes, classes), strides in elements
    target,  # (outer, lanes) int64 or int32; SHARES "soft": probabilities, real, laid out as the gradient
    class_weight,  # (classes) real, or None
    adjust,  # (3, classes) real: S, D, M; or None
    mask,  # (outer, lanes) bool, or None
    losses,  # (outer, lanes) real
    validity,  # (outer, lanes) real, or None
    stats,  # (4, outer, lanes) real: max, scale, at_label, spread; or None
    report,  # (4) int64 in pinned host memory, or None
    count, lanes, classes, stride_outer, stride_lane, stride_class, ignore_index, keep, keep_low, uniform, uniform_low, first, first_low, second,
    second_low, cut, cut_low, least, least_low,
    KIND: tl.constexpr, PRUNE: tl.constexpr, SHARES: tl.constexpr, INNER: tl.constexpr,
    ADJACENT: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = losses.dtype.element_ty
    row_losses(
        logits, target, class_weight, adjust, mask, losses, validity, stats, report, count.to(tl.int64), lanes, classes,
        stride_outer, stride_lane, stride_class, ignore_index, number(keep, keep_low, T), number(uniform, uniform_low, T), number(first, first_low, T),
        number(second, second_low, T), number(cut, cut_low, T), number(least, least_low, T), KIND, PRUNE, SHARES, INNER,
        ADJACENT, UNIT, ROWS, BLOCK, SKIP,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*_SIZES, "update"])
def robust_logit_loss_fwd_kernel(
    logits, target, class_weight, adjust, mask,  # as above
    rows,  # (3, outer, lanes) real: losses, weights, validity
    stats, report,  # as above
    done,  # launch.counter
    score, sample_weight,  # (outer, lanes) real, or None
    log_s, nonfinite, lam,  # one number each
    loss,  # () real
    count, lanes, classes, stride_outer, stride_lane, stride_class, ignore_index, update, keep, keep_low, uniform, uniform_low, first, first_low, second,
    second_low, cut, cut_low, least, least_low,
    gamma, gamma_low, alpha, alpha_low, mix, mix_low, max_weight, max_weight_low,
    KIND: tl.constexpr, PRUNE: tl.constexpr, SHARES: tl.constexpr, INNER: tl.constexpr,
    ADJACENT: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SKIP: tl.constexpr,
    NORMALIZER: tl.constexpr, INIT_FIRST: tl.constexpr, LIMIT: tl.constexpr, LOSSES: tl.constexpr, FENCE: tl.constexpr,
):  # fmt: skip
    """Up to ONE_LAUNCH rows: the last program to finish computes log s', weights, loss and state, LOSSES rows at a time."""
    T: tl.constexpr = rows.dtype.element_ty
    count = count.to(tl.int64)
    row_losses(
        logits, target, class_weight, adjust, mask, rows, rows + 2 * count, stats, report, count, lanes, classes, stride_outer,
        stride_lane, stride_class, ignore_index, number(keep, keep_low, T), number(uniform, uniform_low, T), number(first, first_low, T),
        number(second, second_low, T), number(cut, cut_low, T), number(least, least_low, T), KIND, PRUNE, SHARES, INNER,
        ADJACENT, UNIT, ROWS, BLOCK, SKIP,
    )  # fmt: skip
    if last_program(done, FENCE):
        weigh(
            rows, score, sample_weight, rows + 2 * count, log_s, nonfinite, lam, loss, rows + count, None, None, stats, None,
            None, count, update, number(gamma, gamma_low, tl.float64), number(alpha, alpha_low, tl.float64),
            number(mix, mix_low, T), number(max_weight, max_weight_low, T), NORMALIZER, INIT_FIRST, LIMIT, LOSSES, ".cg",
        )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES[:-1])
def logit_loss_bwd_kernel(
    logits, target, class_weight, adjust, stats,  # as above
    upstream,  # real: (outer, lanes), or one number
    grad,  # (outer, classes, lanes) contiguous for (B, C, d1, ...), else (lanes, classes)
    count, lanes, classes, stride_outer, stride_lane, stride_class, keep, keep_low, uniform, uniform_low,
    EACH: tl.constexpr, SOFT: tl.constexpr, INNER: tl.constexpr,
    ADJACENT: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """u times the gradient of each row."""
    T: tl.constexpr = stats.dtype.element_ty
    col_blocks = tl.cdiv(classes, BLOCK)
    program = tl.program_id(0)
    outer, lane, lanes, classes, offset, stride_class = tile_rows(
        program // col_blocks, lanes, classes, stride_outer, stride_lane, stride_class, ADJACENT, UNIT, ROWS
    )
    count = count.to(tl.int64)
    inside = lane < lanes
    row = outer * lanes + lane
    y = tl.full([ROWS], -1, tl.int32) if SOFT else label_of(target, row, inside, classes, -1)[0]
    u = tl.load(upstream + row, mask=inside, other=0.0) if EACH else tl.load(upstream)
    scale = tl.load(stats + count + row, mask=inside, other=0.0) * u
    at_label = tl.load(stats + 2 * count + row, mask=inside, other=0.0) * u
    top = tl.load(stats + row, mask=inside, other=0.0)
    spread = tl.load(stats + 3 * count + row, mask=inside, other=0.0) * u
    block_gradient(
        logits, target, class_weight, adjust, grad, outer, lane, lanes, classes, offset, stride_class,
        program % col_blocks * BLOCK + tl.arange(0, BLOCK), y, top, scale, at_label, spread, number(keep, keep_low, T),
        number(uniform, uniform_low, T), SOFT, INNER,
    )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def logit_loss_in_place_kernel(
    logits,  # (lanes, classes) contiguous; overwritten by the gradient of each row's own loss
    target, class_weight, adjust, losses, validity, report,  # as above
    count, lanes, classes, stride_outer, stride_lane, stride_class, ignore_index, keep, keep_low, uniform, uniform_low, first, first_low, second,
    second_low, cut, cut_low, least, least_low,
    KIND: tl.constexpr, PRUNE: tl.constexpr, SHARES: tl.constexpr, INNER: tl.constexpr,
    ADJACENT: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """The second loop over a row finds it in the second-level cache."""
    T: tl.constexpr = losses.dtype.element_ty
    keep, uniform = number(keep, keep_low, T), number(uniform, uniform_low, T)
    y, top, scale, at_label, spread = row_losses(
        logits, target, class_weight, adjust, None, losses, validity, None, report, count.to(tl.int64), lanes, classes,
        stride_outer, stride_lane, stride_class, ignore_index, keep, uniform, number(first, first_low, T),
        number(second, second_low, T), number(cut, cut_low, T), number(least, least_low, T), KIND, PRUNE, SHARES, INNER,
        ADJACENT, UNIT, ROWS, BLOCK, SKIP,
    )  # fmt: skip
    outer, lane, lanes, classes, offset, stride_class = tile_rows(
        tl.program_id(0), lanes, classes, stride_outer, stride_lane, stride_class, ADJACENT, UNIT, ROWS
    )
    tl.debug_barrier()  # every thread has read what another may overwrite
    for start in range(0, classes, BLOCK):
        block_gradient(
            logits, target, class_weight, adjust, logits, outer, lane, lanes, classes, offset, stride_class,
            start + tl.arange(0, BLOCK), y, top, scale, at_label, spread, keep, uniform, SHARES == "soft", INNER,
        )  # fmt: skip


KERNELS = (logit_loss_fwd_kernel, robust_logit_loss_fwd_kernel, logit_loss_bwd_kernel, logit_loss_in_place_kernel)


# ---- launchers -----------------------------------------------------------------------------------------------------------


class _Walk:
    """How the programs of a launch share logits of one shape and layout. Chosen by reasoning, not by measurement: 8 or 16
    elements a thread, so that several loads of 16 bytes are under way, and one row per program as soon as a row fills it."""

    __slots__ = ("numbers", "constants", "programs", "warps", "backward", "backward_programs")

    def __init__(self, batch, classes, inner, strides, itemsize, aligned):
        stride_batch, stride_class, stride_inner = strides
        outer, lanes, stride_outer, stride_lane = batch, inner, stride_batch, stride_inner
        if inner == 1:
            outer, lanes, stride_outer, stride_lane = 1, batch, 0, stride_batch
        # the stride of a dimension of one element can be anything
        stride_outer, stride_lane = stride_outer * (outer > 1), stride_lane * (lanes > 1)
        stride_class = stride_class * (classes > 1)
        self.numbers = lanes, classes, stride_outer, stride_lane, stride_class
        along_lanes = lanes > 1 and stride_class != 1 and (classes <= 1 or stride_lane < stride_class)
        if stride_class == 1:
            adjacent, counts = "classes", (classes, stride_outer, stride_lane)
        elif stride_lane == 1:
            adjacent, counts = "lanes", (lanes, stride_outer, stride_class)
        else:
            adjacent, counts = "neither", ()
        unit = launch.unit(itemsize, *counts) if aligned and counts else 1
        layout = {"ADJACENT": adjacent, "UNIT": unit}
        # a tile does not reach from one sample into the next; a batch that is a little smaller is no reason to compile
        tallest = launch.power_of_two(lanes) if inner > 1 else 2048
        # Forward: classes are looped over.
        width = launch.power_of_two(classes)
        block = min(width, 8 if along_lanes else 4096)
        rows = min(tallest, 256 if along_lanes else max(1, 1024 // block))
        self.constants = dict(layout, INNER=inner > 1, ROWS=rows, BLOCK=block, SKIP=rows == 1 and classes > block)
        self.programs = outer * -(-lanes // rows)
        self.warps = 8 if block > 2048 else 4
        # Backward: every block of classes is a program. 32 classes side by side keep rereading of the rows' numbers rare.
        block = min(width, 32 if along_lanes else 2048)
        rows = min(tallest, max(1, 2048 // block))
        self.backward = dict(layout, INNER=inner > 1, ROWS=rows, BLOCK=block)
        self.backward_programs = outer * -(-lanes // rows) * -(-classes // block)


@lru_cache(4096)
def _walk(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, aligned: bool) -> _Walk | None:
    """None where d1, ... have no common stride."""
    inner, stride_inner = 1, 1
    for size, stride in zip(reversed(shape[2:]), reversed(strides[2:])):
        if size == 1:
            continue
        if inner == 1:
            stride_inner = stride
        elif stride != inner * stride_inner:
            return None
        inner *= size
    return _Walk(shape[0], shape[1], inner, (strides[0], strides[1], stride_inner), itemsize, aligned)


def _walked(logits: Tensor) -> tuple[Tensor, _Walk]:
    """logits, copied only where that is needed, and how to walk over them."""
    walk = _walk(logits.shape, logits.stride(), logits.element_size(), logits.data_ptr() % 16 == 0)
    return (logits, walk) if walk is not None else _walked(logits.contiguous())


@lru_cache(1024)
def _numbers(kind: int, prune: bool, first: float, second: float, classes: int) -> tuple[tuple[float, ...], dict]:
    """The loss's numbers and constants (csrc/math.h LossNumbers, csrc/launch.h ClassShares)."""
    smoothing = first if kind == 0 else 0.0
    cut, least = 0.0, math.inf
    if kind == GCE and second > 0:
        cut = -math.expm1(first * math.log(second)) / first
        least = -math.log(second) if prune else least
    second = second * SCE_A if kind == SCE else second
    numbers = parts(1 - smoothing, smoothing / max(classes, 1), first, second, cut, least)
    return numbers, {"KIND": kind, "PRUNE": math.isfinite(least), "SHARES": "smooth" if smoothing else "none"}


GCE, SCE, SCE_A = 2, 3, -math.log(1e-4)  # csrc/math.h Kind, kSceA


def _loss(logits: Tensor, target: Tensor, kind: int, prune: bool, first: float, second: float) -> tuple[tuple[float, ...], dict]:
    numbers, constants = _numbers(kind, prune, first, second, logits.shape[1])
    return numbers, constants | {"SHARES": "soft"} if target.is_floating_point() else constants


def _rows_of(logits: Tensor) -> tuple[int, ...]:
    return (logits.shape[0], *logits.shape[2:])


def logit_loss(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    adjust: Tensor | None,
    first: float,
    second: float,
    ignore_index: int,
    *,
    kind: int,
    prune: bool,
    with_stats: bool,
    report: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-sample losses (math.loss_and_slope) on S_k x_k + D_k - M_y 1[k = y].

    Args:
        logits: (B, C) or (B, C, d1, ...), any strides. target: (B, d1, ...) int64 or int32; for cross-entropy also
            probabilities of the logits' shape, real.
        class_weight: (C) real, or None. adjust: (3, C) real, S, D, M; or None.
        first, second, kind, prune: csrc/math.h LossNumbers; second of GCE is k, or 0.
        report: (4) int64 in pinned host memory, or None. A row whose label is out of range is ignored and, if report[3] is 0,
            reported as (label, row, classes, 1).

    Returns:
        losses (B, d1, ...), real; stats (4, B, d1, ...) real for `logit_loss_backward`, or (0) without `with_stats`; validity,
        as the losses: 1, or 0 where a row is ignored, pruned, or has a label out of range.
    """
    real, shape = launch.real_dtype(logits.dtype), _rows_of(logits)
    losses, validity = logits.new_empty(shape, dtype=real), logits.new_empty(shape, dtype=real)
    stats = logits.new_empty((4, *shape) if with_stats else (0,), dtype=real)
    if losses.numel():
        loss = _loss(logits, target, kind, prune, first, second)
        made = stats if with_stats else None
        _losses(logits, target, class_weight, adjust, loss, ignore_index, None, losses, validity, made, report)
    return losses, stats, validity


def logit_loss_(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    adjust: Tensor | None,
    first: float,
    second: float,
    ignore_index: int,
    *,
    kind: int,
    prune: bool,
    report: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`logit_loss` of contiguous (B, C) logits that are not float16, and over them d loss_i / d logits: 0 for rows that do not
    count.

    Returns:
        losses (B), validity (B), both real.
    """
    if logits.dim() != 2 or not logits.is_contiguous() or logits.dtype == torch.float16:
        raise RuntimeError("logit_loss_: expected contiguous logits (B, C) that are not float16")
    real = launch.real_dtype(logits.dtype)
    losses, validity = logits.new_empty(len(logits), dtype=real), logits.new_empty(len(logits), dtype=real)
    if losses.numel():
        numbers, constants = _loss(logits, target, kind, prune, first, second)
        walk = _walked(logits)[1]
        launch.launch(
            logit_loss_in_place_kernel, walk.programs, logits, logits, target.contiguous(), class_weight, adjust, losses,
            validity, report, losses.numel(), *walk.numbers, ignore_index, *numbers, num_warps=walk.warps, **constants,
            **walk.constants,
        )  # fmt: skip
    return losses, validity


def _losses(logits, target, class_weight, adjust, loss, ignore_index, mask, losses, validity, stats, report) -> None:
    logits, walk = _walked(logits)
    numbers, constants = loss
    launch.launch(
        logit_loss_fwd_kernel, walk.programs, logits, logits, target.contiguous(), class_weight, adjust, mask, losses, validity,
        stats, report, losses.numel(), *walk.numbers, ignore_index, *numbers, num_warps=walk.warps, **constants, **walk.constants,
    )  # fmt: skip


def robust_logit_loss(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    adjust: Tensor | None,
    first: float,
    second: float,
    ignore_index: int,
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
    kind: int,
    prune: bool,
    normalizer: int,
    init_first: bool,
    update: bool,
    with_stats: bool,
    report: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`logit_loss` under `weights.robust_loss`: the robust loss, and with `update` the next state.

    Returns:
        loss (); rows (3, B, d1, ...): losses (0 where ignored), weights, validity; stats as of `logit_loss`, whose
        gradient is that of the robust loss; all real.
    """
    real, shape = launch.real_dtype(logits.dtype), _rows_of(logits)
    rows = logits.new_empty((3, *shape), dtype=real)
    stats = logits.new_empty((4, *shape) if with_stats else (0,), dtype=real)
    count = rows[0].numel()
    if not count:
        return logits.new_zeros((), dtype=real), rows, stats
    loss, made = logits.new_empty((), dtype=real), stats if with_stats else None
    numbers, constants = spec = _loss(logits, target, kind, prune, first, second)
    if count > launch.ONE_LAUNCH:
        _losses(logits, target, class_weight, adjust, spec, ignore_index, mask, rows[0], rows[2], made, report)
        weigh_many(rows[0], score, sample_weight, rows[2], log_s, nonfinite, lam, loss, rows[1], None, None, made, None, None,
                   gamma, alpha, mix, max_weight, normalizer, init_first, update)  # fmt: skip
        return loss, rows, stats
    logits, walk = _walked(logits)
    warps = 8 if count > 4096 else walk.warps  # the last program works alone, on 4 losses a thread at a time
    launch.launch(
        robust_logit_loss_fwd_kernel, walk.programs, logits, logits, target.contiguous(), class_weight, adjust, mask, rows, made,
        report, launch.counter(logits), score, sample_weight, log_s, nonfinite, lam, loss, count, *walk.numbers, ignore_index,
        int(update), *numbers, *parts(gamma, alpha, mix, max_weight), NORMALIZER=NORMALIZERS[normalizer],
        INIT_FIRST=init_first, LIMIT=limit(real, log_s), LOSSES=128 * warps, FENCE=warps * launch.FENCE, num_warps=warps,
        **launch.FEW_REGISTERS.get(real, {}), **constants, **walk.constants,
    )  # fmt: skip
    return loss, rows, stats


def logit_loss_backward(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    adjust: Tensor | None,
    smoothing: float,
    stats: Tensor,
    upstream: Tensor,
) -> Tensor:
    """d (sum of upstream * value) / d logits, contiguous, for the value whose forward pass made `stats`.

    Args:
        smoothing: label smoothing, read with soft targets.
        upstream: real; 0-d, or (B, d1, ...). Each row's gradient is multiplied by it before it is rounded.
    """
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if not grad.numel():
        return grad
    logits, walk = _walked(logits)
    each = any(upstream.stride())
    launch.launch(
        logit_loss_bwd_kernel, walk.backward_programs, logits, logits, target.contiguous(), class_weight, adjust, stats,
        upstream.contiguous() if each else upstream, grad, stats.numel() // 4, *walk.numbers,
        *parts(1 - smoothing, smoothing / max(logits.shape[1], 1)), EACH=each, SOFT=target.is_floating_point(), **walk.backward,
    )  # fmt: skip
    return grad
