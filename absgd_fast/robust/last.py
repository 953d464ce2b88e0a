"""What the latest forward left, and the view of it that users read."""

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..ops import LOG_S


class Memo:
    """What a robust loss remembers of its latest forward. A plain object: setting an attribute of a module costs 0.5 us more."""

    def __init__(self):
        self.sample_stats: Tensor | None = None  # (3, ...): losses, weights (or z), validity
        self.weighing: Tensor | None = None  # what weights are made of where sample_stats has z (ops.weights_of)
        self.moved: tuple[Tensor, Tensor] | None = None  # the reference point of a deferred step, and what settled it

    def remember(self, sample_stats: Tensor, weighing: Tensor | None = None) -> None:
        self.sample_stats, self.weighing, self.moved = sample_stats, weighing, None


class LastForward:
    """Detached view of one forward of `ABLoss`; every figure is computed when it is read.

    losses, weights: shape of the per-sample losses. ess, mean_loss: 0-d.

    >>> from absgd_fast import ABLoss
    >>> criterion = ABLoss(lam=1.0)
    >>> _ = criterion(torch.zeros(2, 4), torch.tensor([0, 3]))
    >>> criterion.last.mean_loss, criterion.last.ess
    (tensor(1.3863), tensor(2.))
    """

    def __init__(self, memo: Memo):
        self._sample_stats, self._weighing, self._moved = memo.sample_stats, memo.weighing, memo.moved

    @property
    def losses(self) -> Tensor:
        """L_i (0 for ignored rows)."""
        return self._sample_stats[0]

    @property
    def weights(self) -> Tensor:
        """W_i, without sample_weight and mix (0 for ignored rows, NaN for rows with a non-finite loss).

        In deferred mode they are relative to the step's reference point until the step, or `finish_`, settles log s.
        """
        weights = ops.weights_of(self._sample_stats, self._weighing)
        if self._moved is None:
            return weights
        reference, settled = self._moved
        return weights * (reference[LOG_S] - settled[LOG_S]).exp().to(weights.dtype)

    @property
    def _counted(self) -> Tensor:
        return (self._sample_stats[2] > 0) & ~self.weights.isnan()

    @property
    def ess(self) -> Tensor:
        """Effective sample size (sum W)^2 / sum W^2 over the rows that count."""
        weights = self.weights.where(self._counted, 0)
        return weights.sum().square() / weights.square().sum()

    @property
    def mean_loss(self) -> Tensor:
        """The plain mean of the losses that count: what to log beside the robust loss (0 for an empty batch)."""
        return self._mean(self.losses)

    @property
    def weighted_mean_loss(self) -> Tensor:
        """(1/n) sum_i W_i L_i over the n rows that count (0 for an empty batch)."""
        return self._mean(self.weights * self.losses)

    def _mean(self, values: Tensor) -> Tensor:
        counted = self._counted
        return values.where(counted, 0).sum() / counted.sum().clamp(min=1)
