"""Operators in plain torch. They have the arguments of their schemas, and use the formulas of reference/.

`REFERENCE` consists of them. They also serve Triton where it has no kernel, because a few launches of torch's kernels on one
number per row suffice. Autograd differentiates their losses, so they save nothing for backward, and return None instead. Weights
and score are constants, as everywhere. With the flag UPDATE they write log s and the count of nonfinite batches in place, as the
kernels do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, _codes, reference
from ..reference import NONFINITE, Z_MAX
from .labels import check_labels
from .modes import transformed
from .spec import LossSpec, masked_inputs


def stack_sample_stats(losses: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor:
    """The sample stats (3, ...): losses (0 where ignored), weights, and validity (1, or 0 where ignored)."""
    valid = torch.ones_like(losses) if mask is None else mask.to(losses.dtype)
    return torch.stack([losses.where(valid > 0, 0.0), weights, valid])


def _normalizer_options(gamma: float, alpha: float, flags: int) -> dict:
    """The options of reference.settle, from the arguments of an operator."""
    init = "first" if flags & _codes.INIT_FIRST else "zero"
    return dict(gamma=gamma, alpha=alpha, init=init, normalizer=_codes.NORMALIZERS[flags & _codes.NORMALIZER])


def _commit(log_s: Tensor, nonfinite: Tensor, new_log_s: Tensor, is_nonfinite: Tensor, flags: int) -> None:
    """Writes the state in place if the flags have UPDATE."""
    if flags & _codes.UPDATE:
        log_s.copy_(new_log_s)
        nonfinite += is_nonfinite


# ---- losses on logits --------------------------------------------------------------------------------------------------


def logit_loss(logits, target, class_weight, adjust, hyper_a, hyper_b, ignore_index, flags):
    """The losses and which rows count; nothing is saved (MATH §2.1)."""
    spec = LossSpec(class_weight, adjust, hyper_a, hyper_b, ignore_index, flags)
    if not (target.is_floating_point() or torch.compiler.is_compiling() or transformed()):
        target = check_labels(target, logits.shape[1], ignore_index)
    losses = spec.recompute(logits, target)
    return losses, None, spec.valid(target, losses).to(losses.dtype)


def robust_logit_loss(
    logits,
    target,
    class_weight,
    adjust,
    hyper_a,
    hyper_b,
    ignore_index,
    score,
    sample_weight,
    mask,
    log_s,
    nonfinite,
    lam,
    gamma,
    alpha,
    mix,
    max_weight,
    flags,
    weighing,
):
    """The losses, and then their robust loss. weighing is None, because the weights are made at once (MATH §1.1)."""
    spec = LossSpec(class_weight, adjust, hyper_a, hyper_b, ignore_index, flags)
    target = _checks.target(logits, target, soft=spec.soft)
    losses, _, valid = logit_loss(*masked_inputs(logits, target, mask, spec), *spec)
    valid = valid > 0 if mask is None else (valid > 0) & mask
    return robust_loss(losses, score, sample_weight, valid, log_s, nonfinite, lam, gamma, alpha, mix, max_weight, flags)


# ---- losses that are there already -------------------------------------------------------------------------------------


def robust_loss(losses, score, sample_weight, mask, log_s, nonfinite, lam, gamma, alpha, mix, max_weight, flags):
    """The robust loss of losses that are there already, and its sample stats (MATH §1.1, §1.7)."""
    given = dict(mix=mix, sample_weight=sample_weight, score=score, mask=mask, max_weight=max_weight)
    options = _normalizer_options(gamma, alpha, flags)
    if options["normalizer"] == "target":
        loss, weights, solved, new_log_s, is_nonfinite = reference.robust_loss_at_target(losses, log_s, gamma, **given)
        if not transformed():  # torch.func transforms let nothing be written
            lam.copy_(solved)
    else:
        loss, weights, new_log_s, is_nonfinite = reference.robust_loss(losses, log_s, lam, **given, **options)
    with torch.no_grad():
        sample_stats = stack_sample_stats(losses.detach(), weights, mask)
        _commit(log_s, nonfinite, new_log_s, is_nonfinite, flags)
    return loss, sample_stats, None


def robust_partial_stats(losses, score, mask, log_s, lam, settled):
    """log sum exp z, count and nonfinite count of some samples; `settled` bounds their z (MATH §1.6, §5)."""
    z_max = None if settled is None else settled[Z_MAX]
    return reference.partial_stats(losses.detach(), log_s, lam, score=score, mask=mask, z_max=z_max)


@torch.no_grad()
def robust_settle(partials, log_s, nonfinite, lam, reference_point, gamma, alpha, grad_multiplier, flags):
    """The settled normaliser of all samples, from their partial stats (MATH §1.6, §5)."""
    settled, new_log_s = reference.settle(
        partials,
        log_s,
        lam,
        grad_multiplier=grad_multiplier,
        reference=reference_point,
        **_normalizer_options(gamma, alpha, flags),
    )
    _commit(log_s, nonfinite, new_log_s, settled[NONFINITE] > 0, flags)
    return settled


def robust_apply(losses, score, sample_weight, mask, settled, log_s, lam, bounded, mix, max_weight, flags):
    """The robust loss by a settled normaliser. With WITH_GRAD its gradient is returned, and the loss has no graph; otherwise
    autograd differentiates the loss."""
    given = dict(mix=mix, max_weight=max_weight, sample_weight=sample_weight, score=score, mask=mask, bounded=bounded)
    grad = losses.new_empty(0)
    if flags & _codes.WITH_GRAD:
        with torch.enable_grad():
            x = losses.detach().requires_grad_()
            loss, weights = reference.apply(x, settled, log_s, lam, **given)
        grad = torch.autograd.grad(loss, x)[0]
        loss = loss.detach()
    else:
        loss, weights = reference.apply(losses, settled, log_s, lam, **given)
    return loss, stack_sample_stats(losses.detach(), weights, mask), grad


def robust_weights(losses, log_s, lam, mask, gamma, alpha, flags):
    """The weights and log s', which autograd differentiates (MATH §1.1, §1.3)."""
    options = _normalizer_options(gamma, alpha, flags)
    return *reference.robust_weights(losses, log_s, lam, mask=mask, **options), None


def rectified(products):
    """The weights of L2RW (MATH §4.5)."""
    return reference.rectified(products)


# ---- the step from per-sample gradients --------------------------------------------------------------------------------


def weighted_step_(
    params,
    buffers,
    grads,
    losses,
    sample_weight,
    mask,
    log_s,
    lam_tensor,
    lr_tensor,
    lam,
    gamma,
    alpha,
    mix,
    max_weight,
    lr,
    weight_decay,
    momentum,
    dampening,
    form,
    flags,
):
    """One momentum step with the weighted mean of per-sample gradients; returns the new log s (MATH §3.4)."""
    return reference.weighted_momentum_step_(
        params,
        buffers or [None] * len(params),
        grads,
        losses,
        log_s,
        lam if lam_tensor is None else lam_tensor,
        mix=mix,
        sample_weight=sample_weight,
        mask=mask,
        max_weight=max_weight,
        lr=lr if lr_tensor is None else lr_tensor.reshape(()),
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=bool(form & _codes.NESTEROV),
        maximize=bool(form & _codes.MAXIMIZE),
        heavy_ball=bool(form & _codes.HEAVY_BALL),
        **_normalizer_options(gamma, alpha, flags),
    )
