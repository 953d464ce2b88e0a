"""Three ways to settle log s': from this batch alone, with other processes, or once for all micro-batches of an optimizer step.

All have `gather` (the statistics of all who take part), `settle` (the normaliser of a batch) and `weigh` (the robust loss of a vector of
losses). `Shared` and `Deferred` also say whether they take part in a forward at all; where they do not, `OWN` serves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .processes import Processes
from .state import RobustState
from .step import OPEN, DeferredStep


class Samples(NamedTuple):
    """What a caller says about each sample, in the shape of the losses."""

    sample_weight: Tensor | None = None
    mask: Tensor | None = None
    score: Tensor | None = None


class Own:
    """This batch settles log s' by itself, within the operator that also weighs."""

    def gather(self, stats: Tensor, state: RobustState, classes: int) -> Tensor:
        return stats.unsqueeze(0)

    def settle(
        self, state: RobustState, operators: ops.Operators, partial_stats_of: Callable, classes: int, update_state: bool
    ) -> tuple[Tensor, bool]:
        """The settled normaliser that weighs the samples of a forward, and whether it bounds their z.

        partial_stats_of(settled or None): the partial statistics of these samples, whose z is bounded by a settled normaliser.
        """
        return state.settle_partials(operators, partial_stats_of(None).unsqueeze(0), update_state=update_state), False

    def weigh(
        self,
        state: RobustState,
        operators: ops.Operators,
        losses: Tensor,
        samples: Samples,
        classes: int,
        update_state: bool,
        mode: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The robust loss, the statistics of its samples and, where `mode` asks for it, its gradient."""
        sample_weight, mask, score = samples
        return operators.robust_loss(losses, score, sample_weight, mask, *state.operands(update_state, mode))


OWN = Own()


class Shared:
    """The batches of several processes settle log s' together. What a framework divides the loss by is undone in the same number."""

    deferred = False

    def __init__(self, processes: Processes, loss_divisor: float):
        self.processes, self.loss_divisor = processes, loss_divisor

    def takes_part(self) -> bool:
        """Whether a training forward has anything to share."""
        return self.loss_divisor != 1 or self.processes.are_several()

    def knows_weights(self, state: RobustState, operators: ops.Operators, logits: Tensor) -> bool:
        """False: log s' needs the samples of this batch."""
        return False

    def gather(self, stats: Tensor, state: RobustState, classes: int) -> Tensor:
        return self.processes.gather(stats, state, self.deferred, self.loss_divisor, classes)

    def settle(self, state, operators, partial_stats_of, classes, update_state) -> tuple[Tensor, bool]:
        return self.settle_together(state, operators, partial_stats_of(None), classes, update_state), False

    def settle_together(
        self,
        state: RobustState,
        operators: ops.Operators,
        partial_stats: Tensor,
        classes: int,
        update_state: bool,
        reference: Tensor | None = None,
    ) -> Tensor:
        partials = self.gather(partial_stats, state, classes)
        multiplier = len(partials) * self.loss_divisor
        return state.settle_partials(
            operators, partials, reference=reference, grad_multiplier=multiplier, update_state=update_state
        )

    def weigh(self, state, operators, losses, samples, classes, update_state, mode) -> tuple[Tensor, Tensor, Tensor]:
        sample_weight, mask, score = samples
        log_s, _, lam, _, _, mix, max_weight, _ = state.operands(False, 0)
        plain = losses.detach()
        settled, bounded = self.settle(
            state,
            operators,
            lambda bound: operators.robust_partial_stats(plain, score, mask, log_s, lam, bound),
            classes,
            update_state,
        )
        return operators.robust_apply(losses, score, sample_weight, mask, settled, log_s, lam, bounded, mix, max_weight, mode)


class Deferred(Shared):
    """All micro-batches of an optimizer step settle log s' together, and those of several processes.

    Each micro-batch is weighed relative to one reference point, which the first one gives. A forward that does not move the state
    stands outside the step, and is normalised at once as by `Shared`.
    """

    deferred = True

    def __init__(self, processes: Processes, loss_divisor: float):
        super().__init__(processes, loss_divisor)
        self.step = DeferredStep()

    def takes_part(self) -> bool:
        return True

    def settle(self, state, operators, partial_stats_of, classes, update_state) -> tuple[Tensor, bool]:
        if not update_state:
            return super().settle(state, operators, partial_stats_of, classes, update_state)
        step, processes = self.step, self.processes.count()  # which says so where the group is gone
        bounded = step.has_reference()
        partial_stats = partial_stats_of(step.reference if bounded else None)
        if not bounded:
            step.begin(state.settle_partials(operators, self.gather(partial_stats, state, classes)))
        elif processes == 1 and step.cannot_look(partial_stats):
            step.begin_where_empty(state.settle_partials(operators, partial_stats.unsqueeze(0)))
        self.add(state, operators, partial_stats)
        return step.reference, bounded

    def add(self, state: RobustState, operators: ops.Operators, partial_stats: Tensor) -> None:
        """Adds a micro-batch to what its step has."""
        before = self.step.partial_stats
        if before is not None:
            partial_stats = state.settle_partials(operators, torch.stack([before, partial_stats]))[ops.PARTIAL_STATS]
        self.step.add(partial_stats)

    def end(self, state: RobustState, operators: ops.Operators, event: str) -> Tensor:
        """log s' of all micro-batches, written to the state; what finishes the gradients (reference.settle)."""
        settled = self.settle_together(state, operators, self.step.partial_stats, 0, True, self.step.reference)
        self.step.end(event, settled)
        return settled

    def knows_weights(self, state: RobustState, operators: ops.Operators, logits: Tensor) -> bool:
        """Whether this micro-batch finds the step's reference point, and kernels that weigh a row as soon as its loss is known."""
        step = self.step
        return (
            operators.weighs_late
            and step.phase is OPEN
            and state.max_weight == math.inf
            and not state.lam_is_open
            and logits.requires_grad
            and not step.cannot_look(step.partial_stats)
            and step.has_reference()
        )
