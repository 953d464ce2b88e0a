"""The state of the optimizers: torch's, but float32 for half-precision parameters, and refused where it means another thing."""

from __future__ import annotations

import torch
from torch import Tensor

from .rule import OptimizerRule

HALF = (torch.bfloat16, torch.float16)


def state_dtype(p: Tensor) -> torch.dtype:
    return torch.float32 if p.dtype in HALF else p.dtype


def place_states(rule: OptimizerRule, params: list[Tensor], states: dict, operators: dict) -> None:
    """States of half precision, which torch makes for parameters of half precision, become float32; counts of steps go where
    kernels read them. operators: of each device, or None."""
    for p in params:
        of_p = states.get(p, {})
        for name in rule.states:
            value = of_p.get(name)
            if isinstance(value, Tensor) and value.dtype in HALF:
                of_p[name] = value.float()
        count = of_p.get("step")
        if count is not None and operators.get(p.device) is not None and count.device != p.device:
            of_p["step"] = count.to(p.device, torch.float32)


def check_forms(rule: OptimizerRule, groups: list[dict], saved_groups: list[dict]) -> None:
    """ValueError where a checkpoint was made with another `heavy_ball` or `paper_form`."""
    for group, saved in zip(groups, saved_groups):
        for name in rule.own_flags:
            before, now = bool(saved.get(name, False)), bool(group[name])
            if before != now:
                raise ValueError(
                    f"{name}: the checkpoint was made with {name}={before}, this optimizer has {name}={now}; their states mean"
                    " different things"
                )


def restore_float32(rule: OptimizerRule, optimizer: torch.optim.Optimizer, state_dict: dict) -> None:
    """Gives half-precision parameters the states of a checkpoint in float32: torch has rounded them to the parameter's dtype."""
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"]):
        for p, index in zip(group["params"], saved["params"]):
            if p.dtype not in HALF:
                continue
            for name, value in state_dict["state"].get(index, {}).items():
                if name in rule.states and isinstance(value, Tensor):
                    optimizer.state[p][name] = value.to(p.device, torch.float32, copy=True)


def fill_in_own_flags(rule: OptimizerRule, groups: list[dict]) -> None:
    """Checkpoints of torch's class do not have them."""
    for group in groups:
        for name in rule.own_flags:
            group.setdefault(name, False)
