"""Who settles log s': this batch alone, several processes together, or all micro-batches of an optimizer step once.

`Own`, `Shared` and `Deferred` have these methods in common:

    gather                 the partial statistics of all who take part (one row each)
    weighing_normalizer    the normaliser that weighs the samples of a forward
    weigh                  the robust loss of a vector of losses
    totals                 the sums of the plain mean loss, which report="mean" returns
    added                  the sums of all who take part, of which `solved` makes the lambda of a TargetESS

`Shared` and `Deferred` also say whether they take part in a forward at all (`takes_part`). If they do not, `OWN` serves.
`Kept` stands before one of these two while activation checkpointing is active, and gives a recomputation the same answers.

Four functions are called settle. `RobustLoss.settle` (base.py) ends a deferred step. reference/weights.py `settle` is the
formula (docs/MATH.md §1.2) for partial statistics in plain torch, and the operator robust_settle is the same on every backend.
kernels/weigh.py `settle` (Triton) and csrc/cuda/weights.cuh `settle` settle the normaliser of one batch inside a kernel.
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
from .target import Solved, before_stages, commit, solve

# Takes a settled normaliser that bounds z, or None, and returns the partial statistics of the samples of a forward.
PartialStatsOf = Callable[[Tensor | None], Tensor]


class Samples(NamedTuple):
    """The arguments of a forward that have one value per sample, each in the shape of the losses."""

    sample_weight: Tensor | None = None
    mask: Tensor | None = None
    score: Tensor | None = None


class Exchanges:
    """The exchanges of all who take part in a normaliser, and the lambda that a TargetESS finds by them."""

    def gather(self, stats: Tensor, state: RobustState, classes: int) -> Tensor:
        """(processes, 3 or more): the statistics of all processes (processes.py `Processes.gather`)."""
        raise NotImplementedError

    def added(self, sums: Tensor) -> Tensor:
        """The sums over all who take part in a forward. sums: float64, of this batch, of any shape."""
        raise NotImplementedError

    def solved(self, state: RobustState, losses: Tensor, samples: Samples, classes: int) -> Solved:
        """The lambda of a TargetESS, for the samples of all who take part (target.py)."""
        _, mask, score = samples
        return solve(state, losses, score, mask, lambda stats: self.gather(stats, state, classes), self.added)


class Own(Exchanges):
    """This batch settles log s' by itself, within the operator that also weighs."""

    def gather(self, stats: Tensor, state: RobustState, classes: int) -> Tensor:
        """(1, 3): the statistics of this batch."""
        return stats.unsqueeze(0)

    def weighing_normalizer(
        self, state: RobustState, operators: ops.Operators, partial_stats_of: PartialStatsOf, classes: int, update_state: bool
    ) -> tuple[Tensor, bool]:
        """The settled normaliser (6) that weighs the samples of a forward, and whether their z is bounded by it.

        It serves forwards that make the three stages themselves (`LinearABLoss`).
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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The robust loss (0-d), the sample stats (3, ...), the gradient of the losses if `mode` asks for it, and lambda."""
        sample_weight, mask, score = samples
        operands = state.operands(update_state, mode)
        return *operators.robust_loss(losses, score, sample_weight, mask, *operands), operands[2]

    def added(self, sums: Tensor) -> Tensor:
        """The sums of this batch."""
        return sums

    def totals(self, sums: Tensor) -> tuple[Tensor, float]:
        """Sums (any number of them) over all who take part in a forward, and the divisor of its loss. sums: of this batch."""
        return sums, 1.0


OWN = Own()


class InStages(Exchanges):
    """A normaliser that is settled before it weighs, because more than this batch has a part in it."""

    def weighing_normalizer(
        self, state: RobustState, operators: ops.Operators, partial_stats_of: PartialStatsOf, classes: int, update_state: bool
    ) -> tuple[Tensor, bool]:
        """As `Own.weighing_normalizer`, for the samples of all who take part."""
        raise NotImplementedError

    def known_reference(self, state: RobustState, operators: ops.Operators, logits: Tensor, update_state: bool) -> Tensor | None:
        """The reference point (6) that weighs the logits of this batch in one pass; None if log s' needs them first."""
        return None

    def add(self, state: RobustState, operators: ops.Operators, partial_stats: Tensor) -> None:
        """Count a batch that was weighed by `known_reference`."""
        raise NotImplementedError

    def weigh(
        self,
        state: RobustState,
        operators: ops.Operators,
        losses: Tensor,
        samples: Samples,
        classes: int,
        update_state: bool,
        mode: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `Own.weigh`, in three stages, before which the lambda of a TargetESS is found."""
        if state.target is not None and state.solves:
            solved = self.solved(state, losses.detach(), samples, classes)
            before = before_stages(state, solved, losses.detach(), samples.score)
            samples = samples._replace(score=before.score)
            weighed = self.weigh(before.state, operators, losses, samples, classes, update_state, mode)
            if update_state:
                commit(state, solved, before)
            return weighed
        sample_weight, mask, score = samples
        log_s, _, lam, _, _, mix, max_weight, _ = state.operands(False, 0)
        plain = losses.detach()
        settled, bounded = self.weighing_normalizer(
            state,
            operators,
            lambda bound: operators.robust_partial_stats(plain, score, mask, log_s, lam, bound),
            classes,
            update_state,
        )
        given = losses, score, sample_weight, mask, settled, log_s, lam, bounded, mix, max_weight, mode
        return *operators.robust_apply(*given), lam

    def totals(self, sums: Tensor) -> tuple[Tensor, float]:
        """As `Own.totals`."""
        raise NotImplementedError


class Shared(InStages):
    """The batches of several processes settle log s' together (docs/MATH.md §1.6).

    `loss_divisor`, the number by which a framework divides the loss, is undone in the same factor as the averaging of gradients.
    """

    deferred = False

    def __init__(self, processes: Processes, loss_divisor: float):
        self.processes, self.loss_divisor = processes, loss_divisor

    def takes_part(self) -> bool:
        """Whether a training forward has anything to share. RuntimeError if the process group is gone."""
        return self.loss_divisor != 1 or self.processes.are_several()

    def gather(self, stats: Tensor, state: RobustState, classes: int) -> Tensor:
        """As `Exchanges.gather`."""
        return self.processes.gather(stats, state, self.deferred, self.loss_divisor, classes)

    def totals(self, sums: Tensor) -> tuple[Tensor, float]:
        """As `InStages.totals`, over all processes."""
        return self.processes.total(sums), self.loss_divisor

    def added(self, sums: Tensor) -> Tensor:
        """As `Exchanges.added`, over all processes."""
        return self.processes.added(sums)

    def weighing_normalizer(
        self, state: RobustState, operators: ops.Operators, partial_stats_of: PartialStatsOf, classes: int, update_state: bool
    ) -> tuple[Tensor, bool]:
        """As `InStages.weighing_normalizer`, for the samples of all processes."""
        return self.settle_together(state, operators, partial_stats_of(None), self.loss_divisor, classes, update_state), False

    def settle_together(
        self,
        state: RobustState,
        operators: ops.Operators,
        partial_stats: Tensor,
        divisor: float,
        classes: int,
        update_state: bool,
        reference: Tensor | None = None,
    ) -> Tensor:
        """The settled normaliser (6) of all processes, from the partial statistics of this one.

        Its SCALE makes up for processes that average their gradients, and for the divisor. reference: as for the operator
        robust_settle, the reference point of a deferred step.
        """
        partials = self.processes.gather(partial_stats, state, self.deferred, divisor, classes)
        multiplier = len(partials) * divisor
        return state.settle_partials(
            operators, partials, reference=reference, grad_multiplier=multiplier, update_state=update_state
        )


class Deferred(Shared):
    """All micro-batches of an optimizer step, on all processes, settle log s' together (docs/MATH.md §5).

    Each micro-batch is weighed relative to one reference point, which the first one gives. A forward that does not update the
    state (update=False) is no part of the step: it is normalised at once, as by `Shared`.

    Each micro-batch has the loss_divisor that it was called with. `end` undoes that of the first one, for all gradients, and a
    later micro-batch with another one is multiplied by their ratio in its own forward.
    """

    deferred = True

    def __init__(self, processes: Processes, loss_divisor: float):
        super().__init__(processes, loss_divisor)
        self.step = DeferredStep()

    def takes_part(self) -> bool:
        """True: every training forward is a micro-batch of a step."""
        return True

    def weighing_normalizer(
        self, state: RobustState, operators: ops.Operators, partial_stats_of: PartialStatsOf, classes: int, update_state: bool
    ) -> tuple[Tensor, bool]:
        """Add a micro-batch to the step; return the reference point (6), and whether it bounds the z of these samples.

        The first micro-batches give the reference point, so their z is not bounded by it. `end` settles log s'.
        """
        if not update_state:
            return super().weighing_normalizer(state, operators, partial_stats_of, classes, update_state)
        step, processes = self.step, self.processes.count()  # before anything changes: it raises if the group is gone
        reference = step.reference if step.has_reference() else None
        bounded = reference is not None
        partial_stats = partial_stats_of(reference)
        if reference is None:
            reference = step.begin(state.settle_partials(operators, self.gather(partial_stats, state, classes)))
        elif processes == 1 and step.cannot_look(partial_stats):
            reference = step.begin_where_empty(state.settle_partials(operators, partial_stats.unsqueeze(0)))
        self.add(state, operators, partial_stats)
        ratio = self.loss_divisor / step.divisor
        if ratio != 1:
            reference = reference.clone()
            reference[ops.SCALE] *= ratio
        return reference, bounded

    def add(self, state: RobustState, operators: ops.Operators, partial_stats: Tensor) -> None:
        """Add the partial statistics (3) of a micro-batch to those of its step."""
        before = self.step.partial_stats
        if before is not None:
            partial_stats = state.settle_partials(operators, torch.stack([before, partial_stats]))[ops.PARTIAL_STATS]
        self.step.add(partial_stats, self.loss_divisor)

    def end(self, state: RobustState, operators: ops.Operators, event: str) -> Tensor:
        """End an OPEN step by "step" or "finish_": write log s' of all micro-batches, and return their settled normaliser (6)."""
        step = self.step
        assert step.partial_stats is not None  # the step is OPEN
        settled = self.settle_together(state, operators, step.partial_stats, step.divisor, 0, True, step.reference)
        step.end(event, settled)
        return settled

    def known_reference(self, state: RobustState, operators: ops.Operators, logits: Tensor, update_state: bool) -> Tensor | None:
        """The step's reference point, if it has one already, and the backend has a kernel that uses it (settled_logit_loss)."""
        step = self.step
        usable = (
            update_state
            and operators.weighs_late
            and step.phase is OPEN
            and step.divisor == self.loss_divisor
            and state.max_weight == math.inf
            and not state.lam_is_open
            and logits.requires_grad
            and not step.cannot_look(logits)
            and step.has_reference()
        )
        return step.reference if usable else None


class Kept(InStages):
    """What a normaliser answered in a forward, so that activation checkpointing can run the forward again without it.

    The first call of each method asks the normaliser. The next call of the same method, which the recomputation makes, gets the
    same answer. So the recomputation exchanges nothing with other processes, and counts no micro-batch twice.
    """

    def __init__(self, normalizer: InStages):
        self._normalizer = normalizer
        self._settled: tuple[Tensor, bool] | None = None
        self._reference: tuple[Tensor | None] | None = None
        self._added = False
        self._totals: tuple[Tensor, float] | None = None
        self._solved: Solved | None = None

    def gather(self, stats: Tensor, state: RobustState, classes: int) -> Tensor:
        """As `Exchanges.gather`; a recomputation does not call it, because lambda is fixed by then."""
        return self._normalizer.gather(stats, state, classes)

    def weighing_normalizer(
        self, state: RobustState, operators: ops.Operators, partial_stats_of: PartialStatsOf, classes: int, update_state: bool
    ) -> tuple[Tensor, bool]:
        """As `InStages.weighing_normalizer`."""
        if self._settled is None:
            self._settled = self._normalizer.weighing_normalizer(state, operators, partial_stats_of, classes, update_state)
        return self._settled

    def solved(self, state: RobustState, losses: Tensor, samples: Samples, classes: int) -> Solved:
        """As `Exchanges.solved`."""
        if self._solved is None:
            self._solved = self._normalizer.solved(state, losses, samples, classes)
        return self._solved

    def known_reference(self, state: RobustState, operators: ops.Operators, logits: Tensor, update_state: bool) -> Tensor | None:
        """As `InStages.known_reference`."""
        if self._reference is None:
            self._reference = (self._normalizer.known_reference(state, operators, logits, update_state),)
        return self._reference[0]

    def add(self, state: RobustState, operators: ops.Operators, partial_stats: Tensor) -> None:
        """As `InStages.add`."""
        if not self._added:
            self._normalizer.add(state, operators, partial_stats)
            self._added = True

    def totals(self, sums: Tensor) -> tuple[Tensor, float]:
        """As `InStages.totals`."""
        if self._totals is None:
            self._totals = self._normalizer.totals(sums)
        return self._totals
