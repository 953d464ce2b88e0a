"""TargetESS where the samples of one lambda are spread over processes or chunks: it is found before the stages that weigh.

The operators find the lambda of a batch that they see whole (csrc/math/target.h). Here it is found by a fixed number of exchanges
of sums at fixed points (reference/target.py `Search`), whatever the losses are. So all processes make the same exchanges and find
the same bits, and no host waits for a GPU. After that lambda is a number, and z = (x - e) / lambda goes through the stages as any
score does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .. import ops
from ..reference import Search, Target, extremes, usable_scores
from .state import RobustState

ROUNDS = 3  # leave an error of lambda of about 1e-6, as float32 has (reference: 4)


class Solved(NamedTuple):
    """The lambda of a forward, and whether it may become the state: no sample of any process is nonfinite, and there is one."""

    target: Target
    moves: Tensor  # 0-d bool


class Before(NamedTuple):
    """What the stages that weigh are given in place of a state with a TargetESS and of the scores."""

    state: RobustState  # a `StandIn`
    score: Tensor  # relative to the extreme score
    lam: Tensor  # 0-d, in the dtype of the state


class StandIn:
    """What the stages read of a state: the lambda that was found, the mode "batch", a log s of its own, and the settings.

    It is no copy of the module, because torch.compile cannot trace one.
    """

    solves, lam_is_open, relative_lam, gamma, alpha = False, False, None, 0.9, 1.0  # as a TargetESS has them (options.py)

    def __init__(self, state: RobustState, lam: Tensor):
        self.log_s, self.lam, self.nonfinite = state.log_s.clone(), lam, state._buffers["nonfinite_batches"]
        self.mix, self.max_weight, self.init, self.normalizer = state.mix, state.max_weight, state.init, state.normalizer
        self.target, self.reports_mean = state.target, state.reports_mean

    def operands(self, update_state: bool, more_bits: int) -> tuple:
        """As `RobustState.operands`."""
        flags = ops.flags("batch", "first") + (ops.UPDATE if update_state else 0) + more_bits
        return self.log_s, self.nonfinite, self.lam, self.gamma, self.alpha, self.mix, self.max_weight, flags

    settle_partials = RobustState.settle_partials


@torch.no_grad()
def solve(
    state: RobustState,
    losses: Tensor,
    score: Tensor | None,
    mask: Tensor | None,
    gather: Callable[[Tensor], Tensor],
    added: Callable[[Tensor], Tensor],
) -> Solved:
    """The lambda of the samples of all who take part in a normaliser.

    Args:
        losses, score, mask: of this process.
        gather: takes three numbers of this process and returns (processes, 3 or more), those of all processes.
        added: takes sums of this process and returns those of all processes.
    """
    assert state.target is not None  # it is called for a TargetESS only
    usable, nonfinite = usable_scores(losses, score, mask)
    x = losses if score is None else score
    of_all = gather(torch.cat([extremes(x, usable), nonfinite.double().reshape(1)]))
    search = Search(state.target, torch.stack([of_all[:, 0].amin(), of_all[:, 1].amax()]), losses.dtype)
    for _ in range(ROUNDS):
        sums = added(search.sums(x, usable))
        search.narrow(sums)
    return Solved(search.found(), (sums[2, 0] > 0) & (of_all[:, 2].sum() == 0))


@torch.no_grad()
def before_stages(state: RobustState, solved: Solved, losses: Tensor, score: Tensor | None) -> Before:
    """The state and the scores that the stages are given once lambda is known."""
    lam, shift = solved.target
    x = losses if score is None else score
    largest = torch.finfo(losses.dtype).max
    relative = (x.double() - shift).clamp(-largest, largest).to(losses.dtype)
    lam = lam.to(state.lam.dtype)
    return Before(cast(RobustState, StandIn(state, lam)), relative, lam)


@torch.no_grad()
def commit(state: RobustState, solved: Solved, before: Before) -> None:
    """Write lambda, and log s as that of exp(x / lambda), once the stages have settled theirs, which is relative to e."""
    lam, shift = solved.target
    log_s = torch.where(lam.isinf(), 0.0, before.state.log_s.double() + shift / lam).to(state.log_s.dtype)
    state.lam.copy_(before.lam)
    state.log_s.copy_(torch.where(solved.moves, log_s, state.log_s))
