"""What the latest forward left behind, and the view of it that users read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks, ops
from ..ops import LOG_S
from .collapse import Collapse

if TYPE_CHECKING:
    from .repeat import Repeat

# A robust loss (0-d), the sample stats of its samples, what weights are made of if these hold z (ops.weights_of), and lambda.
Weighed = tuple[Tensor, Tensor, Tensor | None, Tensor]


class Memo:
    """What a robust loss remembers of its latest forward, and two things that each forward asks for.

    A plain object: setting an attribute of a module costs 0.5 us more.

    Setting an attribute also keeps a forward inside a checkpoint from being compiled (weights/group_dro.py says why).
    """

    def __init__(self, collapse: Collapse) -> None:
        self.collapse = collapse
        self.reports_mean = False  # `RobustLoss.report`
        self.asked = False  # whether the criterion was asked for rows that it ignores (ignored.py)
        self.sample_stats: Tensor | None = None  # (3, ...): losses, weights (or z), validity
        self.weighing: Tensor | None = None  # what weights are made of if sample_stats has z (ops.weights_of)
        self.lam: Tensor | None = None  # by which it weighed; it may be the state tensor
        self.repeat: Repeat | None = None  # what the next forward may take over from the latest (repeat.py)
        self.moved: tuple[Tensor, Tensor] | None = None  # the reference point of a deferred step, and what settled the step

    def __getstate__(self) -> dict[str, Any]:
        """A copy belongs to another module, which has tensors of its own."""
        return {**vars(self), "repeat": None}

    def remember(self, sample_stats: Tensor, weighing: Tensor | None, lam: Tensor) -> None:
        """Replace what the forward before left. A forward that torch.export or FakeTensorMode traces leaves nothing."""
        if type(sample_stats) in _checks.TRACED:
            return
        self.sample_stats, self.weighing, self.moved, self.lam = sample_stats, weighing, None, lam

    def keep_lam(self, state: Tensor) -> None:
        """Copy the lambda of the latest forward if it is this state tensor, which is about to change."""
        if self.lam is state:
            self.lam = state.clone()

    def reshape(self, shape: torch.Size, before: Tensor | None) -> None:
        """Give the samples of the latest forward this shape. before: the sample stats before it, which it may have left here."""
        stats = self.sample_stats
        if stats is not None and stats is not before:
            self.sample_stats = stats.view(len(stats), *shape)


class LastForward:
    """The latest forward of `ABLoss` or `LinearABLoss`, for logging; read it as `criterion.last`.

    Everything is detached, and each figure is computed when it is read. `losses`, `weights` and `counted` have the shape of the
    per-sample losses; the other figures are 0-d. A row counts if it is not ignored and its loss is finite.

    >>> from absgd_fast import ABLoss
    >>> criterion = ABLoss(lam=1.0)
    >>> _ = criterion(torch.zeros(2, 4), torch.tensor([0, 3]))
    >>> criterion.last.mean_loss, criterion.last.ess
    (tensor(1.3863), tensor(2.))
    >>> criterion.last  # n: the rows that count
    LastForward(n=2, mean_loss=1.38629, ess=2)
    """

    def __init__(self, memo: Memo):
        if memo.sample_stats is None:
            raise RuntimeError("last: there was no forward yet; call the criterion first")
        self._sample_stats, self._weighing, self._moved = memo.sample_stats, memo.weighing, memo.moved
        self._lam = None if memo.lam is None else memo.lam.detach().clone()  # the next forward may write it

    def __repr__(self) -> str:
        """The number of rows that count, the mean loss and the ESS. On a GPU it waits for the forward."""
        n, mean_loss, ess = int(self.counted.sum()), float(self.mean_loss), float(self.ess)
        return f"LastForward(n={n}, mean_loss={mean_loss:.6g}, ess={ess:.6g})"

    @property
    def losses(self) -> Tensor:
        """L_i; 0 for ignored rows."""
        return self._sample_stats[0]

    @property
    def weights(self) -> Tensor:
        """W_i, without sample_weight and mix: 0 for ignored rows, NaN for rows with a nonfinite loss.

        In deferred mode the weights are relative to the step's reference point until the optimizer's step, or `finish_`, settles
        log s'. Read them after it.
        """
        weights = ops.weights_of(self._sample_stats, self._weighing)
        if self._moved is None:
            return weights
        reference, settled = self._moved
        return weights * (reference[LOG_S] - settled[LOG_S]).exp().to(weights.dtype)

    @property
    def lam(self) -> Tensor:
        """The lambda by which this forward weighed, 0-d; inf: all weights are 1.

        With a TargetESS every forward has its own, in eval mode too. While a RelativeLam is open, and with a rule, it is inf.
        """
        assert self._lam is not None  # there was a forward
        return self._lam

    @property
    def counted(self) -> Tensor:
        """Bool, of the shape of the losses: which rows count, because they are not ignored and their loss is finite."""
        return (self._sample_stats[2] > 0) & ~self.weights.isnan()

    @property
    def ess(self) -> Tensor:
        """Effective sample size (sum W)^2 / sum W^2 over the rows that count (docs/MATH.md §1.3); NaN if none counts."""
        weights = self.weights.where(self.counted, 0)
        return weights.sum().square() / weights.square().sum()

    @property
    def mean_loss(self) -> Tensor:
        """The plain mean of the losses that count, which is the figure to log beside the robust loss; 0 if none counts."""
        return self._mean(self.losses)

    @property
    def weighted_mean_loss(self) -> Tensor:
        """(1/n) sum_i W_i L_i over the n rows that count; 0 if none counts."""
        return self._mean(self.weights * self.losses)

    def _mean(self, values: Tensor) -> Tensor:
        counted = self.counted
        return values.where(counted, 0).sum() / counted.sum().clamp(min=1)
