"""Pure functions: nothing is mutated, the new state is returned. Only weighted_momentum_step_ writes, as its name says: parameters
and momentum buffers."""

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
    """The checked arguments of `logit_loss`."""
    _checks.choice(kind, "kind", KINDS)
    hyper_a = hyper_b = 0.0  # _codes.HYPERPARAMETERS says what they are
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
    return LossSpec(weight, adjust, hyper_a, hyper_b, int(ignore_index), bits)


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
    """Per-sample losses on logits x, one fused pass.

        a_k = S_k x_k + D_k - M_y 1[k = y],    p = softmax(a)_y,    n = -log p,    w = v_y

        "ce"     w n;  with label smoothing e over C classes  (1 - e) w n + (e / C) sum_k v_k (-log softmax(a)_k)
        "focal"  w (1 - p)^gamma n                                          Lin et al. 2017, Eq. 5
        "gce"    w (1 - p^q) / q;  truncated at k  w (k^q - p^q) / q        Zhang & Sabuncu 2018, Eq. 6 and 9
        "sce"    w (alpha n + beta A (1 - p)),  A = -log 1e-4               Wang et al. 2019, Eq. 5

    Args:
        logits: (B, C) or (B, C, d1, ...), float32, float64, bfloat16 or float16, any strides.
        target: (B) or (B, d1, ...), int64 or int32 labels in [0, C), or `ignore_index`; for "ce" also probabilities of the
            shape of the logits.
        kind: the loss.
        scale, shift, margin: (C) class vectors S, D, M (those of VS, logit adjustment, CDT and LDAM: see the modules);
            default 1, 0, 0.
        weight: (C) class weights v; default all 1.
        label_smoothing: e in [0, 1], "ce" only.
        ignore_index: rows with this label have loss 0 and gradient 0.
        gamma: >= 0. q: in (0, 1]. k: in (0, 1) or None. alpha, beta: >= 0.
        prune: rows with p <= k are treated as ignored, batch by batch (the original prunes a data set at chosen epochs).
        backend: None (the fastest that can run for the device), "cuda", "triton", "cpu" or "reference".

    Returns:
        (B) or (B, d1, ...) losses: float64 for float64 logits, else float32 (a bfloat16 loss is too coarse to be
        exponentiated). The gradient has the logits' dtype.

    Raises:
        TypeError: labels that are not integers. ValueError: shapes, numbers out of range, a kind that is not known.
        IndexError: a label out of range (first value and row). On a GPU the row is ignored, and a later call raises: the host
        does not wait for the GPU. (On Intel's none does.)

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]], requires_grad=True)
    >>> losses = logit_loss(logits, torch.tensor([0, -100]))
    >>> losses.detach()
    tensor([0.1269, 0.0000])
    >>> logit_loss(logits, torch.tensor([0, 1]), kind="gce", q=1.0).detach()  # 1 - p
    tensor([0.1192, 0.5000])

    -log p is computed as log1p(sum_{k != y} exp(a_k - a_y)), which keeps the label's gradient exact as p -> 1 (csrc/math.h).
    """
    classes = logits.shape[1] if isinstance(logits, Tensor) and logits.dim() > 1 else None
    adjust = _checks.class_vectors(scale, shift, margin, classes)
    spec = loss_spec(kind, weight, adjust, label_smoothing, ignore_index, gamma, q, k, prune, alpha, beta)
    if margin is not None:
        spec = spec._replace(bits=spec.bits | ops.HARD)
    return losses_of(logits, target, spec, backend)


def losses_of(logits: Tensor, target: Tensor, spec: LossSpec, backend: str | None) -> Tensor:
    """The losses that `spec` stands for, by whichever backend serves."""
    return losses_and_validity(logits, target, spec, backend)[0]


def losses_and_validity(logits: Tensor, target: Tensor, spec: LossSpec, backend: str | None) -> tuple[Tensor, Tensor]:
    """The same, and which rows count: not 0 where they do. A row that is ignored or pruned does not, nor does one whose label
    a GPU found out of range."""
    target = _checks.target(logits, target, soft=spec.soft)
    spec = spec._replace(class_weight=_checks.class_weight(spec.class_weight, logits), adjust=_checks.adjust(spec.adjust, logits))
    operators = ops.serving(logits.device, backend)
    mode = operators.losses_backward_mode if logits.requires_grad and torch.is_grad_enabled() else 0
    class_weight, adjust, hyper_a, hyper_b, ignore_index, bits = spec
    try:
        losses, saved, valid = operators.logit_loss(
            logits, target, class_weight, adjust, hyper_a, hyper_b, ignore_index, mode | bits
        )
    except RuntimeError as error:
        raise ops.translated(error) from None
    if mode:
        recompute = lambda x: spec.recompute(x, target)  # noqa: E731
        losses = ops.attach_logit_gradient(operators, mode, logits, losses, spec, target, class_weight, adjust, saved, recompute)
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
    """Robust weights of any per-sample losses and the next log s (ABSGD paper, Alg. 1, steps 3-5, in the log domain).

        log s' = logaddexp(log(1 - gamma) + log s, log(gamma alpha) + log mean exp(L / lambda))
        W_i    = exp(L_i / lambda - log s')

    Args:
        losses: any shape; differentiable (also through log s').
        log_s: number or 0-d tensor; -inf before the first batch.
        lam: number or 0-d tensor, not 0; > 0 attends to large losses, < 0 to small ones, +-inf gives W = 1.
        gamma, alpha: in (0, 1].
        init: "first": the first batch sets s alone; "zero": s starts at 0, as in the paper.
        mask: like losses, bool; False = ignored (W = 0).
        backend: None, "cuda", "triton", "cpu" or "reference".

    Returns:
        weights (like losses; float64 for float64 losses, else float32), new log s (0-d; dtype of log_s if a tensor).
        A NaN or infinite loss has W = NaN, leaves the other weights alone and log s where it was.

    Raises:
        ValueError: lam = 0 or NaN, gamma or alpha outside (0, 1], mask of another shape.

    >>> weights, log_s = robust_weights(torch.tensor([1.0, 1000.0]), float("-inf"), 1.0)
    >>> weights, log_s  # no overflow: W <= B / (gamma alpha)
    (tensor([0., 2.]), tensor(999.3068))
    """
    _checks.unit_interval(gamma, "gamma")
    _checks.unit_interval(alpha, "alpha")
    _checks.lam(lam)
    _checks.scalar(log_s, "log_s")
    _checks.choice(init, "init", ("first", "zero"))
    real = real_dtype(losses.dtype)
    mask = _checks.per_sample(mask, "mask", losses, torch.bool)
    state = log_s.dtype if isinstance(log_s, Tensor) else real
    operators = ops.serving(losses.device, backend)
    log_s, lam = _number(log_s, state, losses.device), _number(lam, real, losses.device)
    flags = ops.flags("moving", init)
    return ops.robust_weights(operators, losses.to(real).contiguous(), log_s, lam, mask, float(gamma), float(alpha), flags)


@lru_cache(256)
def _weighted_options(
    gamma, alpha, init, normalizer, mix, max_weight, momentum, dampening, weight_decay, nesterov, maximize, heavy_ball
) -> tuple[float, int, int]:
    """Checks them: once, because they stay the same from step to step (4 us). max_weight as a number, and the operator's bits."""
    _checks.unit_interval(gamma, "gamma")
    _checks.unit_interval(alpha, "alpha")
    _checks.choice(init, "init", ("first", "zero"))
    _checks.choice(normalizer, "normalizer", _codes.NORMALIZERS)
    _checks.within(mix, "mix", -math.inf, math.inf, open_below=True, open_above=True)
    bound = _checks.max_weight(max_weight)
    _checks.momentum_sgd(momentum, dampening, weight_decay, nesterov, heavy_ball)
    form = _codes.MAXIMIZE * bool(maximize) | _codes.NESTEROV * bool(nesterov) | _codes.HEAVY_BALL * bool(heavy_ball)
    return bound, form, ops.flags(normalizer, init)


def _weighted_rows(params: list, losses, mask, sample_weight) -> tuple[Tensor, Tensor | None, Tensor | None, torch.dtype]:
    """Losses, mask and sample weights as the operators read them, and the dtype that the parameters are computed in."""
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        got = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        raise TypeError(f"losses: got {got}, expected a floating tensor (B,), one loss per sample")
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
    """One step of Algorithm 1 from per-sample gradients g_i, in one pass over them and in place: what `ABLoss`, backward and
    `ABSGD` do together, where the gradients of the samples are there already (torch.func.vmap, a linear head).

        z_i    = L_i / lam
        log s' = logaddexp(log(1 - gamma) + log s, log(gamma alpha) + log mean exp(z))
        W_i    = exp(z_i - log s')                                     (at most max_weight; 1 at |lam| = inf)
        G      = (1/n) sum_i sample_weight_i (W_i + mix) g_i           (n valid rows; negated with maximize)
        b      = momentum b + (1 - dampening) (G + weight_decay w)
        w      = w - lr b          (nesterov: w - lr (G + weight_decay w + momentum b); heavy_ball, Eq. 2: see `ABSGD`)

    (ABSGD paper, Alg. 1, in the log domain.) The gradients are read once, and no mean of them is written.

    Args:
        params: tensors of any shape, float32, float64, bfloat16 or float16, all stepped alike; written.
        momentum_buffers: per parameter b (with heavy_ball the last change of w), zeros before the first step: of its shape,
            float64 for float64, else float32; written. Neither read nor written with momentum=0, where None serves.
        per_sample_grads: per parameter (B, *its shape), of its dtype. Rows may lie any way apart (views of one block); a row
            that does not lie as its parameter does, nor contiguous, is copied first.
        losses: (B,) L_i, float64 for float64 parameters, else float32 (a half-precision loss is widened).
        log_s: number or 0-d tensor; -inf before the first batch.
        lam: number or 0-d tensor, not 0; > 0 attends to large losses, < 0 to small ones, +-inf is the plain mean.
        lr: >= 0; a number or a one-element tensor, which a GPU reads by itself.
        gamma, alpha: in (0, 1]. mix: weight of a plain mean term. init, normalizer, max_weight: as for `ABLoss`.
        momentum, weight_decay: >= 0. dampening: also of a first step, which torch.optim.SGD takes without.
        nesterov: with momentum > 0 and no dampening. maximize: ascend. heavy_ball: Eq. 2, neither nesterov nor dampening.
        mask: (B,) bool, False = ignored. sample_weight: (B,) t_i.
        backend: None, "cuda", "triton", "cpu" or "reference".

    Returns:
        new log s (0-d, a new tensor; dtype of log_s if a tensor, else of the losses).

        A row with a NaN or infinite loss that is not masked: nothing is written, and log s stays, so that one such batch never
        poisons the state. No valid row at all: G = 0, so that momentum and decay go on, and log s stays. A row that weighs 0 (masked, or
        of sample weight 0) takes no part, whatever its gradient holds; any other gradient that is not finite is not looked
        for.

    Raises:
        ValueError: shapes, lists of unequal length, devices, tensors that share memory with one that is written, numbers out
        of range. TypeError: dtypes. Nothing is written then.

    >>> w, b = torch.zeros(2), torch.zeros(2)
    >>> grads, losses = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0.0, 9.0])
    >>> log_s = weighted_momentum_step_([w], [b], [grads], losses, -math.inf, lam=-1.0, lr=0.1)
    >>> w, b  # the second sample looks mislabelled
    (tensor([-9.9988e-02, -1.2339e-05]), tensor([9.9988e-01, 1.2339e-04]))

    Source: Qi et al., *Attentional-Biased Stochastic Gradient Descent* (TMLR 2023), Algorithm 1.
    """
    # Written for few Python calls: what is wrong with a tensor is said after an operator refused it.
    params, grads = list(params), list(per_sample_grads)
    _checks.lam(lam)
    _checks.scalar(log_s, "log_s")
    _checks.rate(lr)
    options = _weighted_options.__wrapped__ if torch.compiler.is_compiling() else _weighted_options
    max_weight, form, flags = options(
        gamma, alpha, init, normalizer, mix, max_weight, momentum, dampening, weight_decay, nesterov, maximize, heavy_ball
    )
    losses, mask, sample_weight, real = _weighted_rows(params, losses, mask, sample_weight)
    buffers = None if not momentum else [] if momentum_buffers is None else list(momentum_buffers)
    operators = ops.serving(losses.device, backend)
    if ops.transformed():
        raise RuntimeError("weighted_momentum_step_: got a call inside a torch.func transform; call it on what that returns")
    if operators.backend in ("triton", "reference"):  # the others check by themselves
        _checks.weighted_step(params, buffers, grads, losses)
    if not isinstance(log_s, Tensor) or log_s.device != losses.device:
        log_s = _number(log_s, log_s.dtype if isinstance(log_s, Tensor) else real, losses.device)
    lam_tensor = _number(lam, real, losses.device) if isinstance(lam, Tensor) else None
    lr_tensor = lr if isinstance(lr, Tensor) and lr.device == losses.device else None
    try:
        new_log_s = operators.weighted_step_(
            params, buffers or [], grads, losses if losses.is_contiguous() else losses.contiguous(), sample_weight, mask, log_s,
            lam_tensor, lr_tensor, 0.0 if lam_tensor is not None else lam, gamma, alpha, mix, max_weight,
            0.0 if lr_tensor is not None else float(lr), weight_decay, momentum, dampening, form, flags,
        )  # fmt: skip
    except RuntimeError:
        _checks.weighted_step(params, buffers, grads, losses)  # the usual mistakes, said in Python's words
        raise
    if operators.native and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(params if buffers is None else params + buffers)
    return new_log_s


def _number(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0-d, on the device. A number is filled in there: copying it from the host would make the host wait for a GPU."""
    if isinstance(value, Tensor):
        return value.detach().to(device, dtype)
    return torch.full((), float(value), dtype=dtype, device=device)
