"""The second tier, the list step: the operator `step_` is given lists of tensors.

It takes what the table of a plan cannot hold: parameters in their first step, which have no state yet, tensors in unusual
layouts, complex numbers, everything under torch.compile, and everything where the host module is missing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import tensor_rate
from ..ops import Operators
from ..reference import real_dtype
from .rule import LR, OptimizerRule, read_number
from .scaling import Scaling
from .state import HALF

_DTYPES = (torch.float32, torch.float64, *HALF)


def read_view(t: Tensor | None) -> Tensor | None:
    """A tensor as the kernels read it: complex numbers are pairs of real ones."""
    if t is None:
        return None
    if t.is_complex() and t.layout == torch.strided:
        t = torch.view_as_real(t.resolve_conj())
    if t.layout == torch.strided and not torch.compiler.is_compiling() and t.is_neg():
        t = t.resolve_neg()  # an operator takes no tensor whose sign is still to be flipped in a list that it may write
    return t


def written_view(t: Tensor | None) -> Tensor | None:
    """A tensor as the kernels write it. None: its memory holds conjugates or opposites, which only plain torch can write."""
    if t is None or (t.layout == torch.strided and not torch.compiler.is_compiling() and (t.is_conj() or t.is_neg())):
        return None
    return read_view(t)


def divide(
    operators: dict[torch.device, Operators | None],
    group: dict,
    params: list[Tensor],
    views: list[list[Tensor | None]],
    steps: list[Tensor],
) -> tuple[dict[torch.device, list[int]], list[int]]:
    """Divides the parameters among the kernels of each device and plain torch.

    Args:
        operators: the kernels of each device, or None where plain torch serves it.
        group: the options of the step.
        params: the parameters.
        views: parameters, gradients and the states that are kept, as `read_view` and `written_view` give them.
        steps: the counts of steps, or nothing where the rule does not count them.

    Returns:
        the positions of the parameters that the kernels of each device take, and the positions of the others.
    """
    on_kernels: dict[torch.device, list[int]] = {}
    others: list[int] = []
    for i, p in enumerate(params):
        kernels = operators.get(p.device)
        fits = kernels is not None and _fits(group, [values[i] for values in views], steps[i] if steps else None)
        (on_kernels.setdefault(p.device, []) if fits else others).append(i)
    return on_kernels, others


def _fits(group: dict, tensors: list[Tensor | None], step: Tensor | None) -> bool:
    """Whether the operator `step_` takes a parameter with its gradient and states.

    It takes plain strided tensors on one device. Parameter and gradient have one dtype, and the states have its real dtype. Under
    torch.compile it takes no option that would have to leave the graph as a number.
    """
    present = [t for t in tensors if t is not None]
    if len(present) < len(tensors):
        return False
    p, grad, *states = present
    if torch.compiler.is_compiling() and not _stays_in_graph(group, p.device):
        return False
    return (
        p.dtype in _DTYPES
        and all(type(t) in (Tensor, torch.nn.Parameter) and t.device == p.device and t.layout == torch.strided for t in present)
        and grad.dtype == p.dtype
        and all(t.dtype == real_dtype(p.dtype) for t in states)
        and (step is None or step.device == p.device)
    )


def _stays_in_graph(group: dict, device: torch.device) -> bool:
    """Whether lr is a number or a tensor on the device, and no other option of the group is a tensor."""
    options = [v for key, value in group.items() if key != "params" for v in (value if isinstance(value, tuple) else (value,))]
    if any(isinstance(v, Tensor) and v is not group["lr"] for v in options):
        return False
    return not isinstance(group["lr"], Tensor) or group["lr"].device == device


def launch(
    rule: OptimizerRule,
    operators: Operators,
    group: dict,
    numbers: list[float],
    lists: list[list[Tensor]],
    steps: list[Tensor],
    scaling: Scaling,
) -> None:
    """One step on one device. numbers: of `OptimizerRule.numbers`. lists: parameters, gradients and the states that are kept."""
    params, grads, *states = lists
    device, lr = params[0].device, group["lr"]
    lr_tensor = tensor_rate(lr) if isinstance(lr, Tensor) and lr.device == device else None
    if torch.compiler.is_compiling():
        operators = operators.compiled
        if lr_tensor is None:
            # a number would become part of the code, which would be compiled anew for each lr; so it would with torch.full
            lr_tensor = torch.ones((), dtype=torch.float64, device=device) * lr
    there = [None if t is None else t.to(device, non_blocking=True) for t in scaling]
    operators.step_(
        params,
        grads,
        [t for values in states for t in values],
        steps,
        lr_tensor,
        *there,
        0.0 if lr_tensor is not None else read_number(group, LR),
        *numbers,
        rule.number,
        rule.bits(group),
    )
