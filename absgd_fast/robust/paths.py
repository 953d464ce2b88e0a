"""The two ways of a forward pass.

`fused` makes losses and weights in one call of an operator. `general` makes the losses first, and then the weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _checks, ops
from .. import functional as F
from ..functional import LossSpec
from ..reference import real_dtype
from .base import RobustLoss
from .derivative import Again, derivative, factors_of, losses_again, slopes
from .ignored import warn_of_ignored, without_ignored
from .last import Weighed
from .normalizer import InStages, Own, Samples
from .repeat import can_repeat, remember
from .weighting import FromWeights, Tilt, weighted_sum

NOTHING = Samples()


def fused(
    criterion: RobustLoss,
    operators: ops.Operators,
    normalizer: Own | InStages,
    logits: Tensor,
    target: Tensor,
    spec: LossSpec,
    samples: Samples,
    update_state: bool,
    reference: Tensor | None,
) -> Weighed:
    """The robust loss of logits by a loss that the operators know; normalizer: `OWN`, or one that knows the reference point.

    It is written for few Python calls: at 128 x 10 the kernels take 3 us of the 25 that forward and backward take.
    """
    weight, adjust, hyper_a, hyper_b, ignore_index, bits = spec
    if weight is not None:
        weight = _checks.class_weight(weight, logits)
    if adjust is not None:
        adjust = _checks.adjust(adjust, logits)
    if target.dtype not in _checks.LABELS:
        target = _checks.target(logits, target, soft=spec.soft)
    if samples is not NOTHING:
        samples = checked(samples, target.select(1, 0) if target.is_floating_point() else target, real_dtype(logits.dtype))
    sample_weight, mask, score = samples
    if mask is not None:
        target = ops.masked_target(target, mask, spec)
    learned = None if sample_weight is None or not ops.needs_attaching(operators, sample_weight) else sample_weight
    if criterion.lam_is_open and update_state:
        losses, valid = F.losses_and_validity(logits.detach(), target, spec, criterion.chosen_backend())
        counts = valid > 0 if mask is None else (valid > 0) & mask
        criterion.fix_lam(losses, counts, lambda stats: normalizer.gather(stats, criterion, 0))
    constant = sample_weight if learned is None else learned.detach()
    given = (logits, target, weight, adjust, hyper_a, hyper_b, ignore_index, score, constant, mask)
    try:
        if reference is not None:
            assert isinstance(normalizer, InStages)
            refuse_learned(criterion, update_state, sample_weight=sample_weight)
            return _by_reference_point(criterion, operators, normalizer, reference, spec, given)
        mode = operators.backward_mode(logits) if logits.requires_grad and torch.is_grad_enabled() else 0
        weighing = criterion.room_for_weighing(operators, logits, mode) if operators.weighs_late else None
        operands = criterion.operands(update_state, mode | bits)
        lam = operands[2]
        again = Again(criterion, spec, target, mask, sample_weight, weighing, lam)
        loss, sample_stats, repeat = _of_operator(operators, mode, given, operands, again)
    except RuntimeError as error:
        _checks.target(logits, target, soft=spec.soft)  # says the usual mistakes in plain words
        raise ops.translated(error) from None
    if repeat is not None and mode and update_state and samples is NOTHING and can_repeat(criterion, spec):
        remember(criterion.memo, repeat, given, operands, spec)
    if learned is not None:
        factors_now = factors_of(criterion, sample_stats, weighing, lam)
        loss = _of_sample_weight(loss, learned, factors_now, sample_stats[0], spec, logits, target, mask)
    return loss, sample_stats, weighing, lam


def _of_operator(
    operators: ops.Operators, mode: int, given: tuple, operands: tuple, again: Again
) -> tuple[Tensor, Tensor, Callable | None]:
    """The loss with its graph, the sample stats, and if the eager module made both in one call its function for a repetition.

    given, operands: the arguments of the operator robust_logit_loss.
    """
    logits, target, class_weight, adjust = given[:4]
    if operators.eager is not None and again.spec.recoverable(logits, target):
        made = operators.eager.robust_logit_loss(*given, *operands, (derivative, *again))
        if made is not None:
            return *made, operators.eager.repeat
    loss, sample_stats, saved = operators.robust_logit_loss(*given, *operands, again.weighing)
    if mode:
        of_loss = again.spec, target, class_weight, adjust, saved
        functions = derivative(sample_stats, *again)
        loss = ops.attach_logit_gradient(operators, mode, logits, loss, *of_loss, *functions, sample_stats, again.weighing)
    return loss, sample_stats, None


def _of_sample_weight(
    loss: Tensor,
    sample_weight: Tensor,
    factors: Tensor,
    losses: Tensor,
    spec: LossSpec,
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """The robust loss of the fused operator as a function of the sample weights too: sum_i t_i f_i L_i (docs/MATH.md §7)."""
    slope = factors * losses
    if not logits.requires_grad or torch.compiler.is_compiling():
        return ops.attach_sample_weight(loss, sample_weight, slope)
    version = logits._version

    def slope_again() -> Tensor:
        if logits._version != version:
            raise RuntimeError(
                "ABLoss: got a second derivative by sample_weight, but the logits were changed in place after the forward;"
                " expected them unchanged: clone() them before"
            )
        return factors * losses_again(spec, logits, target, mask).where(factors != 0, 0.0)

    return ops.attach_sample_weight(loss, sample_weight, slope, slope_again)


def _by_reference_point(
    criterion: RobustLoss, operators: ops.Operators, normalizer: InStages, reference: Tensor, spec: LossSpec, given: tuple
) -> Weighed:
    """sum_i exp(z_i - m) L_i of a later micro-batch (MATH §5), with m the step's reference point.

    Its gradient is made while each row is on the chip, so the logits are read once and written once.
    given: the arguments of the operator settled_logit_loss up to the mask.
    """
    logits, target, *loss_args, score, sample_weight, mask = given
    log_s, _, lam, *_, flags = criterion.operands(False, spec.bits)
    loss, sample_stats, saved, partial_stats = operators.settled_logit_loss(
        logits, target, *loss_args, score, sample_weight, mask, reference, log_s, lam, flags
    )
    normalizer.add(criterion, operators, partial_stats)

    factors = sample_stats[1]
    # both are asked only by a second derivative
    recompute = lambda x: weighted_sum(factors, losses_again(spec, x, target, mask), sample_weight)  # noqa: E731
    recover = lambda grad: spec.logits_of(grad, target, sample_stats[0], slopes(factors, sample_weight))  # noqa: E731
    class_weight, adjust = loss_args[:2]
    loss = ops.attach_logit_gradient(
        operators, ops.WITH_GRAD, logits, loss, spec, target, class_weight, adjust, saved, recompute, recover
    )
    return loss, sample_stats, None, lam


def general(
    criterion: RobustLoss,
    weighting: Tilt | FromWeights,
    normalizer: Own | InStages,
    args: tuple,
    spec: LossSpec | None,
    samples: Samples,
    groups: Tensor | None,
    update_state: bool,
) -> Weighed:
    """The robust loss of any per-sample losses: those of `spec`, or if it is None those that the criterion returns for `args`."""
    if spec is None:
        losses, classes = _per_sample_losses(criterion.criterion(*args)), 0
        samples = checked(samples, losses, losses.dtype)
        mask = without_ignored(samples.mask, criterion.ignore_index, criterion.criterion, args, losses)
        if mask is None and update_state and not (criterion.memo.asked or torch.compiler.is_compiling()):
            criterion.memo.asked = True
            warn_of_ignored(args, losses)
        samples = samples._replace(mask=mask)
    else:
        logits, target = args
        if target.requires_grad:
            refuse_learned(criterion, update_state, target=target)
        losses, valid = _losses_of_spec(criterion, logits, target, spec, samples.mask)
        samples, classes = checked(samples._replace(mask=valid), losses, losses.dtype), logits.shape[1]
    if samples.sample_weight is not None:
        refuse_learned(criterion, update_state, sample_weight=samples.sample_weight)
    operators = criterion.operators_for(losses, update_state)
    return weighting.robust_loss(criterion, operators, normalizer, losses, samples, groups, classes, update_state)


def refuse_learned(criterion: RobustLoss, update_state: bool, **inputs: Tensor | None) -> None:
    """ValueError if one of `inputs` requires grad in a micro-batch of a deferred step, which only corrects the parameters'."""
    if not (update_state and criterion.deferred):
        return
    for name, value in inputs.items():
        if value is not None and ops.is_learned(value):
            raise ValueError(
                f"{name}: got a tensor that requires grad in deferred mode, where its gradient would be normalised by a number"
                f" that is not known yet; expected {name}.detach(), or deferred=False"
            )


def _losses_of_spec(
    criterion: RobustLoss, logits: Tensor, target: Tensor, spec: LossSpec, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The losses, and which samples are valid (bool): neither masked, nor ignored or pruned by the loss."""
    target = _checks.target(logits, target, soft=spec.soft)
    if mask is not None:
        mask = _checks.per_sample(mask, "mask", target.select(1, 0) if target.is_floating_point() else target, torch.bool)
    logits, target = ops.masked_inputs(logits, target, mask, spec)
    losses, valid = F.losses_and_validity(logits, target, spec, criterion.chosen_backend(), copy_losses=True)
    valid = valid > 0
    return losses.contiguous(), valid if mask is None else valid & mask


def _per_sample_losses(losses: object) -> Tensor:
    """The per-sample losses that a criterion returned, contiguous and in the dtype of the weights."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"ABLoss: criterion returned {type(losses).__name__}, expected a tensor of per-sample losses")
    if losses.dim() == 0:
        raise ValueError('ABLoss: criterion returned shape (), expected (B,) per-sample losses; pass reduction="none"')
    if not losses.is_floating_point():
        raise TypeError(f"ABLoss: criterion returned {losses.dtype}, expected floating per-sample losses")
    return losses.to(real_dtype(losses.dtype)).contiguous()


def checked(samples: Samples, like: Tensor, real: torch.dtype) -> Samples:
    """The samples as the operators read them: contiguous, sample_weight and score in the dtype `real`.

    ValueError or TypeError if one does not have one value for each element of `like`, or the score is not floating. Only
    sample_weight keeps its graph.
    """
    sample_weight, mask, score = samples
    return Samples(
        _checks.per_sample(sample_weight, "sample_weight", like, real, constant=False),
        _checks.per_sample(mask, "mask", like, torch.bool),
        None if score is None else _checks.per_sample(_checks.floating(score, "score", "scores"), "score", like, real),
    )
