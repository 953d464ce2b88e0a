"""The first tier, the planned step: one kernel launch for all parameters, which a StepPlan (csrc/host.cpp) prepares.

The plan is kept between steps. In each step it reads every tensor afresh and writes the table that the kernel walks over. The
list step takes what the table cannot hold. torch.compile cannot see through the plan, so under torch.compile the list step takes
everything.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from typing import Protocol

import torch
from torch import Tensor

from .. import _backend
from .rule import OptimizerRule, changed
from .scaling import Scaling

# The dicts that the plan reads. One of another class may fetch its values from elsewhere, which only Python would notice.
STATES = (dict, defaultdict)

# without the Python frame of OpOverload.__call__
_planned_step = torch.ops.absgd_fast.planned_step.default._op
_planned_squares = torch.ops.absgd_fast.planned_squares.default._op

_eager = _backend.eager()
_increment_version = torch.autograd.graph.increment_version if _eager is None else _eager.increment_version


class Plan(Protocol):
    """What Python uses of csrc/host.cpp StepPlan."""

    @property
    def table(self) -> Tensor:
        """The table, an int64 tensor on the CPU."""

    def refresh(
        self,
        param_groups: list[dict],
        state: dict,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        sharded: type | None,
        robust: Tensor | None,
        /,
    ) -> tuple[list[Tensor], list[Tensor], Tensor | None, list[tuple[dict, list[Tensor]]]]:
        """Writes the table of a step. csrc/host.cpp describes the results."""


def make_plan(rule: OptimizerRule, backends: set[str]) -> Plan | None:
    """A StepPlan for the kernels of these backends. None: there is none, so the list step serves."""
    host = _backend.host()
    if host is None or not backends & {"cpu", "cuda"}:
        return None
    # the keys are those that csrc/host/rule_names.h looks for
    places = {"weight_decay": rule.weight_decay, "first": rule.hyper_a, "second": rule.hyper_b, "eps": rule.eps}
    numbers = {name: tuple(place) for name, place in places.items() if place is not None}
    try:
        return host.StepPlan(
            Tensor,
            torch.nn.Parameter,
            _allocate_table,
            "cpu" in backends,
            "cuda" in backends,
            rule.number,
            numbers,
            rule.flags,
            tuple(rule.states),
            None if _eager is None else _eager.tensor_access,
        )
    except (AttributeError, ValueError):
        return None  # this torch does not have version 1 of DLPack's exchange table


def refresh(
    plan: Plan, groups: list[dict], state: dict, scaling: Scaling
) -> tuple[list[Tensor], list[Tensor], Tensor | None, list[dict]]:
    """Writes the table of this step.

    Returns:
        the parameters in the table; their gradients and states, which the caller keeps alive until the step is done; one plain
        tensor of the table, or None if the table is empty; and groups of the parameters that the table cannot hold.
    """
    updated, held, on, others = plan.refresh(
        groups, state, scaling.grad_scale, scaling.found_inf, sharded_type(), scaling.settled
    )
    return updated, held, on, [changed(group, params=params) for group, params in others]


def launch(plan: Plan, updated: list[Tensor], on: Tensor) -> None:
    """Steps the parameters in the table. updated, on: results of `refresh`."""
    _planned_step(plan.table, on)
    _increment_version(updated)


def sums_of_squares(plan: Plan, on: Tensor) -> Tensor:
    """The sum of the squares of each gradient in the table, (tensors) float64. on: of `refresh`, on the CPU."""
    return _planned_squares(plan.table, on)


def _allocate_table(words: int) -> Tensor:
    return torch.empty(words, dtype=torch.int64, device="cpu")


def sharded_type() -> type | None:
    """torch's DTensor, if anybody has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else getattr(module, "DTensor", None)
