"""The optimizer step that a deferred loss is in: an explicit machine with one table of transitions."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from ..ops import COUNT, SCALE


class Phase(Enum):
    IDLE = "no micro-batch yet"
    OPEN = "at least one micro-batch; log s' is not known"
    SETTLED = "log s' is known; optimizers with robust= finish their gradients by what settled it"
    FINISHED = "finish_ has multiplied the gradients"
    LOST = "a state was loaded since the micro-batches, whose gradients nothing can normalise any more"


IDLE, OPEN, SETTLED, FINISHED, LOST = Phase

_LOST = (
    ": a state was loaded since the micro-batches, whose gradients cannot be brought to their size any more;"
    " expected zero_grad() and new micro-batches, or discard()"
)
_NO_FORWARD = "finish_: got no forward in training mode since the last step, expected at least one micro-batch"

# event -> phase -> the next phase, or why the event is not allowed there
TRANSITIONS: dict[str, dict[Phase, Phase | str]] = {
    "forward": {IDLE: OPEN, OPEN: OPEN, SETTLED: OPEN, FINISHED: OPEN, LOST: OPEN},
    "step": {
        IDLE: IDLE,
        OPEN: SETTLED,
        SETTLED: SETTLED,  # a second optimizer finishes its gradients by the same numbers
        FINISHED: "step: the gradients were finished by criterion.finish_ already; expected an optimizer without robust= beside"
        " finish_ (which clipping needs), or robust= without finish_",
        LOST: "step" + _LOST,
    },
    "finish_": {
        IDLE: _NO_FORWARD,
        OPEN: FINISHED,
        SETTLED: _NO_FORWARD,
        FINISHED: "finish_: the gradients have been finished already; expected one call per step, with the parameters of all"
        " optimizers, or a forward before it",
        LOST: "finish_" + _LOST,
    },
    "set_lam": {
        IDLE: IDLE,
        OPEN: "set_lam: got another lambda in the middle of a deferred step, expected it after the optimizer's step (or finish_);"
        " where the step is given up, call criterion.discard() first",
        SETTLED: SETTLED,
        FINISHED: FINISHED,
        LOST: LOST,
    },
    "load": {IDLE: IDLE, OPEN: LOST, SETTLED: IDLE, FINISHED: IDLE, LOST: LOST},
    "discard": {IDLE: IDLE, OPEN: IDLE, SETTLED: IDLE, FINISHED: IDLE, LOST: IDLE},
}


class DeferredStep:
    """What the micro-batches of one optimizer step came to so far, and the phase of that step.

    Its attributes are plain: DDP hands buffers from one process to the others, and these differ between processes. They are no part
    of a checkpoint, and nor are gradients.
    """

    def __init__(self):
        self.phase = IDLE
        self.partial_stats: Tensor | None = None  # (3), of the micro-batches so far (OPEN)
        self.reference: Tensor | None = None  # (6), settled by the first micro-batches, with scale 1 (OPEN)
        self.settled: Tensor | None = None  # (6), what finishes the gradients (SETTLED, FINISHED)
        self._count: tuple | None = (
            None  # how many samples the first micro-batches held: a host copy, and the event that it waits for
        )

    def check(self, event: str) -> Phase:
        """The phase that follows upon the event. RuntimeError where the event is not allowed in this phase."""
        following = TRANSITIONS[event][self.phase]
        if isinstance(following, str):
            raise RuntimeError(following)
        return following

    def move(self, event: str) -> None:
        """Enters the phase that follows upon the event; where that is not allowed (`check`) nothing changes."""
        following = self.check(event)
        if following is not OPEN:
            self.partial_stats = self.reference = self._count = None
        if following is not SETTLED and following is not FINISHED:
            self.settled = None
        self.phase = following

    def add(self, partial_stats: Tensor) -> None:
        """One more micro-batch; partial_stats: of all so far."""
        self.move("forward")
        self.partial_stats = partial_stats

    def end(self, event: str, settled: Tensor) -> None:
        self.move(event)
        self.settled = settled

    # ---- the reference point ----

    def begin(self, settled: Tensor) -> None:
        """The first micro-batch, or another after nothing but empty ones, gives the reference point."""
        settled[SCALE] = 1.0
        self.reference, self._count = settled, None
        if settled.is_cuda and not self.cannot_look(settled):
            host = torch.empty(1, dtype=settled.dtype, pin_memory=True)
            with torch.cuda.device(settled.device):  # its stream, whichever device is the current one
                host.copy_(settled[COUNT : COUNT + 1], non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            self._count = (host, event)

    def begin_where_empty(self, settled: Tensor) -> None:
        """The same where the host cannot look whether those before were empty."""
        settled[SCALE] = 1.0
        self.reference = torch.where(self.reference[COUNT] > 0, self.reference, settled)

    @staticmethod
    def cannot_look(like: Tensor) -> bool:
        """Whether the host cannot read a number on this device: while torch.compile traces, or a graph is captured."""
        if torch.compiler.is_compiling() or not like.is_cuda:
            return torch.compiler.is_compiling()
        with torch.cuda.device(like.device):
            return torch.cuda.is_current_stream_capturing()

    def has_reference(self) -> bool:
        """Whether a micro-batch of this step had a sample on any process. On a GPU this waits for the first forward, behind
        which a backward and the next forward are queued by now."""
        if self.reference is None:
            return False
        if self.cannot_look(self.reference):
            return True
        if self._count is not None:
            host, event = self._count
            event.synchronize()
            return bool(host > 0)
        return bool(self.reference[COUNT] > 0)
