"""The third tier, torch's step: plain torch takes what no kernel takes, with the same result.

It takes sparse gradients, tensor subclasses that hold no plain tensor, and everything on a device without kernels. The formulas
are in reference/steps.py; each optimizer says in `_torch_step` which of them is its own.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .._checks import tensor_rate
from .rule import LR, changed, read_number
from .scaling import Scaling

# `_torch_step` of an optimizer: of (group, parameters, gradients, states, counts of steps)
RuleStep = Callable[[dict, list[Tensor], list[Tensor], list[list[Tensor | None]], list[Tensor]], None]


def step(
    rule_step: RuleStep,
    group: dict,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[list[Tensor | None]],
    steps: list[Tensor],
    scaling: Scaling,
) -> None:
    """One step in plain torch. states: one list for each state of the rule, with None for what is not kept."""
    finished = scaling.finished(params, grads)
    if finished is None:
        return
    lr = group["lr"]  # it may have one dimension more than a parameter
    lr = tensor_rate(lr).reshape(()) if isinstance(lr, Tensor) else read_number(group, LR)
    rule_step(changed(group, lr=lr), params, finished, states, steps)
