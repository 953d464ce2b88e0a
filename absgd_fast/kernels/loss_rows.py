"""The work of a kernel on a tile of logits: the losses of its rows, the numbers of their gradients, and the gradients.

losses.py has the kernels that call these functions, and says how a tile lies in the logits. A row is one sample, or one inner
position of a sample of (B, C, d1, ...). MATH §2 has the formulas.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import loss_and_slope, multiple, nll, number, reference_point, row_gradient, shared_loss

# ---- where a tile lies ---------------------------------------------------------------------------------------------------


@triton.jit
def tile_rows(
    program,
    lanes,
    classes,
    stride_outer,
    stride_lane,
    stride_class,
    ADJACENT: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The tile of a program: (outer, lane, lanes, classes, offset of each row in the logits, stride of classes).

    ADJACENT says what is adjacent in memory: "classes", "lanes" or "neither". UNIT divides the lengths and strides that matter
    for 16-byte loads.
    """
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
def contiguous_place(outer, lane, lanes, classes, col, INNER: tl.constexpr):
    """The offset of class `col` of each row in a contiguous (B, C, d1, ...), as soft targets and the gradient are."""
    wide = col.to(tl.int64)[None, :]
    return (outer * classes + wide) * lanes + lane[:, None] if INNER else lane[:, None] * classes + wide


# ---- labels --------------------------------------------------------------------------------------------------------------


@triton.jit
def label_of(target, row, inside, classes, ignore_index):
    """The label as int32 (-1 if there is none), whether the row counts, and whether the label is out of range.

    The comparisons are made in 64 bits.
    """
    label = tl.load(target + row, mask=inside, other=0).to(tl.int64)
    fits = (label >= 0) & (label < classes)
    counts = inside & (label != ignore_index)
    return tl.where(counts & fits, label, -1).to(tl.int32), counts & fits, counts & (fits == 0)


@triton.jit
def report_label(target, report, row, classes):
    """Write (label, row, classes, 1) to host memory, unless it holds an earlier report that nobody has read yet."""
    flag = (report + 3).to(tl.pointer_type(tl.int32), bitcast=True)  # Triton 3.5 has no comparing exchange of 64 bits
    if tl.atomic_cas(flag, 0, 2, sem="relaxed", scope="sys") == 0:
        tl.store(report, tl.load(target + row).to(tl.int64))
        tl.store(report + 1, row)
        tl.store(report + 2, classes.to(tl.int64))
        # The release at the scope of the system makes the host see the flag no sooner than the three numbers.
        tl.atomic_xchg(flag, 1, sem="release", scope="sys")


@triton.jit
def labels_of_rows(target, report, row, inside, classes, ignore_index, count, SOFT: tl.constexpr, ROWS: tl.constexpr):
    """The label of each row (-1 if there is none), and whether the row counts. A label out of range is reported.

    count (int64) is the number of all rows.
    """
    if SOFT:
        y, valid = tl.full([ROWS], -1, tl.int32), inside
    else:
        y, valid, out_of_range = label_of(target, row, inside, classes, ignore_index)
        if report is not None:
            worst = tl.min(tl.where(out_of_range, row, count), 0)
            if worst < count:
                report_label(target, report, worst, classes)
    return y, valid


@triton.jit
def target_logits(logits, class_weight, adjust, y, labelled, offset, stride_class, classes, T: tl.constexpr, ROWS: tl.constexpr):
    """The adjusted logit a_y, the class weight and the margin of each row's label."""
    x_y = tl.load(logits + offset + y.to(tl.int64) * stride_class, mask=labelled, other=0.0).to(T)
    v_y = tl.full([ROWS], 1.0, T) if class_weight is None else tl.load(class_weight + y, mask=labelled, other=0.0)
    margin = tl.zeros([ROWS], T)
    if adjust is not None:
        margin = tl.load(adjust + 2 * classes + y, mask=labelled, other=0.0)
        x_y = (
            tl.load(adjust + y, mask=labelled, other=1.0) * x_y + tl.load(adjust + classes + y, mask=labelled, other=0.0) - margin
        )
    return x_y, v_y, margin


# ---- the losses of a tile ------------------------------------------------------------------------------------------------


@triton.jit
def class_weights(class_weight, soft, place, col, there, classes, keep, uniform, T: tl.constexpr):
    """The weights of sum_k weight_k (-log p_k): v_k, or (keep t_k + uniform) v_k with soft targets t. 0 outside the tile."""
    v = (
        there.to(T)
        if class_weight is None
        else tl.where(there, tl.load(class_weight + col, mask=col < classes, other=0.0)[None, :], 0.0)
    )
    return v if soft is None else v * (keep * tl.load(soft + place, mask=there, other=0.0) + uniform)


@triton.jit
def adjusted(x, adjust, col, classes):
    """S_k x_k + D_k. A logit outside the tile stays -inf."""
    if adjust is not None:  # Not an early return: Triton would compile what follows it all the same.
        s = tl.load(adjust + col, mask=col < classes, other=1.0)[None, :]
        x = s * x + tl.load(adjust + classes + col, mask=col < classes, other=0.0)[None, :]
    return x


@triton.jit
def loss_numbers(
    keep,
    keep_low,
    uniform,
    uniform_low,
    hyper_a,
    hyper_a_low,
    hyper_b,
    hyper_b_low,
    cut,
    cut_low,
    least,
    least_low,
    T: tl.constexpr,
):
    """The numbers of a loss as `row_losses` takes them (csrc/math/losses.h LossNumbers, csrc/launch.h ClassWeights)."""
    return (
        number(keep, keep_low, T),
        number(uniform, uniform_low, T),
        number(hyper_a, hyper_a_low, T),
        number(hyper_b, hyper_b_low, T),
        number(cut, cut_low, T),
        number(least, least_low, T),
    )


@triton.jit
def walk_classes(
    logits,
    target,
    class_weight,
    adjust,
    tile,
    y,
    inside,
    stop,
    keep,
    uniform,
    T: tl.constexpr,
    WEIGHTS: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One pass along the classes of each row, as an online log-sum-exp.

    Returns:
        max; sum of exp(a - max) without the label; sum of weight; sum of weight (a - max). The last two are 0 with WEIGHTS
        "none". With class vectors (`adjust`) the maximum leaves out the label, and `join_target` adds it.
    """
    outer, lane, lanes, classes, offset, stride_class = tile
    row_max = tl.full([ROWS], float("-inf"), T)
    sumexp_others = tl.zeros([ROWS, BLOCK], T)
    if WEIGHTS != "none":
        sum_gaps, sum_weights = sumexp_others, sumexp_others
    for start in range(0, stop, BLOCK):
        col = start + tl.arange(0, BLOCK)
        there = (col < classes)[None, :]  # Not `stop`: the compiler knows the divisors of `classes` only.
        x = tl.load(
            logits + offset[:, None] + col.to(tl.int64)[None, :] * stride_class, mask=inside[:, None] & there, other=float("-inf")
        ).to(T)
        x = adjusted(x, adjust, col, classes)
        is_target = col[None, :] == y[:, None]
        # A margin changes the logit of the label, so the label joins after the loop.
        new_max = tl.maximum(row_max, tl.max(x if adjust is None else tl.where(is_target, float("-inf"), x), 1))
        point = reference_point(new_max)
        e = tl.exp(x - point[:, None])
        sumexp_others = sumexp_others * tl.exp(row_max - point)[:, None] + tl.where(is_target, 0.0, e)
        if WEIGHTS != "none":
            if WEIGHTS == "soft":
                place = contiguous_place(outer, lane, lanes, classes, col, INNER)
                v = class_weights(class_weight, target, place, col, inside[:, None] & there, classes, keep, uniform, T)
            else:
                v = class_weights(class_weight, None, 0, col, there, classes, keep, uniform, T)
            moved = (reference_point(row_max) - point)[:, None]
            sum_gaps += sum_weights * moved + tl.where(v != 0, v * (x - point[:, None]), 0.0)
            sum_weights += v
        row_max = new_max
    total = tl.sum(sumexp_others, 1)
    zeros = tl.zeros([ROWS], T)
    weights, gaps = (tl.sum(sum_weights, 1), tl.sum(sum_gaps, 1)) if WEIGHTS != "none" else (zeros, zeros)
    return row_max, total, weights, gaps


@triton.jit
def join_target(row_max, sumexp_others, sum_weights, sum_gaps, x_y, v_y, margin, labelled, adjust):
    """The results of `walk_classes`, relative to a maximum that includes the label with its margin."""
    if adjust is not None:
        high = tl.where(labelled, tl.maximum(row_max, x_y), row_max)
        sumexp_others *= tl.exp(reference_point(row_max) - reference_point(high))
        # The margin moves the label's own term of sum_gaps. The reference point of the sum moves with the maximum.
        moved = reference_point(row_max) - reference_point(high)
        sum_gaps += sum_weights * moved - tl.where(margin != 0, v_y * margin, 0.0)
        row_max = high
    return row_max, sumexp_others, sum_gaps


@triton.jit
def row_losses(
    logits, target, class_weight, adjust, mask, losses, validity, stats, report, count, lanes, classes, stride_outer, stride_lane,
    stride_class, ignore_index, numbers,
    KIND: tl.constexpr, PRUNE: tl.constexpr, WEIGHTS: tl.constexpr, INNER: tl.constexpr,
    ADJACENT: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """The losses of this program's rows, and the numbers of their gradient, in one pass over the logits.

    1. It reads labels and masks, and the adjusted logit of each label.
    2. It walks along the classes: maximum, sum of exponentials, sums of class weights.
    3. It makes loss and gradient coefficient of these sums.
    4. It stores losses, validity, and the statistics (max, scale, at_label, smoothing_coef).

    count (int64) is the number of all rows, and numbers come from `loss_numbers`. WEIGHTS says how the classes beside the label
    are weighed: "none", "smooth" (label smoothing) or "soft" (`target` holds probabilities). With PRUNE, a row with
    -log p >= least does not count. With SKIP, the logits of an ignored row are not read.

    Returns:
        label, max, scale, at_label, smoothing_coef of each row. The last three are 0 if the row does not count.
    """
    T: tl.constexpr = losses.dtype.element_ty
    keep, uniform, hyper_a, hyper_b, cut, least = numbers
    tile = tile_rows(tl.program_id(0), lanes, classes, stride_outer, stride_lane, stride_class, ADJACENT, UNIT, ROWS)
    outer, lane, lanes, classes, offset, stride_class = tile
    inside = lane < lanes
    row = outer * lanes + lane
    y, valid = labels_of_rows(target, report, row, inside, classes, ignore_index, count, WEIGHTS == "soft", ROWS)
    if mask is not None:
        valid &= tl.load(mask + row, mask=inside, other=0) != 0
    labelled = valid & (y >= 0)
    x_y, v_y, margin = target_logits(logits, class_weight, adjust, y, labelled, offset, stride_class, classes, T, ROWS)
    # Ignored rows of many classes are not read. With few classes this would only make the tile wait for its labels.
    stop = tl.max(tl.where(valid, classes, 0), 0) if SKIP else classes
    row_max, sumexp_others, sum_weights, sum_gaps = walk_classes(
        logits, target, class_weight, adjust, tile, y, inside, stop, keep, uniform, T, WEIGHTS, INNER, ROWS, BLOCK
    )
    row_max, sumexp_others, sum_gaps = join_target(
        row_max, sumexp_others, sum_weights, sum_gaps, x_y, v_y, margin, labelled, adjust
    )
    max_minus_target = row_max - x_y
    exp_target = tl.exp(-max_minus_target)
    loss, c = tl.zeros([ROWS], T), tl.zeros([ROWS], T)
    if WEIGHTS == "soft":
        max_minus_target, exp_target = loss, loss
    else:
        loss, c = loss_and_slope(max_minus_target, sumexp_others, exp_target, v_y, keep, hyper_a, hyper_b, cut, KIND)
    smoothing_coef = uniform * 0
    if WEIGHTS != "none":
        smoothing_coef = uniform if WEIGHTS == "smooth" else smoothing_coef + 1
        loss += smoothing_coef * shared_loss(max_minus_target, sumexp_others, exp_target, sum_weights, sum_gaps)
    if PRUNE:
        valid &= (nll(max_minus_target, sumexp_others, exp_target) >= least) == 0
    tl.store(losses + row, tl.where(valid, loss, 0.0), mask=inside)
    if validity is not None:
        tl.store(validity + row, valid.to(T), mask=inside)
    scale, at_label = row_gradient(sumexp_others, exp_target, c, smoothing_coef, sum_weights)
    scale, at_label = tl.where(valid, scale, 0.0), tl.where(valid, at_label, 0.0)
    smoothing_coef = tl.where(valid, smoothing_coef, 0.0)
    if stats is not None:
        tl.store(stats + row, row_max, mask=inside)
        tl.store(stats + count + row, scale, mask=inside)
        tl.store(stats + 2 * count + row, at_label, mask=inside)
        tl.store(stats + 3 * count + row, smoothing_coef, mask=inside)
    return y, row_max, scale, at_label, smoothing_coef


# ---- the gradient of a tile ----------------------------------------------------------------------------------------------


@triton.jit
def block_gradient(
    logits, target, class_weight, adjust, grad, tile, col, y, row_max, scale, at_label, smoothing_coef, keep, uniform,
    SOFT: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a tile for the classes `col` (math.row_gradient).

    grad_k = S_k (exp(a_k - max) scale - smoothing_coef weight_k) for k != y, grad_y = S_y (at_label - smoothing_coef weight_y).
    grad may be the logits: whatever is written has been read just before.
    """
    outer, lane, lanes, classes, offset, stride_class = tile
    T: tl.constexpr = scale.dtype
    there = (lane < lanes)[:, None] & (col < classes)[None, :]
    # A row of scale 0 is not read. It may hold anything, and exp(NaN) * 0 is not 0.
    x = tl.load(
        logits + offset[:, None] + col.to(tl.int64)[None, :] * stride_class,
        mask=there & (scale != 0)[:, None],
        other=float("-inf"),
    ).to(T)
    e = tl.exp(adjusted(x, adjust, col, classes) - row_max[:, None])
    g = tl.where(col[None, :] == y[:, None], at_label[:, None], tl.where((scale != 0)[:, None], e * scale[:, None], 0.0))
    place = contiguous_place(outer, lane, lanes, classes, col, INNER)
    if SOFT:
        g -= smoothing_coef[:, None] * class_weights(class_weight, target, place, col, there, classes, keep, uniform, T)
    elif class_weight is None:
        g -= smoothing_coef[:, None]
    else:  # The class weights are read only if a row has label smoothing.
        stop = tl.where(tl.max(tl.abs(smoothing_coef), 0) > 0, classes, 0)
        g -= smoothing_coef[:, None] * tl.load(class_weight + col, mask=col < stop, other=0.0)[None, :]
    if adjust is not None:
        g *= tl.load(adjust + col, mask=col < classes, other=1.0)[None, :]
    tl.store(grad + place, g.to(grad.dtype.element_ty), mask=there)
