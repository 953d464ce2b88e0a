"""Activation checkpointing runs a forward twice: a stateful module must move its state once, and give the same values again.

torch.utils.checkpoint(..., use_reentrant=False) does not store the tensors that a forward saves for backward. It runs the forward
a second time during backward, to make them again. While it does either, it keeps hooks for saved tensors in place:

    first pass      hooks that hold the frame of the checkpoint
    recomputation   hooks that refer weakly to the same frame

`Replays` reads both from torch's stack of hooks. In the first pass it stores a record of each forward of a module under the frame
and in order. In a recomputation it gives these records back in the same order. Checkpoints inside checkpoints need the whole
stack: a recomputation of the outer one is a first pass of the inner one.

With use_reentrant=True the first pass runs without gradients, so the state does not move in it, and no hooks are there in the
second. The state moves once, in the second.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch.utils import checkpoint

from ._compiled import constant_in_graphs, outside_graphs

_Record = TypeVar("_Record")
_Result = TypeVar("_Result")

# torch's stack of hooks for saved tensors. There is no public way to see it, and the public context manager costs more.
top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
push_hooks = torch._C._autograd._push_saved_tensors_default_hooks
pop_hooks = torch._C._autograd._pop_saved_tensors_default_hooks


@constant_in_graphs
def hooks_are_active() -> bool:
    """Whether hooks for saved tensors are in place, as they are inside activation checkpointing. It costs 0.1 us.

    torch.compile takes the answer from the time of tracing.
    """
    return top_hooks(True) is not None


class _Recomputation(NamedTuple):
    """A running recomputation."""

    frame: object  # of the checkpoint whose first pass it repeats
    hook: Callable  # an object of this recomputation alone


class Replays(Generic[_Record]):
    """The records of the forwards of one module that activation checkpointing may run again.

    They live as long as the frame of their checkpoint, which lives as long as the graph. A copy of the module has none.
    """

    def __init__(self) -> None:
        self._of_frame: WeakKeyDictionary[object, list[_Record]] = WeakKeyDictionary()
        self._read: WeakKeyDictionary[Callable, int] = WeakKeyDictionary()  # how many each recomputation has taken

    @outside_graphs  # so that the forward sees the hooks each time
    def run(
        self, begin: Callable[[], _Record], first: Callable[[_Record], _Result], again: Callable[[_Record], _Result]
    ) -> _Result:
        """The result of first(record) with a new record from begin(); in a recomputation again(record), with the same record.

        RuntimeError if a recomputation runs a forward that the first pass did not run.
        """
        frames, recomputation = _passes()
        record = begin() if recomputation is None else self._next(recomputation)
        for frame in frames:
            self._of_frame.setdefault(frame, []).append(record)
        return first(record) if recomputation is None else again(record)

    def result(self, make: Callable[[], _Result]) -> _Result:
        """The result of make(). A recomputation gets the result of the first pass."""

        def first(made: list) -> _Result:
            made.append(make())
            return made[0]

        return self.run(list, first, lambda made: made[0])  # type: ignore[arg-type, index]  # these records are lists

    def _next(self, recomputation: _Recomputation) -> _Record:
        """The next record of a recomputation."""
        read, records = self._read.get(recomputation.hook, 0), self._of_frame.get(recomputation.frame, [])
        if read >= len(records):
            raise RuntimeError(
                "activation checkpointing: got a recomputation of a forward that the first pass did not run in this way, expected"
                " the same calls of this module in both; if the module is compiled, compile the function that calls"
                " torch.utils.checkpoint, or call the module outside of the checkpoint"
            )
        self._read[recomputation.hook] = read + 1
        return records[read]

    def __deepcopy__(self, memo: dict[int, Any]) -> Replays[_Record]:
        return type(self)()

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), ()


def _passes() -> tuple[list[object], _Recomputation | None]:
    """The frames whose first pass is running, and the outermost running recomputation."""
    frames: list[object] = []
    recomputation = None
    for pack in _pack_hooks():
        function = inspect.unwrap(pack)  # torch puts torch._dynamo.disable around it
        if getattr(function, "__module__", None) != checkpoint.__name__:
            continue
        held = [cell.cell_contents for cell in function.__closure__ or ()]
        held = [x() if isinstance(x, ref) else x for x in held]
        of_checkpoint = [x for x in held if isinstance(x, checkpoint._CheckpointFrame)]
        is_first = function.__qualname__.startswith("_checkpoint_hook.")
        if len(of_checkpoint) != 1 or not (is_first or function.__qualname__.startswith("_recomputation_hook.")):
            raise RuntimeError(
                f"activation checkpointing: torch {torch.__version__} keeps its frames in another place than expected, so a"
                " recomputation cannot be told from a first pass; use torch.utils.checkpoint with use_reentrant=True"
            )
        if is_first:
            frames.append(of_checkpoint[0])
        else:
            recomputation = _Recomputation(of_checkpoint[0], function)
    return frames, recomputation


def _pack_hooks() -> Iterator[Callable]:
    """The pack hooks in place, from the innermost to the outermost. torch shows the innermost only, so they are taken off."""
    taken = []
    try:
        while (hooks := top_hooks(True)) is not None:
            taken.append(hooks)
            pop_hooks()
    finally:
        for pack, unpack in reversed(taken):
            push_hooks(pack, unpack)
    return iter([pack for pack, _ in taken])
