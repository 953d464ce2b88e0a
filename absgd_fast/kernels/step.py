"""The momentum step of many tensors in one launch: the twin of csrc/cpu/step.cpp.

A program takes BLOCK elements of one tensor. Which tensor that is stands in `owner`; addresses and sizes stand in a table
in device memory. Both are uploaded once for a set of tensors and never written again, so that a captured graph may keep
using them.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import lru_cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from . import launch
from .launch import parts
from .math import divide, number, sgd_update


# ---- device --------------------------------------------------------------------------------------------------------------


@triton.jit
def address(table, field: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table + field).to(tl.pointer_type(T))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def step_block(
    param, grad, buffer, i, inside, scale, lr, momentum, keep, weight_decay,
    FORM: tl.constexpr, DECAYS: tl.constexpr, MAXIMIZE: tl.constexpr,
):  # fmt: skip
    """Elements i of one tensor; `inside` masks them, or is None."""
    w, g = tl.load(param + i, mask=inside), tl.load(grad + i, mask=inside)
    v = w if FORM == "plain" else tl.load(buffer + i, mask=inside)
    if scale is not None:
        g = divide(g, scale)
        tl.store(grad + i, g, mask=inside)
    w, v = sgd_update(w, v, g, lr, momentum, keep, weight_decay, FORM, DECAYS, MAXIMIZE)
    if FORM != "plain":
        tl.store(buffer + i, v, mask=inside)
    tl.store(param + i, w, mask=inside)


@triton.jit
def sgd_step_kernel(
    table,  # (tensors, 5) int64: parameter, gradient, momentum buffer, elements, first program
    owner,  # (programs) int32: the tensor of each program
    lr_tensor, grad_scale, found_inf,  # one number each, or None
    lr, lr_low, momentum, momentum_low, keep, keep_low, weight_decay, weight_decay_low,
    T: tl.constexpr, FORM: tl.constexpr, DECAYS: tl.constexpr, MAXIMIZE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    rate = number(lr, lr_low, T) if lr_tensor is None else tl.load(lr_tensor).to(T)
    scale = None if grad_scale is None else tl.load(grad_scale).to(T)
    momentum, keep = number(momentum, momentum_low, T), number(keep, keep_low, T)
    weight_decay = number(weight_decay, weight_decay_low, T)
    program = tl.program_id(0)
    table += tl.load(owner + program) * 5
    param, grad = address(table, 0, T, ALIGNED), address(table, 1, T, ALIGNED)
    buffer = address(table, 2, T, ALIGNED)
    count = tl.load(table + 3)
    start = (program - tl.load(table + 4)) * BLOCK
    i = start + tl.arange(0, BLOCK)
    # a whole block needs no mask, which would stand in the way of loads of 16 bytes
    if start + BLOCK <= count:
        step_block(param, grad, buffer, i, None, scale, rate, momentum, keep, weight_decay, FORM, DECAYS, MAXIMIZE)
    else:
        step_block(param, grad, buffer, i, i < count, scale, rate, momentum, keep, weight_decay, FORM, DECAYS, MAXIMIZE)


KERNELS = (sgd_step_kernel,)


# ---- launcher ------------------------------------------------------------------------------------------------------------

_BLOCK = 2048  # 16 elements a thread of 4 warps: 4 loads of 16 bytes from each of parameter, gradient and buffer under way
_KEPT = 64  # sets of tensors whose table is kept
_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
_tables: OrderedDict[tuple, tuple[Tensor, Tensor, bool, bool]] = OrderedDict()
_captured: list = []  # what captured graphs read again at every replay


def _upload(numbers: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """To the device without waiting for it."""
    host = torch.tensor(numbers, dtype=dtype, pin_memory=device.type != "cpu")
    return host.to(device, non_blocking=True), host


def _overlaps(starts: tuple[int, ...], counts: tuple[int, ...], itemsize: int) -> bool:
    """Whether tensors that are written share memory."""
    ranges = sorted((start, start + count * itemsize) for start, count in zip(starts, counts) if count)
    return any(end > start for (_, end), (start, _) in zip(ranges, ranges[1:]))


def _table(pointers: tuple[int, ...], counts: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor, bool, bool]:
    """(table, owner, whether every address is a multiple of 16, whether written tensors share memory) for pointers (params,
    grads, buffers) and their sizes."""
    index = like.get_device()
    key = pointers, counts, index, 0 if index < 0 else driver.active.get_current_stream(index)
    captures = like.is_cuda and torch.cuda.is_current_stream_capturing()
    made = _tables.get(key)
    if made is None:
        tensors = len(counts)
        programs = [-(-count // _BLOCK) for count in counts]
        first = [0, *accumulate(programs)]
        params, grads, buffers = (pointers[j * tensors : (j + 1) * tensors] for j in range(3))
        rows = zip(params, grads, buffers or params, counts, first)
        table = _upload([field for row in rows for field in row], torch.int64, like.device)
        owner = _upload([j for j, n in enumerate(programs) for _ in range(n)], torch.int32, like.device)
        shared = _overlaps(params + buffers, counts * 2, like.element_size())
        made = table[0], owner[0], not any(pointer % 16 for pointer in pointers), shared
        if captures:  # the copies belong to the graph: nothing has been copied yet, and every replay copies again
            _captured.append((table, owner))
            return made
        _tables[key] = made
        if len(_tables) > _KEPT:
            _tables.popitem(last=False)
    if captures:
        _captured.append(made)
    _tables.move_to_end(key)
    return made


@lru_cache(1024)
def _numbers(lr: float, momentum: float, dampening: float, weight_decay: float) -> tuple[float, ...]:
    return parts(lr, momentum, 1 - dampening, weight_decay)


def _dense(t: Tensor) -> bool:
    """Whether the elements fill a block of memory, each place once, in whatever order of dimensions (channels_last)."""
    block = 1
    for stride, size in sorted((stride, size) for size, stride in zip(t.shape, t.stride()) if size > 1):
        if stride != block:
            return False
        block *= size
    return True


def _fitted(t: Tensor, like: Tensor) -> Tensor:
    """t in the layout of `like`, which is dense; a copy where it is not."""
    if t.shape != like.shape:
        raise ValueError(f"sgd_step_: got a gradient or buffer of shape {tuple(t.shape)} for a parameter of {tuple(like.shape)}")
    if all(a == b for a, b, size in zip(t.stride(), like.stride(), t.shape) if size > 1):
        return t
    return torch.empty_like(like).copy_(t)


def sgd_step_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    lr_tensor: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    heavy_ball: bool,
) -> None:
    """One step of momentum SGD on all tensors, in place (reference.momentum_step_).

    Args:
        params, grads, momentum_buffers: float32 or float64, equal shapes; no buffers where momentum is 0.
        lr_tensor: one number, used instead of lr. grad_scale: one number; gradients are divided by it, in place.
        found_inf: one number; where it is not 0 nothing is written. All on the device of the parameters.
    """
    if not params:
        return
    dtypes = {p.dtype for p in params}
    if len(dtypes) > 1:
        for dtype in dtypes:
            some = [[t for t, p in zip(ts, params) if p.dtype == dtype] for ts in (params, grads, momentum_buffers)]
            sgd_step_(
                *some, lr_tensor, grad_scale, found_inf, lr, momentum, dampening, weight_decay, nesterov, maximize, heavy_ball
            )
        return
    (dtype,) = dtypes
    lists = params, grads, momentum_buffers
    sizes = [p.numel() for p in params]
    # contiguous tensors of one size lie alike; anything else is looked at
    if not all([t.is_contiguous() for ts in lists for t in ts]) or any(
        [t.numel() for t in ts] != sizes for ts in lists[1:] if ts
    ):
        like = [p if _dense(p) else p.contiguous() for p in params]
        lists = like, *([_fitted(t, p) for t, p in zip(ts, like)] for ts in lists[1:])
    if not any(sizes):
        return
    table, owner, aligned, shared = _table(tuple([t.data_ptr() for ts in lists for t in ts]), tuple(sizes), params[0])
    if shared and len(params) > 1:  # one after the other, as without a kernel
        for one in zip(*(ts for ts in lists if ts)):
            p, g, *b = ([t] for t in one)
            sgd_step_(
                p, g, *b or [[]], lr_tensor, grad_scale, found_inf, lr, momentum, dampening, weight_decay, nesterov, maximize,
                heavy_ball,
            )  # fmt: skip
        return
    form = "plain" if momentum == 0 else "heavy_ball" if heavy_ball else "nesterov" if nesterov else "momentum"
    launch.launch(
        sgd_step_kernel, owner.numel(), params[0], table, owner, lr_tensor, grad_scale, found_inf,
        *_numbers(lr, momentum, dampening, weight_decay), T=_DTYPES[dtype], FORM=form, DECAYS=weight_decay != 0,
        MAXIMIZE=maximize, ALIGNED=aligned, BLOCK=_BLOCK,
    )  # fmt: skip
    if lists[0] is not params:
        written = [(params, lists[0]), (momentum_buffers, lists[2])] + ([] if grad_scale is None else [(grads, lists[1])])
        for original, copy in ((t, c) for ts, cs in written for t, c in zip(ts, cs)):
            if copy is not original:
                original.copy_(copy)
