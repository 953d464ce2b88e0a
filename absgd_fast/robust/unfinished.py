"""Finds training loops that never finish a deferred step.

Such a loop has neither `finish_` nor an optimizer with robust=. Its gradients stay sums, log s never moves, and no number looks
wrong. So while a step is OPEN, and no optimizer has it as robust=, torch calls `_after_step` after every step of any optimizer.
The error comes with the second step of one optimizer that uses gradients of this criterion (step.py `TRANSITIONS`, event
"unfinished").

    the first forward     walks over the graph of its loss once, and keeps the parameters that backward will reach
    the first step        of an optimizer with such a parameter is noted, with one of these parameters as a witness
    each later backward   of the criterion notes the gradient that it has left in a witness
    the second step       is an error if the witness still holds that gradient

A criterion reaches parameters that its own optimizer does not step, as the loss of a generator reaches the discriminator. The
optimizer of the discriminator may step in every micro-batch. Its zero_grad() drops what the generator's loss left in its
gradients, and so its witness has another gradient by then. (zero_grad(set_to_none=False) does not show; set the discriminator to
requires_grad_(False) there while the generator's loss is made.)

Parameters that the graph does not show, as those of FSDP2 and of reentrant checkpointing, are not found.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.optim.optimizer import Optimizer, _global_optimizer_post_hooks, register_optimizer_step_post_hook

from .touched import Params, Touched


class OpenStep(Protocol):
    """What is told of the steps of optimizers: a `DeferredStep`."""

    def stepped(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped."""


class Witness:
    """A parameter of an optimizer that has stepped, and the gradient in it that was not normalised."""

    def __init__(self, param: Tensor, grad: Tensor | None = None):
        self.param = weakref.ref(param)
        self.version: int | None = None if grad is None else grad._version
        self.grad = None if grad is None else weakref.ref(grad)

    def now(self) -> tuple[Tensor | None, int]:
        """The gradient of the parameter, and how often it was written."""
        param = self.param()
        grad = None if param is None else param.grad
        return grad, 0 if grad is None else grad._version

    def note(self, before: tuple[Tensor | None, int]) -> None:
        """A backward of the criterion has ended. before: `now` when it began."""
        grad, version = self.now()
        if grad is not None and (grad is not before[0] or version != before[1]):
            self.grad, self.version = weakref.ref(grad), None  # whatever else is added to it

    def testifies(self) -> bool:
        """Whether the gradient is still there; that of the step before only if nobody has written to it since."""
        grad, version = self.now()
        return grad is not None and self.grad is not None and self.grad() is grad and self.version in (None, version)


class Watch:
    """Who steps the gradients of one criterion while its step is OPEN. A copied or unpickled criterion has a new one."""

    def __init__(self) -> None:
        self.quiet = False  # whether a forward has nothing to do here
        self.met = False  # whether there was a micro-batch since the criterion was made, copied or unpickled
        self.warned = False  # whether state_dict() has warned
        self.touched = Touched()
        self._early: weakref.ref[Tensor] | None = None  # a parameter that was stepped before `finish_`
        self._claims: list[weakref.ref[Optimizer]] = []
        self._reached: dict[int, weakref.ref[Tensor]] = {}  # id of a parameter -> the parameter
        self._witnesses: weakref.WeakKeyDictionary[Optimizer, Witness | None] = weakref.WeakKeyDictionary()
        self._strangers: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # they step no parameter that the criterion reaches

    def __reduce__(self) -> tuple:
        return Watch, ()

    def claim(self, optimizer: Optimizer) -> None:
        """An optimizer with robust= finishes the steps, as long as it lives and has the criterion as its `robust`."""
        self._claims = [claim for claim in self._claims if claim() not in (None, optimizer)] + [weakref.ref(optimizer)]

    def forward(self, step: OpenStep, loss: Tensor) -> None:
        """Watch over the step of this loss. Called after each micro-batch, unless `quiet`."""
        if torch.compiler.is_compiling():
            return
        node = loss.grad_fn
        if node is None:
            return
        if id(step) not in _open:
            finishing = {id(o): _params_of(o) for claim in self._claims if (o := claim()) is not None and _robust_step(o) is step}
            if finishing:
                self._look_for_writers(loss, finishing)
                return
            self._witnesses = weakref.WeakKeyDictionary()
            _open_step(step)
            if not self._reached:
                self._walk(node)
        elif None in self._witnesses.values():
            self._walk(node)  # an optimizer steps parameters that the first graph did not hold
            self._look_for_witnesses()
        if self._witnesses:
            loss.register_hook(self._backward_begins)
        self._look_for_writers(loss, {Touched.FINISH: self._params})

    def _look_for_writers(self, loss: Tensor, who: dict[int, Params]) -> None:
        """See whether somebody writes the gradients before they are finished. Afterwards it is quiet, if nothing else is left."""
        if self.touched.left:
            self.touched.forward(loss, who)
        self.quiet = not self._witnesses and self.touched.left == 0

    def _params(self) -> list[Tensor]:
        """The parameters that a graph of the criterion held."""
        return [param for known in self._reached.values() if (param := known()) is not None]

    def stepped_early(self, params: Iterable[Tensor]) -> bool:
        """Whether an optimizer has stepped one of these parameters with the gradient that the criterion has left there."""
        early = None if self._early is None else self._early()
        return early is not None and any(param is early for param in params)

    def closed(self, step: OpenStep) -> None:
        """The step has ended."""
        if torch.compiler.is_compiling():
            return
        self.quiet, self._early = False, None
        if id(step) in _open:
            self._witnesses = weakref.WeakKeyDictionary()
            _close_step(id(step))

    def stepped(self, optimizer: Optimizer) -> bool:
        """Note the step of an optimizer. Returns whether it is another one with gradients that were to be normalised."""
        left = self.touched.left_as_it_was(optimizer)
        self._early = self._early if left is None else weakref.ref(left)
        witness = self._witnesses.get(optimizer, self)  # one look, because another thread may end the step
        if witness is not self:
            return isinstance(witness, Witness) and witness.testifies()
        if optimizer not in self._strangers:
            param = self._reached_by(optimizer)
            self._witnesses[optimizer] = None if param is None else Witness(param, param.grad)
            self.quiet = False
        return False

    def _walk(self, node: Node) -> None:
        self._reached |= {id(param): weakref.ref(param) for param in leaves(node)}

    def _look_for_witnesses(self) -> None:
        for optimizer in [optimizer for optimizer, witness in self._witnesses.items() if witness is None]:
            param = self._reached_by(optimizer)
            if param is None:
                self._strangers.add(optimizer)
                del self._witnesses[optimizer]
            else:
                self._witnesses[optimizer] = Witness(param)

    def _reaches(self, param: Tensor) -> bool:
        known = self._reached.get(id(param))
        return known is not None and known() is param

    def _reached_by(self, optimizer: Optimizer) -> Tensor | None:
        """A parameter of the optimizer that the criterion reaches; if possible one that has a gradient."""
        reached = [p for group in optimizer.param_groups for p in group["params"] if self._reaches(p)]
        return next((p for p in reached if p.grad is not None), reached[0] if reached else None)

    def _backward_begins(self, _: Tensor) -> None:
        before = [(witness, witness.now()) for witness in self._witnesses.values() if witness is not None]

        def backward_has_ended() -> None:
            for witness, then in before:
                witness.note(then)

        torch.autograd.Variable._execution_engine.queue_callback(backward_has_ended)


def _params_of(optimizer: Optimizer) -> Params:
    """What gives the parameters of an optimizer, without keeping it alive."""
    known = weakref.ref(optimizer)

    def params() -> list[Tensor]:
        alive = known()
        return [] if alive is None else [p for group in alive.param_groups for p in group["params"]]

    return params


def _robust_step(optimizer: Optimizer) -> object:
    """The deferred step that this optimizer finishes, if any."""
    return getattr(getattr(optimizer, "robust", None), "deferred_step", None)


def leaves(node: Node) -> Iterator[Tensor]:
    """The tensors in whose ``.grad`` a backward from this node adds."""
    seen, left = {node}, [node]
    while left:
        for following, _ in left.pop().next_functions:
            if following is None or following in seen:
                continue
            seen.add(following)
            if type(following).__name__ == "AccumulateGrad":
                yield following.variable  # type: ignore[attr-defined]  # this kind of node has it
            left.append(following)


# ---- torch's hook ------------------------------------------------------------------------------------------------------------

_TORCHS_FILE = Optimizer.profile_hook_step.__code__.co_filename  # of the code that walks over the hooks
_open: dict[int, weakref.ref[OpenStep]] = {}  # the OPEN steps that are watched, by their id


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not torch.compiler.is_compiling():
        for open_step in list(_open.values()):
            step = open_step()
            if step is not None:
                step.stepped(optimizer)


_handle = register_optimizer_step_post_hook(_after_step)
_handle.remove()  # until a step opens; the hook keeps this id, or torch.compile would compile steps again for each new one


def _open_step(step: OpenStep) -> None:
    key = id(step)
    _open[key] = weakref.ref(step, lambda _: _close_step(key))
    _global_optimizer_post_hooks[_handle.id] = _after_step


def _close_step(key: int) -> None:
    _open.pop(key, None)
    if not _open and not _torch_walks_over_hooks():
        _handle.remove()


def _torch_walks_over_hooks() -> bool:
    """Whether this is called by a hook that runs after a step. Then our hook stays, and does nothing, until another step ends."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == _TORCHS_FILE and "post_hook" in frame.f_locals:  # the variable of torch's loop
            return True
        frame = frame.f_back
    return False
