"""`absgd.losses` of the reference package, with its names, defaults and quirks."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from .. import robust


class ABLoss(nn.Module):
    """`absgd.losses.ABLoss`, step by step the same numbers (ABSGD paper, Alg. 1).

    Kept: s starts at 0, so the first weighted step is 1 / (abgamma abalpha) times too large; lambda is off until
    `updateLambda()` was called max(milestone, 1) times, and the plain mean is used before.

    Not kept, because it is wrong there: the graph of every step stays alive through u; L / lambda > 88.7 gives NaN for
    good; state_dict() is empty; an evaluation pass moves u; rows with ignore_index count as losses of 0; an empty batch
    makes u NaN for good.

    Args:
        mylambda: lambda.
        milestone: calls of `updateLambda()` (one per epoch) before lambda is on.
        criterion: returns per-sample losses.
        abgamma, abalpha: gamma and alpha, in (0, 1].

    >>> import torch
    >>> criterion = ABLoss(1.0)
    >>> criterion.updateLambda()
    >>> criterion(torch.zeros(2, 2), torch.tensor([0, 1]))  # 1 / abgamma too large
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
        self.loss = robust.ABLoss(criterion, lam=math.inf, gamma=abgamma, alpha=abalpha, init="zero", process_group=None)
        self.criterion = criterion
        self.abgamma, self.abalpha = abgamma, abalpha
        self.milestone, self.mylambda, self.step = milestone, mylambda, 0

    @property
    def ablambda(self) -> float | None:
        """lambda in use; None before the milestone."""
        lam = float(self.loss.lam)
        return None if math.isinf(lam) else lam

    @property
    def u(self) -> Tensor:
        """The moving average s."""
        return self.loss.log_s.exp()

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.loss(output, target)

    def updateLambda(self) -> None:
        """Once per epoch."""
        if self.step >= self.milestone - 1:
            self.loss.set_lam(self.mylambda, reset=False)  # the original keeps u
        self.step += 1

    def get_extra_state(self) -> dict:
        return {"step": self.step}

    def set_extra_state(self, state: dict) -> None:
        self.step = state["step"]
