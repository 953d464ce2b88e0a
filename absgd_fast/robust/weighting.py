"""What weighs the losses: lambda (`Tilt`), or a rule that the user gives (`FromRule`).

A weighting has `robust_loss`, and `with_groups`: the weighting that a forward with groups= uses. `fuses` says whether the operators know
it, so that losses and weights can be made in one call. The rule itself belongs to the criterion, where a user may replace it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .. import _checks, ops
from ..weights.tilted import NATIVE_TILTS, term
from .normalizer import OWN, Own, Samples, Shared
from .state import RobustState


class Tilt:
    """W_i = exp(z_i - log s'), z_i = L_i / lambda."""

    fuses = True

    def with_groups(self) -> FromRule:
        raise ValueError("groups: only a rule uses groups; leave it out")

    def robust_loss(
        self,
        criterion: RobustState,
        operators: ops.Operators,
        normalizer: Own | Shared,
        losses: Tensor,
        samples: Samples,
        groups: Tensor | None,
        classes: int,
        update_state: bool,
    ) -> Tensor:
        """The robust loss of losses that are in the dtype of the weights, contiguous; samples are checked.

        criterion: a state that also has a `memo` and the `rule` (base.py `RobustLoss`).
        """
        if criterion.lam_is_open and update_state:
            criterion.fix_lam(losses.detach(), samples.mask, lambda stats: normalizer.gather(stats, criterion, classes))
        mode = vector_mode(operators, losses)
        loss, sample_stats, slope = normalizer.weigh(criterion, operators, losses, samples, classes, update_state, mode)
        criterion.memo.remember(sample_stats)
        return attached(operators, mode, losses, loss, slope)


class TermTilt(Tilt):
    """The flat `weights.term` with a tilt that the kernels take: lambda = 1/t, normalised by the batch alone."""

    def __init__(self, with_groups: FromRule):
        self._with_groups = with_groups

    def with_groups(self) -> FromRule:
        return self._with_groups

    def robust_loss(self, criterion, operators, normalizer, *batch) -> Tensor:
        check_alone(normalizer)
        return super().robust_loss(criterion, operators, normalizer, *batch)


class FromRule:
    """W = rule(losses), as the sample weights of a plain mean."""

    fuses = False

    def __init__(self, takes: frozenset[str]):
        self._takes = takes  # which of groups, mask and update the rule takes

    def with_groups(self) -> FromRule:
        return self

    def robust_loss(self, criterion, operators, normalizer, losses, samples, groups, classes, update_state) -> Tensor:
        check_alone(normalizer)
        sample_weight, mask, score = samples
        plain = losses.detach()
        seen = plain if score is None else score.where(plain.isfinite(), math.nan)
        weights = weights_of_rule(criterion.rule, self._takes, seen, mask, groups, update_state)
        if criterion.max_weight != math.inf:
            weights = weights.clamp(max=criterion.max_weight)
        factor = weights + criterion.mix if criterion.mix else weights
        factor = factor if sample_weight is None else factor * sample_weight
        log_s, nonfinite, lam, *_ = criterion.operands(False, 0)
        mode = vector_mode(operators, losses)
        flags = ops.flags("moving", "first") | mode | (ops.UPDATE if update_state else 0)
        plain_mean = torch.full_like(lam, math.inf), 1.0, 1.0, 0.0, math.inf, flags
        loss, sample_stats, slope = operators.robust_loss(losses, score, factor, mask, log_s, nonfinite, *plain_mean)
        sample_stats[1] = weights
        criterion.memo.remember(sample_stats)
        return attached(operators, mode, losses, loss, slope)


def weighting_of(rule: Callable | None) -> Tilt | FromRule:
    if rule is None:
        return Tilt()
    from_rule = FromRule(options_of(rule))
    return from_rule if flat_tilt(rule) is None else TermTilt(from_rule)


def check_alone(normalizer: Own | Shared) -> None:
    """ValueError where other processes would have a part in what a rule weighs."""
    if normalizer is not OWN:
        raise ValueError("rule: weighs the batch of one process; pass process_group=None to weigh each process's batch by itself")


def vector_mode(operators: ops.Operators, losses: Tensor) -> int:
    """What an operator on a vector of losses leaves for backward."""
    return operators.vector_backward_mode if losses.requires_grad and torch.is_grad_enabled() else 0


def attached(operators: ops.Operators, mode: int, losses: Tensor, loss: Tensor, slope: Tensor) -> Tensor:
    """The loss as a function of the losses, in which it is linear: slope = d loss / d L."""
    return ops.attach(operators, losses, loss, slope, lambda x: (slope * x).sum()) if mode else loss


# ---- rules --------------------------------------------------------------------------------------------------------------


def flat_tilt(rule) -> float | None:
    """t, where a rule is the flat `term` with a tilt that its kernel takes: then ABLoss can weigh as with lambda = 1/t."""
    if not (isinstance(rule, partial) and rule.func is term and not rule.args and set(rule.keywords) == {"t"}):
        return None
    t = _checks.tilt(rule.keywords["t"], "t")
    return t if NATIVE_TILTS[0] <= abs(t) <= NATIVE_TILTS[1] else None


def options_of(rule) -> frozenset[str]:
    """Which of groups, mask and update a rule takes beside the losses."""
    known = {"groups", "mask", "update"}
    while isinstance(rule, (partial, torch._dynamo.OptimizedModule)):
        known -= rule.keywords.keys() if isinstance(rule, partial) else set()
        rule = rule.func if isinstance(rule, partial) else rule._orig_mod
    try:
        parameters = inspect.signature(rule.forward if isinstance(rule, nn.Module) else rule).parameters
    except (TypeError, ValueError):  # a builtin, which does not say
        return frozenset()
    return frozenset(known & parameters.keys())


def shown(rule) -> str:
    """A rule in a line: "cvar(beta=0.1)"."""
    if isinstance(rule, partial):
        numbers = [*map(repr, rule.args), *(f"{name}={value!r}" for name, value in rule.keywords.items())]
        return f"{shown(rule.func)}({', '.join(numbers)})"
    return type(rule).__name__ if isinstance(rule, nn.Module) else getattr(rule, "__qualname__", repr(rule))


def weights_of_rule(
    rule, takes: frozenset[str], losses: Tensor, valid: Tensor | None, groups: Tensor | None, update: bool
) -> Tensor:
    """W of a rule for the rows that are valid (None: all), 0 for the others; W is checked, detached and of the losses' dtype and
    shape.

    A rule without a `mask` is given the valid rows with a finite loss alone, and the others' W is NaN; choosing them waits for a GPU.
    """
    if groups is not None and "groups" not in takes:
        raise ValueError("groups: got groups, but the rule of this ABLoss takes none; leave them out")
    more = {"update": update} if "update" in takes else {}
    grouped = lambda groups: {} if groups is None else {"groups": groups}  # noqa: E731
    if "mask" in takes:
        return _returned(rule(losses, **({} if valid is None else {"mask": valid}), **grouped(groups), **more), losses)
    good = losses.isfinite() if valid is None else losses.isfinite() & valid
    if bool(good.all()):
        return _returned(rule(losses, **grouped(groups), **more), losses)
    kept = losses[good]
    weights = _returned(rule(kept, **grouped(None if groups is None else groups[good]), **more), kept)
    bad = ~good if valid is None else valid & ~good
    return torch.zeros_like(losses).masked_scatter_(good, weights).masked_fill_(bad, math.nan)


def _returned(weights: object, losses: Tensor) -> Tensor:
    if not isinstance(weights, Tensor) or weights.shape != losses.shape or not weights.is_floating_point():
        got = f"{weights.dtype}, shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"rule: returned {got}, expected one floating weight per loss, shape {tuple(losses.shape)}")
    weights = weights.detach() if weights.requires_grad else weights
    return weights if weights.dtype == losses.dtype else weights.to(losses.dtype)
