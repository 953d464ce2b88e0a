"""One step of an optimizer for many tensors in one launch: the twin of csrc/cuda/step.cu.

A program takes BLOCK elements of one tensor. Which tensor that is stands in `owner`; addresses and sizes stand in a table
in device memory (tables.py). Rules that count steps have a small kernel before that one: it writes what the step owes to the count,
then counts. So no program finds a count that another has already raised, and the corrections, in float64, are computed once for a
tensor.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _codes
from . import launch, layouts
from .launch import parts, real_dtype
from .math import adagrad_step, adam_step, corrections, divide, number, rms_prop_step, sgd_step, slope
from .tables import Table, table_of

# ---- device --------------------------------------------------------------------------------------------------------------


@triton.jit
def address(table, field: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table + field).to(tl.pointer_type(T))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def rate_of(lr, lr_low, lr_tensor, T: tl.constexpr):
    return number(lr, lr_low, T) if lr_tensor is None else tl.load(lr_tensor).to(T)


@triton.jit
def goes(found_inf, settled):
    """Whether the step is taken: no infinite gradient, no sample without a finite loss."""
    NONFINITE: tl.constexpr = 5  # of reference.settle
    go = tl.full([], 1, tl.int1)
    if found_inf is not None:
        go &= tl.load(found_inf) == 0
    if settled is not None:
        go &= tl.load(settled + NONFINITE) == 0
    return go


@triton.jit
def step_block(
    param, grad, state_0, state_1, state_2, i, inside, grad_scale, gain, numbers,
    T: tl.constexpr, RULE: tl.constexpr, FORM: tl.constexpr, STATES: tl.constexpr, DECAY: tl.constexpr, MAXIMIZE: tl.constexpr,
):  # fmt: skip
    """Elements i of one tensor; `inside` masks them, or is None."""
    lr, weight_decay, hyper_a, one_minus_a, hyper_b, one_minus_b, eps, rate, scale = numbers
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
        w, s_0 = sgd_step(w, s_0, g, lr, hyper_a, one_minus_b, FORM)
    elif RULE == "adam":
        w, s_0, s_1, s_2 = adam_step(
            w,
            s_0,
            s_1,
            s_2,
            g,
            one_minus_a,
            hyper_b,
            one_minus_b,
            eps,
            rate,
            scale,
            lr * weight_decay,
            STATES & 4 != 0,
            DECAY == "decoupled",
        )
    elif RULE == "rmsprop":
        w, s_0, s_1, s_2 = rms_prop_step(
            w, s_0, s_1, s_2, g, hyper_a, one_minus_a, hyper_b, eps, lr, STATES & 2 != 0, STATES & 4 != 0
        )
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
    settled,  # math/weights.h Normalizer, or None
    lr, lr_low, weight_decay, weight_decay_low, hyper_a, hyper_a_low, one_minus_a, one_minus_a_low, hyper_b, hyper_b_low,
    one_minus_b, one_minus_b_low, eps, eps_low,
    S: tl.constexpr, T: tl.constexpr, RULE: tl.constexpr, FORM: tl.constexpr, STATES: tl.constexpr, DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """S: how parameters and gradients are stored. STATES: the states that are kept, as bits. FORM: of sgd_step."""
    SCALE: tl.constexpr = 1  # of reference.settle
    if goes(found_inf, settled):
        program = tl.program_id(0)
        tensor = tl.load(owner + program)
        table += tensor * 8
        rate = rate_of(lr, lr_low, lr_tensor, T)
        numbers = (
            rate,
            number(weight_decay, weight_decay_low, T),
            number(hyper_a, hyper_a_low, T),
            number(one_minus_a, one_minus_a_low, T),
            number(hyper_b, hyper_b_low, T),
            number(one_minus_b, one_minus_b_low, T),
            number(eps, eps_low, T),
            rate if corrected is None else tl.load(corrected + 2 * tensor),
            tl.full([], 1, T) if corrected is None else tl.load(corrected + 2 * tensor + 1),
        )
        scale = None if grad_scale is None else tl.load(grad_scale).to(T)
        gain = None if settled is None else tl.load(settled + SCALE).to(T)
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
            )
        else:
            step_block(
                param, grad, state_0, state_1, state_2, i, i < count, scale, gain, numbers, T, RULE, FORM, STATES, DECAY, MAXIMIZE
            )


@triton.jit(do_not_specialize=["tensors"])
def count_steps_kernel(
    table,
    corrected,
    lr_tensor,
    found_inf,
    settled,  # as above
    tensors,
    lr,
    lr_low,
    hyper_a,
    hyper_a_low,
    hyper_b,
    hyper_b_low,  # hyper_a, hyper_b: of `corrections`
    C: tl.constexpr,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One more step for every tensor, and what this one owes to its count. C: how counts are stored."""
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tensors = tl.where(goes(found_inf, settled), tensors, 0)
    inside = tensor < tensors
    count = tl.load(table + 8 * tensor + 4, mask=inside, other=0).to(tl.pointer_type(C))
    steps = tl.load(count, mask=inside, other=0.0) + 1
    if corrected is not None:
        D: tl.constexpr = tl.float64
        c_1, c_2 = corrections(steps.to(D), number(hyper_a, hyper_a_low, D), number(hyper_b, hyper_b_low, D), RULE)
        T: tl.constexpr = corrected.dtype.element_ty
        tl.store(corrected + 2 * tensor, (rate_of(lr, lr_low, lr_tensor, D) / c_1).to(T), mask=inside)
        tl.store(corrected + 2 * tensor + 1, (1 / c_2).to(T), mask=inside)
    tl.store(count, steps, mask=inside)


KERNELS = (step_kernel, count_steps_kernel)


# ---- launcher ------------------------------------------------------------------------------------------------------------

# elements of a program, 16 (float64: 8) a thread of 4 warps: 4 loads of 16 bytes from each state under way
_BLOCK = {torch.float32: 2048, torch.float64: 1024}
_COUNT_BLOCK = 128  # tensors of a program of count_steps_kernel
DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@lru_cache(1024)
def _numbers(lr: float, weight_decay: float, hyper_a: float, hyper_b: float, eps: float) -> tuple[float, ...]:
    return parts(lr, weight_decay, hyper_a, 1 - hyper_a, hyper_b, 1 - hyper_b, eps)


@lru_cache(1024)
def _correction_numbers(rule: str, hyper_a: float, hyper_b: float) -> tuple[float, ...]:
    """hyper_a, hyper_b of math.corrections. The logarithms are taken here: that of a beta in two float32 (an error of 2^-48) would
    be 4e-12 off for 0.999."""
    if rule == "adam":
        hyper_a, hyper_b = (math.log(beta) if beta else -math.inf for beta in (hyper_a, hyper_b))
    return parts(hyper_a, hyper_b)


@lru_cache(64)
def _slots(rule: str, flags: int, momentum: bool) -> tuple[int, ...]:
    """Which of the three states a rule keeps (math/step.h StepNumbers::states)."""
    if rule == "adam":
        return (0, 1, 2) if flags & _codes.AMSGRAD else (0, 1)
    if rule == "rmsprop":
        return (0,) + (1,) * momentum + (2,) * bool(flags & _codes.CENTERED)
    return (0,) if rule == "adagrad" or momentum else ()


def sgd_form(momentum: bool, flags: int) -> str:
    """FORM of sgd_step."""
    if not momentum:
        return "plain"
    return "heavy_ball" if flags & _codes.HEAVY_BALL else "nesterov" if flags & _codes.NESTEROV else "momentum"


class _Step(NamedTuple):
    """What one call of `step_` does to every tensor."""

    rule: str
    flags: int
    momentum: bool
    slots: tuple[int, ...]  # of `_slots`
    lr_tensor: Tensor | None
    grad_scale: Tensor | None
    found_inf: Tensor | None
    settled: Tensor | None
    numbers: tuple[float, ...]  # of `_numbers`
    correction_numbers: tuple[float, ...]
    decays: bool


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
    hyper_a: float,
    hyper_b: float,
    eps: float,
    rule: int,
    flags: int,
) -> None:
    """One step of `rule` (_codes.RULES) on all tensors, in place: momentum_step_, adam_step_, rmsprop_step_, adagrad_step_ of
    reference/steps.py.

    Args:
        params, grads: float32, float64, bfloat16 or float16, equal shapes.
        states: those the rule keeps, of all parameters, one kind after the other; float64 for float64, else float32.
        steps: float32 or float64, one number each, how many steps the parameter took; one more afterwards. None for sgd.
        lr_tensor: one number, used instead of lr. grad_scale: one number; gradients are divided by it, in place.
        found_inf: one number; where it is not 0 nothing is written. All on the device of the parameters.
        robust: (6) float64, of reference.settle: its SCALE multiplies the gradients, which are not written; nothing is where NONFINITE is
            not 0.
        hyper_a, hyper_b: sgd momentum, dampening; adam the betas; rmsprop alpha, momentum; adagrad lr_decay.
        flags: bits of _codes.py (csrc/math/step.h StepFlag).
    """
    if not params:
        return
    name, size = _codes.RULES[rule], len(params)
    momentum = {"sgd": hyper_a, "rmsprop": hyper_b}.get(name, 0) != 0
    slots = _slots(name, flags, momentum)
    if len(grads) != size or len(states) != len(slots) * size or len(steps) != (0 if name == "sgd" else size):
        raise ValueError(
            f"step_: got {len(grads)} gradients, {len(states)} states and {len(steps)} counts for {size} parameters, which"
            f" {name} with flags {flags} keeps {len(slots)} states of"
        )
    step = _Step(
        name,
        flags,
        momentum,
        slots,
        lr_tensor,
        grad_scale,
        found_inf,
        robust,
        _numbers(lr, weight_decay, hyper_a, hyper_b, eps),
        _correction_numbers(name, hyper_a, hyper_b),
        weight_decay != 0,
    )
    lists = [params, grads, *(states[j * size : (j + 1) * size] for j in range(len(slots)))]
    for some in _by_dtype(lists, steps):
        _step_alike(step, *some)


def _by_dtype(lists: list[list[Tensor]], steps: list[Tensor]) -> list[tuple[list[list[Tensor]], list[Tensor]]]:
    """The lists and counts in parts, each with parameters of one dtype and counts of one dtype."""
    params = lists[0]
    if len({p.dtype for p in params}) == 1 and len({t.dtype for t in steps}) <= 1:
        return [(lists, steps)]
    sets: dict[tuple, list[int]] = {}
    for i, p in enumerate(params):
        sets.setdefault((p.dtype, steps[i].dtype if steps else None), []).append(i)
    return [_chosen(lists, steps, chosen) for chosen in sets.values()]


def _chosen(lists: list[list[Tensor]], steps: list[Tensor], chosen: list[int]) -> tuple[list[list[Tensor]], list[Tensor]]:
    return [[ts[i] for i in chosen] for ts in lists], [steps[i] for i in chosen] if steps else []


def _step_alike(step: _Step, lists: list[list[Tensor]], steps: list[Tensor]) -> None:
    """The step of parameters of one dtype, laid out as the kernels walk over them."""
    params, grads, *states = lists
    dtype, real = params[0].dtype, real_dtype(params[0].dtype)
    others = {t.dtype for t in grads} - {dtype} or {t.dtype for ts in states for t in ts} - {real}
    if others:
        raise ValueError(f"step_: got {others}, expected gradients of {dtype} and states of {real} for parameters of {dtype}")
    fitted = layouts.fit(lists)
    table = table_of(fitted, tuple([p.numel() for p in params]), steps, step.slots, _BLOCK[real])
    if table.overlaps and len(params) > 1:  # one after the other, as without a kernel
        for i in range(len(params)):
            _step_alike(step, *_chosen(lists, steps, [i]))
        return
    _launch(step, table, params[0], len(params), steps[0].dtype if steps else None)
    if fitted is not lists:
        for j, (originals, copies) in enumerate(zip(lists, fitted)):
            if j != 1 or step.grad_scale is not None:  # gradients are written where they were unscaled
                layouts.write_back(originals, copies)


def _launch(step: _Step, table: Table, like: Tensor, size: int, count_dtype: torch.dtype | None) -> None:
    """The two kernels over the table of `size` tensors of the dtype of `like`. count_dtype: None where no steps are counted."""
    real, rule, flags = real_dtype(like.dtype), step.rule, step.flags
    corrected = None if rule in ("sgd", "rmsprop") or flags & _codes.PAPER_FORM else table.corrected
    if count_dtype is not None:
        launch.launch(
            count_steps_kernel,
            -(-size // _COUNT_BLOCK),
            like,
            table.table,
            corrected,
            step.lr_tensor,
            step.found_inf,
            step.settled,
            size,
            *step.numbers[:2],
            *step.correction_numbers,
            C=DTYPES[count_dtype],
            RULE=rule,
            BLOCK=_COUNT_BLOCK,
        )
    if table.owner.numel():
        launch.launch(
            step_kernel, table.owner.numel(), like, table.table, table.owner, corrected, step.lr_tensor, step.grad_scale, step.found_inf,
            step.settled, *step.numbers, S=DTYPES[like.dtype], T=DTYPES[real], RULE=rule,
            FORM=sgd_form(step.momentum, flags) if rule == "sgd" else "plain", STATES=sum(1 << slot for slot in step.slots),
            DECAY="none" if not step.decays else "decoupled" if flags & _codes.DECOUPLED else "gradient",
            MAXIMIZE=bool(flags & _codes.MAXIMIZE), ALIGNED=table.aligned, BLOCK=_BLOCK[real],
        )  # fmt: skip
