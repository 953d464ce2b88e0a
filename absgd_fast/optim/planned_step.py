"""The first tier, the planned step: one kernel launch for all parameters, found again each step by a StepPlan (csrc/host.cpp).

The plan is kept between steps. It reads every tensor afresh and writes the table that the kernel walks over; what the table
cannot hold is left to the list step. torch.compile cannot see through the plan, so there the list step does everything.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from .. import _backend
from .rule import OptimizerRule
from .scaling import Scaling

_planned_step = torch.ops.absgd_fast.planned_step.default._op  # without the Python frame of OpOverload.__call__


def make_plan(rule: OptimizerRule, backends: set[str]):
    """A StepPlan for kernels of these backends; None where there is none, and the operator is given lists."""
    host = _backend.host()
    if host is None or not backends & {"cpu", "cuda"}:
        return None
    # the names that csrc/host.cpp RuleNames looks for
    places = {"weight_decay": rule.weight_decay, "first": rule.hyper_a, "second": rule.hyper_b, "eps": rule.eps}
    places = {name: tuple(place) for name, place in places.items() if place is not None}
    try:
        return host.StepPlan(
            Tensor,
            torch.nn.Parameter,
            _allocate_table,
            "cpu" in backends,
            "cuda" in backends,
            rule.number,
            places,
            rule.flags,
            tuple(rule.states),
        )
    except (AttributeError, ValueError):
        return None  # a torch without DLPack's exchange table, version 1


def refresh(
    plan, groups: list[dict], state: dict, scaling: Scaling
) -> tuple[list[Tensor], list[Tensor], Tensor | None, list[dict]]:
    """Writes the table of this step.

    Returns:
        the parameters in the table; their gradients, to be kept alive until the step is done; a plain tensor of the table, or
        None; and the groups of parameters that the table cannot hold.
    """
    updated, grads, on, others = plan.refresh(
        groups, state, scaling.grad_scale, scaling.found_inf, _sharded_type(), scaling.settled
    )
    return updated, grads, on, [{**group, "params": params} for group, params in others]


def launch(plan, updated: list[Tensor], on: Tensor) -> None:
    """One step of what the table holds. updated, on: of `refresh`."""
    _planned_step(plan.table, on)
    torch.autograd.graph.increment_version(updated)


def _allocate_table(words: int) -> Tensor:
    return torch.empty(words, dtype=torch.int64)


def _sharded_type() -> type | None:
    """torch's DTensor, where anybody has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else getattr(module, "DTensor", None)
