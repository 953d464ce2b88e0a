"""Group DRO, the one rule that has a state (docs/MATH.md §4.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks, ops
from .._checkpointing import Replays, hooks_are_active
from .._exact import ExactState, exact_dtype
from .samples import Samples, kernels_for, prepared


class GroupDRO(ExactState):
    """Group DRO: a group weighs more, the more it has lost so far (Sagawa et al. 2020, Alg. 1; docs/MATH.md §4.2).

        q_g <- q_g exp(eta mean loss of g), normalised to sum 1          the state: one weight per group
        p_i  = q_{g(i)} / n_g,   W_i = n p_i                             n_g: the samples of g in the batch

    Use it when the groups are known and the worst of them counts. A group that is absent from the batch changes its q only by
    the normalisation, and contributes nothing: the mean of W is the sum of q over the groups in the batch.

    forward(losses, groups, *, mask=None, update=True) returns W. The weights are always those of the new q. The new q is stored
    in training mode with gradients enabled and update=True, unless a valid sample is not finite.

    Args:
        n_groups: number of groups; forward takes labels in [0, n_groups).
        eta: step size of q, >= 0.
        backend: as for `cvar`.

    Attributes:
        log_q: (n_groups), the logarithms of q; float32 (float64 after .double()). A state tensor, as log_s of `ABLoss`.
        q: (n_groups) the weights of the groups.

    Raises:
        ValueError: n_groups < 1, eta out of range, or groups of another shape.
        TypeError: groups that are not integers.
        RuntimeError: a forward that updates q inside a torch.func transform.
        IndexError: a group out of range, on the CPU. A GPU gives the sample W = NaN instead, because the host does not wait for
            it.

    >>> rule = GroupDRO(2, eta=math.log(2.0))
    >>> rule(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0, 0, 1]))  # q = 2/3, 1/3
    tensor([1., 1., 1.])
    >>> rule.q
    tensor([0.6667, 0.3333])

    Source: Sagawa et al. 2020, "Distributionally robust neural networks for group shifts", Alg. 1. A step of the paper
    draws one group and weighs its loss by q_g. Here a batch holds several groups, and the mean loss of each is weighed by q_g.
    """

    STATE = ("log_q",)

    log_q: Tensor
    place: Tensor

    def __init__(self, n_groups: int, eta: float = 0.01, *, backend: str | None = None):
        super().__init__()
        self.backend = backend
        self.n_groups = _checks.at_least(n_groups, "n_groups", 1)
        self.eta = _checks.within(eta, "eta", 0, math.inf)
        self.log_q = torch.empty(self.n_groups, dtype=exact_dtype())
        self.register_buffer(
            "place", torch.zeros((), dtype=torch.float32), persistent=False
        )  # `follow_buffers` sees by it where the module is
        self.reset_parameters()
        self._was_compiled = False
        self._replays: Replays[list[Tensor]] = Replays()

    def reset_parameters(self) -> None:
        """Start anew, with equal weights of all groups. torch calls it after `to_empty`."""
        self.log_q.fill_(-math.log(self.n_groups))
        self.place.zero_()

    @property
    def q(self) -> Tensor:
        """The weights of the groups, (n_groups)."""
        return self.log_q.exp()

    def forward(self, losses: Tensor, groups: Tensor, *, mask: Tensor | None = None, update: bool = True) -> Tensor:
        """The weights W, as losses.

        Args:
            losses: any shape.
            groups: as losses, integers in [0, n_groups).
            mask: as losses, bool; a sample with False is ignored.
            update: False: q does not move.
        """
        if torch.compiler.is_compiling():
            # Inside a checkpoint torch.compile cannot trace an attribute that is set. So it runs the checkpoint without
            # compiling. If it compiled it, backward would recompute W from the q that has moved already (torch 2.13).
            self._was_compiled = True
        if hooks_are_active():
            return self._replays.result(lambda: self._weights(losses, groups, mask, update))
        return self._weights(losses, groups, mask, update)

    def _weights(self, losses: Tensor, groups: Tensor, mask: Tensor | None, update: bool) -> Tensor:
        losses, mask = prepared(losses, mask)
        groups = _checks.groups(groups, losses)
        if losses.device != self.log_q.device:
            self.follow_buffers(losses.device)
        if losses.device != self.log_q.device:
            raise ValueError(
                f"GroupDRO: got losses on {losses.device}, expected {self.log_q.device}, the device of its state; use"
                f" .to({str(losses.device)!r})"
            )
        update = update and self.training and torch.is_grad_enabled()
        if update:
            ops.refuse_update("GroupDRO")
            ops.refuse_export("GroupDRO")
        if (kernels := kernels_for(losses, self.backend)) is not None:
            try:
                return kernels.group_weights(losses, mask, groups, self.log_q, self.eta, update)
            except RuntimeError:  # a group is out of range: the code below says which one
                pass
        samples, groups = Samples(losses, mask), groups.flatten()
        inside = (groups >= 0) & (groups < self.n_groups)
        counts = samples.finite | samples.nonfinite
        can_look = losses.device.type == "cpu" and _checks.has_values(losses) and not torch.compiler.is_compiling()
        can_look = can_look and not ops.transformed()
        if can_look and bool((counts & ~inside).any()):
            row = int((counts & ~inside).nonzero()[0])
            raise IndexError(
                f"groups: got {int(groups[row])} in row {row}, expected 0 <= group < {self.n_groups}; mask rows that must not"
                " count"
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
        """The numbers of the rule, for repr()."""
        return f"n_groups={self.n_groups}, eta={self.eta:g}"
