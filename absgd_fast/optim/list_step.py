"""The second tier, the list step: the operator `step_` on lists of tensors, for what the table of a plan cannot hold.

These are parameters in their first step, which have no state yet, tensors in unusual layouts, complex numbers, and everything
under torch.compile or where the host module is missing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Operators
from ..reference import real_dtype
from .rule import OptimizerRule, Place, read_number
from .scaling import Scaling
from .state import HALF

_DTYPES = (torch.float32, torch.float64, *HALF)
_LR = Place("lr")


def kernel_view(t: Tensor | None) -> Tensor | None:
    """What the kernels see of a tensor: complex numbers as pairs."""
    if t is None:
        return None
    if t.is_complex() and t.layout == torch.strided:
        t = torch.view_as_real(t.resolve_conj())
    if t.layout == torch.strided and not torch.compiler.is_compiling() and t.is_neg():
        t = t.resolve_neg()  # an operator takes no pending sign in a list it may write
    return t


def divide(
    operators: dict[torch.device, Operators | None], group: dict, lists: list[list[Tensor | None]], steps: list[Tensor]
) -> tuple[dict[torch.device, list[int]], list[int]]:
    """Which parameters the kernels of each device take, and which are left to plain torch.

    lists: parameters, gradients, and the states that are kept, as `kernel_view` gives them.
    """
    on_kernels: dict[torch.device, list[int]] = {}
    others = []
    for i, p in enumerate(lists[0]):
        kernels = operators.get(p.device)
        fits = kernels is not None and _fits(group, [values[i] for values in lists], steps[i] if steps else None)
        (on_kernels.setdefault(p.device, []) if fits else others).append(i)
    return on_kernels, others


def _fits(group: dict, tensors: list[Tensor | None], step: Tensor | None) -> bool:
    """Whether `step_` takes them: plain strided tensors on one device, the parameter and gradient of one dtype and states of
    its real dtype; under torch.compile no option that would have to leave the graph as a number."""
    if any(t is None for t in tensors):
        return False
    p = tensors[0]
    if torch.compiler.is_compiling() and not _stays_in_graph(group, p.device):
        return False
    return (
        p.dtype in _DTYPES
        and all(type(t) in (Tensor, torch.nn.Parameter) and t.device == p.device and t.layout == torch.strided for t in tensors)
        and tensors[1].dtype == p.dtype
        and all(t.dtype == real_dtype(p.dtype) for t in tensors[2:])
        and (step is None or step.device == p.device)
    )


def _stays_in_graph(group: dict, device: torch.device) -> bool:
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
    """One step of parameters, gradients and states on one device. numbers: of `OptimizerRule.numbers`."""
    params, grads, *states = lists
    device, lr = params[0].device, group["lr"]
    lr_tensor = lr if isinstance(lr, Tensor) and lr.device == device else None
    if torch.compiler.is_compiling():
        operators = operators.compiled
        if lr_tensor is None:
            # a number would become part of the code: compiled anew for each lr, and so with torch.full
            lr_tensor = torch.ones((), dtype=torch.float64, device=device) * lr
    there = [None if t is None else t.to(device, non_blocking=True) for t in scaling]
    operators.step_(
        params,
        grads,
        [t for values in states for t in values],
        steps,
        lr_tensor,
        *there,
        0.0 if lr_tensor is not None else read_number(group, _LR),
        *numbers,
        rule.number,
        rule.bits(group),
    )
