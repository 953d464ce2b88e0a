"""What a step still has to do to the gradients in ``.grad``: divide them by GradScaler's loss scale, and normalise those of a
deferred ABLoss (docs/MATH.md §5)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import NONFINITE, SCALE, real_dtype
from .state import HALF


class Scaling(NamedTuple):
    """What a step still has to do to the gradients. The kernels do it by themselves; `finished` does it in plain torch."""

    grad_scale: Tensor | None  # the gradients are divided by it, in place
    found_inf: Tensor | None  # unless it is 0, nothing is written
    settled: Tensor | None  # of `RobustLoss.settle`: the step uses SCALE times the gradients; ``.grad`` is not written

    def finished(self, params: list[Tensor], grads: list[Tensor]) -> list[Tensor] | None:
        """The gradients that plain torch steps with. None: this step writes nothing. The host waits for a GPU to know that."""
        if self.found_inf is not None:
            if self.found_inf:
                return None
            if self.grad_scale is not None:
                unscale_(params, self.grad_scale)
        if self.settled is None:
            return grads
        if self.settled[NONFINITE] > 0:
            return None
        scale = self.settled[SCALE]
        # Half precision would round the product, so it is made in the dtype of the states.
        real = [g.float() if g.dtype in HALF else g for g in grads]
        return [g * scale.to(g.device, real_dtype(g.dtype)) for g in real]


# ---- GradScaler ----------------------------------------------------------------------------------------------------------


def unscale_where_host_reads(grad_scale: Tensor | None, found_inf: Tensor, groups: list[dict]) -> bool:
    """Unscales the gradients where no kernel reads GradScaler's numbers. Returns False if this step is to be skipped."""
    if found_inf:
        return False
    if grad_scale is not None:
        unscale_((p for group in groups for p in group["params"]), grad_scale)
    return True


@torch.no_grad()
def unscale_(params: Iterable[Tensor], grad_scale: Tensor) -> None:
    """Divides the gradients of the parameters by GradScaler's loss scale, in place."""
    for p in params:
        if p.grad is not None:
            p.grad.div_(grad_scale.to(p.grad.device))


# ---- deferred normalisation ----------------------------------------------------------------------------------------------


def is_known_nonfinite(settled: Tensor | None) -> bool:
    """Whether the host knows that a loss was not finite. On a GPU it does not look, because that waits: the kernels do."""
    if settled is None or settled.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool(settled[NONFINITE] > 0)
