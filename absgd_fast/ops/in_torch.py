"""Operators in plain torch, with the arguments of their schemas, by the formulas of reference/.

They are what `REFERENCE` consists of, and the twins of those operators for which Triton has no kernel because a few launches of
torch's on one number per row do. Their losses are differentiable by autograd, so they save nothing for backward and return None
in its place. Weights and score are constants, as everywhere. With UPDATE among the flags log s and the count of non-finite
batches move in place, as in the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, _codes, reference
from ..reference import NONFINITE, Z_MAX
from .labels import check_labels
from .modes import transformed
from .spec import LossSpec, masked_target


def stack_sample_stats(losses: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor:
    """(3, ...): losses (0 where ignored), weights, 1 or 0 = ignored."""
    valid = torch.ones_like(losses) if mask is None else mask.to(losses.dtype)
    return torch.stack([losses.where(valid > 0, 0.0), weights, valid])


def _normalizer_options(gamma: float, alpha: float, flags: int) -> dict:
    """The arguments of reference.settle that the operators take apart."""
    init = "first" if flags & _codes.INIT_FIRST else "zero"
    return dict(gamma=gamma, alpha=alpha, init=init, normalizer=_codes.NORMALIZERS[flags & _codes.NORMALIZER])


def _commit(log_s: Tensor, nonfinite: Tensor, new_log_s: Tensor, is_nonfinite: Tensor, flags: int) -> None:
    """Writes the state, in place, where UPDATE says so."""
    if flags & _codes.UPDATE:
        log_s.copy_(new_log_s)
        nonfinite += is_nonfinite


# ---- losses on logits --------------------------------------------------------------------------------------------------


def logit_loss(logits, target, class_weight, adjust, hyper_a, hyper_b, ignore_index, flags):
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
    """The losses, and then the robust loss of them. (weighing is None: the weights are made at once.)"""
    spec = LossSpec(class_weight, adjust, hyper_a, hyper_b, ignore_index, flags)
    target = _checks.target(logits, target, soft=spec.soft)
    losses, _, valid = logit_loss(logits, masked_target(target, mask, spec), *spec)
    valid = valid > 0 if mask is None else (valid > 0) & mask
    return robust_loss(losses, score, sample_weight, valid, log_s, nonfinite, lam, gamma, alpha, mix, max_weight, flags)


# ---- losses that are there already -------------------------------------------------------------------------------------


def robust_loss(losses, score, sample_weight, mask, log_s, nonfinite, lam, gamma, alpha, mix, max_weight, flags):
    loss, weights, new_log_s, is_nonfinite = reference.robust_loss(
        losses,
        log_s,
        lam,
        mix=mix,
        sample_weight=sample_weight,
        score=score,
        mask=mask,
        max_weight=max_weight,
        **_normalizer_options(gamma, alpha, flags),
    )
    with torch.no_grad():
        sample_stats = stack_sample_stats(losses.detach(), weights, mask)
        _commit(log_s, nonfinite, new_log_s, is_nonfinite, flags)
    return loss, sample_stats, None


def robust_partial_stats(losses, score, mask, log_s, lam, settled):
    z_max = None if settled is None else settled[Z_MAX]
    return reference.partial_stats(losses.detach(), log_s, lam, score=score, mask=mask, z_max=z_max)


@torch.no_grad()
def robust_settle(partials, log_s, nonfinite, lam, reference_point, gamma, alpha, grad_multiplier, flags):
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
    """With WITH_GRAD the gradient is made at once, for autograd to be told; without it the loss is differentiable by itself."""
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
    options = _normalizer_options(gamma, alpha, flags)
    return *reference.robust_weights(losses, log_s, lam, mask=mask, **options), None


def rectified(products):
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
