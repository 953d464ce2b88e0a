"""RobustState: the numbers and buffers of a robust loss, in the form in which the operators take them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _checks, ops
from .._codes import NORMALIZERS
from .._exact import ExactState
from .lam import RelativeLam


class RobustState(ExactState):
    """log s, lambda and the count of nonfinite batches as buffers; gamma, alpha, mix, max_weight, init and normalizer as numbers.

    It knows neither losses nor processes: it is what a normaliser settles, and what a weighting reads.
    """

    def __init__(
        self,
        lam: float | RelativeLam,
        *,
        gamma: float = 0.9,
        alpha: float = 1.0,
        mix: float = 0.0,
        init: str = "first",
        normalizer: str = "moving",
        max_weight: float | None = None,
    ):
        super().__init__()
        self.gamma = _checks.unit_interval(gamma, "gamma")
        self.alpha = _checks.unit_interval(alpha, "alpha")
        self.mix = float(mix)
        if not math.isfinite(self.mix):
            raise ValueError(f"mix: got {mix!r}, expected a finite number")
        self.max_weight = _checks.max_weight(max_weight)
        self.init = _checks.choice(init, "init", ("first", "zero"))
        self.normalizer = _checks.choice(normalizer, "normalizer", NORMALIZERS)
        self.bits = ops.flags(self.normalizer, self.init)
        self.register_buffer("lam", torch.tensor(math.inf))
        self.register_buffer("log_s", torch.tensor(-math.inf))
        self.register_buffer("nonfinite_batches", torch.tensor(0))
        self._take_lam(lam, reset=True)

    # ---- lambda ----

    def _take_lam(self, value: float | RelativeLam, reset: bool) -> None:
        self._given_lam = math.nan if isinstance(value, (RelativeLam, Tensor)) else float(value)
        if isinstance(value, RelativeLam):
            self.relative_lam, self.lam_is_open = value.r, True
            self.lam.fill_(math.nan)
        else:
            _checks.lam(value)
            self.relative_lam, self.lam_is_open = None, False
            self.lam.copy_(value) if isinstance(value, Tensor) else self.lam.fill_(value)
        if reset:
            self.log_s.fill_(0.0 if self.normalizer == "none" else -math.inf)

    def fix_lam(self, losses: Tensor, mask: Tensor | None, gather: Callable[[Tensor], Tensor]) -> None:
        """A RelativeLam becomes a number on the first batch whose plain mean over all processes is finite and not 0.

        gather: (3) numbers of this process -> (processes, 3 or more), those of all.
        """
        kept = losses if mask is None else losses[mask]
        sums = torch.stack([kept.double().sum(), kept.new_tensor(kept.numel(), dtype=torch.float64), kept.new_zeros(()).double()])
        of_all = gather(sums)
        lam = self.relative_lam * of_all[:, 0].sum() / of_all[:, 1].sum()
        if bool(lam.isfinite() & (lam != 0)):
            self.lam.copy_(lam)
            self.lam_is_open = False

    # ---- what an operator is given ----

    def operands(self, update_state: bool, more_bits: int) -> tuple:
        """The last arguments of the operators: log_s, nonfinite, lam, gamma, alpha, mix, max_weight, flags.

        lam is infinity, which is the plain mean, while a RelativeLam is open.
        """
        buffers = self._buffers
        lam = torch.full_like(buffers["lam"], math.inf) if self.lam_is_open else buffers["lam"]
        flags = self.bits + (ops.UPDATE if update_state else 0) + more_bits
        return buffers["log_s"], buffers["nonfinite_batches"], lam, self.gamma, self.alpha, self.mix, self.max_weight, flags

    def settle_partials(
        self,
        operators: ops.Operators,
        partials: Tensor,
        *,
        reference: Tensor | None = None,
        grad_multiplier: float = 1.0,
        update_state: bool = False,
    ) -> Tensor:
        """(6) float64: the settled normaliser of all partial statistics together (reference.settle); log s moves if told to."""
        log_s, nonfinite, lam, gamma, alpha, _, _, flags = self.operands(update_state, 0)
        return operators.robust_settle(partials, log_s, nonfinite, lam, reference, gamma, alpha, grad_multiplier, flags)

    # ---- nn.Module ----

    def _apply(self, fn, recurse=True):
        before = self.lam
        super()._apply(fn, recurse)
        if self.lam.dtype != before.dtype and not before.is_meta and bool(before == before.new_tensor(self._given_lam)):
            self.lam.fill_(self._given_lam)  # not what float32 made of it
        return self
