"""The optimizer step that a deferred loss is in: five phases, and one table of what may follow (docs/MATH.md §5).

A deferred step begins with its first micro-batch, a forward in training mode. It ends when log s' of all its micro-batches is
settled: by `step()` of an optimizer with robust=, or by `criterion.finish_()`. `TRANSITIONS` has every event in every phase.

After a micro-batch with a nonfinite loss (NaN, infinite, or z more than 60 above the reference point) this happens:

    1. That forward returns NaN. The step stays OPEN and accepts more micro-batches, because other processes go on too; their
       losses may all be finite. `partial_stats` keeps the number of nonfinite losses.
    2. The step ends like any other: OPEN -> SETTLED by an optimizer with robust=, or OPEN -> FINISHED by `finish_`.
       log s stays as it was. `nonfinite_batches` grows by 1, once for the whole step, on every process.
    3. The gradients of the step are not used.
       With robust=: the optimizer changes neither parameters nor its states. On the CPU `step()` returns early; on a GPU its
       kernels read the count of nonfinite losses and write nothing.
       With finish_: it returns False. On the CPU every `.grad` becomes None; on a GPU every gradient becomes NaN.
    4. The next forward begins a new step (-> OPEN), as if the spoilt one had never been. `zero_grad()` is needed as usual.

A training loop that sees the NaN itself may also call zero_grad() and `criterion.discard()`, on all processes; then the step is
not counted.

A training loop that never ends its step gets an error (unfinished.py).
"""

from __future__ import annotations

import warnings
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ..ops import COUNT, SCALE
from .arrival import Arrival
from .unfinished import Watch


class Phase(Enum):
    """How far a deferred step has come; the values say it in words."""

    IDLE = "no micro-batch yet: at the start, after discard(), or after a state was loaded between two steps"
    OPEN = "at least one micro-batch; log s' is not known yet, and the gradients are not normalised"
    SETTLED = "log s' is known; each optimizer with robust= normalises its gradients by it within its step"
    FINISHED = "log s' is known, and finish_ has normalised the gradients"
    LOST = "a state was loaded after the micro-batches, so nothing can normalise their gradients any more"


IDLE, OPEN, SETTLED, FINISHED, LOST = Phase

_LOST = (
    ": a state was loaded after the micro-batches, so their gradients can no longer be normalised;"
    " expected zero_grad() and new micro-batches, or discard()"
)
_COPIED = (
    "got a copy (or pickle) of a criterion in the middle of a deferred step, which counts micro-batches whose gradients torch"
    " does not copy; expected it after optimizer.step() (robust=) or finish_, discard() of the copy, or a copy of the gradients"
)
_NO_FORWARD = "finish_: got no forward in training mode since the last step, expected at least one micro-batch"

# event -> phase before it -> phase after it. A text instead of a phase is the RuntimeError that the event raises in that phase;
# then nothing changes.
TRANSITIONS: dict[str, dict[Phase, Phase | str]] = {
    # A forward in training mode, with gradients enabled and update=True. Its losses may be nonfinite: the phase is the same.
    "forward": {IDLE: OPEN, OPEN: OPEN, SETTLED: OPEN, FINISHED: OPEN, LOST: OPEN},
    # step() of an optimizer with robust=, which calls criterion.settle().
    "step": {
        IDLE: IDLE,  # the optimizer uses the gradients as they are
        OPEN: SETTLED,
        SETTLED: SETTLED,  # a second optimizer normalises its own gradients by the same numbers
        FINISHED: "step: criterion.finish_ has normalised the gradients already; expected an optimizer without robust= together"
        " with finish_ (which clipping needs), or an optimizer with robust= and no finish_",
        LOST: "step" + _LOST,
    },
    # An optimizer without robust= has stepped gradients of the micro-batches so far, and not for the first time (unfinished.py).
    "unfinished": {
        IDLE: IDLE,
        OPEN: "step: got a second step of an optimizer with gradients of a deferred criterion, and nothing has normalised them or"
        " moved log s; expected criterion.finish_(params) before optimizer.step(), or an optimizer with robust=criterion, or"
        " deferred=False; after gradients that were thrown away, criterion.discard()",
        SETTLED: SETTLED,
        FINISHED: FINISHED,
        LOST: LOST,
    },
    # criterion.finish_(params)
    "finish_": {
        IDLE: _NO_FORWARD,
        OPEN: FINISHED,
        SETTLED: _NO_FORWARD,
        FINISHED: "finish_: it has normalised the gradients of this step already; expected one call per step, with the parameters"
        " of all optimizers, or a forward before the next call",
        LOST: "finish_" + _LOST,
    },
    # criterion.set_lam(value)
    "set_lam": {
        IDLE: IDLE,
        OPEN: "set_lam: got another lambda in the middle of a deferred step, expected it after the optimizer's step (or finish_);"
        " to give the step up instead, call criterion.discard() first",
        SETTLED: SETTLED,
        FINISHED: FINISHED,
        LOST: LOST,
    },
    # criterion.load_state_dict(state)
    "load": {IDLE: IDLE, OPEN: LOST, SETTLED: IDLE, FINISHED: IDLE, LOST: LOST},
    # criterion.discard(), for gradients that were thrown away
    "discard": {IDLE: IDLE, OPEN: IDLE, SETTLED: IDLE, FINISHED: IDLE, LOST: IDLE},
}


class DeferredStep:
    """The phase of one optimizer step, and the statistics of its micro-batches so far.

    Its attributes are plain and not buffers, because DDP copies buffers from one process to the others, and these numbers differ
    between processes. A checkpoint does not contain them, as it does not contain gradients.
    """

    def __init__(self) -> None:
        self.phase = IDLE
        self.partial_stats: Tensor | None = None  # (3), of the micro-batches so far (OPEN)
        self.reference: Tensor | None = None  # (6), settled by the first micro-batches, with scale 1 (OPEN)
        self.settled: Tensor | None = None  # (6), normalises the gradients (SETTLED, FINISHED)
        self.divisor = 1.0  # the loss_divisor of the first micro-batch, which the end of the step undoes (OPEN)
        self._count: Arrival | None = None  # on a GPU: how many samples the first micro-batches held
        self.watch = Watch()

    def __getstate__(self) -> dict[str, Any]:
        """For a copy or a pickle. In the middle of a step it warns, because torch copies no gradients of parameters."""
        if self.phase is OPEN:
            warnings.warn(_COPIED, stacklevel=2)
        return vars(self)

    def check(self, event: str) -> Phase:
        """The phase that follows the event. RuntimeError if the event is not allowed in this phase."""
        following = TRANSITIONS[event][self.phase]
        if isinstance(following, str):
            raise RuntimeError(following)
        return following

    def move(self, event: str) -> None:
        """Enter the phase that follows the event. If the event is not allowed, `check` raises and nothing changes."""
        following = self.check(event)
        if following is not OPEN:
            self.partial_stats = self.reference = self._count = None
            self.watch.closed(self)
        if following is not SETTLED and following is not FINISHED:
            self.settled = None
        self.phase = following

    def add(self, partial_stats: Tensor, divisor: float) -> None:
        """Count one more micro-batch. partial_stats: those of all micro-batches so far, this one included. divisor: its own."""
        if self.phase is not OPEN:
            self.divisor = divisor
        self.move("forward")
        self.partial_stats = partial_stats
        self.watch.met = True

    def end(self, event: str, settled: Tensor) -> None:
        """End the step by "step" or "finish_". settled: the normaliser of all its micro-batches."""
        self.move(event)
        self.settled = settled

    def stepped(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped while this step was watched. RuntimeError if nobody finishes what it steps."""
        if self.phase is OPEN and self.watch.stepped(optimizer):
            self.check("unfinished")

    # ---- the reference point ----

    def begin(self, settled: Tensor) -> Tensor:
        """Take and return the reference point: of the first micro-batch, or of the next one while all before it were empty."""
        settled[SCALE] = 1.0
        self.reference, self._count = settled, None
        if settled.is_cuda and not self.cannot_look(settled):
            self._count = Arrival(settled[COUNT])
        return settled

    def begin_where_empty(self, settled: Tensor) -> Tensor:
        """As `begin`, if the host cannot look whether the micro-batches so far were empty: the device decides."""
        assert self.reference is not None  # `has_reference` was true
        settled[SCALE] = 1.0
        self.reference = torch.where(self.reference[COUNT] > 0, self.reference, settled)
        return self.reference

    @staticmethod
    def cannot_look(like: Tensor) -> bool:
        """Whether the host cannot read a number on this device: while torch.compile traces, or a graph is captured."""
        if torch.compiler.is_compiling() or not like.is_cuda:
            return torch.compiler.is_compiling()
        with torch.cuda.device(like.device):
            return torch.cuda.is_current_stream_capturing()

    def has_reference(self) -> bool:
        """Whether a micro-batch of this step had a sample on any process.

        On a GPU this waits until the first forward is done; a backward and the next forward are queued behind it by then.
        """
        if self.reference is None:
            return False
        if self.cannot_look(self.reference):
            return True
        if self._count is not None:
            return self._count.value() > 0
        return bool(self.reference[COUNT] > 0)
