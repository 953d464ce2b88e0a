"""A forward that activation checkpointing runs twice: the state moves in the first pass, and the recomputation starts from the
same state (_checkpointing.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .base import RobustLoss
from .normalizer import InStages, Kept, Own
from .weighting import FromWeights, Tilt

# Takes the criterion, its weighting, its normaliser and whether the state moves, and returns the robust loss of a batch.
LossOfBatch = Callable[[Any, Any, Own | InStages, bool], Tensor]


class _Forward:
    """What a forward started from, and what weighed it: copies of two numbers, and the answers of the normaliser."""

    def __init__(self, criterion: RobustLoss, weighting: Tilt | FromWeights, normalizer: Own | InStages):
        self.weighting = weighting
        self.normalizer = normalizer if isinstance(normalizer, Own) else Kept(normalizer)
        self.log_s = criterion.log_s.clone()
        self.weighing: Tensor | None = None
        self._take_lam(criterion)

    def _take_lam(self, criterion: RobustLoss) -> None:
        self.lam, self.lam_is_open = criterion.lam.clone(), criterion.lam_is_open

    def first(self, loss_of: LossOfBatch, criterion: RobustLoss, update_state: bool) -> Tensor:
        """The loss of the first pass. It may fix a RelativeLam, by which it then weighs."""
        was_open = self.lam_is_open
        loss = loss_of(criterion, self.weighting, self.normalizer, update_state)
        if was_open:
            self._take_lam(criterion)
        self.weighting = self.weighting.kept(criterion.memo)
        self.weighing = criterion.memo.weighing
        return loss

    def again(self, loss_of: LossOfBatch, criterion: RobustLoss) -> Tensor:
        """The loss of a recomputation, which neither moves the state nor shows in `last`."""
        stand_in = criterion.at(self.log_s, self.lam, self.lam_is_open)
        stand_in.is_stand_in = True  # its lambda may be written: selective checkpointing has seen nobody make a tensor for it
        if self.weighing is not None:
            # Selective checkpointing may leave out the operator that fills this tensor, and reuse the other results.
            vars(stand_in)["room_for_weighing"] = lambda *args: self.weighing
        return loss_of(stand_in, self.weighting, self.normalizer, False)


def run_once_or_again(
    loss_of: LossOfBatch,
    criterion: RobustLoss,
    weighting: Tilt | FromWeights,
    normalizer: Own | InStages,
    update_state: bool,
) -> Tensor:
    """The robust loss of a batch while hooks for saved tensors are in place: in a first pass, or in a recomputation of one."""
    return criterion.replays.run(
        lambda: _Forward(criterion, weighting, normalizer),
        lambda forward: forward.first(loss_of, criterion, update_state),
        lambda forward: forward.again(loss_of, criterion),
    )
