"""Slow fp64 oracle: MATH section 1 and the cross-entropy rows of section 2, in plain Python and NumPy, log domain.

Nothing here shares code with the package, with torch or with the reference implementation.
"""

import math
from dataclasses import dataclass

import numpy as np

INF = math.inf


def logsumexp(values):
    """log of the sum of exp(values); -inf for no values."""
    values = [float(v) for v in values]
    top = max(values, default=-INF)
    return top if math.isinf(top) else top + math.log(math.fsum(math.exp(v - top) for v in values))


def log(x):
    return math.log(x) if x > 0 else -INF


@dataclass
class Weights:
    weights: np.ndarray  # W, 0 where not valid, NaN where valid but not finite
    log_s: float  # the state afterwards
    norm: float  # log s' that the weights were divided by
    share: float  # gamma' * alpha, the share of this batch in s'
    valid: np.ndarray  # not ignored
    good: np.ndarray  # valid and finite: the n rows of the formulas


def robust_weights(losses, log_s, lam, *, gamma=0.9, alpha=1.0, init="first", mask=None,
                   normalizer="moving", max_weight=None, score=None, largest=INF):  # fmt: skip
    """MATH section 1. `largest`: above it, |L/lam| is infinite in the precision of the state."""
    losses = np.asarray(losses, np.float64)
    valid = np.ones(losses.shape, bool) if mask is None else np.asarray(mask, bool)
    if math.isinf(lam):
        return Weights(valid.astype(float), log_s, 0.0, 0.0, valid, valid & np.isfinite(losses))
    with np.errstate(invalid="ignore", over="ignore"):
        z = (losses if score is None else np.asarray(score, np.float64)) / lam
    good = valid & np.isfinite(losses) & np.isfinite(z) & (np.abs(z) <= largest)
    n = int(good.sum())
    if n == 0:
        return Weights(np.where(valid, np.nan, 0.0), log_s, log_s, 0.0, valid, good)
    log_g = logsumexp(z[good]) - math.log(n)
    share = alpha
    if normalizer == "none":
        norm = share = 0.0
    elif normalizer == "batch" or (init == "first" and log_s == -INF):
        norm = math.log(alpha) + log_g
    else:
        share = gamma * alpha
        norm = logsumexp([log(1 - gamma) + log_s, math.log(gamma * alpha) + log_g])
    weights = np.where(valid, np.nan, 0.0)
    weights[good] = [math.exp(min(v - norm, 700)) for v in z[good]]
    if max_weight is not None:
        weights = np.minimum(weights, max_weight)
    bad = bool((valid & ~good).any())
    return Weights(weights, log_s if bad else norm, norm, share, valid, good)


@dataclass
class Forward:
    loss: float
    grad: np.ndarray  # d loss / d L, W being constant
    weights: np.ndarray
    ess: float
    mean_loss: float
    objective: float


class ABLoss:
    """The state rules of MATH section 1 around `robust_weights`."""

    def __init__(self, lam, *, gamma=0.9, alpha=1.0, mix=0.0, init="first", normalizer="moving", max_weight=None):
        self.lam, self.mix, self.normalizer = lam, mix, normalizer
        self.options = dict(gamma=gamma, alpha=alpha, init=init, normalizer=normalizer, max_weight=max_weight)
        self.log_s = 0.0 if normalizer == "none" else -INF
        self.nonfinite_batches = 0

    def __call__(self, losses, *, sample_weight=None, mask=None, score=None, update=True):
        losses = np.asarray(losses, np.float64)
        w = robust_weights(losses, self.log_s, self.lam, mask=mask, score=score, **self.options)
        n = int(w.good.sum())
        bad = bool((w.valid & ~w.good).any())
        if update:
            self.log_s = w.log_s
            self.nonfinite_batches += bad
        outside = np.ones(losses.shape) if sample_weight is None else np.asarray(sample_weight, np.float64)
        factor = outside * (w.weights + (0.0 if math.isinf(self.lam) else self.mix))
        grad = np.where(w.valid, factor / max(n, 1), 0.0)
        loss = math.nan if bad else math.fsum((grad * losses)[w.valid])
        mean = math.fsum(losses[w.valid]) / n if n and not bad else (math.nan if bad else 0.0)
        ws = w.weights[w.good]
        ess = float(ws.sum() ** 2 / (ws**2).sum()) if (ws > 0).any() else 0.0
        objective = mean if math.isinf(self.lam) else self.lam * self.log_s
        return Forward(loss, grad, w.weights, ess, mean, objective)


def cross_entropy(logits, target, *, weight=None, label_smoothing=0.0, ignore_index=-100):
    """Losses (B,) and d loss / d logits (B, C) of finite logits (B, C), row by row, r summed without the target."""
    logits = np.asarray(logits, np.float64)
    rows, classes = logits.shape
    v = np.ones(classes) if weight is None else np.asarray(weight, np.float64)
    losses, grads = np.zeros(rows), np.zeros((rows, classes))
    for i, (x, y) in enumerate(zip(logits, target)):
        y = int(y)
        if y == ignore_index:
            continue
        d = x - x[y]
        log_r = logsumexp(np.delete(d, y))
        n = math.log1p(math.exp(log_r)) if log_r < 30 else log_r + math.log1p(math.exp(-log_r))
        p = np.exp(d - n)
        minus_one = p.copy()
        minus_one[y] = -math.exp(log_r - n)
        losses[i] = (1 - label_smoothing) * v[y] * n
        grads[i] = (1 - label_smoothing) * v[y] * minus_one
        if label_smoothing:
            share = label_smoothing / classes
            losses[i] += share * math.fsum(v * (n - d))
            grads[i] += share * (p * v.sum() - v)
    return losses, grads


def rows(logits):
    """(B, C, d1, ...) -> (B*d1*..., C), in the order in which a target (B, d1, ...) is flattened."""
    logits = np.asarray(logits)
    return np.moveaxis(logits, 1, -1).reshape(-1, logits.shape[1])


def unrows(flat, shape):
    """The inverse of `rows` for logits of this shape."""
    return np.moveaxis(np.asarray(flat).reshape(shape[0], *shape[2:], shape[1]), -1, 1)
