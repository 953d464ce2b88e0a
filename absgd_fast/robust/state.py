"""RobustState: the numbers and state tensors of a robust loss, in the form in which the operators take them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import _checks, ops
from .._codes import NORMALIZERS
from .._exact import exact_dtype
from .._scheduled import Scheduled
from .lam import RelativeLam

if TYPE_CHECKING:
    from typing_extensions import Self


class RobustState(Scheduled):
    """The state of a robust loss (docs/MATH.md §1.4), which knows neither losses nor processes.

    State tensors: log_s and lam. Buffer: nonfinite_batches. Plain numbers: gamma, alpha, mix, max_weight, init and normalizer.
    The classes of normalizer.py settle this state; those of weighting.py read it.
    """

    STATE = ("lam", "log_s")
    COUNTS: ClassVar[tuple[str, ...]] = ("two_stage_count",)

    lam: Tensor  # 0-d; NaN while a RelativeLam is open
    log_s: Tensor  # 0-d; -inf before the first batch
    nonfinite_batches: Tensor  # 0-d int64: training batches (deferred: steps) that held a nonfinite loss
    relative_lam: float | None  # the r of RelativeLam; None for any other lambda
    lam_is_open: bool  # whether a RelativeLam still waits for its first batch
    two_stage_count: int | None = None  # of a TwoStage that drives this module
    reports_mean: bool = False  # whether the value of a forward is the plain mean loss (`RobustLoss.report`)

    def __init__(
        self,
        lam: float | Tensor | RelativeLam,
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
        self.mix = _checks.finite(mix, "mix")
        self.max_weight = _checks.max_weight(max_weight)
        self.init = _checks.choice(init, "init", ("first", "zero"))
        self.normalizer = _checks.choice(normalizer, "normalizer", NORMALIZERS)
        self.bits = ops.flags(self.normalizer, self.init)
        self.lam = torch.tensor(math.inf, dtype=exact_dtype())
        self.log_s = torch.tensor(-math.inf, dtype=exact_dtype())
        self.register_buffer("nonfinite_batches", torch.tensor(0, dtype=torch.int64))
        self._take_lam(lam, reset=True)
        self.lam_is_constructors = True  # until a schedule or set_lam replaces it

    # ---- lambda ----

    def _take_lam(self, value: float | Tensor | RelativeLam, reset: bool) -> None:
        """Make `value` the lambda; `reset` starts log s anew, because s lives on the scale of the old lambda."""
        if isinstance(value, Tensor) and value.is_meta:
            raise ValueError(
                "lam: got a tensor on the meta device, which has no value; expected a number or a tensor with a value"
            )
        if isinstance(value, RelativeLam):
            self.relative_lam, self.lam_is_open = value.r, True
            self.lam.fill_(math.nan)
        else:
            value = _checks.lam(value)
            self.relative_lam, self.lam_is_open = None, False
            self.lam.copy_(value) if isinstance(value, Tensor) else self.lam.fill_(value)
        self._given_lam = value.detach().clone() if isinstance(value, Tensor) else value
        self.lam_is_constructors = False
        if reset:
            self.log_s.fill_(0.0 if self.normalizer == "none" else -math.inf)

    @property
    def lam_number(self) -> float:
        """The number that was given as lambda, to the constructor or to `set_lam`; NaN if it was a tensor or a RelativeLam."""
        return math.nan if isinstance(self._given_lam, (RelativeLam, Tensor)) else float(self._given_lam)

    def has_lam(self, saved: Tensor) -> bool:
        """Whether a saved lambda is that of this module: the number that was given, also if rounded as the saved one, or lam."""
        given = self.lam_number, float(saved.new_tensor(self.lam_number))
        return float(saved) in given or (not self.lam.is_meta and float(saved) == float(self.lam))

    def reset_parameters(self) -> None:
        """Start anew: log s as at first, `nonfinite_batches` 0, and the lambda that was given last; a RelativeLam is open again.

        torch calls it after `to_empty`.
        """
        constructors = self.lam_is_constructors
        self._take_lam(self._given_lam, reset=True)
        self.lam_is_constructors = constructors
        self.nonfinite_batches.zero_()

    def at(self, log_s: Tensor, lam: Tensor, lam_is_open: bool) -> Self:
        """A shallow copy with another state, whose forwards do not change this one's."""
        copied = copy.copy(self)
        copied.log_s, copied.lam, copied.lam_is_open = log_s, lam, lam_is_open
        return copied

    def fix_lam(self, losses: Tensor, mask: Tensor | None, gather: Callable[[Tensor], Tensor]) -> None:
        """Turn an open RelativeLam into a number (MATH §1.5), unless the mean over all processes is 0 or not finite.

        Args:
            losses: of this batch. mask: bool, of the same shape, which of them count; None: all.
            gather: takes three numbers of this process and returns (processes, 3 or more), those of all processes.
        """
        assert self.relative_lam is not None  # it is called only while a RelativeLam is open
        kept = losses if mask is None else losses[mask]
        sums = torch.stack([kept.double().sum(), kept.new_tensor(kept.numel(), dtype=torch.float64), kept.new_zeros(()).double()])
        of_all = gather(sums)
        lam = self.relative_lam * of_all[:, 0].sum() / of_all[:, 1].sum()
        if bool(lam.isfinite() & (lam != 0)):
            self.lam.copy_(lam)
            self.lam_is_open = False

    def also_changed(self) -> list[tuple[object, str, Any]]:
        """As `ExactState.also_changed`."""
        return [(self, "lam_is_open", self.lam_is_open)]

    def put_back(self, state: dict[str, Tensor]) -> None:
        """Give the state tensors earlier values, as `load_state_dict` does, but without hooks, which have seen them before."""
        for name in self.STATE:
            getattr(self, name).copy_(state[name])
        self._after_load()

    # ---- what an operator is given ----

    def operands(self, update_state: bool, more_bits: int) -> tuple[Tensor, Tensor, Tensor, float, float, float, float, int]:
        """The last arguments of the operators: log_s, nonfinite, lam, gamma, alpha, mix, max_weight, flags.

        While a RelativeLam is open lam is infinity, which means the plain mean.
        """
        lam = torch.full_like(self.lam, math.inf) if self.lam_is_open else self.lam
        nonfinite: Tensor = self._buffers["nonfinite_batches"]  # type: ignore[assignment]  # torch allows None there
        flags = self.bits + (ops.UPDATE if update_state else 0) + more_bits
        log_s = self.log_s
        if not update_state and torch.compiler.is_exporting():
            # The schemas say that operators write these two, and torch.export refuses constants that are written.
            log_s, nonfinite = log_s.clone(), nonfinite.clone()
        return log_s, nonfinite, lam, self.gamma, self.alpha, self.mix, self.max_weight, flags

    def settle_partials(
        self,
        operators: ops.Operators,
        partials: Tensor,
        *,
        reference: Tensor | None = None,
        grad_multiplier: float = 1.0,
        update_state: bool = False,
    ) -> Tensor:
        """The settled normaliser of all partial statistics together; log s moves only with update_state.

        It calls the operator robust_settle. reference/weights.py `settle` is the same in plain torch and explains the arguments.

        Returns:
            (6) float64, by the places LOG_S, SCALE, Z_MAX, LOG_SUM, COUNT, NONFINITE.
        """
        log_s, nonfinite, lam, gamma, alpha, _, _, flags = self.operands(update_state, 0)
        return operators.robust_settle(partials, log_s, nonfinite, lam, reference, gamma, alpha, grad_multiplier, flags)

    # ---- nn.Module ----

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.lam
        super()._apply(fn, recurse)
        if self.lam.dtype != before.dtype and not before.is_meta and bool(before == before.new_tensor(self.lam_number)):
            self.lam.fill_(self.lam_number)  # the number that the user gave, not the one that float32 rounded it to
        return self
