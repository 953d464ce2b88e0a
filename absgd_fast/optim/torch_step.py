"""The third tier, torch's step: plain torch for what no kernel takes, with the same result.

These are sparse gradients, tensor subclasses that hold no plain tensor, and everything where no kernels serve. The formulas are
in reference/; each optimizer says in `_torch_step` which of them is its own.
"""

from __future__ import annotations

from torch import Tensor

from .scaling import Scaling


def step(optimizer, group: dict, lists: list[list[Tensor | None]], scaling: Scaling) -> None:
    """lists: as torch's `_init_group` fills them; None for a state that is not kept."""
    params, grads, *rest = lists
    grads = scaling.finished(params, grads)
    if grads is None:
        return
    if isinstance(group["lr"], Tensor):
        group = {**group, "lr": group["lr"].reshape(())}  # may have one dimension more than a parameter
    optimizer._torch_step(group, params, grads, *rest)
