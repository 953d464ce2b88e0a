"""Clipping by the global norm within a step (docs/MATH.md §3.6).

Every step multiplies the gradients by one number already: SCALE of a settled normaliser (scaling.py). The clip factor goes into
this number. So a clipped step reads the gradients once more, for their norm, and writes no gradient.

    prepared            gives the step a settled normaliser that it may change
    sums_of_squares     of the gradients, one for each tensor; the plan has a kernel for them (planned_step.py)
    clip_               the global norm, and the clip factor
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _numbers
from ..ops import SCALE
from ..reference import clip_factor
from .list_step import read_view
from .planned_step import sharded_type
from .scaling import Scaling


def check_max_norm(value: object, groups: list[dict]) -> float | None:
    """The largest norm as a float; None: no clipping.

    Raises:
        ValueError: it is not a number > 0, or a parameter belongs to FullyShardedDataParallel, whose shards do not say so.
    """
    if value is None:
        return None
    number = _numbers.real(value, tensors=True)
    if number is None or not number > 0:
        raise ValueError(f"max_norm: got {value!r}, expected a number > 0, or None for no clipping")
    if any(hasattr(p, "_fsdp_flattened") for group in groups for p in group["params"]):
        raise ValueError(
            "max_norm: got parameters of FullyShardedDataParallel, each process of which sees a part of the gradients; expected"
            " fully_shard (FSDP2), or criterion.finish_(params) and then model.clip_grad_norm_(max_norm), with max_norm=None"
        )
    return number


def unknown(groups: list[dict]) -> Tensor:
    """The norm before the first step, and of a skipped one: NaN, on the device of the first parameter."""
    device = next((p.device for group in groups for p in group["params"]), torch.device("cpu"))
    return torch.full((), math.nan, dtype=torch.float64, device=device)


def prepared(scaling: Scaling, groups: list[dict]) -> Scaling:
    """The same with a settled normaliser of its own, whose SCALE `clip_` may change. Without one it is that of SCALE 1."""
    if scaling.settled is not None:
        return scaling._replace(settled=scaling.settled.clone())
    device = next((p.device for group in groups for p in group["params"] if p.grad is not None), torch.device("cpu"))
    settled = torch.zeros(6, dtype=torch.float64, device=device)
    settled[SCALE] = 1.0
    return scaling._replace(settled=settled)


@torch.no_grad()
def sums_of_squares(params: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of each gradient, (len(params)) float64. A DTensor gives that of the part of this process."""
    grads = [_values(p.grad) for p in params]
    plain = [g for g in grads if type(g) is Tensor]
    of_plain = iter(torch._foreach_norm(plain, 2, dtype=torch.float64) if plain else ())
    norms = [next(of_plain) if type(g) is Tensor else torch.linalg.vector_norm(g.double()) for g in grads]
    return torch.stack([norm.to(grads[0].device) for norm in norms]).square()


def _values(grad: Any) -> Tensor:
    """The numbers of a gradient as a plain tensor of real numbers, if it holds one."""
    if _is_sharded(grad):
        grad = _summed_up(grad).to_local()
    if grad.is_sparse:
        grad = grad.coalesce().values()
    viewed = read_view(grad)
    assert viewed is not None
    return viewed


@torch.no_grad()
def clip_(scaling: Scaling, max_norm: float, parts: list[tuple[list[Tensor], Tensor]], groups: list[dict]) -> Tensor:
    """Multiplies the clip factor into SCALE of the settled normaliser, and returns the norm of the finished gradients.

    Args:
        scaling: of `prepared`.
        parts: parameters, and the sums of squares of their gradients.
        groups: the parameter groups of the optimizer.

    Returns:
        0-d float64: the norm of G over all parameters, before clipping (reference/steps.py `clip_factor`).
    """
    settled = scaling.settled
    assert settled is not None  # `prepared` has made one
    squares = _over_all_processes(parts, groups, settled.device)
    total = squares.sqrt() * settled[SCALE]
    if scaling.grad_scale is not None:
        total = total / scaling.grad_scale.to(total.device)
    settled[SCALE] *= clip_factor(total, max_norm)
    return total


def _over_all_processes(parts: list[tuple[list[Tensor], Tensor]], groups: list[dict], device: torch.device) -> Tensor:
    """The sum of the squares of all gradients, 0-d float64. Those of sharded ones are summed over the processes.

    A sum goes over the mesh dimensions on which a gradient is sharded, and not over those on which it is replicated.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    sharded = sharded_type()
    if not any([type(p) is sharded for group in groups for p in group["params"]]):
        return sum((squares.sum().to(device) for _, squares in parts), total)
    squares = torch.cat([squares.to(device) for _, squares in parts]) if parts else total.new_empty(0)
    # All parameters, also those without a gradient here: every process must take part in every sum, in the same order.
    places: dict[Any, list[int]] = {_sharding(p): [] for group in groups for p in group["params"]}
    for place, p in enumerate([p for params, _ in parts for p in params]):
        places[_sharding(p)].append(place)
    for sharding, of_squares in places.items():
        square = squares[of_squares].sum()
        if sharding is not None:
            mesh, dimensions = sharding
            for dimension in dimensions:
                torch.distributed.all_reduce(square, group=mesh.get_group(dimension))
        total += square
    return total


def _sharding(p: Any) -> tuple[Any, tuple[int, ...]] | None:
    """The mesh, and the dimensions of it on which the gradient of a parameter is sharded; None for a plain tensor."""
    if not _is_sharded(p):
        return None
    like = p.grad if _is_sharded(p.grad) else p
    whole = [placement.is_replicate() or placement.is_partial() for placement in like.placements]
    return like.device_mesh, tuple(i for i, is_whole in enumerate(whole) if not is_whole)


def _is_sharded(t: Any) -> bool:
    return type(t) is sharded_type()


def _summed_up(grad: Any) -> Any:
    """A DTensor without parts that are still to be summed up over processes."""
    if not any(placement.is_partial() for placement in grad.placements):
        return grad
    from torch.distributed.tensor import Replicate

    return grad.redistribute(placements=[Replicate() if x.is_partial() else x for x in grad.placements])
