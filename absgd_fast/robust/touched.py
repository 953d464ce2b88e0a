"""Finds training loops that change the gradients of a deferred step before an optimizer with robust= has finished them.

The change is nearly always clipping. It sees sums that nobody has normalised, so the step becomes far too small, and no number
looks wrong. torch says nothing when it clips. But it writes the gradients, which counts their version up:

    each backward of the criterion    notes the gradient of one parameter of each such optimizer, and its version
    the step                          compares them

A loop that clips does so in every step, so the first LOOKS steps suffice, and later steps cost nothing. GradScaler writes the
gradients too. A step with its numbers is not looked at.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

LOOKS = 2


class Touched:
    """The gradients that backward has left to the optimizers with robust= of one criterion."""

    def __init__(self) -> None:
        self.left = LOOKS  # how many more steps are looked at
        self._notes: weakref.WeakKeyDictionary[Optimizer, _Note] = weakref.WeakKeyDictionary()

    def forward(self, loss: Tensor, optimizers: list[Optimizer]) -> None:
        """Note the gradients when the backward of this loss has ended."""
        queue = torch.autograd.Variable._execution_engine.queue_callback
        watched = weakref.WeakSet(optimizers)

        def backward_has_ended() -> None:
            self._notes.update({optimizer: _Note(optimizer) for optimizer in watched})

        def backward_begins(_: Tensor) -> None:
            # DDP writes the averages into the gradients in a callback that it queues during backward. A callback that is queued
            # by a callback runs after all of these.
            queue(lambda: queue(backward_has_ended))

        loss.register_hook(backward_begins)

    def by_hand(self, optimizer: Optimizer) -> bool:
        """Whether somebody has written the gradients since the latest backward. A step asks once; the answer is True once."""
        if self.left == 0:
            return False
        self.left -= 1
        note = self._notes.pop(optimizer, None)
        written = note is not None and note.is_written()
        if written:
            self.left = 0  # one warning says it
        return written


class _Note:
    """What backward has left in one gradient of an optimizer: the smallest one of which this process has a part."""

    def __init__(self, optimizer: Optimizer):
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        here = [p for p in params if _part(p.grad).numel()]
        self._noted: tuple[weakref.ref[Tensor], weakref.ref[Tensor], int, Tensor | None] | None = None
        if here:
            param: Tensor = min(here, key=lambda p: _part(p.grad).numel())
            grad = param.grad
            assert grad is not None
            # The operators of DTensor write parts without counting up their versions, so there the numbers are compared.
            numbers = None if _part(grad) is grad else _part(grad).clone()
            self._noted = weakref.ref(param), weakref.ref(grad), _part(grad)._version, numbers

    def is_written(self) -> bool:
        """Whether somebody has written the same gradient since."""
        if self._noted is None:
            return False
        param, grad, version, numbers = self._noted
        noted = grad()
        if noted is None or id(getattr(param(), "grad", None)) != id(noted):
            return False
        part = _part(noted)
        return part._version != version or (numbers is not None and not _same(part, numbers))


def _part(grad: Tensor) -> Tensor:
    """The part of a DTensor that this process has; any other gradient itself."""
    part: Tensor = getattr(grad, "_local_tensor", grad)
    return part


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())
