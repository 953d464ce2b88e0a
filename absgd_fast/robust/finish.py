"""finish_: the gradients of a deferred step brought to their size, for any optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..ops import NONFINITE, SCALE


def deferred_grads(params: Tensor | Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters, each once, and their gradients. ValueError for a gradient that cannot hold deferred sums."""
    params = [params] if isinstance(params, Tensor) else list({id(p): p for p in params}.values())
    grads = [p.grad for p in params if p.grad is not None]
    if any(grad.dtype == torch.float16 for grad in grads):
        raise ValueError("finish_: got a float16 gradient, which cannot hold deferred sums; expected float32 or bfloat16")
    return params, grads


@torch.no_grad()
def scale_grads(params: list[Tensor], grads: list[Tensor], settled: Tensor) -> Tensor:
    """Multiplies the gradients by the scale of a settled normaliser; returns whether the step counts (0-d bool).

    Where it does not, there is no gradient left on the CPU. On a GPU the gradients become NaN, because looking would wait for it.
    """
    counts = settled[NONFINITE] == 0
    if settled.device.type == "cpu" and not counts:
        for p in params:
            p.grad = None
        return counts
    scale = settled[SCALE].where(counts, math.nan)
    by_kind: dict[tuple, list[Tensor]] = {}
    for grad in grads:
        grad = getattr(grad, "_local_tensor", grad)  # what this process holds of a DTensor
        by_kind.setdefault((grad.device, grad.dtype, grad.layout), []).append(grad)
    for (device, _, layout), some in by_kind.items():
        factor = float(scale) if scale.device.type == "cpu" else scale.to(device, non_blocking=True)
        if layout == torch.strided:
            torch._foreach_mul_(some, factor)
        else:
            for grad in some:
                grad.mul_(factor)
    return counts
