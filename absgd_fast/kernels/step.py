"""One step of an optimizer for many tensors in one launch: the twin of csrc/cpu/step.cpp.

A program takes BLOCK elements of one tensor. Which tensor that is stands in `owner`; addresses and sizes stand in a table
in device memory. Both are uploaded once for a set of tensors and never written again, so that a captured graph may keep
using them. Rules that count steps have a small kernel before that one: it writes what the step owes to the count, then
counts. So no program finds a count that another has already raised, and the corrections, in float64, are computed once
for a tensor.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from . import launch
from .launch import parts, real_dtype
from .math import adagrad_step, adam_step, corrections, divide, number, rms_prop_step, sgd_step, slope

RULES = ("sgd", "adam", "rmsprop", "adagrad")  # in the order of csrc/math.h Rule


# ---- device --------------------------------------------------------------------------------------------------------------


@triton.jit
def address(table, field: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table + field).to(tl.pointer_type(T))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def rate_of(lr, lr_low, lr_tensor, T: tl.constexpr):
    return number(lr, lr_low, T) if lr_tensor is None else tl.load(lr_tensor).to(T)


@triton.jit
def goes(found_inf, robust):
    """Whether the step is taken: no infinite gradient, no row without a finite loss."""
    go = tl.full([], 1, tl.int1)
    if found_inf is not None:
        go &= tl.load(found_inf) == 0
    if robust is not None:
        go &= tl.load(robust + 5) == 0
    return go


@triton.jit
def step_block(
    param, grad, state_0, state_1, state_2, i, inside, grad_scale, gain, numbers,
    T: tl.constexpr, RULE: tl.constexpr, FORM: tl.constexpr, STATES: tl.constexpr, DECAY: tl.constexpr, MAXIMIZE: tl.constexpr,
):  # fmt: skip
    """Elements i of one tensor; `inside` masks them, or is None."""
    lr, weight_decay, first, new_first, second, new_second, eps, rate, scale = numbers
    w, g = tl.load(param + i, mask=inside).to(T), tl.load(grad + i, mask=inside).to(T)
    s_0 = tl.load(state_0 + i, mask=inside) if STATES & 1 else w
    s_1 = tl.load(state_1 + i, mask=inside) if STATES & 2 else w
    s_2 = tl.load(state_2 + i, mask=inside) if STATES & 4 else w
    if grad_scale is not None:
        g = divide(g, grad_scale)
        tl.store(grad + i, g.to(grad.dtype.element_ty), mask=inside)
    if gain is not None:
        g *= gain
    g = slope(g, w, weight_decay, DECAY == "gradient", MAXIMIZE)
    if RULE == "sgd":
        w, s_0 = sgd_step(w, s_0, g, lr, first, new_second, FORM)
    elif RULE == "adam":
        w, s_0, s_1, s_2 = adam_step(
            w, s_0, s_1, s_2, g, new_first, second, new_second, eps, rate, scale, lr * weight_decay, STATES & 4 != 0,
            DECAY == "decoupled",
        )  # fmt: skip
    elif RULE == "rmsprop":
        w, s_0, s_1, s_2 = rms_prop_step(
            w, s_0, s_1, s_2, g, first, new_first, second, eps, lr, STATES & 2 != 0, STATES & 4 != 0
        )  # fmt: skip
    else:
        w, s_0 = adagrad_step(w, s_0, g, eps, rate)
    if STATES & 1:
        tl.store(state_0 + i, s_0, mask=inside)
    if STATES & 2:
        tl.store(state_1 + i, s_1, mask=inside)
    if STATES & 4:
        tl.store(state_2 + i, s_2, mask=inside)
    tl.store(param + i, w.to(param.dtype.element_ty), mask=inside)


@triton.jit
def step_kernel(
    table,  # (tensors, 8) int64: parameter, gradient, elements, first program, count of steps, three states
    owner,  # (programs) int32: the tensor of each program
    corrected,  # (tensors, 2) real: lr / c_1 and 1 / c_2, or None: lr and 1
    lr_tensor, grad_scale, found_inf,  # one number each, or None
    robust,  # math.h Settled, or None
    lr, lr_low, weight_decay, weight_decay_low, first, first_low, new_first, new_first_low, second, second_low,
    new_second, new_second_low, eps, eps_low,  # new: 1 - the number
    S: tl.constexpr, T: tl.constexpr, RULE: tl.constexpr, FORM: tl.constexpr, STATES: tl.constexpr, DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """S: how parameters and gradients are stored. STATES: the states that are kept, as bits. FORM: of sgd_step."""
    if goes(found_inf, robust):
        program = tl.program_id(0)
        tensor = tl.load(owner + program)
        table += tensor * 8
        rate = rate_of(lr, lr_low, lr_tensor, T)
        numbers = (
            rate,
            number(weight_decay, weight_decay_low, T),
            number(first, first_low, T),
            number(new_first, new_first_low, T),
            number(second, second_low, T),
            number(new_second, new_second_low, T),
            number(eps, eps_low, T),
            rate if corrected is None else tl.load(corrected + 2 * tensor),
            tl.full([], 1, T) if corrected is None else tl.load(corrected + 2 * tensor + 1),
        )
        scale = None if grad_scale is None else tl.load(grad_scale).to(T)
        gain = None if robust is None else tl.load(robust + 1).to(T)
        param, grad = address(table, 0, S, ALIGNED), address(table, 1, S, ALIGNED)
        state_0, state_1 = address(table, 5, T, ALIGNED), address(table, 6, T, ALIGNED)
        state_2 = address(table, 7, T, ALIGNED)
        count = tl.load(table + 2)
        start = (program - tl.load(table + 3)) * BLOCK
        i = start + tl.arange(0, BLOCK)
        # a whole block needs no mask, which would stand in the way of loads of 16 bytes
        if start + BLOCK <= count:
            step_block(
                param, grad, state_0, state_1, state_2, i, None, scale, gain, numbers, T, RULE, FORM, STATES, DECAY, MAXIMIZE
            )  # fmt: skip
        else:
            step_block(
                param, grad, state_0, state_1, state_2, i, i < count, scale, gain, numbers, T, RULE, FORM, STATES, DECAY, MAXIMIZE
            )  # fmt: skip


@triton.jit(do_not_specialize=["tensors"])
def count_steps_kernel(
    table, corrected, lr_tensor, found_inf, robust,  # as above
    tensors, lr, lr_low, first, first_low, second, second_low,  # first, second: of `corrections`
    C: tl.constexpr, RULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One more step for every tensor, and what this one owes to its count. C: how counts are stored."""
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tensors = tl.where(goes(found_inf, robust), tensors, 0)
    inside = tensor < tensors
    count = tl.load(table + 8 * tensor + 4, mask=inside, other=0).to(tl.pointer_type(C))
    steps = tl.load(count, mask=inside, other=0.0) + 1
    if corrected is not None:
        D: tl.constexpr = tl.float64
        c_1, c_2 = corrections(steps.to(D), number(first, first_low, D), number(second, second_low, D), RULE)
        T: tl.constexpr = corrected.dtype.element_ty
        tl.store(corrected + 2 * tensor, (rate_of(lr, lr_low, lr_tensor, D) / c_1).to(T), mask=inside)
        tl.store(corrected + 2 * tensor + 1, (1 / c_2).to(T), mask=inside)
    tl.store(count, steps, mask=inside)


KERNELS = (step_kernel, count_steps_kernel)


# ---- launcher ------------------------------------------------------------------------------------------------------------

# elements of a program, 16 (float64: 8) a thread of 4 warps: 4 loads of 16 bytes from each state under way
_BLOCK = {torch.float32: 2048, torch.float64: 1024}
_COUNT_BLOCK = 128  # tensors of a program of count_steps_kernel
_KEPT = 64  # sets of tensors whose table is kept, and for which pinned memory is
_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_MAXIMIZE, _NESTEROV, _HEAVY_BALL, _AMSGRAD, _DECOUPLED, _PAPER_FORM, _CENTERED = (1 << j for j in range(7))  # math.h StepFlag


class _Table(NamedTuple):
    table: Tensor
    owner: Tensor
    corrected: Tensor
    aligned: bool  # every address is a multiple of 16
    shared: bool  # some of the tensors that are written share memory


_tables: OrderedDict[tuple, _Table] = OrderedDict()
_captured: list = []  # what captured graphs read again at every replay


def _pinned(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type != "cpu")


class _Reserve:
    """Pinned memory for what is uploaded while a stream is captured: then CUDA may refuse to allocate any. A graph copies from it
    at every replay, so what was taken is neither written again nor given back."""

    def __init__(self):
        self.memory, self.left = torch.empty(0, dtype=torch.uint8), 0
        self.sizes: OrderedDict[tuple, int] = OrderedDict()
        self.needed = 0

    def know(self, tensors: tuple, size: int) -> None:
        """A set of tensors whose uploads take so many bytes: a graph may want them again, with other addresses."""
        self.sizes[tensors] = size
        self.sizes.move_to_end(tensors)
        if len(self.sizes) > _KEPT:
            self.sizes.popitem(last=False)
        self.needed = sum(self.sizes.values())

    def refill(self, device: torch.device) -> None:
        """Outside of a capture: as much as the graph of a step with all those sets needs."""
        if self.left < self.needed:
            self.memory, self.left = _pinned(self.needed, device), self.needed

    def take(self, size: int, device: torch.device) -> Tensor:
        """More than there is: as torch can get it."""
        if size > self.left:
            return _pinned(size, device)
        taken, self.memory, self.left = self.memory[:size], self.memory[size:], self.left - size
        return taken


_reserve = _Reserve()


class _Upload(NamedTuple):
    device: Tensor
    host: Tensor


def _room(numbers: Tensor) -> int:
    """Bytes for them, up to where the next may begin."""
    return -(-numbers.nbytes // 16) * 16


def _upload(numbers: list[int], dtype: torch.dtype, device: torch.device, captures: bool) -> _Upload:
    """To the device without waiting for it."""
    if captures:
        plain = torch.tensor(numbers, dtype=dtype)
        host = _reserve.take(_room(plain), device)[: plain.nbytes].view(dtype).copy_(plain)
    else:
        host = torch.tensor(numbers, dtype=dtype, pin_memory=device.type != "cpu")
    return _Upload(host.to(device, non_blocking=True), host)


def _overlaps(ranges: list[tuple[int, int]]) -> bool:
    ranges = sorted(ends for ends in ranges if ends[0] < ends[1])
    return any(end > start for (_, end), (start, _) in zip(ranges, ranges[1:]))


def _table(
    tensors: list[Sequence[Tensor]], counts: tuple[int, ...], steps: list[Tensor], slots: tuple[int, ...], block: int
) -> _Table:
    """The table of parameters, gradients and states (`slots`: which of the three) of so many elements, and counts of steps.
    block: elements of a program."""
    like = tensors[0][0]
    pointers = tuple([t.data_ptr() for ts in (*tensors, steps) for t in ts])
    index = like.get_device()
    stream = 0 if index < 0 else driver.active.get_current_stream(index)
    key = pointers, counts, slots, block, like.dtype, index, stream
    captures = launch.captures(like)
    made = _tables.get(key)
    if made is None:
        real = real_dtype(like.dtype)
        programs = [-(-count // block) for count in counts]
        first = accumulate(programs, initial=0)
        params, grads, *states, counters = ([t.data_ptr() for t in ts] for ts in (*tensors, steps))
        none = [0] * len(counts)
        kept = [none] * 3
        for slot, addresses in zip(slots, states):
            kept[slot] = addresses
        rows = zip(params, grads, counts, first, counters or none, *kept)
        table = _upload([field for row in rows for field in row], torch.int64, like.device, captures)
        owner = _upload([j for j, n in enumerate(programs) for _ in range(n)], torch.int32, like.device, captures)
        corrected = torch.empty(len(counts), 2, dtype=real, device=like.device)
        written = [t for ts in (tensors[0], *tensors[2:], steps) for t in ts]
        shared = _overlaps([(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in written])
        aligned = not any(pointer % 16 for pointer in pointers[: len(pointers) - len(steps)])
        made = _Table(table.device, owner.device, corrected, aligned, shared)
        if captures:  # the copies belong to the graph: nothing has been copied yet, and every replay copies again
            _captured.append((table, owner, corrected))
            return made
        _reserve.know(key[1:], _room(table.host) + _room(owner.host))
        _tables[key] = made
        if len(_tables) > _KEPT:
            _tables.popitem(last=False)
    if captures:
        _captured.append(made)
    else:
        _reserve.refill(like.device)
    _tables.move_to_end(key)
    return made


@lru_cache(1024)
def _numbers(lr: float, weight_decay: float, first: float, second: float, eps: float) -> tuple[float, ...]:
    return parts(lr, weight_decay, first, 1 - first, second, 1 - second, eps)


@lru_cache(1024)
def _correction_numbers(rule: str, first: float, second: float) -> tuple[float, ...]:
    """first, second of math.corrections. The logarithms are taken here: that of a beta in two float32 (an error of 2^-48) would
    be 4e-12 off for 0.999."""
    if rule == "adam":
        first, second = (math.log(beta) if beta else -math.inf for beta in (first, second))
    return parts(first, second)


@lru_cache(64)
def _slots(rule: str, flags: int, momentum: bool) -> tuple[int, ...]:
    """Which of the three states a rule keeps (math.h StepNumbers::states)."""
    if rule == "adam":
        return (0, 1, 2) if flags & _AMSGRAD else (0, 1)
    if rule == "rmsprop":
        return (0,) + (1,) * momentum + (2,) * bool(flags & _CENTERED)
    return (0,) if rule == "adagrad" or momentum else ()


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
        raise ValueError(f"step_: got a gradient or state of shape {tuple(t.shape)} for a parameter of {tuple(like.shape)}")
    if all(a == b for a, b, size in zip(t.stride(), like.stride(), t.shape) if size > 1):
        return t
    return torch.empty_like(like, dtype=t.dtype).copy_(t)


def step_(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    steps: list[Tensor],
    lr_tensor: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    robust: Tensor | None,
    lr: float,
    weight_decay: float,
    first: float,
    second: float,
    eps: float,
    rule: int,
    flags: int,
) -> None:
    """One step of `rule` (ops.RULES) on all tensors, in place: momentum_step_, adam_step_, rmsprop_step_, adagrad_step_ of
    reference.py.

    Args:
        params, grads: float32, float64, bfloat16 or float16, equal shapes.
        states: those the rule keeps, of all parameters, one kind after the other; float64 for float64, else float32.
        steps: float32 or float64, one number each, how many steps the parameter took; one more afterwards. None for sgd.
        lr_tensor: one number, used instead of lr. grad_scale: one number; gradients are divided by it, in place.
        found_inf: one number; where it is not 0 nothing is written. All on the device of the parameters.
        robust: (6) float64, of reference.settle: its second number multiplies the gradients, which are not written; nothing is
            where its last is not 0.
        first, second: sgd momentum, dampening; adam the betas; rmsprop alpha, momentum; adagrad lr_decay.
        flags: bits of csrc/math.h StepFlag.
    """
    if not params:
        return
    name, size = RULES[rule], len(params)
    momentum = {"sgd": first, "rmsprop": second}.get(name, 0) != 0
    slots = _slots(name, flags, momentum)
    if len(grads) != size or len(states) != len(slots) * size or len(steps) != (0 if name == "sgd" else size):
        raise ValueError(
            f"step_: got {len(grads)} gradients, {len(states)} states and {len(steps)} counts for {size} parameters, which"
            f" {name} with flags {flags} keeps {len(slots)} states of"
        )
    lists = [params, grads, *(states[j * size : (j + 1) * size] for j in range(len(slots)))]

    def step_some(chosen: list[int]) -> None:
        p, g, *kept = ([ts[i] for i in chosen] for ts in lists)
        step_(
            p, g, [t for ts in kept for t in ts], [steps[i] for i in chosen] if steps else [], lr_tensor, grad_scale, found_inf, robust,
            lr, weight_decay, first, second, eps, rule, flags,
        )  # fmt: skip

    dtypes, count_dtypes = {p.dtype for p in params}, {t.dtype for t in steps} or {None}
    if len(dtypes) > 1 or len(count_dtypes) > 1:
        sets: dict[tuple, list[int]] = {}
        for i, p in enumerate(params):
            sets.setdefault((p.dtype, steps[i].dtype if steps else None), []).append(i)
        for chosen in sets.values():
            step_some(chosen)
        return
    (dtype,), (count_dtype,) = dtypes, count_dtypes
    real = real_dtype(dtype)
    others = {t.dtype for t in grads} - {dtype} or {t.dtype for t in states} - {real}
    if others:
        raise ValueError(f"step_: got {others}, expected gradients of {dtype} and states of {real} for parameters of {dtype}")
    counts = [p.numel() for p in params]
    fitted = lists
    # contiguous tensors of one size lie alike; anything else is looked at
    if not all([t.is_contiguous() for ts in lists for t in ts]) or any([[t.numel() for t in ts] != counts for ts in lists[1:]]):
        like = [p if _dense(p) else p.contiguous() for p in params]
        fitted = [like, *([_fitted(t, p) for t, p in zip(ts, like)] for ts in lists[1:])]
    table, owner, corrected, aligned, shared = _table(fitted, tuple(counts), steps, slots, _BLOCK[real])
    if shared and size > 1:  # one after the other, as without a kernel
        for i in range(size):
            step_some([i])
        return
    if name in ("sgd", "rmsprop") or flags & _PAPER_FORM:
        corrected = None
    numbers = _numbers(lr, weight_decay, first, second, eps)
    if steps:
        launch.launch(
            count_steps_kernel, -(-size // _COUNT_BLOCK), params[0], table, corrected, lr_tensor, found_inf, robust, size, *numbers[:2],
            *_correction_numbers(name, first, second), C=_DTYPES[count_dtype], RULE=name, BLOCK=_COUNT_BLOCK,
        )  # fmt: skip
    form = "plain" if not momentum else "heavy_ball" if flags & _HEAVY_BALL else "nesterov" if flags & _NESTEROV else "momentum"
    if owner.numel():
        launch.launch(
            step_kernel, owner.numel(), params[0], table, owner, corrected, lr_tensor, grad_scale, found_inf, robust, *numbers,
            S=_DTYPES[dtype], T=_DTYPES[real], RULE=name, FORM=form if name == "sgd" else "plain",
            STATES=sum(1 << slot for slot in slots),
            DECAY="none" if weight_decay == 0 else "decoupled" if flags & _DECOUPLED else "gradient",
            MAXIMIZE=bool(flags & _MAXIMIZE), ALIGNED=aligned, BLOCK=_BLOCK[real],
        )  # fmt: skip
    if fitted is not lists:
        for j, (originals, copies) in enumerate(zip(lists, fitted)):
            if j == 1 and grad_scale is None:  # gradients are written where they were unscaled
                continue
            for original, copy in zip(originals, copies):
                if copy is not original:
                    original.copy_(copy)
