"""Errors of the optimizers beyond those of torch's classes."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..robust import ABLoss
from ..robust.base import RobustLoss
from .rule import OptimizerRule


def check_torchs_options(cls: type, options: dict[str, Any]) -> None:
    """Raises torch's RuntimeError for what a kernel cannot do, and for options that exclude each other in torch's classes.

    options: the defaults of the groups. As in torch, they alone decide whether autograd records a step: torch's step enters
    autograd by the default of ``differentiable``, whatever the groups hold.
    """
    if options["differentiable"]:
        torchs = next(base.__name__ for base in cls.__mro__ if base.__module__.startswith("torch.optim"))
        raise RuntimeError(
            "differentiable: got True, expected False, because autograd cannot record the step of a kernel; use"
            f" torch.optim.{torchs}(..., differentiable=True), which has the same checkpoints and works with ABLoss too"
        )
    if options["fused"] and options["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")  # torch's text: its RMSprop has no fused


def check_robust(robust: object) -> None:
    """Raises TypeError unless robust= is None or a loss whose normaliser a step can settle."""
    if robust is not None and not (isinstance(robust, ABLoss) and robust.deferred):
        got = "an ABLoss that is not deferred" if isinstance(robust, ABLoss) else type(robust).__name__
        raise TypeError(
            f"robust: got {got}, expected ABLoss(..., deferred=True), or None; the gradients of any other loss need no robust="
        )


def check_no_attributes(group: object) -> None:
    """Raises ValueError for a group with an option that belongs to the whole optimizer, and would do nothing in a group."""
    for name in ("max_norm", "robust"):
        if isinstance(group, dict) and name in group:
            raise ValueError(f"{name}: got it as an option of a parameter group, expected it as an argument of the optimizer")


def claim(optimizer: torch.optim.Optimizer) -> None:
    """Tells the criterion of robust= that this optimizer finishes its steps, so nobody has to watch over them."""
    step = getattr(getattr(optimizer, "robust", None), "deferred_step", None)
    if step is not None:
        step.watch.claim(optimizer)


def warn_of_another_criterion(robust: RobustLoss, groups: list[dict]) -> None:
    """Warns once if there are gradients to step, but the criterion of robust= has had no micro-batch since it was made or copied.

    So it is if criterion and optimizer were copied separately: the optimizer then has a criterion of its own, which nobody calls.
    """
    step = getattr(robust, "deferred_step", None)
    if step is None or step.watch.met or all(p.grad is None for group in groups for p in group["params"]):
        return
    step.watch.met = True
    warnings.warn(
        "robust: got gradients to step, but this criterion has had no forward in training mode since it was made, copied or"
        " unpickled, so the step uses them as they are. If another deferred criterion made them, nothing normalises them;"
        " expected a pair that was copied together, copy.deepcopy((model, criterion, optimizer)), or optimizer.robust ="
        " criterion after copying",
        stacklevel=4,
    )


def warn_of_written_gradients(optimizer: torch.optim.Optimizer, robust: RobustLoss) -> None:
    """Warns if somebody has written the gradients of a deferred step that is not finished yet, as clipping does (touched.py)."""
    step = getattr(robust, "deferred_step", None)
    if step is None or getattr(optimizer, "found_inf", None) is not None or not step.watch.touched.by_hand(id(optimizer)):
        return
    warnings.warn(
        "robust: got gradients that were changed in place after backward, before this step has normalised them. If that was"
        " clipping, it has seen sums, and the step is far too small; expected"
        f" {type(optimizer).__name__}(..., robust=criterion, max_norm=1.0) instead of clip_grad_norm_, or an optimizer without"
        " robust= and criterion.finish_(params) before clipping. Multiplying the gradients by a constant is fine",
        stacklevel=4,
    )


def check_deferrable(group: dict) -> None:
    """Raises ValueError if a gradient of the group is float16: sums that are not normalised yet leave its range."""
    if any(p.dtype == torch.float16 for p in group["params"]):
        raise ValueError(
            "robust: got a float16 parameter, whose gradient cannot hold deferred sums; expected float32 or bfloat16"
        )


def check_tensors(rule: OptimizerRule, group: dict, params: list[Tensor], states: dict) -> None:
    """Checks the parameters of the group that have a gradient, before anything is written.

    Raises:
        RuntimeError: a sparse gradient that the rule does not take, a gradient or state of another shape than its parameter, or
            a parameter whose elements share memory.
        TypeError: a state that the group's options keep is None.
    """
    kept = [name for name in rule.kept(group, list(rule.states)) if name not in rule.made_in_step]
    for p in params:
        grad = p.grad
        if grad is not None and grad.is_sparse:
            rule.check_sparse(group)
        of_p = states.get(p, {})
        for name in kept:
            if name in of_p and of_p[name] is None:
                raise TypeError(
                    f"step: got None as state {name!r} of a parameter, expected a tensor; or delete the parameter's state"
                )
        for t in (grad, *(of_p.get(name) for name in rule.states)):
            if isinstance(t, Tensor) and t.shape != p.shape:
                raise RuntimeError(
                    f"step: got a gradient or state of shape {tuple(t.shape)}, expected that of its parameter, {tuple(p.shape)}"
                )
        for t in (p, *(of_p.get(name) for name in rule.states)):
            if isinstance(t, Tensor) and t.layout == torch.strided and torch._debug_has_internal_overlap(t) == 1:
                raise RuntimeError(
                    "unsupported operation: more than one element of the written-to tensor refers to a single memory location."
                    " Please clone() the tensor before performing the operation."
                )
