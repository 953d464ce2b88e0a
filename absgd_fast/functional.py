"""Pure functions: nothing is mutated, the new state is returned."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, ops, reference
from .reference import real_dtype


class LossSpec(NamedTuple):
    """Which loss on logits, in the terms of the operators."""

    class_weight: Tensor | None  # (C)
    adjust: Tensor | None  # (3, C): S, D, M
    first: float  # these two: csrc/math.h LossNumbers
    second: float
    ignore_index: int
    bits: int  # kind, pruning, soft targets: see ops.KIND

    @property
    def soft(self) -> bool:
        """Whether targets may be probabilities: cross-entropy without a margin, which stands at one label."""
        return self.bits < ops.HARD

    def plain(self, logits: Tensor, target: Tensor) -> Tensor:
        """The losses in plain torch."""
        kind = reference.KINDS[self.bits // ops.KIND]
        numbers = dict(zip(_NUMBERS[kind], (self.first, self.second)))
        if kind == "gce":
            numbers |= {"k": self.second or None, "prune": bool(self.bits & ops.PRUNE)}
        if self.adjust is not None:
            numbers |= dict(zip(("scale", "shift", "margin"), self.adjust))
        return reference.logit_loss(
            logits, target, kind=kind, weight=self.class_weight, ignore_index=self.ignore_index, **numbers
        )

    def valid(self, target: Tensor, losses: Tensor) -> Tensor:
        """Which rows count."""
        valid = torch.ones_like(losses, dtype=torch.bool) if target.is_floating_point() else target != self.ignore_index
        return valid & (losses != 0) if self.bits & ops.PRUNE else valid  # what is not pruned is below 0


_NUMBERS = {
    "ce": ("label_smoothing",),
    "focal": ("gamma",),
    "gce": ("q",),
    "sce": ("alpha", "beta"),
    "weighted_focal": ("gamma",),
}


def loss_spec(
    kind: str, weight: Tensor | None, adjust: Tensor | None, label_smoothing: float, ignore_index: int,
    gamma: float, q: float, k: float | None, prune: bool, alpha: float, beta: float,
) -> LossSpec:  # fmt: skip
    """The checked arguments of `logit_loss`."""
    _checks.choice(kind, "kind", reference.KINDS)
    if kind == "ce":
        first, second = _checks.smoothing(label_smoothing), 0.0
    elif label_smoothing:
        raise ValueError(f"label_smoothing: got {label_smoothing!r}, expected 0 for kind {kind!r}: only cross-entropy has it")
    elif kind == "gce":
        first, second = _checks.within(q, "q", 0, 1, open_below=True), 0.0
        if k is not None:
            second = _checks.within(k, "k", 0, 1, open_below=True, open_above=True)
        elif prune:
            raise ValueError("prune: got True without k, expected k in (0, 1): rows with p <= k are pruned")
    elif kind == "sce":
        first, second = _checks.within(alpha, "alpha", 0, math.inf), _checks.within(beta, "beta", 0, math.inf)
    else:
        first, second = _checks.within(gamma, "gamma", 0, math.inf), 0.0
    bits = reference.KINDS.index(kind) * ops.KIND + (ops.PRUNE if prune and kind == "gce" else 0)
    return LossSpec(weight, adjust, first, second, int(ignore_index), bits)


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
        does not wait for the GPU.

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
    target = _checks.target(logits, target, soft=spec.soft)
    spec = spec._replace(class_weight=_checks.class_weight(spec.class_weight, logits), adjust=_checks.adjust(spec.adjust, logits))
    operators = ops.serving(logits.device, backend)
    if operators is None:
        if not (target.is_floating_point() or torch.compiler.is_compiling() or ops.transformed()):
            target = ops.check_labels(target, logits.shape[1], spec.ignore_index)
        return spec.plain(logits, target)
    saves = operators.saves_losses if logits.requires_grad and torch.is_grad_enabled() else 0
    weight, adjust, first, second, ignore_index, bits = spec
    try:
        losses, made = operators.logit_loss(logits, target, weight, adjust, first, second, ignore_index, saves | bits)
    except RuntimeError as error:
        raise ops.translated(error) from None
    if not saves:
        return losses
    again = lambda x: spec.plain(x, target)  # noqa: E731
    if saves == ops.WITH_STATS:
        return ops.attach_rows(
            operators, logits, losses, (target, weight, adjust, first if bits < ops.KIND else 0.0), made, again
        )
    return ops.attach(operators, logits, losses, made, again)


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
    _checks.share(gamma, "gamma")
    _checks.share(alpha, "alpha")
    _checks.lam(lam)
    _checks.scalar(log_s, "log_s")
    _checks.choice(init, "init", ("first", "zero"))
    real = real_dtype(losses.dtype)
    mask = _checks.per_sample(mask, "mask", losses, torch.bool)
    state = log_s.dtype if isinstance(log_s, Tensor) else real
    operators = ops.serving(losses.device, backend)
    if operators is None:
        return reference.robust_weights(losses, log_s, lam, gamma=gamma, alpha=alpha, init=init, mask=mask)
    log_s, lam = _number(log_s, state, losses.device), _number(lam, real, losses.device)
    flags = ops.flags("moving", init)
    return ops.robust_weights(
        losses.to(real).contiguous(), log_s, lam, mask, float(gamma), float(alpha), flags, operators.backend
    )


def _number(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0-d, on the device. A number is filled in there: copying it from the host would make the host wait for a GPU."""
    if isinstance(value, Tensor):
        return value.detach().to(device, dtype)
    return torch.full((), float(value), dtype=dtype, device=device)
