"""The module `absgd.losses` of the reference package, with its names, defaults and numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from .. import _numbers, robust


class ABLoss(nn.Module):
    """`absgd.losses.ABLoss` with the same numbers in every step (ABSGD paper, Alg. 1; docs/MATH.md §1.1).

    Two of its habits are kept. s starts at 0, so the first weighted step is too large by the factor 1 / (abgamma abalpha). lambda
    is used only after max(milestone, 1) calls of `updateLambda()`; before that the loss is the plain mean.

    These errors of the original are not kept: u keeps the graph of every step alive. L / lambda > 88.7 gives NaN, and u stays
    infinite for good. state_dict() is empty. An evaluation pass moves u. Rows with ignore_index count as losses of 0. An empty
    batch makes u NaN for good.

    Args:
        mylambda: lambda.
        milestone: number of calls of `updateLambda()`, one per epoch, after which lambda is used.
        criterion: returns per-sample losses; default torch.nn.CrossEntropyLoss(reduction="none").
        abgamma, abalpha: gamma and alpha, in (0, 1].

    forward(output, target) returns a 0-d loss.

    >>> import torch
    >>> criterion = ABLoss(1.0)
    >>> criterion.updateLambda()
    >>> criterion(torch.zeros(2, 2), torch.tensor([0, 1]))  # log 2 / abgamma: the first weighted step
    tensor(0.7702)
    """

    def __init__(
        self,
        mylambda: float,
        milestone: int = 0,
        criterion: Callable[..., Tensor] | None = None,
        abgamma: float = 0.9,
        abalpha: float = 1,
    ):
        super().__init__()
        criterion = nn.CrossEntropyLoss(reduction="none") if criterion is None else criterion
        self.loss = robust.ABLoss(
            criterion, lam=math.inf, gamma=abgamma, alpha=abalpha, init="zero", process_group=None, warn_of_collapse=False
        )
        self.loss.set_lam(math.inf)  # `updateLambda` is a schedule: loading another lambda is an ordinary resume
        self.criterion = criterion
        self.abgamma, self.abalpha = self.loss.gamma, self.loss.alpha
        self.milestone, self.mylambda, self.step = _numbers.plain(milestone), _numbers.plain(mylambda), 0

    @property
    def ablambda(self) -> float | None:
        """The lambda in use; None before the milestone."""
        lam = float(self.loss.lam)
        return None if math.isinf(lam) else lam

    @property
    def u(self) -> Tensor:
        """The moving average s."""
        return self.loss.log_s.exp()

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The robust loss of the criterion's per-sample losses of output and target (0-d)."""
        return self.loss(output, target)

    def updateLambda(self) -> None:
        """Count one epoch; call it once per epoch."""
        if self.step >= self.milestone - 1:
            self.loss.set_lam(self.mylambda, reset=False)  # as the original, which keeps u
        self.step += 1

    def get_extra_state(self) -> dict[str, int]:
        """The number of calls of `updateLambda()`, for state_dict()."""
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore the number of calls of `updateLambda()`."""
        self.step = state["step"]
