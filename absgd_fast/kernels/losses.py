"""Losses on logits, alone and with the robust weights (MATH §1, §2): the twin of csrc/cuda/losses.cu.

The forward pass reads the logits once and keeps four numbers for each row. The backward pass reads the logits once more and
writes the gradient (loss_rows.py). The kernels see logits as (outer, lanes, classes) with any strides. `lanes` is the batch, or
the inner positions of one sample of (B, C, d1, ...). A program takes a tile of rows x classes. "real" is float64 for float64
logits, and float32 for all others.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._codes import KINDS, NORMALIZERS
from ..reference import SCE_A
from . import launch
from .launch import parts
from .loss_rows import block_gradient, label_of, loss_numbers, row_losses, tile_rows
from .math import number
from .walk import walked
from .weigh import last_program, weigh
from .weights import limit, weigh_many, without_samples

# ---- kernels -----------------------------------------------------------------------------------------------------------
#
# An optional tensor may be None. Triton does not compile a kernel for each size and stride: ADJACENT and UNIT say what it must
# know of them.

_SIZES = ["count", "lanes", "classes", "stride_outer", "stride_lane", "stride_class", "ignore_index"]


@triton.jit(do_not_specialize=_SIZES)
def logit_loss_fwd_kernel(
    logits,  # (outer, lanes, classes), strides in elements
    target,  # (outer, lanes) int64 or int32; WEIGHTS "soft": probabilities, real, laid out as the gradient
    class_weight,  # (classes) real, or None
    adjust,  # (3, classes) real: S, D, M; or None
    mask,  # (outer, lanes) bool, or None
    losses,  # (outer, lanes) real
    validity,  # (outer, lanes) real, or None
    stats,  # (4, outer, lanes) real: max, scale, at_label, smoothing_coef; or None
    report,  # (4) int64 in pinned host memory, or None
    count, lanes, classes, stride_outer, stride_lane, stride_class, ignore_index,
    keep, keep_low, uniform, uniform_low, hyper_a, hyper_a_low, hyper_b, hyper_b_low, cut, cut_low, least, least_low,
    KIND: tl.constexpr, PRUNE: tl.constexpr, WEIGHTS: tl.constexpr, INNER: tl.constexpr,
    ADJACENT: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """The losses of all rows, and the statistics that backward makes the gradient from. Each program has one tile of rows.

    1. It reads the labels of its rows.
    2. It walks along the classes, BLOCK at a time, and adds up the exponentials.
    3. It stores losses, validity and statistics (loss_rows.row_losses).
    """
    T: tl.constexpr = losses.dtype.element_ty
    numbers = loss_numbers(
        keep, keep_low, uniform, uniform_low, hyper_a, hyper_a_low, hyper_b, hyper_b_low, cut, cut_low, least, least_low, T
    )
    row_losses(
        logits, target, class_weight, adjust, mask, losses, validity, stats, report, count.to(tl.int64), lanes, classes,
        stride_outer, stride_lane, stride_class, ignore_index, numbers, KIND, PRUNE, WEIGHTS, INNER, ADJACENT, UNIT, ROWS, BLOCK,
        SKIP,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*_SIZES, "update"])
def robust_logit_loss_fwd_kernel(
    logits, target, class_weight, adjust, mask,  # as above
    sample_stats,  # (3, outer, lanes) real: losses, weights, validity
    stats, report,  # as above
    done,  # launch.counter
    score, sample_weight,  # (outer, lanes) real, or None
    log_s, nonfinite, lam,  # one number each
    loss,  # () real
    count, lanes, classes, stride_outer, stride_lane, stride_class, ignore_index, update,
    keep, keep_low, uniform, uniform_low, hyper_a, hyper_a_low, hyper_b, hyper_b_low, cut, cut_low, least, least_low,
    gamma, gamma_low, alpha, alpha_low, mix, mix_low, max_weight, max_weight_low,
    KIND: tl.constexpr, PRUNE: tl.constexpr, WEIGHTS: tl.constexpr, INNER: tl.constexpr,
    ADJACENT: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SKIP: tl.constexpr,
    NORMALIZER: tl.constexpr, INIT_FIRST: tl.constexpr, LIMIT: tl.constexpr, LOSSES: tl.constexpr, FENCE: tl.constexpr,
):  # fmt: skip
    """The robust loss of up to ONE_LAUNCH rows.

    1. Each program makes losses, validity and statistics of its rows, as logit_loss_fwd_kernel does.
    2. The program that finishes last reads the losses of all rows, LOSSES at a time, and settles log s'. With a target for the
       effective sample size it reads them once more for each lambda that it tries.
    3. The same program reads them again, stores weights, loss and the next state, and multiplies the statistics by the factors.
    """
    T: tl.constexpr = sample_stats.dtype.element_ty
    count = count.to(tl.int64)
    numbers = loss_numbers(
        keep, keep_low, uniform, uniform_low, hyper_a, hyper_a_low, hyper_b, hyper_b_low, cut, cut_low, least, least_low, T
    )
    row_losses(
        logits, target, class_weight, adjust, mask, sample_stats, sample_stats + 2 * count, stats, report, count, lanes, classes,
        stride_outer, stride_lane, stride_class, ignore_index, numbers, KIND, PRUNE, WEIGHTS, INNER, ADJACENT, UNIT, ROWS, BLOCK,
        SKIP,
    )  # fmt: skip
    if last_program(done, FENCE):
        weigh(
            sample_stats, score, sample_weight, sample_stats + 2 * count, log_s, nonfinite, lam, loss, sample_stats + count, None,
            None, stats, None, None, count, update, number(gamma, gamma_low, tl.float64), number(alpha, alpha_low, tl.float64),
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
    """The gradient of every row, times the upstream gradient. Each program has a tile of rows and one block of classes.

    1. It reads labels, upstream gradients and statistics of its rows.
    2. It multiplies the statistics by the upstream gradients.
    3. It reads the logits of its classes and writes the gradient (loss_rows.block_gradient).

    EACH: every row has an upstream gradient of its own. SOFT: `target` holds probabilities.
    """
    T: tl.constexpr = stats.dtype.element_ty
    col_blocks = tl.cdiv(classes, BLOCK)
    program = tl.program_id(0)
    tile = tile_rows(program // col_blocks, lanes, classes, stride_outer, stride_lane, stride_class, ADJACENT, UNIT, ROWS)
    outer, lane, lanes, classes, _offset, stride_class = tile
    count = count.to(tl.int64)
    inside = lane < lanes
    row = outer * lanes + lane
    y = tl.full([ROWS], -1, tl.int32) if SOFT else label_of(target, row, inside, classes, -1)[0]
    u = tl.load(upstream + row, mask=inside, other=0.0) if EACH else tl.load(upstream)
    scale = tl.load(stats + count + row, mask=inside, other=0.0) * u
    at_label = tl.load(stats + 2 * count + row, mask=inside, other=0.0) * u
    row_max = tl.load(stats + row, mask=inside, other=0.0)
    smoothing_coef = tl.load(stats + 3 * count + row, mask=inside, other=0.0) * u
    block_gradient(
        logits, target, class_weight, adjust, grad, tile, program % col_blocks * BLOCK + tl.arange(0, BLOCK), y, row_max, scale,
        at_label, smoothing_coef, number(keep, keep_low, T), number(uniform, uniform_low, T), SOFT, INNER,
    )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def logit_loss_in_place_kernel(
    logits,  # (lanes, classes) contiguous; overwritten by the gradient of each row's own loss
    target, class_weight, adjust, losses, validity, report,  # as above
    count, lanes, classes, stride_outer, stride_lane, stride_class, ignore_index,
    keep, keep_low, uniform, uniform_low, hyper_a, hyper_a_low, hyper_b, hyper_b_low, cut, cut_low, least, least_low,
    KIND: tl.constexpr, PRUNE: tl.constexpr, WEIGHTS: tl.constexpr, INNER: tl.constexpr,
    ADJACENT: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """The losses of all rows, and over the logits their gradients. Each program has one tile of rows.

    1. It makes losses, validity and the numbers of the gradient of its rows (loss_rows.row_losses).
    2. All its threads wait until the logits of the tile have been read.
    3. It reads the logits again, now from the second-level cache, and overwrites them with the gradient.
    """
    T: tl.constexpr = losses.dtype.element_ty
    numbers = loss_numbers(
        keep, keep_low, uniform, uniform_low, hyper_a, hyper_a_low, hyper_b, hyper_b_low, cut, cut_low, least, least_low, T
    )
    y, row_max, scale, at_label, smoothing_coef = row_losses(
        logits, target, class_weight, adjust, None, losses, validity, None, report, count.to(tl.int64), lanes, classes,
        stride_outer, stride_lane, stride_class, ignore_index, numbers, KIND, PRUNE, WEIGHTS, INNER, ADJACENT, UNIT, ROWS, BLOCK,
        SKIP,
    )  # fmt: skip
    tile = tile_rows(tl.program_id(0), lanes, classes, stride_outer, stride_lane, stride_class, ADJACENT, UNIT, ROWS)
    tl.debug_barrier()  # Every thread has read what another one may overwrite.
    for start in range(0, tile[3], BLOCK):  # tile[3] is `classes` in the form whose divisor the compiler knows.
        block_gradient(
            logits, target, class_weight, adjust, logits, tile, start + tl.arange(0, BLOCK), y, row_max, scale, at_label,
            smoothing_coef, numbers[0], numbers[1], WEIGHTS == "soft", INNER,
        )  # fmt: skip


KERNELS = (logit_loss_fwd_kernel, robust_logit_loss_fwd_kernel, logit_loss_bwd_kernel, logit_loss_in_place_kernel)


# ---- launchers -----------------------------------------------------------------------------------------------------------

_CE, _GCE, _SCE = (KINDS.index(name) for name in ("ce", "gce", "sce"))


@lru_cache(1024)
def _loss_numbers(kind: int, prune: bool, hyper_a: float, hyper_b: float, classes: int) -> tuple[tuple[float, ...], dict]:
    """The numbers and constants of a loss (csrc/math/losses.h LossNumbers, csrc/launch.h ClassWeights)."""
    label_smoothing = hyper_a if kind == _CE else 0.0
    cut, least = 0.0, math.inf
    if kind == _GCE and hyper_b > 0:
        q, k = hyper_a, hyper_b
        cut = -math.expm1(q * math.log(k)) / q
        least = -math.log(k) if prune else least
    if kind == _SCE:
        hyper_b *= SCE_A
    numbers = parts(1 - label_smoothing, label_smoothing / max(classes, 1), hyper_a, hyper_b, cut, least)
    return numbers, {"KIND": kind, "PRUNE": math.isfinite(least), "WEIGHTS": "smooth" if label_smoothing else "none"}


class _Loss(NamedTuple):
    """A loss with its tensors beside the logits, as the kernels take them."""

    target: Tensor
    class_weight: Tensor | None
    adjust: Tensor | None
    ignore_index: int
    numbers: tuple[float, ...]
    constants: dict

    @classmethod
    def of(cls, logits, target, class_weight, adjust, hyper_a, hyper_b, ignore_index, kind, prune) -> _Loss:
        numbers, constants = _loss_numbers(kind, prune, hyper_a, hyper_b, logits.shape[1])
        if target.is_floating_point():
            constants = constants | {"WEIGHTS": "soft"}
        return cls(target.contiguous(), class_weight, adjust, ignore_index, numbers, constants)

    def launch(self, kernel, logits: Tensor, count: int, *tensors: Tensor | None) -> None:
        """Launch a kernel that makes per-sample losses only. tensors: the arguments that it takes after `adjust`."""
        logits, walk = walked(logits)
        launch.launch(
            kernel,
            walk.programs,
            logits,
            logits,
            self.target,
            self.class_weight,
            self.adjust,
            *tensors,
            count,
            *walk.numbers,
            self.ignore_index,
            *self.numbers,
            num_warps=walk.warps,
            **self.constants,
            **walk.constants,
        )


def _new_rows(logits: Tensor, *leading: int) -> Tensor:
    """A new tensor with `leading` real numbers for each row; with one if `leading` is left out."""
    return logits.new_empty((*leading, logits.shape[0], *logits.shape[2:]), dtype=launch.real_dtype(logits.dtype))


def _new_stats(logits: Tensor, with_stats: bool) -> Tensor:
    return _new_rows(logits, 4) if with_stats else logits.new_empty((0,), dtype=launch.real_dtype(logits.dtype))


def logit_loss(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    adjust: Tensor | None,
    hyper_a: float,
    hyper_b: float,
    ignore_index: int,
    *,
    kind: int,
    prune: bool,
    with_stats: bool,
    report: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-sample losses on the adjusted logits S_k x_k + D_k - M_y 1[k = y] (MATH §2.1, math.loss_and_slope).

    Args:
        logits: (B, C) or (B, C, d1, ...), any strides.
        target: (B, d1, ...) int64 or int32. For cross-entropy also probabilities of the logits' shape, real.
        class_weight: (C) real, or None.
        adjust: (3, C) real: S, D, M; or None.
        hyper_a, hyper_b, kind, prune: see _codes.py HYPERPARAMETERS and csrc/math/losses.h LossNumbers.
        report: (4) int64 in pinned host memory, or None. A row whose label is out of range is ignored. If report[3] is 0, it is
            reported as (label, row, classes, 1).

    Returns:
        losses (B, d1, ...), real; stats (4, B, d1, ...), real, for `logit_loss_backward`, or (0) without `with_stats`; validity,
        like the losses: 1, or 0 if a row is ignored, pruned, or has a label out of range.
    """
    losses, validity, stats = _new_rows(logits), _new_rows(logits), _new_stats(logits, with_stats)
    if losses.numel():
        loss = _Loss.of(logits, target, class_weight, adjust, hyper_a, hyper_b, ignore_index, kind, prune)
        saved = stats if with_stats else None
        loss.launch(logit_loss_fwd_kernel, logits, losses.numel(), None, losses, validity, saved, report)
    return losses, stats, validity


def logit_loss_(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    adjust: Tensor | None,
    hyper_a: float,
    hyper_b: float,
    ignore_index: int,
    *,
    kind: int,
    prune: bool,
    report: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`logit_loss` of contiguous (B, C) logits that are not float16, which are overwritten by d loss_i / d logits.

    The gradient of a row that does not count is 0.

    Returns:
        losses (B), validity (B), both real.
    """
    if logits.dim() != 2 or not logits.is_contiguous() or logits.dtype == torch.float16:
        raise RuntimeError("logit_loss_: expected contiguous logits (B, C) that are not float16")
    losses, validity = _new_rows(logits), _new_rows(logits)
    if losses.numel():
        loss = _Loss.of(logits, target, class_weight, adjust, hyper_a, hyper_b, ignore_index, kind, prune)
        loss.launch(logit_loss_in_place_kernel, logits, losses.numel(), losses, validity, report)
    return losses, validity


def robust_logit_loss(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    adjust: Tensor | None,
    hyper_a: float,
    hyper_b: float,
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
    """`logit_loss` followed by `weights.robust_loss`: the robust loss of the batch, and with `update` the next state.

    Returns:
        loss (); sample_stats (3, B, d1, ...): losses (0 where ignored), weights, validity; stats as from `logit_loss`, but for
        the gradient of the robust loss. All are real.
    """
    sample_stats, stats = _new_rows(logits, 3), _new_stats(logits, with_stats)
    real, count = sample_stats.dtype, sample_stats[0].numel()
    if not count:
        without_samples(lam, normalizer)
        return logits.new_zeros((), dtype=real), sample_stats, stats
    value, saved = logits.new_empty((), dtype=real), stats if with_stats else None
    loss = _Loss.of(logits, target, class_weight, adjust, hyper_a, hyper_b, ignore_index, kind, prune)
    if count > launch.ONE_LAUNCH:
        losses, weights, validity = sample_stats.unbind()
        loss.launch(logit_loss_fwd_kernel, logits, count, mask, losses, validity, saved, report)
        weigh_many(losses, score, sample_weight, validity, log_s, nonfinite, lam, value, weights, None, None, saved, None, None,
                   gamma, alpha, mix, max_weight, normalizer, init_first, update)  # fmt: skip
        return value, sample_stats, stats
    logits, walk = walked(logits)
    warps = 8 if count > 4096 else walk.warps  # The last program works alone, on 4 losses a thread at a time.
    launch.launch(
        robust_logit_loss_fwd_kernel, walk.programs, logits, logits, loss.target, class_weight, adjust, mask, sample_stats, saved,
        report, launch.counter(logits), score, sample_weight, log_s, nonfinite, lam, value, count, *walk.numbers, ignore_index,
        int(update), *loss.numbers, *parts(gamma, alpha, mix, max_weight), NORMALIZER=NORMALIZERS[normalizer],
        INIT_FIRST=init_first, LIMIT=limit(real, log_s), LOSSES=128 * warps, FENCE=warps * launch.FENCE, num_warps=warps,
        **launch.FEW_REGISTERS.get(real, {}), **loss.constants, **walk.constants,
    )  # fmt: skip
    return value, sample_stats, stats


def logit_loss_backward(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    adjust: Tensor | None,
    label_smoothing: float,
    stats: Tensor,
    upstream: Tensor,
) -> Tensor:
    """The gradient of the forward pass that made `stats`, times the upstream gradient: contiguous, like the logits.

    Args:
        label_smoothing: used with soft targets only.
        upstream: real, 0-d or (B, d1, ...). The gradient of each row is multiplied by it before it is rounded.
    """
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if not grad.numel():
        return grad
    logits, walk = walked(logits)
    each = any(upstream.stride())
    launch.launch(
        logit_loss_bwd_kernel,
        walk.backward_programs,
        logits,
        logits,
        target.contiguous(),
        class_weight,
        adjust,
        stats,
        upstream.contiguous() if each else upstream,
        grad,
        stats.numel() // 4,
        *walk.numbers,
        *parts(1 - label_smoothing, label_smoothing / max(logits.shape[1], 1)),
        EACH=each,
        SOFT=target.is_floating_point(),
        **walk.backward,
    )
    return grad
