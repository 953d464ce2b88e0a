"""The processes whose batches are normalised as one (docs/MATH.md §1.6)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import distributed, ops
from .._codes import NORMALIZER, NORMALIZERS
from .state import RobustState

is_distributed = torch.distributed.is_initialized if torch.distributed.is_available() else lambda: False

# What processes must have in common to share one normaliser, in the order in which `Processes.gather` sends it.
_CONFIGURATION = (
    "lam",
    "gamma",
    "alpha",
    "mix",
    "max_weight",
    "normalizer and init",
    "deferred",
    "loss_divisor",
    "report",
    "the number of classes",
    "the r of RelativeLam or the share of TargetESS",
    "log s",
)


class Processes:
    """A process group, the number of processes that it had when last asked, and the settings that they last agreed on."""

    def __init__(self, group: torch.distributed.ProcessGroup | str | None):
        distributed.check(group)
        self.group = group
        self._count = 1
        self._agreed: tuple | None = None
        self._configured: tuple[tuple, Tensor] | None = None

    def are_several(self) -> bool:
        """Whether more than one process shares the normaliser. RuntimeError if the group is gone."""
        return (
            self.group is not None
            and (self.group != distributed.AUTO or self._count > 1 or is_distributed())
            and self.count() > 1
        )

    def count(self) -> int:
        """How many processes exchange their partial statistics. RuntimeError if the group is gone."""
        self._count = distributed.ranks(self.group, self._count)
        return self._count

    def forget_agreement(self) -> None:
        """Compare the settings again at the next exchange, because one of them may have changed."""
        self._agreed = None

    def gather(self, stats: Tensor, state: RobustState, deferred: bool, loss_divisor: float, classes: int) -> Tensor:
        """The statistics of all processes, after a check that all of them have the same settings.

        Args:
            stats: (3) float64, the partial statistics of this process.
            classes: the number of classes of the logits; 0 if the losses do not come from logits.

        Returns:
            (processes, 3 or more) float64; the first three columns are the statistics.

        Raises:
            ValueError: the processes disagree on a setting. RuntimeError: the group is gone, or the exchange failed.
        """
        count = self.count()
        if count == 1:
            return stats.unsqueeze(0)
        fixed = (
            state.gamma,
            state.alpha,
            state.mix,
            state.max_weight,
            state.bits if state.target is None else ops.flags("target", state.init),
            deferred,
            loss_divisor,
            state.reports_mean,
            classes,
            state.target if state.target is not None else (state.relative_lam or 0.0) if state.lam_is_open else 0.0,
        )
        key = (fixed, stats.device)
        if self._configured is None or self._configured[0] != key:
            numbers = torch.tensor([float(x) for x in fixed], dtype=torch.float64, device="cpu").to(
                stats.device, non_blocking=True
            )
            self._configured = (key, numbers)
        lam, log_s = (t.detach().double().reshape(1) for t in (state.lam, state.log_s))
        of_all = distributed.exchange(torch.cat([stats, lam, self._configured[1], log_s]), self.group, count)
        # Looking at numbers on a GPU waits for it, so there the check is made once after each change of the settings.
        if not torch.compiler.is_compiling() and (stats.device.type == "cpu" or self._agreed != key):
            if state.reports_mean:
                _check_same_exchange(of_all)
            distributed.check_agreement(of_all[:, 3:].cpu(), _CONFIGURATION, _shown)
            self._agreed = key
        return of_all

    def added(self, sums: Tensor) -> Tensor:
        """Sums of any shape over all processes, which must be in this exchange too. sums: float64, those of this process."""
        count = self.count()
        return sums if count == 1 else distributed.exchange(sums.flatten(), self.group, count).sum(0).view(sums.shape)

    def total(self, sums: Tensor) -> Tensor:
        """The sums over all processes. sums: float64, those of this process.

        A row is as wide as one of `gather`, so that processes that made unequally many forwards get an error by name. On a GPU
        nobody looks: there `total` gives NaN, and `gather` statistics of a bad batch.

        Raises:
            RuntimeError: the group is gone, the exchange failed, or another process is in `gather`.
        """
        count = self.count()
        if count == 1:
            return sums
        row = sums.new_full((3 + len(_CONFIGURATION),), math.nan)
        row[2] = 1.0  # one nonfinite loss, by which log s stays
        row[_LAM] = 0.0  # no lambda is 0
        row[_LAM + 1 : _LAM + 1 + len(sums)] = sums
        of_all = distributed.exchange(row, self.group, count)
        if not torch.compiler.is_compiling() and sums.device.type == "cpu":
            _check_same_exchange(of_all)
        return of_all[:, _LAM + 1 : _LAM + 1 + len(sums)].where(of_all[:, _LAM : _LAM + 1] == 0, math.nan).sum(0)


_LAM = 3  # the column of lambda in the rows of `gather`


def _check_same_exchange(of_all: Tensor) -> None:
    """RuntimeError if some processes are in `total` and some in `gather`."""
    in_total = of_all[:, _LAM] == 0
    if in_total.any() and not in_total.all():
        more, fewer = int(in_total.nonzero()[0]), int(in_total.logical_not().nonzero()[0])
        raise RuntimeError(
            f'ABLoss: with report="mean" rank {more} made a forward of an optimizer step that rank {fewer} had ended already;'
            " expected equally many training forwards on all processes, those without samples with an empty batch, or"
            ' report="robust", with which deferred micro-batches exchange nothing'
        )


def _shown(name: str, value: float) -> str:
    """A setting in words, for the error of processes that disagree on it."""
    if name == "normalizer and init":
        return f"{NORMALIZERS[int(value) & NORMALIZER]!r} and {'first' if int(value) & ops.INIT_FIRST else 'zero'!r}"
    if name == "log s":
        return f"{value:.9g}"
    if name == "report":
        return repr("mean" if value else "robust")
    return str(bool(value)) if name == "deferred" else f"{value:g}" if value == value else "a RelativeLam that is still open"
