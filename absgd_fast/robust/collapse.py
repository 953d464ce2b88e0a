"""Weights that have collapsed: a small share of the rows has nearly all of the weight, forward after forward.

This cannot be seen in the loss, which looks as if the training went well. So one forward in a hundred is looked at. If its ESS/n
is below its limit, every following forward is looked at too, as long as the mean over these forwards stays below. A hundred of
them are worth a warning. So a healthy training pays a hundredth of a look per forward. A look never makes the host wait for a
GPU: the sums stay there, and copies of the count are read once they have arrived.

The mean decides, because ESS/n of a single batch scatters: of 16 rows, one class of ten has none to six.

There are two limits, because the same share means two things. If the weights rise with the loss (lambda > 0), a tenth of the rows
may be meant to have most of the weight. If they fall (lambda < 0), the rows that have lost it are those that the model does not
fit. A model that has learned one class of C fits 1/C of them, and gets no gradient from the others. docs/choosing-lambda.md has
the trainings by which the limits were chosen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks, ops
from .arrival import Arrival
from .step import DeferredStep

LENGTH = 100  # forwards in a row
LIMIT = 0.05  # ESS / n below this is a collapse
LIMIT_FALLING = 0.17  # the same, if the weights fall with the loss


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
        self._run: Tensor | None = None  # (2,), on the device: forwards in a row, and the sum of `_share_of_limit` over them
        self._arrival: Arrival | None = None  # of an earlier `_run[0]`

    @torch.no_grad()
    def look(self, sample_stats: Tensor, weighing: Tensor | None) -> bool:
        """Look at a forward; whether to warn, which happens once."""
        self.until_look = 1
        if not _checks.has_values(sample_stats) or DeferredStep.cannot_look(sample_stats):
            return False
        before, share = self._run, _share_of_limit(sample_stats, weighing)
        if before is None or before.device != share.device:
            before = sample_stats.new_full((2,), math.nan, dtype=torch.float64)  # NaN: no forward yet
        run = before.nan_to_num(0.0) + torch.stack([torch.ones_like(share), share])
        count, total = run.unbind()
        self._run = torch.where(share.isnan(), before, run * (total < count))
        if self._arrival is None:
            self._arrival = Arrival(self._run[0])
        if not self._arrival.is_there():
            return False
        arrived, self._arrival = self._arrival.value(), None
        if arrived == 0:
            self.restart()
        elif arrived >= LENGTH:
            self.until_look = math.inf
            return True
        return False


def _share_of_limit(sample_stats: Tensor, weighing: Tensor | None) -> Tensor:
    """ESS / n (docs/MATH.md §1.3) divided by its limit, 0-d float64; NaN if no row counts.

    n is the number of rows that are neither ignored nor bad. Weights that are all 0, because they underflow, have ESS 0. Weights
    fall with the loss if the weighted mean of the losses is below the plain one.
    """
    losses, _, valid = sample_stats.reshape(3, -1).unbind()  # ignored rows have 0 in all three
    weights = ops.weights_of(sample_stats, weighing).flatten()  # ignored rows have 0, bad rows NaN
    rows = torch.stack([valid, weights, losses]).where(~weights.isnan(), 0).double()
    n, weight, loss = rows.sum(1).unbind()
    squares, weighted_loss = (rows[1] * rows[1:]).sum(1).unbind()
    share = weight.square() / (n * squares.clamp(min=torch.finfo(torch.float64).tiny))
    return torch.where(weighted_loss * n < weight * loss, share / LIMIT_FALLING, share / LIMIT)


def message(name: str, weighting: str) -> str:
    """The warning. name: of the class of the criterion. weighting: its lambda or rule, in words."""
    return (
        f"{name}: the weights have collapsed: over {LENGTH} training forwards in a row the mean effective sample size was below"
        f" {LIMIT_FALLING:.0%} of the rows ({LIMIT:.0%} for weights that rise with the loss), by {weighting}. The model learns"
        " from a small share of its samples, which the loss does not show. Expected a weighting that spreads more, such as a"
        " larger |lam|, or the plain mean first, by Ramp(criterion, lam, length) (docs/choosing-lambda.md, The warning of a"
        " collapse); warn_of_collapse=False if this is meant"
    )
