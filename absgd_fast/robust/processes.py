"""The processes whose batches are normalised as one."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import distributed, ops
from .._codes import NORMALIZER, NORMALIZERS
from .state import RobustState

_is_distributed = torch.distributed.is_initialized if torch.distributed.is_available() else lambda: False

# What processes must have in common to share one normaliser, in the order of `Processes.gather`.
_CONFIGURATION = (
    "lam",
    "gamma",
    "alpha",
    "mix",
    "max_weight",
    "normalizer and init",
    "deferred",
    "loss_divisor",
    "the number of classes",
    "the r of RelativeLam",
)


class Processes:
    """A process group, how many processes it had when it was last asked, and what they were last seen to agree on."""

    def __init__(self, group):
        distributed.check(group)
        self.group = group
        self._count = 1
        self._agreed: tuple | None = None
        self._configured: tuple[tuple, Tensor] | None = None

    def are_several(self) -> bool:
        return (
            self.group is not None
            and (self.group != distributed.AUTO or self._count > 1 or _is_distributed())
            and self.count() > 1
        )

    def count(self) -> int:
        """How many exchange their partial statistics. RuntimeError where the group is gone."""
        self._count = distributed.ranks(self.group, self._count)
        return self._count

    def forget_agreement(self) -> None:
        """Something that they must have in common may have changed."""
        self._agreed = None

    def gather(self, stats: Tensor, state: RobustState, deferred: bool, loss_divisor: float, classes: int) -> Tensor:
        """(processes, 3 or more): the statistics of all processes, which are seen to be set up alike."""
        count = self.count()
        if count == 1:
            return stats.unsqueeze(0)
        fixed = (
            state.gamma,
            state.alpha,
            state.mix,
            state.max_weight,
            state.bits,
            deferred,
            loss_divisor,
            classes,
            state.relative_lam if state.lam_is_open else 0.0,
        )
        key = (fixed, stats.device)
        if self._configured is None or self._configured[0] != key:
            numbers = torch.tensor([float(x) for x in fixed], dtype=torch.float64).to(stats.device, non_blocking=True)
            self._configured = (key, numbers)
        lam = state._buffers["lam"].detach().double().reshape(1)
        of_all = distributed.exchange(torch.cat([stats, lam, self._configured[1]]), self.group, count)
        # On a GPU looking would wait for it, so there it is done once for each setting.
        if not torch.compiler.is_compiling() and (stats.device.type == "cpu" or self._agreed != key):
            distributed.check_agreement(of_all[:, 3:].cpu(), _CONFIGURATION, _shown)
            self._agreed = key
        return of_all


def _shown(name: str, value: float) -> str:
    if name == "normalizer and init":
        return f"{NORMALIZERS[int(value) & NORMALIZER]!r} and {'first' if int(value) & ops.INIT_FIRST else 'zero'!r}"
    return str(bool(value)) if name == "deferred" else f"{value:g}" if value == value else "a RelativeLam that is still open"
