"""A slow float64 oracle: the formulas of docs/MATH.md, written again in plain Python and NumPy, in the log domain.

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


def robust_weights(
    losses,
    log_s,
    lam,
    *,
    gamma=0.9,
    alpha=1.0,
    init="first",
    mask=None,
    normalizer="moving",
    max_weight=None,
    score=None,
    largest=INF,
):
    """MATH §1.1 and §1.2. An |L / lam| above `largest` counts as infinite in the precision of the state (MATH §1.4)."""
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


def target_ess(losses, share, sign=1, *, mask=None, score=None, floor=64 * 2.0**-52):
    """MATH §1.7: lambda, log s and the weights of the valid and finite samples, by bisection of u = 1 / |lambda|.

    floor: 64 epsilons of the losses' dtype; smaller differences make no weights.
    """
    losses = np.asarray(losses, np.float64)
    x = losses if score is None else np.asarray(score, np.float64)
    good = np.isfinite(losses) & np.isfinite(x) & (True if mask is None else np.asarray(mask, bool))
    x, n = x[good], int(good.sum())
    if n == 0:
        return INF, 0.0, np.ones(0)
    e = x.max() if sign > 0 else x.min()
    d = np.abs(x - e)
    single, floor = floor > 1e-9, floor * max(1.0, float(np.abs(x).max()))
    if d.max() <= floor:
        return INF, 0.0, np.ones(n)

    def log_share(u):
        return 2 * logsumexp(-u * d) - logsumexp(-2 * u * d) - math.log(n)

    low, high = 0.0, (110 if single else 750) / floor
    if log_share(high) > math.log(share):
        low = high
    for _ in range(2200):  # down to the smallest number, and then 52 digits
        u = (low + high) / 2
        if not low < u < high:
            break
        low, high = (u, high) if log_share(u) > math.log(share) else (low, u)
    u = (low + high) / 2
    log_mean = logsumexp(-u * d) - math.log(n)
    return sign / u, sign * u * float(e) + log_mean, np.exp(-u * d - log_mean)


@dataclass
class Forward:
    loss: float
    grad: np.ndarray  # d loss / d L, W being constant
    weights: np.ndarray
    ess: float
    mean_loss: float
    objective: float


class ABLoss:
    """The state rules of MATH §1.4 around `robust_weights`."""

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


def rectified(products):
    """L2RW (MATH §4.5; Ren 2018, Eq. 8 and 9): max(u, 0) over its sum, relative to the largest, which prevents overflow."""
    u = np.asarray(products, np.float64)
    good = np.isfinite(u)
    kept = np.where(good & (u > 0), u, 0.0)
    if kept.any():
        kept = kept / kept.max()
        kept = kept / math.fsum(kept)
    return np.where(good, kept, np.nan)


A = -math.log(1e-4)  # SCE's stand-in for -log 0


def logit_loss(
    logits,
    target,
    *,
    kind="ce",
    scale=None,
    shift=None,
    margin=None,
    weight=None,
    label_smoothing=0.0,
    ignore_index=-100,
    gamma=2.0,
    q=0.7,
    k=None,
    prune=False,
    alpha=0.1,
    beta=1.0,
):
    """Losses (B,) and d loss / d logits (B, C) of logits (B, C), r summed without the target. Rows that do not count are 0.

    "weighted_focal" is the authors' form, with the class weight inside the probability.
    """
    logits, target = np.asarray(logits, np.float64), np.asarray(target, np.int64)
    count, classes = logits.shape
    v, S = (np.ones(classes) if x is None else np.asarray(x, np.float64) for x in (weight, scale))
    D, M = (np.zeros(classes) if x is None else np.asarray(x, np.float64) for x in (shift, margin))
    losses, grads = np.zeros(count), np.zeros((count, classes))
    keep = np.flatnonzero(target != ignore_index)
    if not len(keep) or not classes:
        return losses, grads
    y, i = target[keep], np.arange(len(keep))
    a = S * logits[keep] + D
    a[i, y] -= M[y]
    d = a - a[i, y][:, None]
    others = d.copy()
    others[i, y] = -INF
    top = others.max(1)
    with np.errstate(divide="ignore"):  # one class: r = 0
        log_r = np.where(np.isinf(top), top, top + np.log(np.exp(others - np.where(np.isinf(top), 0, top)[:, None]).sum(1)))
    n, w = np.logaddexp(0, log_r), v[y]
    with np.errstate(over="ignore"):  # each with its own digits: exp(log r - n) would lose those of log r
        p, one_minus_p = 1 / (1 + np.exp(log_r)), 1 / (1 + np.exp(-log_r))

    def focal(m, u, one_minus_u):
        """(1 - u)^gamma m, and its derivative in m for u = exp(-m); m / (1 - u) -> 1 as m -> 0."""
        power = one_minus_u**gamma
        ratio = np.divide(m, one_minus_u, out=np.ones_like(m), where=one_minus_u > 0)
        return power * m, power * (1 + gamma * u * ratio)

    if kind == "ce":
        loss, c = (1 - label_smoothing) * w * n, (1 - label_smoothing) * w
    elif kind == "focal":
        loss, c = (w * x for x in focal(n, p, one_minus_p))
    elif kind == "weighted_focal":
        loss, c = focal(w * n, np.exp(-w * n), -np.expm1(-w * n))
        c = w * c
    elif kind == "gce":
        p_q = np.exp(-q * n)
        loss, c = w * (-np.expm1(-q * n) if k is None else k**q - p_q) / q, w * p_q
    elif kind == "sce":
        loss, c = w * (alpha * n + beta * A * one_minus_p), w * (alpha + beta * A * p)
    softmax = np.exp(d - n[:, None])
    minus_one = softmax.copy()
    minus_one[i, y] = -one_minus_p
    grad = c[:, None] * minus_one
    if label_smoothing:
        share = label_smoothing / classes
        loss = loss + share * ((n[:, None] - d) * v).sum(1)
        grad = grad + share * (softmax * v.sum() - v)
    losses[keep], grads[keep] = loss, S * grad
    if prune:
        losses[keep[p <= k]] = grads[keep[p <= k]] = 0
    return losses, grads


def valid(logits, target, *, ignore_index=-100, k=None, prune=False, **options):
    """Which rows count: not ignored and, with `prune`, p > k."""
    keep = np.asarray(target) != ignore_index
    if prune:
        vectors = {name: options.get(name) for name in ("scale", "shift", "margin")}
        keep &= np.exp(-logit_loss(logits, target, ignore_index=ignore_index, **vectors)[0]) > k
    return keep


def cross_entropy(logits, target, **options):
    return logit_loss(logits, target, **options)


def soft_cross_entropy(logits, probabilities, *, weight=None, label_smoothing=0.0, scale=None, shift=None):
    """Probabilities (B, C): sum over k of ((1 - e) t_k + e / C) v_k times the cross-entropy with label k."""
    probabilities = np.asarray(probabilities, np.float64)
    count, classes = probabilities.shape
    v = np.ones(classes) if weight is None else np.asarray(weight, np.float64)
    u = ((1 - label_smoothing) * probabilities + label_smoothing / classes) * v
    losses, grads = np.zeros(count), np.zeros((count, classes))
    for label in range(classes):
        loss, grad = logit_loss(logits, np.full(count, label), scale=scale, shift=shift)
        losses += u[:, label] * loss
        grads += u[:, label, None] * grad
    return losses, grads


def ldam(cls_num_list, max_m=0.5, s=30.0):
    m = [float(n) ** -0.25 for n in cls_num_list]
    return {"scale": [s] * len(m), "margin": [s * max_m * x / max(m) for x in m]}


def vs(cls_num_list, gamma=0.3, tau=1.0):
    total, largest = sum(cls_num_list), max(cls_num_list)
    return {"scale": [(n / largest) ** gamma for n in cls_num_list], "shift": [tau * math.log(n / total) for n in cls_num_list]}


def logit_adjusted(cls_num_list, tau=1.0):
    return vs(cls_num_list, 0.0, tau)


def cdt(cls_num_list, gamma=0.3):
    return vs(cls_num_list, gamma, 0.0)


def to_sum_to_count(weights):
    return np.asarray(weights) * len(weights) / math.fsum(weights)


def class_balanced_weights(cls_num_list, beta=0.9999):
    """(1 - beta^N) = -expm1(N log beta); beta = 0 leaves 1."""
    return to_sum_to_count([(1 - beta) / (-math.expm1(n * math.log(beta)) if beta else 1.0) for n in cls_num_list])


def adrw_weights(cls_num_list, nu):
    return to_sum_to_count([(n / sum(cls_num_list)) ** -nu for n in cls_num_list])


def rows(logits):
    """(B, C, d1, ...) -> (B*d1*..., C), in the order in which a target (B, d1, ...) is flattened."""
    logits = np.asarray(logits)
    return np.moveaxis(logits, 1, -1).reshape(-1, logits.shape[1])


def unrows(flat, shape):
    """The inverse of `rows` for logits of this shape."""
    return np.moveaxis(np.asarray(flat).reshape(shape[0], *shape[2:], shape[1]), -1, 1)
