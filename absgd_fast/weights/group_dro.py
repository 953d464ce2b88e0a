"""Group DRO, the rule with a state."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks
from .._exact import ExactState
from .samples import Samples, kernels_for, prepared


class GroupDRO(ExactState):
    """Group DRO: groups are weighed by how much they have lost so far; the state is one weight per group.

        q_g <- q_g exp(eta mean loss of g), normalised to sum 1          (a group that is not in the batch keeps its q, but for that)
        p_i  = q_{g(i)} / n_g,   W_i = n p_i

    forward(losses, groups, *, mask=None, update=True) -> W. q moves only in training mode with gradients enabled and
    update=True, and not after a bad row; the weights are those of the new q in any case. The mean of W is the sum of q over the
    groups in the batch: one that is absent contributes nothing.

    Args:
        n_groups: number of groups; forward takes labels in [0, n_groups).
        eta: step size >= 0 of q. backend: as for `cvar`.

    Attributes:
        log_q: (n_groups) buffer, float32 (float64 after .double()). q: its exponential.

    Raises:
        ValueError: n_groups < 1, eta out of range, groups of another shape. TypeError: groups that are not integers.
        IndexError: a group out of range, on the CPU; on a GPU, which is not waited for, its row has W = NaN.

    >>> rule = GroupDRO(2, eta=math.log(2.0))
    >>> rule(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0, 0, 1]))  # q = 2/3, 1/3
    tensor([1., 1., 1.])
    >>> rule.q
    tensor([0.6667, 0.3333])

    Source: Sagawa et al. 2020, "Distributionally robust neural networks for group shifts", Alg. 1. There q / n_g weighs a
    batch drawn group by group; so it does here.
    """

    def __init__(self, n_groups: int, eta: float = 0.01, *, backend: str | None = None):
        super().__init__()
        self.backend = backend
        if isinstance(n_groups, bool) or not isinstance(n_groups, int) or n_groups < 1:
            raise ValueError(f"n_groups: got {n_groups!r}, expected an integer >= 1")
        self.n_groups = n_groups
        self.eta = _checks.within(eta, "eta", 0, math.inf)
        self.register_buffer("log_q", torch.full((n_groups,), -math.log(n_groups)))

    @property
    def q(self) -> Tensor:
        return self.log_q.exp()

    def forward(self, losses: Tensor, groups: Tensor, *, mask: Tensor | None = None, update: bool = True) -> Tensor:
        losses, mask = prepared(losses, mask)
        groups = _checks.groups(groups, losses)
        if losses.device != self.log_q.device:
            raise ValueError(
                f"GroupDRO: got losses on {losses.device}, but its state is on {self.log_q.device}; use .to({str(losses.device)!r})"
            )
        update = update and self.training and torch.is_grad_enabled()
        if (kernels := kernels_for(losses, self.backend)) is not None:
            try:
                return kernels.group_weights(losses, mask, groups, self.log_q, self.eta, update)
            except RuntimeError:  # a group out of range, which is said below
                pass
        samples, groups = Samples(losses, mask), groups.flatten()
        inside = (groups >= 0) & (groups < self.n_groups)
        counts = samples.finite | samples.nonfinite
        if losses.device.type == "cpu" and not torch.compiler.is_compiling() and bool((counts & ~inside).any()):
            row = int((counts & ~inside).nonzero()[0])
            raise IndexError(
                f"groups: got {int(groups[row])} in row {row}, expected 0 <= group < {self.n_groups}; mask rows that shall"
                " not count"
            )
        group = groups.where(inside, 0)
        samples.nonfinite, samples.finite = samples.nonfinite | (counts & ~inside), samples.finite & inside
        one, zeros = samples.finite.double(), samples.x.new_zeros(self.n_groups)
        sizes = zeros.index_add(0, group, one)
        means = zeros.index_add(0, group, one * samples.x) / sizes.clamp(min=1)
        log_q = (self.log_q.double() + (self.eta * means).clamp(-1e300, 1e300)).log_softmax(0)
        w = (log_q.exp() / sizes.clamp(min=1))[group] * one.sum()
        if update:
            moves = log_q.isfinite().all() & ~samples.nonfinite.any()
            self.log_q.copy_(torch.where(moves, log_q.to(self.log_q.dtype), self.log_q))
        return samples.weights(w)

    def extra_repr(self) -> str:
        return f"n_groups={self.n_groups}, eta={self.eta:g}"
