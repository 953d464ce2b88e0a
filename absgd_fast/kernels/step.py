"""One step of an optimizer for many tensors in one launch (MATH §3): the twin of csrc/cuda/step.cu.

A program takes BLOCK elements of one tensor. `owner` says which tensor that is. A table in device memory (tables.py) has the
addresses and sizes of the tensors. For a rule that counts steps a small kernel runs before: it raises the counts, and writes the
corrections that depend on them. So no program of the step reads a count that another has already raised, and the corrections are
computed only once for each tensor, in float64.
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
    """The pointer to elements of type T that stands in a field of a tensor's row of the table."""
    pointer = tl.load(table + field).to(tl.pointer_type(T))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def rate_of(lr, lr_low, lr_tensor, T: tl.constexpr):
    """The learning rate: the number in lr_tensor, or the Python float lr without it."""
    return number(lr, lr_low, T) if lr_tensor is None else tl.load(lr_tensor).to(T)


@triton.jit
def goes(found_inf, settled):
    """Whether the step is taken. It is skipped after an infinite gradient or a nonfinite loss (MATH §3.5)."""
    NONFINITE: tl.constexpr = 5  # the place of this number in `settled` (reference.NONFINITE)
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
    """Step elements i of one tensor. `inside` masks them, unless it is None.

    1. It loads parameter, gradient and states.
    2. It divides the gradient by grad_scale and stores it, then multiplies it by gain.
    3. It steps with the function of the rule (math.py).
    4. It stores states and parameter.
    """
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
    corrected,  # (tensors, 2) real: lr / c_1 and 1 / c_2; None stands for lr and 1
    lr_tensor, grad_scale, found_inf,  # one number each, or None
    settled,  # math/weights.h Normalizer, or None
    lr, lr_low, weight_decay, weight_decay_low, hyper_a, hyper_a_low, one_minus_a, one_minus_a_low, hyper_b, hyper_b_low,
    one_minus_b, one_minus_b_low, eps, eps_low,
    S: tl.constexpr, T: tl.constexpr, RULE: tl.constexpr, FORM: tl.constexpr, STATES: tl.constexpr, DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step of BLOCK elements of one tensor.

    1. If GradScaler or a nonfinite loss skips the step, the program ends and changes nothing.
    2. It looks up its tensor in `owner`, and the addresses of the tensor in `table`.
    3. It reads the numbers of the step: the learning rate, the corrections, and the factors of the gradient.
    4. It steps its elements (step_block).

    S is the dtype that parameters and gradients are stored in, and T the dtype of states and computation. Bit j of STATES is set
    if the rule keeps state j. FORM is that of math.sgd_step. DECAY is "none", "gradient" or "decoupled".
    """
    SCALE: tl.constexpr = 1  # the place of this number in `settled` (reference.SCALE)
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
        # A whole block needs no mask. A mask would prevent loads of 16 bytes.
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
    settled,  # these five as for step_kernel
    tensors,
    lr,
    lr_low,
    hyper_a,
    hyper_a_low,
    hyper_b,
    hyper_b_low,  # hyper_a and hyper_b as math.corrections takes them
    C: tl.constexpr,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The count of steps of every tensor, raised by one, and the corrections that depend on it. C is the dtype of counts.

    1. If the step is skipped, nothing is written.
    2. A program reads the counts of BLOCK tensors and adds 1.
    3. It computes lr / c_1 and 1 / c_2 in float64 (math.corrections) and stores them in `corrected`.
    4. It stores the counts.
    """
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

# Elements of a program: 16 for each thread of 4 warps (8 in float64). So a thread has 4 loads of 16 bytes from each state under
# way.
_BLOCK = {torch.float32: 2048, torch.float64: 1024}
_COUNT_BLOCK = 128  # tensors that a program of count_steps_kernel takes
DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@lru_cache(1024)
def _numbers(lr: float, weight_decay: float, hyper_a: float, hyper_b: float, eps: float) -> tuple[float, ...]:
    return parts(lr, weight_decay, hyper_a, 1 - hyper_a, hyper_b, 1 - hyper_b, eps)


@lru_cache(1024)
def _correction_numbers(rule: str, hyper_a: float, hyper_b: float) -> tuple[float, ...]:
    """The numbers hyper_a and hyper_b of math.corrections.

    The logarithms of the betas are taken here. A beta in two float32 has an error of 2^-48, and its logarithm would be 4e-12 off
    for 0.999.
    """
    if rule == "adam":
        hyper_a, hyper_b = (math.log(beta) if beta else -math.inf for beta in (hyper_a, hyper_b))
    return parts(hyper_a, hyper_b)


@lru_cache(64)
def _slots(rule: str, flags: int, momentum: bool) -> tuple[int, ...]:
    """The states that a rule keeps, of the three (csrc/math/step.h StepNumbers::states)."""
    if rule == "adam":
        return (0, 1, 2) if flags & _codes.AMSGRAD else (0, 1)
    if rule == "rmsprop":
        return (0,) + (1,) * momentum + (2,) * bool(flags & _codes.CENTERED)
    return (0,) if rule == "adagrad" or momentum else ()


def sgd_form(momentum: bool, flags: int) -> str:
    """The `form` of math.sgd_step, from the flags of a step."""
    if not momentum:
        return "plain"
    return "heavy_ball" if flags & _codes.HEAVY_BALL else "nesterov" if flags & _codes.NESTEROV else "momentum"


class _Step(NamedTuple):
    """The arguments of one call of `step_` that are the same for all tensors."""

    rule: str
    flags: int
    momentum: bool
    slots: tuple[int, ...]  # from `_slots`
    lr_tensor: Tensor | None
    grad_scale: Tensor | None
    found_inf: Tensor | None
    settled: Tensor | None
    numbers: tuple[float, ...]  # from `_numbers`
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
    """One step of a rule on all tensors, in place (MATH §3).

    Its twins in plain torch are momentum_step_, adam_step_, rmsprop_step_ and adagrad_step_ of reference/steps.py.

    Args:
        params: float32, float64, bfloat16 or float16.
        grads: of the dtypes and shapes of the parameters.
        states: the states that the rule keeps, of all parameters, one kind after the other. float64 for float64 parameters, else
            float32.
        steps: float32 or float64, one number each: the number of steps that each parameter took, which is raised by one. Empty
            for sgd.
        lr_tensor: one number that takes the place of lr, or None.
        grad_scale: one number or None. The gradients are divided by it, in place.
        found_inf: one number or None. If it is not 0, nothing is written. These three are on the device of the parameters.
        robust: (6) float64 from reference.settle, or None. Its SCALE multiplies the gradients, but the products are not written
            back. If its NONFINITE is not 0, nothing is written.
        lr, weight_decay, eps: numbers of the rule.
        hyper_a, hyper_b: sgd momentum, dampening; adam the betas; rmsprop alpha, momentum; adagrad lr_decay.
        rule: a place in _codes.RULES.
        flags: bits of _codes.py (csrc/math/step.h StepFlag).

    Raises:
        ValueError: The number of gradients, states or counts is not what the rule needs, or a tensor has the wrong dtype or
            shape.
    """
    if not params:
        return
    name, size = _codes.RULES[rule], len(params)
    momentum = {"sgd": hyper_a, "rmsprop": hyper_b}.get(name, 0) != 0
    slots = _slots(name, flags, momentum)
    if len(grads) != size or len(states) != len(slots) * size or len(steps) != (0 if name == "sgd" else size):
        raise ValueError(
            f"step_: got {len(grads)} gradients, {len(states)} states and {len(steps)} counts for {size} parameters, but {name}"
            f" with flags {flags} expects {size} gradients, {len(slots) * size} states and {0 if name == 'sgd' else size} counts"
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
    """The lists and counts, divided into parts with parameters of one dtype and counts of one dtype."""
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
    """Step parameters of one dtype. The tensors are brought into the layout that the kernels walk over."""
    params, grads, *states = lists
    dtype, real = params[0].dtype, real_dtype(params[0].dtype)
    others = {t.dtype for t in grads} - {dtype} or {t.dtype for ts in states for t in ts} - {real}
    if others:
        raise ValueError(f"step_: got {others}, expected gradients of {dtype} and states of {real} for parameters of {dtype}")
    fitted = layouts.fit(lists)
    table = table_of(fitted, tuple([p.numel() for p in params]), steps, step.slots, _BLOCK[real])
    if table.overlaps and len(params) > 1:  # Tensors that share memory are stepped one after the other.
        for i in range(len(params)):
            _step_alike(step, *_chosen(lists, steps, [i]))
        return
    _launch(step, table, params[0], len(params), steps[0].dtype if steps else None)
    if fitted is not lists:
        for j, (originals, copies) in enumerate(zip(lists, fitted)):
            if j != 1 or step.grad_scale is not None:  # Gradients (j = 1) have changed only if grad_scale divided them.
                layouts.write_back(originals, copies)


def _launch(step: _Step, table: Table, like: Tensor, size: int, count_dtype: torch.dtype | None) -> None:
    """Launch the kernels over a table of `size` tensors of the dtype of `like`. count_dtype: None if no steps are counted."""
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
            step_kernel, table.owner.numel(), like, table.table, table.owner, corrected, step.lr_tensor, step.grad_scale,
            step.found_inf, step.settled, *step.numbers, S=DTYPES[like.dtype], T=DTYPES[real], RULE=rule,
            FORM=sgd_form(step.momentum, flags) if rule == "sgd" else "plain", STATES=sum(1 << slot for slot in step.slots),
            DECAY="none" if not step.decays else "decoupled" if flags & _codes.DECOUPLED else "gradient",
            MAXIMIZE=bool(flags & _codes.MAXIMIZE), ALIGNED=table.aligned, BLOCK=_BLOCK[real],
        )  # fmt: skip
