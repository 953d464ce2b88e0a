"""LabelAudit: which samples had large losses, or unusual weights, while a model was trained."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _checks, distributed
from ._exact import ExactState, exact_dtype

if TYPE_CHECKING:
    import torch.distributed as dist

LOSS, WEIGHT, COUNT = range(3)  # the rows of `LabelAudit.sums`
RANKINGS = ("loss", "weight")


class LabelAudit(ExactState):
    """Average loss and weight of each training sample over a training, to find wrong labels.

        mean_loss_i = (1/T_i) sum_t L_i(t)        T_i: how often sample i was seen

    A network learns what many samples share before it memorises single ones. So a wrong label has a large loss early in a
    training, and only its average over all epochs still shows that at the end (docs/audit.md has the measurements). The audit
    keeps three numbers for each sample. It needs no second training, only the index of each sample in its data set.

    update(index, losses, weights) adds a batch. Pass `criterion.last.losses` and `criterion.last.weights` of an `ABLoss`, or any
    per-sample losses without weights. The state is saved, moved and copied as that of a module, and `state_dict()` resumes it
    exactly. `update` and `ranked` never wait for a GPU.

    What does not count: a row whose loss or weight is NaN or infinite, and a row whose mask is False. An `ABLoss` gives ignored
    rows the loss 0 and the weight 0, as a real row may have them too: pass `mask=criterion.last.counted` if there are any.

    Args:
        n_samples: number of samples of the data set; an index is in [0, n_samples).

    Attributes:
        sums: (3, n_samples): the sum of losses, the sum of weights, and the count. float32 (float64 after .double()). A state
            tensor, as log_s of `ABLoss`.
        mean_loss, mean_weight: (n_samples); NaN for a sample that was never seen.
        count: (n_samples) int64, how often each sample counted.

    Raises:
        ValueError: n_samples < 1.

    >>> audit = LabelAudit(4)
    >>> audit.update(torch.tensor([2, 0]), torch.tensor([3.0, 0.5]))
    >>> audit.update(torch.tensor([2, 1]), torch.tensor([2.0, 1.0]))
    >>> audit.mean_loss
    tensor([0.5000, 1.0000, 2.5000,    nan])
    >>> audit.ranked()
    tensor([2, 1, 0, 3])
    """

    STATE = ("sums",)

    sums: Tensor

    def __init__(self, n_samples: int):
        super().__init__()
        self.n_samples = _checks.at_least(n_samples, "n_samples", 1)
        self.sums = torch.empty(3, self.n_samples, dtype=exact_dtype())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start anew, with nothing seen. torch calls it after `to_empty`."""
        self.sums.zero_()

    @torch.no_grad()
    def update(self, index: Tensor, losses: Tensor, weights: Tensor | None = None, *, mask: Tensor | None = None) -> None:
        """Add the losses and weights of a batch. A sample that is in the batch twice counts twice. No graph is kept.

        Args:
            index: the place of each sample in the data set, integers of any dtype. It may stay on the CPU.
            losses: as index, floating; plain per-sample losses, before the weights. For a sample with several losses, such as a
                text of T tokens, pass their mean, or give each of them the index of the sample:
                index[:, None].expand_as(losses).
            weights: as index, floating; None means that all weigh 1.
            mask: as index, bool; a row with False does not count.

        Raises:
            IndexError: an index is out of range and on the CPU. On a GPU such a row does not count instead, because the host
                does not wait for it.
            TypeError: the index is not of integers, or the losses or weights are not floating.
            ValueError: the shapes differ, or losses, weights or mask are on another device than the state.
        """
        self._check(index, losses, weights, mask)
        if index.device.type == "cpu" and _checks.has_values(index) and not torch.compiler.is_compiling():
            self._check_range(index, mask)
        index = index.long().flatten().to(self.sums.device, non_blocking=True)
        losses = losses.flatten().to(self.sums)
        weights = torch.ones_like(losses) if weights is None else weights.flatten().to(self.sums)
        rows = torch.stack([losses, weights, torch.ones_like(losses)])
        # inf - inf and NaN - NaN are NaN, which equals nothing; with isfinite an update takes 132 us instead of 92
        counts = (losses - losses == weights - weights) & (index >= 0) & (index < self.n_samples)
        if mask is not None:
            counts &= mask.flatten()
        self.sums.index_add_(1, index.where(counts, 0), rows.where(counts, 0))

    def _check(self, index: Tensor, losses: Tensor, weights: Tensor | None, mask: Tensor | None) -> None:
        if not isinstance(index, Tensor) or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            got = getattr(index, "dtype", type(index).__name__)
            raise TypeError(f"index: got {got}, expected a tensor of integers: the place of each sample in the data set")
        for name, x in {"losses": losses, "weights": weights, "mask": mask}.items():
            if x is None and name != "losses":
                continue
            is_mask = name == "mask"
            if not isinstance(x, Tensor) or not (x.dtype == torch.bool if is_mask else x.is_floating_point()):
                expected = "a tensor of bools" if is_mask else "a floating tensor, one number per sample"
                raise TypeError(f"{name}: got {getattr(x, 'dtype', type(x).__name__)}, expected {expected}")
            if x.shape != index.shape and _without_ones(x) != _without_ones(index):
                raise ValueError(
                    f"{name}: got shape {tuple(x.shape)}, expected {tuple(index.shape)}, that of index{_hint(x, index)}"
                )
            if x.device != self.sums.device:
                raise ValueError(
                    f"{name}: got a tensor on {x.device}, expected {self.sums.device}, the device of the audit; use"
                    f" audit.to({str(x.device)!r})"
                )

    def _check_range(self, index: Tensor, mask: Tensor | None) -> None:
        """IndexError if an index that counts is out of range. The index is on the CPU; a mask on another device is not read."""
        index = index.long().flatten()
        if mask is not None and mask.device == index.device:
            index = index[mask.flatten()]
        low, high = map(int, index.aminmax()) if len(index) else (0, 0)
        if low < 0 or high >= self.n_samples:
            raise IndexError(
                f"index: got {low if low < 0 else high}, expected 0 <= index < {self.n_samples}, the number of samples of this"
                " audit; give LabelAudit the length of the whole data set, and update the place of each sample in it"
            )

    @property
    def count(self) -> Tensor:
        """How often each sample counted, (n_samples) int64."""
        return self.sums[COUNT].long()

    @property
    def mean_loss(self) -> Tensor:
        """The average loss of each sample over all updates, (n_samples); NaN for a sample that was never seen."""
        return self.sums[LOSS] / self.sums[COUNT]

    @property
    def mean_weight(self) -> Tensor:
        """The average weight of each sample over all updates, (n_samples); NaN for a sample that was never seen."""
        return self.sums[WEIGHT] / self.sums[COUNT]

    def ranked(self, by: str = "loss") -> Tensor:
        """The indices of all samples, most suspicious first.

        by="loss" puts the largest average loss first. by="weight" puts the weight first that marks large losses: the smallest if
        weights fall with the loss (lam < 0), the largest if they rise with it (lam > 0). The sign of the covariance of mean loss
        and mean weight tells which. With lam > 0 the training attends to the suspicious samples and learns them: rare and
        hard samples come first together with wrong labels, so look for wrong labels with the plain mean or lam < 0.

        Samples of equal value keep the order of their indices. Samples that were never seen come last.

        Args:
            by: "loss" or "weight".

        Returns:
            (n_samples) int64, on the device of the audit.

        Raises:
            ValueError: another `by`.
        """
        _checks.choice(by, "by", RANKINGS)
        seen = self.sums[COUNT] > 0
        key = self.mean_loss
        if by == "weight":
            apart = [torch.where(seen, x - x.nanmean(), 0) for x in (self.mean_loss, self.mean_weight)]
            rises = (apart[0] * apart[1]).sum() > 0
            key = self.mean_weight.where(rises, -self.mean_weight)
        order = torch.argsort(key.where(seen, 0), descending=True, stable=True)
        return order[torch.argsort((~seen)[order].to(torch.uint8), stable=True)]

    def merged(self, process_group: dist.ProcessGroup | str | None = "auto") -> LabelAudit:
        """An audit with the sums of all processes. Every process of the group must call it; this audit stays as it is.

        Call it once, after the training or before you save. The processes may have made different numbers of updates. A
        `DistributedSampler` repeats some samples to give every process as many; these count as often as they were seen, so their
        averages stay averages. To resume, load the saved merged state on one process, and let the others start anew.

        Args:
            process_group: a `torch.distributed.ProcessGroup`, "auto" (the default group if torch.distributed is initialised) or
                None (this process alone). Its backend must serve the device of the audit: for nccl use audit.to("cuda").

        Raises:
            TypeError, RuntimeError: as process_group= of `ABLoss`.
            ValueError: the processes have audits of different sizes.
        """
        distributed.check(process_group)
        out = copy.deepcopy(self)
        if (count := distributed.ranks(process_group, 1)) > 1:
            distributed.add_up(out.sums, process_group, count, "n_samples of LabelAudit")
        return out

    def extra_repr(self) -> str:
        """The number of samples, for repr()."""
        return str(self.n_samples)


def _without_ones(x: Tensor) -> list[int]:
    return [n for n in x.shape if n != 1]


def _hint(x: Tensor, index: Tensor) -> str:
    if x.dim() > index.dim() and x.shape[: index.dim()] == index.shape:
        return "; reduce it to one number per sample first, such as losses.flatten(1).mean(1)"
    return ""
