"""Weights that have collapsed: a small share of the rows has nearly all of the weight, forward after forward.

This cannot be seen in the loss, which looks as if the training went well. So one forward in a hundred is looked at. If its
weights have collapsed, every following forward is looked at too. This ends with the first forward whose weights have not
collapsed. A hundred collapsed forwards in a row are worth a warning. So a healthy training pays a hundredth of a look per
forward, the warning is true word by word, and it comes at most a hundred forwards late. A look never makes the host wait for a
GPU: the count stays there, and its copies are read once they have arrived.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks, ops
from .arrival import Arrival
from .step import DeferredStep

LENGTH = 100  # forwards in a row
SHARE = 0.05  # a forward whose ESS / n is below this has collapsed


class Collapse:
    """The training forwards in a row whose weights have collapsed, of one criterion. A copy or a pickle counts anew."""

    def __init__(self, watched: bool):
        self.watched = watched
        self.restart()

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), (self.watched,)

    def restart(self) -> None:
        """Count anew, and warn again."""
        self.until_look: float = LENGTH if self.watched else math.inf  # forwards until the next look
        self._run: Tensor | None = None  # 0-d, on the device: the latest forwards in a row that had collapsed; NaN: none yet
        self._arrival: Arrival | None = None  # of an earlier `_run`

    @torch.no_grad()
    def look(self, sample_stats: Tensor, weighing: Tensor | None) -> bool:
        """Look at a forward; whether to warn, which happens once."""
        self.until_look = 1
        if not _checks.has_values(sample_stats) or DeferredStep.cannot_look(sample_stats):
            return False
        before, (collapsed, counts) = self._run, _collapsed(sample_stats, weighing)
        if before is None or before.device != counts.device:
            before = sample_stats.new_full((), math.nan, dtype=torch.float64)
        self._run = torch.where(counts, (before.nan_to_num(0.0) + 1) * collapsed, before)
        if self._arrival is None:
            self._arrival = Arrival(self._run)
        if not self._arrival.is_there():
            return False
        run, self._arrival = self._arrival.value(), None
        if run == 0:
            self.restart()
        elif run >= LENGTH:
            self.until_look = math.inf
            return True
        return False


def _collapsed(sample_stats: Tensor, weighing: Tensor | None) -> tuple[Tensor, Tensor]:
    """Whether ESS / n (docs/MATH.md §1.3) is below SHARE, and whether any row counts; both 0-d bool.

    n is the number of rows that are neither ignored nor bad. Weights that are all 0, because they underflow, have collapsed.
    """
    weights = ops.weights_of(sample_stats, weighing).double()  # ignored rows have 0, bad rows NaN
    n = ((sample_stats[2] > 0) & ~weights.isnan()).sum()
    weights = weights.nan_to_num(0.0)
    squares = weights.square().sum()
    return (weights.sum().square() < n * squares * SHARE) | (squares == 0), n > 0


def message(name: str, weighting: str) -> str:
    """The warning. name: of the class of the criterion. weighting: its lambda or rule, in words."""
    return (
        f"{name}: the weights have collapsed: in {LENGTH} training forwards in a row the effective sample size was below"
        f" {SHARE:.0%} of the rows, by {weighting}. The model learns from a small share of its samples, which the loss does not"
        " show. Expected a weighting that spreads more, such as a larger |lam| or the plain"
        " mean first (docs/lambda.md, Choosing λ); warn_of_collapse=False if this is meant"
    )
