"""Finds training loops that change the gradients of a deferred step before it is finished.

The change is nearly always clipping. It sees sums that nobody has normalised, so the step becomes far too small, and no number
looks wrong. torch says nothing when it clips. But it writes the gradients, which counts their version up:

    each backward of the criterion    notes one gradient of those that will be finished, and its version
    the end of the step               compares them: an optimizer with robust= in its step, and `finish_`

A loop that clips does so in every step, so the first LOOKS steps suffice, and later steps cost nothing. GradScaler writes the
gradients too. So an optimizer does not look while GradScaler has left its numbers with it, and `finish_` does not look if the
loss was multiplied by a number above 1 before backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

LOOKS = 2

Params = Callable[[], Iterable[Tensor]]


class Touched:
    """The gradients that backward has left to those who finish the steps of one criterion.

    They are known by keys: the id of an optimizer with robust=, or `FINISH` for `finish_`.
    """

    FINISH = 0

    def __init__(self) -> None:
        self.left = LOOKS  # how many more steps are looked at
        self._notes: dict[int, _Note] = {}

    def forward(self, loss: Tensor, who: dict[int, Params]) -> None:
        """Note gradients when the backward of this loss has ended. who: key -> the parameters whose gradients it finishes."""
        if torch._C._current_graph_task_id() != -1:  # a reentrant checkpoint: the outer backward writes gradients after this one
            self.left = 0
            return
        queue = torch.autograd.Variable._execution_engine.queue_callback

        def backward_has_ended() -> None:
            self._notes = {key: _Note(params()) for key, params in who.items()}

        def backward_begins(upstream: Tensor) -> None:
            if self.FINISH in who and bool(upstream > 1):
                self.left = 0
                return
            # DDP writes the averages into the gradients in a callback that it queues during backward. A callback that is queued
            # by a callback runs after all of these.
            queue(lambda: queue(backward_has_ended))

        loss.register_hook(backward_begins)

    def by_hand(self, key: int) -> bool:
        """Whether somebody has written the gradients since the latest backward. A step asks once; the answer is True once."""
        if self.left == 0:
            return False
        self.left -= 1
        note = self._notes.pop(key, None)
        written = note is not None and note.is_written()
        if written:
            self.left = 0  # one warning says it
        return written

    def left_as_it_was(self, optimizer: Optimizer) -> Tensor | None:
        """A parameter of the optimizer whose gradient is what the latest backward of the criterion left for `finish_`, if any."""
        note = self._notes.get(self.FINISH)
        param = note.param() if note is not None and note.is_there() and not note.is_written() else None
        params = [p for group in optimizer.param_groups for p in group["params"]]
        return param if param is not None and any(p is param for p in params) else None

    def forget(self) -> None:
        """Forget the gradients of a step that was given up."""
        self._notes.clear()


class _Note:
    """What backward has left in one gradient: the smallest one of which this process has a part."""

    def __init__(self, params: Iterable[Tensor]):
        here = [p for p in params if p.grad is not None and _part(p.grad).numel()]
        self._noted: tuple[weakref.ref[Tensor], weakref.ref[Tensor], int, Tensor | None] | None = None
        if here:
            param = min(here, key=lambda p: 0 if p.grad is None else _part(p.grad).numel())
            grad = param.grad
            assert grad is not None
            # The operators of DTensor write parts without counting up their versions, so there the numbers are compared.
            numbers = None if _part(grad) is grad else _part(grad).clone()
            self._noted = weakref.ref(param), weakref.ref(grad), _part(grad)._version, numbers

    def param(self) -> Tensor | None:
        """The parameter whose gradient was noted."""
        return None if self._noted is None else self._noted[0]()

    def is_there(self) -> bool:
        """Whether the parameter still has the gradient that was noted."""
        noted = None if self._noted is None else self._noted[1]()
        return noted is not None and id(getattr(self.param(), "grad", None)) == id(noted)

    def is_written(self) -> bool:
        """Whether somebody has written the same gradient since."""
        if self._noted is None or not self.is_there():
            return False
        _, grad, version, numbers = self._noted
        noted = grad()
        assert noted is not None  # it is there
        part = _part(noted)
        return part._version != version or (numbers is not None and not _same(part, numbers))


def _part(grad: Tensor) -> Tensor:
    """The part of a DTensor that this process has; any other gradient itself."""
    part: Tensor = getattr(grad, "_local_tensor", grad)
    return part


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())
