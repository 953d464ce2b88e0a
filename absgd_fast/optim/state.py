"""The state of the optimizers. It is torch's, but float32 for half-precision parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from .rule import OptimizerRule

HALF = (torch.bfloat16, torch.float16)
COUNTS = (torch.float32, torch.float64)  # the dtypes in which kernels read the counts of steps


def state_dtype(p: Tensor) -> torch.dtype:
    """The dtype in which the states of a parameter are kept."""
    return torch.float32 if p.dtype in HALF else p.dtype


def place_states(rule: OptimizerRule, params: list[Tensor], states: dict, operators: dict) -> None:
    """Makes half-precision states, which torch has made, float32, and moves the counts of steps to where kernels read them.

    operators: the kernels of each device, or None where plain torch serves it.
    """
    for p in params:
        of_p = states.get(p, {})
        for name in rule.states:
            value = of_p.get(name)
            if isinstance(value, Tensor) and value.dtype in HALF:
                of_p[name] = value.float()
        count = of_p.get("step")
        if count is None:
            continue
        if not isinstance(count, Tensor):
            of_p["step"] = count = torch.tensor(float(count), dtype=torch.float32, device="cpu")
        if count.is_meta and not p.is_meta:
            of_p["step"] = count = first_count(count.dtype)
        if operators.get(p.device) is not None and not (count.device == p.device and count.dtype in COUNTS):
            of_p["step"] = count.to(p.device, torch.float32)


def first_count(dtype: torch.dtype) -> Tensor:
    """The count of steps of a parameter that has taken none. torch makes it on its default device, which may be meta."""
    return torch.zeros((), dtype=dtype, device="cpu")


def check_forms(rule: OptimizerRule, groups: list[dict], saved_groups: list[dict]) -> None:
    """Raises ValueError if a checkpoint was made with another `heavy_ball` or `paper_form`."""
    for group, saved in zip(groups, saved_groups):
        for name in rule.own_flags:
            before, now = bool(saved.get(name, False)), bool(group[name])
            if before != now:
                raise ValueError(
                    f"{name}: the checkpoint was made with {name}={before}, this optimizer has {name}={now}, and their"
                    f" states mean different things; construct the optimizer with {name}={before} to load it"
                )


def restore_float32(rule: OptimizerRule, optimizer: torch.optim.Optimizer, state_dict: dict) -> None:
    """Loads the float32 states of half-precision parameters again, because torch has rounded them to the parameter's dtype."""
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"]):
        for p, index in zip(group["params"], saved["params"]):
            if p.dtype not in HALF:
                continue
            for name, value in state_dict["state"].get(index, {}).items():
                if name in rule.states and isinstance(value, Tensor):
                    optimizer.state[p][name] = value.to(p.device, torch.float32, copy=True)


def fill_in_own_flags(rule: OptimizerRule, groups: list[dict]) -> None:
    """Adds the options that torch's class does not have, and that are missing in its checkpoints, to the groups."""
    for group in groups:
        group.setdefault("fused", None)  # torch's RMSprop does not have it
        for name in rule.own_flags:
            group.setdefault(name, False)
