"""The steps of the optimizers, in place: step 6 of Algorithm 1, and Sec. 3.4 (docs/MATH.md §3).

Each step takes lists with one tensor per parameter. Complex parameters are stepped as pairs of real numbers. Half-precision
parameters are stepped in float32 and rounded once at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .weights import NONFINITE, SettleOptions, partial_stats, settle, state_of, weigh

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _as_real(t: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers, in the same memory; any other tensor as it is."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _is_conjugated(t: Tensor) -> bool:
    """Whether the memory holds the conjugate. torch.compile cannot know it, so there every complex tensor may be one."""
    return t.is_complex() and (torch.compiler.is_compiling() or t.is_conj())


@contextmanager
def _real_values(param: Tensor, grad: Tensor, *states: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The parameter, its gradient and its states as real numbers, without autograd; a half-precision parameter in float32.

    At the end of the block those that are copies are written back: half precision, and tensors whose memory holds the conjugate.
    """
    half = param.dtype in (torch.bfloat16, torch.float16)
    with torch.no_grad():
        written = [t for t in (param, *states) if t is not None]
        values = [_as_real(t) for t in written]
        g = _as_real(grad)
        if half:
            values[0], g = values[0].float(), g.float()
        real = iter(values[1:])
        yield (values[0], g, *(None if t is None else next(real) for t in states))
        for t, value in zip(written, values):
            if _is_conjugated(t) or (t is param and half):
                t.copy_(torch.view_as_complex(value) if t.is_complex() else value)


def _slope(w: Tensor, grad: Tensor, weight_decay: float, maximize: bool) -> Tensor:
    """G = grad + weight_decay * w, with -grad if the objective is maximized."""
    g = -grad if maximize else grad
    return g.add(w, alpha=weight_decay) if weight_decay else g


def momentum_step_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor | None],
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    heavy_ball: bool = False,
) -> list[Tensor | None]:
    """Step 6 of Algorithm 1, in place: momentum SGD in torch's form, or in the paper's with `heavy_ball` (docs/MATH.md §3.1).

        G = grad + weight_decay * w                            (-grad with `maximize`)

        torch's form        b = momentum * b + (1 - dampening) * G         (b = G in the first step)
                            w = w - lr * b                                 (nesterov: w - lr * (G + momentum * b))
        the paper's, Eq. 2  d = momentum * d - lr * G                      (d = w_t - w_{t-1}, 0 before the first step)
                            w = w + d

    The two forms agree while lr is constant. When lr changes, Eq. 2 keeps the past steps at the lr they were taken with.

    Args:
        params, grads: lists of tensors of equal shapes.
        momentum_buffers: for each parameter b (or d), or None before its first step.

    Returns:
        The momentum buffers; None for each parameter if momentum = 0.

    >>> w = torch.tensor([1.0])
    >>> buffers = momentum_step_([w], [torch.tensor([2.0])], [None], lr=0.1, momentum=0.9)
    >>> w
    tensor([0.8000])
    """
    out: list[Tensor | None] = []
    for w, grad, buffer in zip(params, grads, momentum_buffers):
        with _real_values(w, grad, buffer) as (x, g, b):
            g = _slope(x, g, weight_decay, maximize)
            if heavy_ball:
                b = torch.zeros_like(x) if b is None else b
                b.mul_(momentum).sub_(lr * g)
                x.add_(b)
            else:
                if momentum:
                    if b is None:
                        b = g.clone()
                    else:
                        b.mul_(momentum).add_(g, alpha=1 - dampening)
                    g = g.add(b, alpha=momentum) if nesterov else b
                x.sub_(lr * g)
        if buffer is None and b is not None and momentum:
            buffer = torch.view_as_complex(b) if w.is_complex() else b
        out.append(buffer if momentum else None)
    return out


@torch.no_grad()
def weighted_momentum_step_(
    params: list[Tensor],
    momentum_buffers: list[Tensor | None],
    per_sample_grads: list[Tensor],
    losses: Tensor,
    log_s: float | Tensor,
    lam: float | Tensor,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    heavy_ball: bool = False,
    mix: float = 0.0,
    max_weight: float = math.inf,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
    **options: Unpack[SettleOptions],
) -> Tensor:
    """Steps 3 to 6 of Algorithm 1 from per-sample gradients g_i, in place (docs/MATH.md §3.4).

        G = (1/n) sum_i t_i (W_i + mix) g_i           the gradient of `robust_loss`; then `momentum_step_` with G

    A sample with factor 0 (a masked one, say) has no influence, even if its gradient holds NaN. If a valid sample has a NaN or
    infinite loss, nothing is written.

    Args:
        params: list of parameters, written.
        momentum_buffers: for each parameter b (or d, with `heavy_ball`), zeros before the first step; None if momentum = 0.
        per_sample_grads: for each parameter (B, *shape).
        losses: (B).
        log_s, lam, max_weight, mask: as for `robust_weights`.
        lr, momentum, dampening, weight_decay, nesterov, maximize, heavy_ball: as for `momentum_step_`.
        mix, sample_weight: as for `apply`.
        options: gamma, alpha, init, normalizer, ..., as for `settle`.

    Returns:
        The new log s (0-d).

    >>> w, grads = torch.tensor([1.0]), torch.tensor([[2.0], [4.0]])
    >>> log_s = weighted_momentum_step_([w], [None], [grads], torch.tensor([1.0, 3.0]), -math.inf, math.inf, lr=0.1)
    >>> w  # the plain mean
    tensor([0.7000])
    """
    losses, lam, log_s = state_of(losses, lam, log_s)
    settled, new_log_s = settle(partial_stats(losses, log_s, lam, mask=mask)[None], log_s, lam, **options)
    if settled[NONFINITE] > 0:
        return new_log_s
    factor, *_ = weigh(losses, settled, log_s, lam, mix=mix, max_weight=max_weight, sample_weight=sample_weight, mask=mask)
    means = []
    for g in per_sample_grads:
        f = factor.view(-1, *[1] * (g.dim() - 1))
        means.append(torch.where(f == 0, 0.0, f * g.to(f.dtype)).sum(0))
    momentum_step_(
        params,
        means,
        momentum_buffers,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
        heavy_ball=heavy_ball,
    )
    return new_log_s


def adam_step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor | None],
    steps: list[Tensor],
    *,
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    paper_form: bool = False,
) -> None:
    """Adam, AdamW, or ABAdam as the paper writes it, in place (docs/MATH.md §3.2).

        G = grad + weight_decay * w                       (-grad with `maximize`),    t = the number of this step, from 1

        v = beta_1 v + (1 - beta_1) G
        u = beta_2 u + (1 - beta_2) G^2                   (amsgrad: below max(u_max, u) stands for u, and is kept as u_max)

        Adam    w = w - lr (v / (1 - beta_1^t)) / (sqrt(u / (1 - beta_2^t)) + eps)              Kingma & Ba 2015, Alg. 1
        AdamW   G = grad, and besides  w = w - lr weight_decay w                                `decoupled_weight_decay`
        Eq. 9   as AdamW without the two corrections 1 - beta^t; eps is the paper's G_0         `paper_form`

    Args:
        params, grads: lists of tensors of equal shapes.
        exp_avgs, exp_avg_sqs: v and u of each parameter.
        max_exp_avg_sqs: u_max of each parameter, or None without amsgrad.
        steps: one 0-d tensor per parameter, the number of steps it has taken; raised by one.

    >>> w, v, u = torch.ones(1), torch.zeros(1), torch.zeros(1)
    >>> adam_step_([w], [torch.tensor([2.0])], [v], [u], [None], [torch.zeros(())], lr=0.1)
    >>> w
    tensor([0.9000])
    """
    for param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, step in zip(
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps
    ):
        with _real_values(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq) as (w, g, v, u, u_max):
            step += 1
            decoupled = decoupled_weight_decay or paper_form
            g = _slope(w, g, 0.0 if decoupled else weight_decay, maximize)
            v.lerp_(g, 1 - betas[0])
            u.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
            if u_max is not None:
                u = u_max.copy_(torch.maximum(u_max, u))
            t = step.double().to(w.device)
            correction_v, correction_u = (1.0, 1.0) if paper_form else (1 - betas[0] ** t, 1 - betas[1] ** t)
            change = (v / correction_v) / ((u / correction_u).sqrt() + eps)
            if decoupled and weight_decay:
                change = change + weight_decay * w
            w.sub_(lr * change)


def rmsprop_step_(
    params: list[Tensor],
    grads: list[Tensor],
    square_avgs: list[Tensor],
    momentum_buffers: list[Tensor | None],
    grad_avgs: list[Tensor | None],
    steps: list[Tensor],
    *,
    lr: float | Tensor = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    maximize: bool = False,
) -> None:
    """RMSprop, in place (docs/MATH.md §3.3).

        G = grad + weight_decay * w                       (-grad with `maximize`)

        u = alpha u + (1 - alpha) G^2                     Tieleman & Hinton 2012
        m = alpha m + (1 - alpha) G                       centered: Graves 2013, Eq. 38 to 45; else m = 0
        d = G / (sqrt(u - m^2) + eps)
        w = w - lr d                                      with momentum:  b = momentum b + d,  w = w - lr b

    Args:
        params, grads: lists of tensors of equal shapes.
        square_avgs: u of each parameter.
        momentum_buffers: b of each parameter, or None without momentum.
        grad_avgs: m of each parameter, or None if not centered.
        steps: one 0-d tensor per parameter, the number of steps it has taken; raised by one.

    >>> w, u = torch.ones(1), torch.zeros(1)
    >>> rmsprop_step_([w], [torch.tensor([2.0])], [u], [None], [None], [torch.zeros(())], lr=0.01)
    >>> w
    tensor([0.9000])
    """
    for param, grad, square_avg, buffer, grad_avg, step in zip(params, grads, square_avgs, momentum_buffers, grad_avgs, steps):
        with _real_values(param, grad, square_avg, buffer, grad_avg) as (w, g, u, b, m):
            step += 1
            g = _slope(w, g, weight_decay, maximize)
            u.mul_(alpha).addcmul_(g, g, value=1 - alpha)
            if m is not None:
                m.lerp_(g, 1 - alpha)
                u = u - m * m
            d = g / (u.sqrt() + eps)
            if b is not None:
                d = b.mul_(momentum).add_(d)
            w.sub_(lr * d)


def adagrad_step_(
    params: list[Tensor],
    grads: list[Tensor],
    sums: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float | Tensor = 1e-2,
    lr_decay: float = 0.0,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """AdaGrad, in place (Duchi et al. 2011; docs/MATH.md §3.3).

        G = grad + weight_decay * w                       (-grad with `maximize`),    t = the number of this step, from 1

        u = u + G^2
        w = w - lr / (1 + (t - 1) lr_decay) * G / (sqrt(u) + eps)

    Args:
        params, grads: lists of tensors of equal shapes.
        sums: u of each parameter.
        steps: one 0-d tensor per parameter, the number of steps it has taken; raised by one.

    >>> w, u = torch.ones(1), torch.zeros(1)
    >>> adagrad_step_([w], [torch.tensor([2.0])], [u], [torch.zeros(())], lr=0.1)
    >>> w
    tensor([0.9000])
    """
    for param, grad, total, step in zip(params, grads, sums, steps):
        with _real_values(param, grad, total) as (w, g, u):
            step += 1
            g = _slope(w, g, weight_decay, maximize)
            u.addcmul_(g, g)
            rate = lr / (1 + (step.double().to(w.device) - 1) * lr_decay)
            w.sub_(rate * (g / (u.sqrt() + eps)))


def clip_factor(total: Tensor, max_norm: float) -> Tensor:
    """The number by which clipping multiplies the gradients (Pascanu et al. 2013, Alg. 1; docs/MATH.md §3.6).

        total = ||G||_2 over all parameters,    c = min(1, max_norm / (total + 1e-6))

    G is the finished gradient: that of a deferred step after its scale. The 1e-6 is that of torch.nn.utils.clip_grad_norm_.

    Args:
        total: 0-d.
        max_norm: the largest norm that a step uses, > 0.

    >>> clip_factor(torch.tensor(4.0), 1.0)
    tensor(0.2500)
    """
    return (max_norm / (total + 1e-6)).clamp(max=1.0)
