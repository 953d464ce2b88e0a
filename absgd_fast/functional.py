"""Pure functions: they change no argument and return the new state.

The one exception is `weighted_momentum_step_`. As the underscore in its name says, it writes parameters and momentum buffers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from . import _checks, _codes, ops
from ._codes import KINDS
from .ops import LossSpec, masked_target  # noqa: F401
from .reference import real_dtype


def loss_spec(
    kind: str,
    weight: Tensor | None,
    adjust: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    gamma: float,
    q: float,
    k: float | None,
    prune: bool,
    alpha: float,
    beta: float,
) -> LossSpec:
    """The arguments of `logit_loss`, checked, in the form that the operators take."""
    _checks.choice(kind, "kind", KINDS)
    hyper_a = hyper_b = 0.0  # _codes.HYPERPARAMETERS has their names for each kind
    if kind == "ce":
        hyper_a = _checks.smoothing(label_smoothing)
    elif label_smoothing:
        raise ValueError(f"label_smoothing: got {label_smoothing!r}, expected 0 for kind {kind!r}: only cross-entropy has it")
    elif kind == "gce":
        hyper_a = _checks.within(q, "q", 0, 1, open_below=True)
        if k is not None:
            hyper_b = _checks.within(k, "k", 0, 1, open_below=True, open_above=True)
        elif prune:
            raise ValueError("prune: got True without k, expected k in (0, 1): rows with p <= k are pruned")
    elif kind == "sce":
        hyper_a, hyper_b = _checks.within(alpha, "alpha", 0, math.inf), _checks.within(beta, "beta", 0, math.inf)
    else:
        assert kind in ("focal", "weighted_focal"), kind
        hyper_a = _checks.within(gamma, "gamma", 0, math.inf)
    bits = KINDS.index(kind) * ops.KIND + (ops.PRUNE if prune and kind == "gce" else 0)
    return LossSpec(weight, adjust, hyper_a, hyper_b, _checks.ignore_index(ignore_index), bits)


def logit_loss(
    logits: Tensor,
    target: Tensor,
    *,
    kind: str = "ce",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    margin: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    gamma: float = 2.0,
    q: float = 0.7,
    k: float | None = None,
    prune: bool = False,
    alpha: float = 0.1,
    beta: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Per-sample losses on logits x, computed in one fused pass (docs/MATH.md §2.1 and §2.2).

        a_j = S_j x_j + D_j - M_y 1[j = y],    p = softmax(a)_y,    nll = -log p,    w = v_y        j: a class; y: the label

        "ce"              w nll;  with label smoothing e over C classes  (1 - e) w nll + (e / C) sum_j v_j (-log softmax(a)_j)
        "focal"           w (1 - p)^gamma nll                                        Lin et al. 2017, Eq. 5
        "gce"             w (1 - p^q) / q;  with k  w (k^q - p^q) / q                Zhang & Sabuncu 2018, Eq. 6 and 9
        "sce"             w (alpha nll + beta A (1 - p)),  A = -log 1e-4             Wang et al. 2019, Eq. 5
        "weighted_focal"  (1 - u)^gamma m,  m = w nll,  u = exp(-m)                  the ABSGD authors' code

    nll is computed as log1p(sum_{j != y} exp(a_j - a_y)). So the gradient at the label keeps its digits as p -> 1.

    Args:
        logits: (B, C) or (B, C, d1, ...), float32, float64, bfloat16 or float16, with any strides; (C) for one sample.
        target: (B) or (B, d1, ...), int64 or int32 labels in [0, C), or `ignore_index`; () for one sample. Labels (B) and () may
            be uint8 too, as in torch. For "ce" also probabilities of the shape of the logits (docs/MATH.md §2.4), which get a
            gradient if they require grad (§7).
        kind: the loss, one of the names above.
        scale, shift, margin: (C) class vectors S, D, M; default 1, 0, 0. The losses `VS`, `LogitAdjusted`, `CDT` and `LDAM`
            make them from the numbers of samples per class. A shift of -inf removes a class, as a logit of -inf does.
        weight: (C) class weights v; default all 1. The values of these four tensors are not checked, because on a GPU the host
            would wait; the losses as modules check theirs once.
        label_smoothing: e in [0, 1], for "ce" only.
        ignore_index: rows with this label have loss 0 and gradient 0.
        gamma: >= 0, of "focal" and "weighted_focal".
        q: in (0, 1], of "gce".
        k: in (0, 1), the probability at which "gce" is truncated; None: not truncated.
        prune: True: rows with p <= k are treated as ignored, batch by batch. (The original prunes the data set at chosen epochs.)
        alpha, beta: >= 0, of "sce".
        backend: None (the fastest that can run on the device), "cuda", "triton", "cpu" or "reference".

    Returns:
        (B), (B, d1, ...) or () losses: float64 for float64 logits, else float32, because a bfloat16 loss is too coarse to be
        exponentiated. The gradient has the dtype of the logits.

    Raises:
        TypeError: logits that are not floating, or a target of another dtype than those named above.
        ValueError: shapes that do not fit, numbers out of range, or an unknown kind.
        IndexError: a label out of range; the text names the first one and its row. A GPU ignores the row and a later call
            raises, because the host does not wait for the GPU. On Intel GPUs no call raises: the kernels ignore such rows.
        RuntimeError: weight, scale, shift or margin requires grad, by which nothing is differentiated.

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]], requires_grad=True)
    >>> losses = logit_loss(logits, torch.tensor([0, -100]))
    >>> losses.detach()
    tensor([0.1269, 0.0000])
    >>> logit_loss(logits, torch.tensor([0, 1]), kind="gce", q=1.0).detach()  # 1 - p
    tensor([0.1192, 0.5000])
    """
    adjust = _checks.class_vectors(scale, shift, margin, logits)
    spec = loss_spec(kind, weight, adjust, label_smoothing, ignore_index, gamma, q, k, prune, alpha, beta)
    if margin is not None:
        spec = spec._replace(bits=spec.bits | ops.HARD)
    return losses_and_validity(logits, target, spec, backend, one_sample=True, scale_may_be_0=scale is not None)[0]


def losses_and_validity(
    logits: Tensor,
    target: Tensor,
    spec: LossSpec,
    backend: str | None,
    *,
    one_sample: bool = False,
    scale_may_be_0: bool = False,
    copy_losses: bool = False,
) -> tuple[Tensor, Tensor]:
    """The losses that `spec` describes, from the backend that serves the device, and which rows count.

    Args:
        one_sample: whether logits (C) with a label (), or with (C) probabilities, are taken too. Their loss is 0-d.
        scale_may_be_0: whether the class vector S may have a 0. Then the gradient does not show the logits, and the graph keeps
            them.
        copy_losses: copy the losses where this spares the graph the logits, which costs 1 us. A second derivative of a loss other
            than cross-entropy needs either, and not the returned losses, which a caller may change.

    The second tensor is 0 for a row that does not count: one that is ignored, pruned, or has a label that a GPU found out of
    range. It is not 0 for every other row.
    """
    target = _checks.target(logits, target, soft=spec.soft, one_sample=one_sample)
    if logits.dim() == 1:
        options: dict[str, bool] = {"scale_may_be_0": scale_may_be_0, "copy_losses": copy_losses}
        losses, valid = losses_and_validity(logits.unsqueeze(0), target.unsqueeze(0), spec, backend, **options)
        return losses.squeeze(0), valid.squeeze(0)
    spec = spec._replace(class_weight=_checks.class_weight(spec.class_weight, logits), adjust=_checks.adjust(spec.adjust, logits))
    operators = ops.serving(logits.device, backend)
    mode = operators.losses_backward_mode(logits) if logits.requires_grad and torch.is_grad_enabled() else 0
    class_weight, adjust, hyper_a, hyper_b, ignore_index, bits = spec
    learned = target.requires_grad and ops.needs_attaching(operators, target)
    try:
        losses, saved, valid = operators.logit_loss(
            logits, target.detach() if learned else target, class_weight, adjust, hyper_a, hyper_b, ignore_index, mode | bits
        )
    except RuntimeError as error:
        raise ops.translated(error) from None
    if mode:
        # asked only by a second derivative
        recompute = lambda x: spec.unpruned().recompute(x, target).where(valid > 0, 0.0)  # noqa: E731
        recover = None
        if not scale_may_be_0 and (copy_losses or bits < ops.KIND):
            values = losses.clone() if mode != ops.WITH_STATS and bits >= ops.KIND else None
            recover = lambda grad: spec.logits_of(grad, target, values)  # noqa: E731
        losses = ops.attach_logit_gradient(
            operators, mode, logits, losses, spec, target, class_weight, adjust, saved, recompute, recover
        )
    if learned:
        losses = ops.attach_target(losses, target, logits, spec)
    return losses, valid


def robust_weights(
    losses: Tensor,
    log_s: float | Tensor,
    lam: float | Tensor,
    *,
    gamma: float = 0.9,
    alpha: float = 1.0,
    init: str = "first",
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Robust weights of any per-sample losses, and the next log s.

        log s' = logaddexp(log(1 - gamma) + log s, log(gamma alpha) + log mean exp(L / lambda))
        W_i    = exp(L_i / lambda - log s')

    These are steps 3 to 5 of Alg. 1 of the ABSGD paper in the log domain (docs/MATH.md §1.1). Both results are differentiable
    functions of the losses (docs/MATH.md §1.3). log_s is a constant for autograd.

    Args:
        losses: floating tensor of any shape.
        log_s: number or 0-d tensor; -inf before the first batch.
        lam: number or 0-d tensor, not 0. > 0 attends to large losses, < 0 to small ones; at +-inf W = 1.
        gamma: weight of this batch in the moving average, in (0, 1].
        alpha: multiplier on the batch mean, in (0, 1].
        init: "first": the first batch alone sets s. "zero": s starts at 0, as in the paper.
        mask: as losses, bool; a sample with False is ignored and has W = 0.
        backend: None (the fastest that can run on the device), "cuda", "triton", "cpu" or "reference".

    Returns:
        weights (as losses; float64 for float64 losses, else float32) and the new log s (0-d; of the dtype of log_s if that is a
        float32 or float64 tensor, else of the weights). A sample with a NaN or infinite loss has W = NaN and does not affect the
        other weights. A batch with such a sample leaves log s as it was (docs/MATH.md §1.4).

    Raises:
        ValueError: lam is 0 or NaN, log_s is NaN, gamma or alpha lies outside (0, 1], or mask has another shape.
        TypeError: losses that are not floating, or lam or log_s is no number.
        RuntimeError: lam requires grad.

    >>> weights, log_s = robust_weights(torch.tensor([1.0, 1000.0]), float("-inf"), 1.0)
    >>> weights, log_s  # no overflow: W <= n / (gamma alpha)
    (tensor([0., 2.]), tensor(999.3068))
    """
    gamma, alpha = _checks.unit_interval(gamma, "gamma"), _checks.unit_interval(alpha, "alpha")
    lam, log_s = _checks.lam(lam), checked_log_s(log_s)
    _checks.choice(init, "init", ("first", "zero"))
    real = real_dtype(_checks.floating(losses, "losses", "per-sample losses").dtype)
    mask = _checks.per_sample(mask, "mask", losses, torch.bool)
    operators = ops.serving(losses.device, backend)
    log_s, lam = state_of(log_s, real, losses.device), _number(lam, real, losses.device)
    flags = ops.flags("moving", init)
    return ops.robust_weights(operators, losses.to(real).contiguous(), log_s, lam, mask, gamma, alpha, flags)


@lru_cache(256, typed=True)  # typed: True equals 1.0, but is refused
def _weighted_options(
    gamma: float,
    alpha: float,
    init: str,
    normalizer: str,
    mix: float,
    max_weight: float | None,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    heavy_ball: bool,
) -> tuple[tuple[float, ...], tuple[float, ...], int, int]:
    """Check the options; return the numbers of the weights and of the step as floats, and the bits of the step and the weights.

    The numbers of the weights are gamma, alpha, mix and max_weight; those of the step weight_decay, momentum and dampening.

    The result is cached, because the options stay the same from step to step and the checks cost 4 us.
    """
    gamma, alpha = _checks.unit_interval(gamma, "gamma"), _checks.unit_interval(alpha, "alpha")
    _checks.choice(init, "init", ("first", "zero"))
    _checks.choice(normalizer, "normalizer", _codes.CHOSEN_BY_NAME)
    mix = _checks.within(mix, "mix", -math.inf, math.inf, open_below=True, open_above=True)
    bound = _checks.max_weight(max_weight)
    momentum, dampening, weight_decay = _checks.momentum_sgd(momentum, dampening, weight_decay, nesterov, heavy_ball)
    form = _codes.MAXIMIZE * bool(maximize) | _codes.NESTEROV * bool(nesterov) | _codes.HEAVY_BALL * bool(heavy_ball)
    return (gamma, alpha, mix, bound), (weight_decay, momentum, dampening), form, ops.flags(normalizer, init)


def _weighted_samples(
    params: list[Tensor], losses: Tensor, mask: Tensor | None, sample_weight: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, torch.dtype]:
    """Losses, mask and sample weights as the operators read them, and the dtype in which the step is computed."""
    losses = _checks.floating(losses, "losses", "shape (B,), one loss per sample")
    real = real_dtype(getattr(params[0], "dtype", torch.float32) if params else losses.dtype)
    if losses.dtype.itemsize == 2:
        losses = losses.to(real)
    if mask is not None:
        mask = _checks.per_sample(mask, "mask", losses, torch.bool)
    if sample_weight is not None:
        sample_weight = _checks.per_sample(sample_weight, "sample_weight", losses, real)
    return losses, mask, sample_weight, real


def weighted_momentum_step_(
    params: Iterable[Tensor],
    momentum_buffers: Iterable[Tensor] | None,
    per_sample_grads: Iterable[Tensor],
    losses: Tensor,
    log_s: float | Tensor,
    *,
    lam: float | Tensor,
    lr: float | Tensor,
    gamma: float = 0.9,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    heavy_ball: bool = False,
    alpha: float = 1.0,
    mix: float = 0.0,
    init: str = "first",
    normalizer: str = "moving",
    max_weight: float | None = None,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of Algorithm 1 of the ABSGD paper from per-sample gradients g_i, in place (docs/MATH.md §3.4).

    The function does what `ABLoss`, backward and `ABSGD` do together. Use it when the gradients of the samples are there
    already, from torch.func.vmap or a linear head. It reads them once and writes no mean of them. Nothing is differentiated.

        z_i    = L_i / lam
        log s' = logaddexp(log(1 - gamma) + log s, log(gamma alpha) + log mean exp(z))
        W_i    = exp(z_i - log s')                                     (at most max_weight; 1 at |lam| = inf)
        G      = (1/n) sum_i sample_weight_i (W_i + mix) g_i           (n valid samples; negated with maximize)
        b      = momentum b + (1 - dampening) (G + weight_decay w)
        w      = w - lr b          (nesterov: w - lr (G + weight_decay w + momentum b); heavy_ball, Eq. 2: see `ABSGD`)

    Args:
        params: tensors of any shape, float32, float64, bfloat16 or float16; all take the same step and are written.
        momentum_buffers: for each parameter b (with heavy_ball the last change of w), of its shape, float64 for float64
            parameters, else float32; zeros before the first step. They are written. With momentum=0 they are neither read nor
            written and may be None.
        per_sample_grads: for each parameter (B, *its shape), of its dtype. The rows may lie any distance apart (views of one
            block). A row that is neither contiguous nor laid out as its parameter is copied first.
        losses: (B) L_i, float64 for float64 parameters, else float32. Half-precision losses are widened.
        log_s: number or 0-d tensor; -inf before the first batch.
        lam: number or 0-d tensor, not 0. > 0 attends to large losses, < 0 to small ones; +-inf is the plain mean.
        lr: >= 0; a number or a one-element tensor. The kernels of a GPU read the tensor, so the host does not wait.
        gamma, alpha: in (0, 1], as for `robust_weights`.
        mix: weight of an added plain mean.
        init, normalizer, max_weight: as for `ABLoss`.
        momentum, weight_decay: >= 0.
        dampening: applies to the first step too, where torch.optim.SGD leaves it out.
        nesterov: needs momentum > 0 and dampening = 0.
        maximize: True: ascend.
        heavy_ball: True: Eq. 2 of the paper, which has neither nesterov nor dampening.
        mask: (B) bool; a sample with False is ignored.
        sample_weight: (B).
        backend: None (the fastest that can run on the device), "cuda", "triton", "cpu" or "reference".

    Returns:
        The new log s: a new 0-d tensor, of the dtype of log_s if that is a float32 or float64 tensor, else of the losses.

        If an unmasked sample has a NaN or infinite loss, nothing is written and log s stays, so one bad batch does not spoil
        the state. If no sample is valid, G = 0: momentum and decay go on, and log s stays. A sample of weight 0 (masked, or
        with sample_weight 0) has no influence, even if its gradient holds NaN. The gradients of other samples are not checked
        for NaN.

    Raises:
        ValueError: shapes, devices or lengths of lists that do not fit, numbers out of range, or a written tensor that shares
            memory with another one.
        TypeError: dtypes that do not fit, or a lam or log_s that is no number.

    Nothing is written where an error is raised.

    >>> w, b = torch.zeros(2), torch.zeros(2)
    >>> grads, losses = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0.0, 9.0])
    >>> log_s = weighted_momentum_step_([w], [b], [grads], losses, -math.inf, lam=-1.0, lr=0.1)
    >>> w, b  # the second sample looks mislabelled
    (tensor([-9.9988e-02, -1.2339e-05]), tensor([9.9988e-01, 1.2339e-04]))

    Source: Qi et al., *Attentional-Biased Stochastic Gradient Descent* (TMLR 2023), Algorithm 1.
    """
    # The C++ operators check the tensors. Python checks them only after such an operator raised, to give a clearer message.
    params, grads = list(params), list(per_sample_grads)
    lam, log_s, lr = _checks.lam(lam), checked_log_s(log_s), _checks.rate(lr)
    options = _weighted_options.__wrapped__ if torch.compiler.is_compiling() else _weighted_options
    given = gamma, alpha, init, normalizer, mix, max_weight, momentum, dampening, weight_decay, nesterov, maximize, heavy_ball
    try:
        of_weights, of_step, form, flags = options(*given)
    except TypeError:  # one of them has no hash, and the checks refuse it by name
        of_weights, of_step, form, flags = _weighted_options.__wrapped__(*given)
    losses, mask, sample_weight, real = _weighted_samples(params, losses, mask, sample_weight)
    has_momentum = of_step[1] != 0
    buffers = None if not has_momentum else [] if momentum_buffers is None else list(momentum_buffers)
    operators = ops.serving(losses.device, backend)
    if ops.transformed():
        raise RuntimeError(
            "weighted_momentum_step_: got a call inside a torch.func transform, expected one outside; call it on the results of"
            " the transform"
        )
    if operators.backend in ("triton", "reference"):  # these two do not check
        _checks.weighted_step(params, buffers, grads, losses)
    log_s = state_of(log_s, real, losses.device)
    lam_tensor = _number(lam, real, losses.device) if isinstance(lam, Tensor) else None
    lr_tensor = _checks.tensor_rate(lr) if isinstance(lr, Tensor) and lr.device == losses.device else None
    try:
        new_log_s = operators.weighted_step_(
            params, buffers or [], grads, losses if losses.is_contiguous() else losses.contiguous(), sample_weight, mask, log_s,
            lam_tensor, lr_tensor, 0.0 if lam_tensor is not None else lam, *of_weights,
            0.0 if lr_tensor is not None else float(lr), *of_step, form, flags,
        )  # fmt: skip
    except RuntimeError:
        _checks.weighted_step(params, buffers, grads, losses)  # the clearer message, for the common mistakes
        raise
    if operators.has_kernels and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(params if buffers is None else params + buffers)
    return new_log_s


def checked_log_s(value: float | Tensor) -> float | Tensor:
    """A log s as `_checks.scalar` returns it; ValueError for the number NaN. The value of a tensor is not looked at."""
    value = _checks.scalar(value, "log_s")
    if isinstance(value, float) and math.isnan(value):
        raise ValueError("log_s: got NaN, expected a number, or -inf before the first batch")
    return value


def state_of(log_s: float | Tensor, real: torch.dtype, device: torch.device) -> Tensor:
    """log s as a 0-d tensor on the device: float32 or float64 if it is such a tensor already, else in the dtype of the losses."""
    if isinstance(log_s, Tensor) and log_s.dtype in (torch.float32, torch.float64):
        real = log_s.dtype
    return _number(log_s, real, device)


def _number(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number or a 0-d tensor as a 0-d tensor on the device.

    A number is written there by a fill, because a copy from the host would wait for the GPU.
    """
    if isinstance(value, Tensor):
        return value.detach().to(device, dtype)
    return torch.full((), float(value), dtype=dtype, device=device)
