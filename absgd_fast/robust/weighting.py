"""What makes the weights of the losses: lambda (`Tilt`), or a rule that the user gives (`FromRule`).

Both have `robust_loss`, and `with_groups`, which returns the weighting of a forward with groups=. `kept` returns the weighting by
which activation checkpointing runs a forward again. `fuses` says whether the
operators know the weighting, so that one call can make losses and weights. The rule itself belongs to the criterion, where a user
may replace it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .. import _checks, ops
from .._compiled import is_compiled
from ..weights.tilted import NATIVE_TILTS, term
from .base import RobustLoss, Rule
from .last import Memo, Weighed
from .normalizer import OWN, InStages, Own, Samples

OFFERED = ("groups", "mask", "update")  # what a rule may take besides the losses


class Tilt:
    """W_i = exp(z_i - log s') with z_i = L_i / lambda (ABSGD paper, Alg. 1; docs/MATH.md §1.1)."""

    fuses = True

    def kept(self, memo: Memo) -> Tilt:
        """The weighting by which activation checkpointing runs a forward again. memo: what the forward left behind."""
        return self

    def with_groups(self) -> FromRule:
        """ValueError, because only a rule uses groups."""
        raise ValueError("groups: got groups, but this criterion weighs by lam, and only a rule= uses groups; leave them out")

    def robust_loss(
        self,
        criterion: RobustLoss,
        operators: ops.Operators,
        normalizer: Own | InStages,
        losses: Tensor,
        samples: Samples,
        groups: Tensor | None,
        classes: int,
        update_state: bool,
    ) -> Weighed:
        """The robust loss of a vector of losses.

        Args:
            losses: contiguous, in the dtype of the weights. samples: checked against the losses.
            groups: like losses, integers; only a rule reads them. classes: of the logits; 0 if there are none.
        """
        if criterion.lam_is_open and update_state:
            criterion.fix_lam(losses.detach(), samples.mask, lambda stats: normalizer.gather(stats, criterion, classes))
        learned, samples = without_learned(operators, samples)
        mode = vector_mode(operators, losses, learned)
        loss, sample_stats, slope, lam = normalizer.weigh(criterion, operators, losses, samples, classes, update_state, mode)
        return attached(operators, mode, losses, loss, slope, learned), sample_stats, None, lam


class TermTilt(Tilt):
    """The flat `weights.term` with a tilt t that the kernels take: lambda = 1/t, normalised by the batch alone (MATH §4.1)."""

    def __init__(self, with_groups: FromRule):
        self._with_groups = with_groups

    def with_groups(self) -> FromRule:
        """The same rule, called as a function: its form with groups has no kernel."""
        return self._with_groups

    def robust_loss(
        self,
        criterion: RobustLoss,
        operators: ops.Operators,
        normalizer: Own | InStages,
        losses: Tensor,
        samples: Samples,
        groups: Tensor | None,
        classes: int,
        update_state: bool,
    ) -> Weighed:
        """As `Tilt.robust_loss`. ValueError if other processes have a part in the normaliser."""
        check_alone(normalizer)
        return super().robust_loss(criterion, operators, normalizer, losses, samples, groups, classes, update_state)


class FromWeights:
    """W from anywhere, used as the sample weights of a plain mean (docs/MATH.md §4)."""

    fuses = False

    def weights(
        self, criterion: RobustLoss, losses: Tensor, samples: Samples, groups: Tensor | None, update_state: bool
    ) -> Tensor:
        """W, detached, as losses: at most max_weight, 0 for rows that do not count, and NaN for rows with a nonfinite loss."""
        raise NotImplementedError

    def kept(self, memo: Memo) -> FromWeights:
        """As `Tilt.kept`: the weights of the forward, because a rule may have a state or draw random numbers."""
        assert memo.sample_stats is not None  # there was a forward
        return GivenWeights(memo.sample_stats[1])

    def robust_loss(
        self,
        criterion: RobustLoss,
        operators: ops.Operators,
        normalizer: Own | InStages,
        losses: Tensor,
        samples: Samples,
        groups: Tensor | None,
        classes: int,
        update_state: bool,
    ) -> Weighed:
        """As `Tilt.robust_loss`. ValueError as in `weights` and in `check_alone`."""
        check_alone(normalizer)
        learned, (sample_weight, mask, score) = without_learned(operators, samples)
        weights = self.weights(criterion, losses.detach(), samples, groups, update_state)
        factor = weights + criterion.mix if criterion.mix else weights
        factor = factor if sample_weight is None else factor * sample_weight
        log_s, nonfinite, lam, *_ = criterion.operands(False, 0)
        mode = vector_mode(operators, losses, learned)
        flags = ops.flags("moving", "first") | mode | (ops.UPDATE if update_state else 0)
        plain_mean = torch.full_like(lam, math.inf), 1.0, 1.0, 0.0, math.inf, flags
        loss, sample_stats, slope = operators.robust_loss(losses, score, factor, mask, log_s, nonfinite, *plain_mean)
        sample_stats = torch.stack([sample_stats[0], weights, sample_stats[2]])
        return attached(operators, mode, losses, loss, slope, learned), sample_stats, None, lam


class FromRule(FromWeights):
    """W = rule(losses)."""

    def __init__(self, takes: frozenset[str], needs_groups: bool):
        self._takes = takes  # those of groups, mask and update that the rule takes
        self._needs_groups = needs_groups  # whether the rule cannot do without groups

    def with_groups(self) -> FromRule:
        """Itself."""
        return self

    def weights(
        self, criterion: RobustLoss, losses: Tensor, samples: Samples, groups: Tensor | None, update_state: bool
    ) -> Tensor:
        """As `FromWeights.weights`. ValueError if the rule lacks its groups or returns no weights."""
        rule = criterion.rule
        assert rule is not None  # `weighting_of` made this weighting from it
        if groups is None and self._needs_groups:
            raise ValueError(f"groups: got none, but the rule {shown(rule)} needs them; pass groups= to the criterion's call")
        score = samples.score
        seen = losses if score is None else score.where(losses.isfinite(), math.nan)
        weights = weights_of_rule(rule, self._takes, seen, samples.mask, groups, update_state)
        return weights if criterion.max_weight == math.inf else weights.clamp(max=criterion.max_weight)


class GivenWeights(FromWeights):
    """The weights of an earlier forward of the same batch."""

    def __init__(self, weights: Tensor):
        self._weights = weights

    def weights(
        self, criterion: RobustLoss, losses: Tensor, samples: Samples, groups: Tensor | None, update_state: bool
    ) -> Tensor:
        """As `FromWeights.weights`."""
        return self._weights


def weighting_of(rule: Rule | None) -> Tilt | FromRule:
    """The weighting of an `ABLoss` with this rule; None: by lambda. TypeError if the rule needs an argument that is not bound."""
    if rule is None:
        return Tilt()
    takes = _arguments_of(rule)
    needed = [p.name for p in takes.values() if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if missing := [name for name in needed if name not in OFFERED]:
        bound = ", ".join(f"{name}=..." for name in missing)
        raise TypeError(
            f"rule: {shown(rule)} needs {' and '.join(missing)}, expected a rule that needs only the losses; bind"
            f" {'it' if len(missing) == 1 else 'them'}: functools.partial(rule, {bound})"
        )
    from_rule = FromRule(frozenset(takes.keys() & set(OFFERED)), "groups" in needed)
    return from_rule if flat_tilt(rule) is None else TermTilt(from_rule)


def check_alone(normalizer: Own | InStages) -> None:
    """ValueError if other processes have a part in the normaliser, because a rule sees the losses of one process only."""
    if normalizer is not OWN:
        raise ValueError(
            "rule: got a normaliser that several processes share (or a loss_divisor), but a rule weighs the batch of one process;"
            " pass process_group=None to weigh each process's batch by itself"
        )


def vector_mode(operators: ops.Operators, losses: Tensor, learned: Tensor | None) -> int:
    """The backward mode of an operator on a vector of losses; 0 if nobody asks for a gradient. learned: sample weights."""
    wanted = learned is not None or (losses.requires_grad and torch.is_grad_enabled())
    return operators.vector_backward_mode if wanted else 0


def attached(operators: ops.Operators, mode: int, losses: Tensor, loss: Tensor, slope: Tensor, learned: Tensor | None) -> Tensor:
    """The robust loss as a function of the losses, in which it is linear: slope = d loss / d L.

    learned: sample weights that the operator was not given, of which it becomes a function too.
    """
    if learned is not None:
        return weighted_sum(slope, losses, learned)
    if not mode:
        return loss
    # The derivative is the same at any losses, so any numbers serve as the losses that a second derivative asks for.
    return ops.attach(operators, losses, loss, slope, lambda x: (slope * x).sum(), lambda _: slope)


# ---- sample weights that require grad ----
#
# The robust loss is sum_i t_i f_i L_i, and an operator that is given no sample weights t returns the factors f as its gradient.
# So the sum in torch's own operators has all gradients, and second ones too (docs/MATH.md §7).


def without_learned(operators: ops.Operators, samples: Samples) -> tuple[Tensor | None, Samples]:
    """The sample weights by which kernels cannot differentiate, or None, and the samples that an operator is given."""
    sample_weight = samples.sample_weight
    if sample_weight is None or not ops.needs_attaching(operators, sample_weight):
        return None, samples
    return sample_weight, samples._replace(sample_weight=None)


def weighted_sum(factor: Tensor, losses: Tensor, sample_weight: Tensor | None) -> Tensor:
    """sum_i t_i f_i L_i. A sample with the factor 0 may hold any loss and sample weight."""
    counts = factor != 0
    terms = factor * losses.where(counts, 0.0)
    return (terms if sample_weight is None else terms * sample_weight.where(counts, 0.0)).sum()


# ---- rules --------------------------------------------------------------------------------------------------------------


def flat_tilt(rule: Rule) -> float | None:
    """The t of a rule `partial(term, t=t)`, with which ABLoss can weigh as with lambda = 1/t.

    None for any other rule, and for a t whose 1/t the kernels do not take.
    """
    if not (isinstance(rule, partial) and rule.func is term and not rule.args and set(rule.keywords) == {"t"}):
        return None
    t = _checks.tilt(rule.keywords["t"], "t")
    return t if NATIVE_TILTS[0] <= abs(t) <= NATIVE_TILTS[1] else None


def _function_of(rule: Rule) -> Callable:
    """The rule as a function whose arguments Python knows: a module by its forward, inside a partial and if compiled too."""
    if isinstance(rule, partial):
        return partial(_function_of(rule.func), *rule.args, **rule.keywords)
    if is_compiled(rule):
        return _function_of(rule._orig_mod)
    return rule.forward if isinstance(rule, nn.Module) else rule


def _arguments_of(rule: Rule) -> dict[str, inspect.Parameter]:
    """The arguments besides the losses that a call of the rule may give: name -> what Python knows of it."""
    function = _function_of(rule)
    try:
        _, *others = inspect.signature(function).parameters.items()  # the first are the losses
    except (TypeError, ValueError):  # a builtin, whose arguments Python does not know, or a function without arguments
        return {}
    bound = function.keywords if isinstance(function, partial) else {}
    return {name: parameter for name, parameter in others if name not in bound}


def shown(rule: Rule) -> str:
    """A rule in one line, as in "cvar(beta=0.1)"."""
    if isinstance(rule, partial):
        numbers = [*map(repr, rule.args), *(f"{name}={value!r}" for name, value in rule.keywords.items())]
        return f"{shown(rule.func)}({', '.join(numbers)})"
    return type(rule).__name__ if isinstance(rule, nn.Module) else getattr(rule, "__qualname__", repr(rule))


def weights_of_rule(
    rule: Rule, takes: frozenset[str], losses: Tensor, valid: Tensor | None, groups: Tensor | None, update: bool
) -> Tensor:
    """W of a rule: detached, in the dtype and shape of the losses, and 0 for rows that are not valid.

    A rule with an argument `mask` gets all losses. A rule without it gets only the valid, finite losses, and the W of a nonfinite
    one is NaN; selecting them makes the host wait for a GPU.

    Args:
        takes: those of groups, mask and update that the rule takes. valid: bool, like losses; None: all are valid.
        update: whether the rule may change its own state.

    Raises:
        ValueError: groups for a rule that takes none, or a rule that does not return one floating weight per loss.
    """
    if groups is not None and "groups" not in takes:
        raise ValueError("groups: got groups, but the rule of this ABLoss has no argument `groups`; leave them out")
    more = {"update": update} if "update" in takes else {}
    grouped = lambda groups: {} if groups is None else {"groups": groups}  # noqa: E731
    if "mask" in takes:
        return _returned(rule(losses, **({} if valid is None else {"mask": valid}), **grouped(groups), **more), losses)
    finite = losses.isfinite() if valid is None else losses.isfinite() & valid
    if bool(finite.all()):
        return _returned(rule(losses, **grouped(groups), **more), losses)
    kept = losses[finite]
    weights = _returned(rule(kept, **grouped(None if groups is None else groups[finite]), **more), kept)
    nonfinite = ~finite if valid is None else valid & ~finite
    return torch.zeros_like(losses).masked_scatter_(finite, weights).masked_fill_(nonfinite, math.nan)


def _returned(weights: object, losses: Tensor) -> Tensor:
    """The weights that a rule returned, if they fit the losses."""
    if not isinstance(weights, Tensor) or weights.shape != losses.shape or not weights.is_floating_point():
        got = f"{weights.dtype}, shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"rule: returned {got}, expected one floating weight per loss, shape {tuple(losses.shape)}")
    weights = weights.detach() if weights.requires_grad else weights
    return weights if weights.dtype == losses.dtype else weights.to(losses.dtype)
