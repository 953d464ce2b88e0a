"""The arithmetic of `finish_`, which normalises the gradients of a deferred step for any optimizer (docs/MATH.md §5)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..ops import NONFINITE, SCALE


def deferred_grads(params: Tensor | Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters, each once, and their gradients. ValueError for a float16 gradient."""
    params = [params] if isinstance(params, Tensor) else list({id(p): p for p in params}.values())
    grads = [p.grad for p in params if p.grad is not None]
    if any(grad.dtype == torch.float16 for grad in grads):
        raise ValueError(
            "finish_: got a float16 gradient, whose range is too small for sums that are not normalised yet; expected"
            " float32 or bfloat16"
        )
    return params, grads


@torch.no_grad()
def scale_grads(params: list[Tensor], grads: list[Tensor], settled: Tensor) -> Tensor:
    """Multiply the gradients by the SCALE of a settled normaliser; return whether the step counts (0-d bool).

    A step with a nonfinite loss does not count. Then every `.grad` becomes None on the CPU. On a GPU the gradients become NaN,
    because the host would have to wait for the GPU to know.
    """
    counts = settled[NONFINITE] == 0
    if settled.device.type == "cpu" and not counts:
        for p in params:
            p.grad = None
        return counts
    scale = settled[SCALE].where(counts, math.nan)
    by_kind: dict[tuple, list[Tensor]] = {}
    for grad in grads:
        grad = getattr(grad, "_local_tensor", grad)  # the part of a DTensor that this process holds
        by_kind.setdefault((grad.device, grad.dtype, grad.layout), []).append(grad)
    for (device, _, layout), some in by_kind.items():
        factor = float(scale) if scale.device.type == "cpu" else scale.to(device, non_blocking=True)
        if layout == torch.strided:
            torch._foreach_mul_(some, factor)
        else:
            for grad in some:
                grad.mul_(factor)
    return counts
