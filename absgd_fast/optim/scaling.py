"""What stands between ``.grad`` and the gradient that a step takes: GradScaler's loss scale, and the normaliser of an ABLoss
with deferred=True."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import NONFINITE, SCALE, real_dtype
from .checks import check_deferrable


class Scaling(NamedTuple):
    """What a step still has to do to the gradients. Kernels do it; `finished` does it in plain torch."""

    grad_scale: Tensor | None  # gradients are divided by it, in place
    found_inf: Tensor | None  # where it is not 0 nothing is written
    settled: Tensor | None  # of ABLoss.settle: SCALE multiplies the gradients, which are not written

    def finished(self, params: list[Tensor], grads: list[Tensor]) -> list[Tensor] | None:
        """The gradients that plain torch steps with; None: this step writes nothing. (On a GPU the host waits for that.)"""
        if self.found_inf is not None:
            if self.found_inf:
                return None
            if self.grad_scale is not None:
                unscale_(params, self.grad_scale)
        if self.settled is None:
            return grads
        if self.settled[NONFINITE] > 0:
            return None
        return [g * self.settled[SCALE].to(g.device, real_dtype(g.dtype)) for g in grads]


# ---- GradScaler ----------------------------------------------------------------------------------------------------------


def unscale_where_host_reads(grad_scale: Tensor | None, found_inf: Tensor, groups: list[dict]) -> bool:
    """Does what GradScaler asks for where the kernels do not read its numbers. False: the step is to be skipped."""
    if found_inf:
        return False
    if grad_scale is not None:
        unscale_((p for group in groups for p in group["params"]), grad_scale)
    return True


@torch.no_grad()
def unscale_(params: Iterable[Tensor], grad_scale: Tensor) -> None:
    for p in params:
        if p.grad is not None:
            p.grad.div_(grad_scale.to(p.grad.device))


# ---- deferred normalisation ----------------------------------------------------------------------------------------------


def take_settled(optimizer) -> Tensor | None:
    """What finishes the gradients of this step; None where they have their size already.

    It finishes the gradients of one step: those that another loss makes after it are normalised already.
    """
    for group in optimizer.param_groups:
        check_deferrable(group)
    settled = optimizer.robust.settle()
    if torch.compiler.is_compiling():
        return settled
    if settled is optimizer._used:
        return None
    optimizer._used = settled
    return settled


def is_known_nonfinite(settled: Tensor | None) -> bool:
    """Whether a sample had no finite loss, as far as that can be known without waiting; a GPU's kernels ask it themselves."""
    if settled is None or settled.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool(settled[NONFINITE] > 0)
