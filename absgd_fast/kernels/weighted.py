"""The weighted step (MATH §3.4): the weighted mean of per-sample gradients, and one step of momentum SGD with it.

One launch steps many tensors. It is the twin of csrc/cuda/weighted.cu, but the weights take launches of their own before it
(weights.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _codes
from . import launch, layouts
from .math import multiple, number, sgd_step, slope
from .step import DTYPES, address, rate_of, sgd_form
from .tables import table_of
from .weights import robust_loss

# ---- device --------------------------------------------------------------------------------------------------------------


@triton.jit
def weighted_mean(block, factors, i, inside, batch, count, T: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """sum_r factor_r block[r, i] over the samples r, ROWS at a time. A row of factor 0 takes no part, whatever it holds."""
    mean = tl.zeros([BLOCK], T)
    for first in range(0, batch, ROWS):
        r = first + tl.arange(0, ROWS)
        factor = tl.load(factors + r, mask=r < batch, other=0.0)[:, None]
        some = factor != 0 if inside is None else (factor != 0) & inside[None, :]
        g = tl.load(block + r.to(tl.int64)[:, None] * count + i[None, :], mask=some, other=0.0).to(T)
        mean += tl.sum(factor * g, 0)
    return mean


@triton.jit
def weighted_block(
    param,
    block,
    buffer,
    factors,
    i,
    inside,
    batch,
    count,
    numbers,
    T: tl.constexpr,
    FORM: tl.constexpr,
    DECAYS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step elements i of one tensor with the weighted mean of their gradients. `inside` masks them, unless it is None."""
    lr, weight_decay, momentum, keep = numbers
    mean = weighted_mean(block, factors, i, inside, batch, count, T, ROWS, BLOCK)
    w = tl.load(param + i, mask=inside).to(T)
    b = w if FORM == "plain" else tl.load(buffer + i, mask=inside)
    w, b = sgd_step(w, b, slope(mean, w, weight_decay, DECAYS, MAXIMIZE), lr, momentum, keep, FORM)
    if FORM != "plain":
        tl.store(buffer + i, b, mask=inside)
    tl.store(param + i, w.to(param.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch"])
def weighted_step_kernel(
    table,  # (tensors, 8) int64, as for step_kernel; the gradient is a block (batch, elements)
    owner,  # (programs) int32: the tensor of each program
    factors,  # (batch) real
    nonfinite,  # (1) int64: if it is not 0, nothing is written
    lr_tensor,  # one number, or None
    batch, lr, lr_low, weight_decay, weight_decay_low, momentum, momentum_low, keep, keep_low,  # keep: 1 - dampening
    S: tl.constexpr, T: tl.constexpr, FORM: tl.constexpr, DECAYS: tl.constexpr, MAXIMIZE: tl.constexpr, ALIGNED: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One weighted step of BLOCK elements of one tensor.

    1. If a loss was nonfinite, the program ends and changes nothing.
    2. It looks up its tensor in `owner`, and the addresses of the tensor in `table`.
    3. It reads its columns of the gradients, ROWS samples at a time, and adds them up with their factors.
    4. It steps its elements with that mean, which is never stored.

    S is the dtype that parameters and gradients are stored in, and T that of buffers and computation. UNIT divides the number of
    elements of every tensor, so that rows can be loaded 16 bytes at a time.
    """
    if tl.load(nonfinite) == 0:
        program = tl.program_id(0)
        table += tl.load(owner + program) * 8
        numbers = (
            rate_of(lr, lr_low, lr_tensor, T),
            number(weight_decay, weight_decay_low, T),
            number(momentum, momentum_low, T),
            number(keep, keep_low, T),
        )
        param, block = address(table, 0, S, ALIGNED), address(table, 1, S, ALIGNED)
        buffer = address(table, 5, T, ALIGNED)
        count = multiple(tl.load(table + 2), UNIT)
        start = (program - tl.load(table + 3)) * BLOCK
        i = start + tl.arange(0, BLOCK)
        # A whole block needs no mask. A mask would prevent loads of 16 bytes.
        if start + BLOCK <= count:
            weighted_block(param, block, buffer, factors, i, None, batch, count, numbers, T, FORM, DECAYS, MAXIMIZE, ROWS, BLOCK)
        else:
            weighted_block(
                param, block, buffer, factors, i, i < count, batch, count, numbers, T, FORM, DECAYS, MAXIMIZE, ROWS, BLOCK
            )


KERNELS = (weighted_step_kernel,)


# ---- launcher ------------------------------------------------------------------------------------------------------------

# A program takes _BYTES of a row, 16 for each thread of 4 warps, and _ROWS rows at a time. So a thread has 8 loads of 16 bytes
# under way. If fewer threads shared a row, the sum over rows would go through shared memory.
_BYTES, _ROWS = 2048, 8


def weighted_step_(
    params: list[Tensor],
    buffers: list[Tensor],
    grads: list[Tensor],
    losses: Tensor,
    sample_weight: Tensor | None,
    mask: Tensor | None,
    log_s: Tensor,
    lam_tensor: Tensor | None,
    lr_tensor: Tensor | None,
    lam: float,
    gamma: float,
    alpha: float,
    mix: float,
    max_weight: float,
    lr: float,
    weight_decay: float,
    momentum: float,
    dampening: float,
    form: int,
    *,
    normalizer: int,
    init_first: bool,
) -> Tensor:
    """The Triton kernel of functional.weighted_momentum_step_, which has checked the arguments (_checks.weighted_step).

    Args:
        buffers: the momentum buffers; empty if momentum is 0.
        lam_tensor, lr_tensor: one number each, which takes the place of lam or lr; or None.
        form: bits of _codes.py (csrc/math/step.h StepFlag).

    Returns:
        The next log s. log_s itself is not written.
    """
    new_log_s, nonfinite = log_s.clone(), torch.zeros(1, dtype=torch.int64, device=losses.device)
    if lam_tensor is None:
        lam_tensor = torch.full((), lam, dtype=losses.dtype, device=losses.device)
    _, _, factors = robust_loss(
        losses, None, sample_weight, mask, new_log_s, nonfinite, lam_tensor, gamma, alpha, mix, max_weight,
        normalizer=normalizer, init_first=init_first, update=True, with_grad=True,
    )  # fmt: skip
    numbers = launch.parts(lr, weight_decay, momentum, 1 - dampening)
    for dtype in sorted({p.dtype for p in params}, key=str):
        chosen = [i for i, p in enumerate(params) if p.dtype == dtype]
        lists = [[ts[i] for i in chosen] for ts in (params, grads, buffers) if ts]
        fitted = [[t.contiguous() for t in ts] for ts in lists]
        counts, block = tuple([p.numel() for p in fitted[0]]), _BYTES // dtype.itemsize
        table = table_of(fitted, counts, [], (0,) if buffers else (), block)
        if table.owner.numel():
            launch.launch(
                weighted_step_kernel, table.owner.numel(), losses, table.table, table.owner, factors, nonfinite, lr_tensor,
                len(losses), *numbers, S=DTYPES[dtype], T=DTYPES[losses.dtype], FORM=sgd_form(bool(buffers), form),
                DECAYS=weight_decay != 0, MAXIMIZE=bool(form & _codes.MAXIMIZE), ALIGNED=table.aligned,
                UNIT=launch.unit(dtype.itemsize, *counts), ROWS=_ROWS, BLOCK=block,
            )  # fmt: skip
        for originals, copies in zip(lists[::2], fitted[::2]):
            layouts.write_back(originals, copies)
    return new_log_s
