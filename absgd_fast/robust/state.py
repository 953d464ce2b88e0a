"""RobustState: the numbers and state tensors of a robust loss, in the form in which the operators take them."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import _checks, ops
from .._codes import CHOSEN_BY_NAME
from .._exact import exact_dtype
from .._scheduled import Scheduled
from .lam import RampedLam, RelativeLam, TargetESS

if TYPE_CHECKING:
    from typing_extensions import Self


TARGET = "target"  # in a state_dict too, with a TargetESS, which makes the saved lam; the name of the attribute


class RobustState(Scheduled):
    """The state of a robust loss (docs/MATH.md §1.4), which knows neither losses nor processes.

    State tensors: log_s and lam. Buffer: nonfinite_batches. Plain numbers: gamma, alpha, mix, max_weight, init and normalizer.
    The classes of normalizer.py settle this state; those of weighting.py read it.
    """

    STATE = ("lam", "log_s")
    COUNTS: ClassVar[tuple[str, ...]] = ("two_stage_count", "ramp_count")
    NUMBERS: ClassVar[tuple[str, ...]] = ("ramp_end", "ramp_share")

    lam: Tensor  # 0-d; NaN while a RelativeLam is open, with a TargetESS that of the latest training forward
    log_s: Tensor  # 0-d; -inf before the first batch
    nonfinite_batches: Tensor  # 0-d int64: training batches (deferred: steps) that held a nonfinite loss
    relative_lam: float | None  # the r of RelativeLam; None for any other lambda
    target: float | None = None  # the share of a TargetESS, with the sign of lambda; None for any other lambda
    lam_is_open: bool  # whether a RelativeLam still waits for its first batch
    two_stage_count: int | None = None  # of a TwoStage that drives this module
    ramp_count: int | None = None  # of a Ramp that drives this module
    ramp_end: float | None = None  # what the RelativeLam of a Ramp has become; NaN while it is open; None: there is none
    ramp_share: float | None = None  # t / length of the Ramp that made lambda; NaN: it was set since; None: there was no Ramp
    solves: bool = True  # False: the lambda of the TargetESS was found already (target.py `StandIn`)
    is_stand_in: bool = False  # whether this is the copy by which activation checkpointing runs a forward again (replay.py)
    reports_mean: bool = False  # whether the value of a forward is the plain mean loss (`RobustLoss.report`)

    def __init__(
        self,
        lam: float | Tensor | RelativeLam | TargetESS,
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
        self.normalizer = _checks.choice(normalizer, "normalizer", CHOSEN_BY_NAME)
        self.lam = torch.tensor(math.inf, dtype=exact_dtype())
        self.log_s = torch.tensor(-math.inf, dtype=exact_dtype())
        self.register_buffer("nonfinite_batches", torch.tensor(0, dtype=torch.int64))
        self.ramp_end = None  # an attribute of its own, because `also_changed` gives it back
        self._take_lam(lam, reset=True)
        self.lam_is_constructors = True  # until a schedule or set_lam replaces it

    # ---- lambda ----

    def _take_lam(self, value: float | Tensor | RelativeLam | TargetESS | RampedLam, reset: bool) -> None:
        """Make `value` the lambda; `reset` starts log s anew, because s lives on the scale of the old lambda."""
        if isinstance(value, Tensor) and value.is_meta:
            raise ValueError(
                "lam: got a tensor on the meta device, which has no value; expected a number or a tensor with a value"
            )
        if not isinstance(value, (RelativeLam, TargetESS, RampedLam)):
            value = _checks.lam(value)
        self._lam_changes()
        self.target = value.signed_share if isinstance(value, TargetESS) else None
        self.relative_lam = value.r if isinstance(value, (RelativeLam, RampedLam)) else None
        self.lam_is_open = self.relative_lam is not None and (isinstance(value, RelativeLam) or math.isnan(self._ramp_end()))
        self.bits = ops.flags(self.normalizer if self.target is None else "target", self.init)
        if isinstance(value, RelativeLam):
            self.lam.fill_(math.nan)
        elif isinstance(value, RampedLam):
            self.lam.fill_(value.number(self._ramp_end()))
        elif isinstance(value, TargetESS):
            if reset:
                self.lam.fill_(math.inf)  # until the first training batch
        else:
            self.lam.copy_(value) if isinstance(value, Tensor) else self.lam.fill_(value)
        if isinstance(value, RampedLam):
            self.ramp_share = value.share
        elif self.ramp_share is not None:
            self.ramp_share = math.nan
        self._given_lam = value.detach().clone() if isinstance(value, Tensor) else value
        self.lam_is_constructors = False
        if reset:
            self.log_s.fill_(0.0 if self.normalizer == "none" else -math.inf)

    def _lam_changes(self) -> None:
        """Called before the tensor `lam` gets another value from anybody but a forward."""

    def _ramp_end(self) -> float:
        return math.nan if self.ramp_end is None else self.ramp_end

    @property
    def is_ramped(self) -> bool:
        """Whether lambda is that of a `Ramp`, and not one that was set since."""
        return isinstance(self._given_lam, RampedLam)

    def take_ramp(self, ramped: RampedLam, carry: bool = True) -> None:
        """Make the lambda of a `Ramp` that of this module, without a look at a tensor.

            log s <- (log s - log alpha) lam_old / lam_new + log alpha               if lam_old is of the ramp too, and finite

        log s starts anew after any other lambda. carry: False leaves log s as it is, as for a count that was loaded.
        """
        before = self._given_lam
        carries = carry and isinstance(before, RampedLam) and before.share > 0
        self._take_lam(ramped, reset=carry and not carries)
        if carries and self.normalizer != "none":
            assert isinstance(before, RampedLam)
            log_alpha = math.log(self.alpha)
            self.log_s.sub_(log_alpha).mul_(ramped.share / before.share).add_(log_alpha)

    @property
    def lam_number(self) -> float:
        """The number that was given as lambda, to the constructor or to `set_lam`; NaN for a tensor, RelativeLam or TargetESS.

        Under a `Ramp` it is the lambda of the ramp; NaN if that is not known yet.
        """
        given = self._given_lam
        if isinstance(given, RampedLam):
            return given.number(self._ramp_end())
        return math.nan if isinstance(given, (RelativeLam, TargetESS, Tensor)) else float(given)

    def has_lam(self, saved: Tensor) -> bool:
        """Whether a saved lambda is that of this module: the number that was given, also if rounded as the saved one, or lam."""
        given = self.lam_number, float(saved.new_tensor(self.lam_number))
        return float(saved) in given or (not self.lam.is_meta and float(saved) == float(self.lam))

    def warn_of_another_lam(self, lam: Tensor, target: float | None) -> None:
        """Say that the loaded lambda replaces the one given to the constructor, unless that was replaced before.

        target: the signed share, if the loaded lambda is that of the last batch of a TargetESS.
        """
        given = self.lam_number
        if not self.lam_is_constructors:
            return
        if target is not None and self.target is None:
            made_by = repr(TargetESS(abs(target), 1 if target > 0 else -1))
            warnings.warn(
                f"{type(self).__name__}: the loaded state has lam={float(lam):g}, which {made_by} chose for its last batch, but"
                f" the constructor was given lam={self._given_lam}; the loaded number holds. Construct the criterion with"
                f" {made_by}, or call set_lam after loading",
                stacklevel=2,
            )
        elif not math.isnan(given) and not self.has_lam(lam):
            warnings.warn(
                f"{type(self).__name__}: the loaded state has lam={float(lam):g}, but the constructor was given"
                f" lam={given:g}; the loaded one holds. Construct the criterion with it, or call set_lam after loading",
                stacklevel=2,
            )

    def reset_parameters(self) -> None:
        """Start anew: log s as at first, `nonfinite_batches` 0, and the lambda that was given last; a RelativeLam is open again.

        torch calls it after `to_empty`.
        """
        constructors = self.lam_is_constructors
        if isinstance(self._given_lam, RampedLam) and self._given_lam.r is not None:
            self.ramp_end = math.nan
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
            if isinstance(self._given_lam, RampedLam):
                self.ramp_end = float(lam)
                self.lam.fill_(self.lam_number)
            else:
                self.lam.copy_(lam)
            self.lam_is_open = False

    def also_changed(self) -> list[tuple[object, str, Any]]:
        """As `ExactState.also_changed`."""
        return [(self, name, getattr(self, name)) for name in ("lam_is_open", "ramp_end")]

    def put_back(self, state: dict[str, Tensor]) -> None:
        """Give the state tensors earlier values, as `load_state_dict` does, but without hooks, which have seen them before."""
        self._lam_changes()
        for name in self.STATE:
            getattr(self, name).copy_(state[name])
        self._after_load()

    # ---- what an operator is given ----

    def operands(self, update_state: bool, more_bits: int) -> tuple[Tensor, Tensor, Tensor, float, float, float, float, int]:
        """The last arguments of the operators: log_s, nonfinite, lam, gamma, alpha, mix, max_weight, flags.

        While a RelativeLam is open lam is infinity, which means the plain mean. With a TargetESS the place of gamma has the
        share, and the operator writes the lambda of the batch into lam: with update_state that of this module, else a new tensor.
        """
        if self.target is not None:
            return self._operands_of_target(update_state, more_bits)
        lam = torch.full_like(self.lam, math.inf) if self.lam_is_open else self.lam
        nonfinite: Tensor = self._buffers["nonfinite_batches"]  # type: ignore[assignment]  # torch allows None there
        flags = self.bits + (ops.UPDATE if update_state else 0) + more_bits
        log_s = self.log_s
        if not update_state and torch.compiler.is_exporting():
            # The schemas say that operators write these three, and torch.export refuses constants that are written.
            log_s, nonfinite, lam = log_s.clone(), nonfinite.clone(), lam.clone()
        return log_s, nonfinite, lam, self.gamma, self.alpha, self.mix, self.max_weight, flags

    def _operands_of_target(
        self, update_state: bool, more_bits: int
    ) -> tuple[Tensor, Tensor, Tensor, float, float, float, float, int]:
        """`operands` with a TargetESS."""
        assert self.target is not None
        log_s, nonfinite = self.log_s, self._buffers["nonfinite_batches"]
        assert nonfinite is not None
        if update_state or self.is_stand_in:
            lam = self.lam
        else:  # NaN where nobody may write it: in torch.func transforms
            lam = torch.full_like(self.lam, math.nan) if ops.transformed() else torch.empty_like(self.lam)
            if torch.compiler.is_exporting():
                log_s, nonfinite = log_s.clone(), nonfinite.clone()
        flags = self.bits + (ops.UPDATE if update_state else 0) + more_bits
        return log_s, nonfinite, lam, self.target, 1.0, self.mix, self.max_weight, flags

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

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.target is not None:
            destination[prefix + TARGET] = torch.tensor(self.target, dtype=torch.float64, device="cpu")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.lam
        super()._apply(fn, recurse)
        if self.lam.dtype != before.dtype and not before.is_meta and bool(before == before.new_tensor(self.lam_number)):
            self.lam.fill_(self.lam_number)  # the number that the user gave, not the one that float32 rounded it to
        return self
