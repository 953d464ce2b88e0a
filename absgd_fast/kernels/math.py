"""Every formula of the kernels once, on scalars or blocks of float32 or float64: the twin of csrc/math.h.

MATH: the ABSGD paper, Alg. 1 and Eq. 2; csrc/math.h says more at each function of the same name. The kernels use no global
constants: Triton compares each of them at every launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ---- arithmetic ----------------------------------------------------------------------------------------------------


@triton.jit
def number(high, low, dtype: tl.constexpr):
    """A Python float that came as two float32 (launch.parts). It never widens a computation in float32."""
    x = tl.full([], high, dtype)
    if dtype == tl.float64:
        x += tl.full([], low, dtype)
    return x


@triton.jit
def multiple(x, unit: tl.constexpr):
    """x, a multiple of `unit`, in a form from which the compiler sees that: it then loads 16 bytes at a time."""
    return x // unit * unit if unit > 1 else x


@triton.jit
def divide(x, y):
    """x / y, correctly rounded: Triton's / of float32 is off by up to 2 ulp, at L / lambda = 1000 a weight by 2e-4."""
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def log1p(x):
    """log(1 + x), x > -1 finite, to a few ulp: what the rounding of 1 + x does to the logarithm, it does to the quotient."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / (u - 1)))


@triton.jit
def reference_point(top):
    """The running maximum `top`, or 0 before there is one: -inf - -inf would be NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


# ---- per-sample losses on logits -----------------------------------------------------------------------------------
#
# A row with adjusted logits a_k and label y is three numbers (math.h Row); the label's own term is never subtracted from a sum:
#     gap = max - a_y >= 0,    rest = sum over k != y of exp(a_k - max),    own = exp(-gap);    soft targets: gap = own = 0


@triton.jit
def log_sum(rest, own):
    """Where p >= 1/2: log1p(r), which keeps every digit as p -> 1; else log(rest + own)."""
    sure = rest <= own
    return log1p(tl.where(sure, rest / tl.where(sure, own, 1.0), rest - 1 + own))


@triton.jit
def nll(gap, rest, own):
    """-log p"""
    x = log_sum(rest, own)
    return tl.where(rest <= own, x, gap + x)


@triton.jit
def log_total(gap, rest, own):
    """log sum_k exp(a_k - max)"""
    x = log_sum(rest, own)
    return tl.where(rest <= own, x - gap, x)


@triton.jit
def power(base, exponent):
    """base^exponent for base in [0, 1], exponent >= 0"""
    positive = base > 1e-37
    x = tl.exp(exponent * tl.log(tl.where(positive, base, 1.0)))
    return tl.where(exponent > 0, tl.where(positive, x, tl.where(base >= 0, 0.0, base)), 1.0)


@triton.jit
def one_minus_exp(x):
    """1 - exp(-x) for x >= 0, without cancellation: (1 - u) x / -log u with u = exp(-x), whose errors cancel."""
    u = tl.exp(-x)
    inside = (u < 1) & (x < 16)
    return tl.where(inside, (1 - u) * x / -tl.log(tl.where(inside, u, 0.5)), tl.where(u < 1, 1 - u, x))


@triton.jit
def loss_and_slope(gap, rest, own, w, keep, first, second, cut, KIND: tl.constexpr):
    """The functors of math.h: loss, and c in dl/dx_k = S_k c (softmax_k - 1[k = y]). second of sce: beta A."""
    n = nll(gap, rest, own)
    p, far = own / (rest + own), rest / (rest + own)
    if KIND == 0:  # cross-entropy
        loss, c = keep * w * n, keep * w + tl.zeros_like(n)
    elif KIND == 1:  # focal
        ratio = tl.where(far > 0, n / tl.where(far > 0, far, 1.0), 1.0)
        shape = w * power(far, first + tl.zeros_like(far))
        loss, c = shape * n, shape * (1 + first * tl.where(p > 0, p * ratio, 0.0))
    elif KIND == 2:  # gce
        loss, c = w * (one_minus_exp(first * n) / first - cut), w * tl.exp(-first * n)
    elif KIND == 3:  # sce
        loss, c = w * (first * n + second * far), w * (first + second * p)
    else:  # weighted focal
        m = w * n
        far, q = one_minus_exp(m), tl.exp(-m)
        ratio = tl.where(far > 0, m / tl.where(far > 0, far, 1.0), 1.0)
        shape = power(far, first + tl.zeros_like(far))
        loss, c = shape * m, w * shape * (1 + first * tl.where(q > 0, q * ratio, 0.0))
    return loss, c


@triton.jit
def shared_loss(gap, rest, own, total, gaps):
    """sum_k weight_k (-log p_k), gaps = sum_k weight_k (a_k - max), total = sum_k weight_k."""
    return log_total(gap, rest, own) * total - gaps


@triton.jit
def row_gradient(rest, own, c, spread, total):
    """(scale, at_label): dl/dx_k = S_k (exp(a_k - max) scale - spread weight_k), at the label S_y (at_label - spread weight_y)."""
    inverse_total = 1 / (rest + own)
    return (c + spread * total) * inverse_total, spread * total * own * inverse_total - c * rest * inverse_total


# ---- robust weights (Alg. 1, in the log domain) ---------------------------------------------------------------------


@triton.jit
def log_mean_exp(top, total, n):
    """log((1/n) sum_i exp(z_i)) from top = max z and total = sum_i exp(z_i - top)."""
    return top + tl.log(total) - tl.log(n)


@triton.jit
def logaddexp(a, b):
    """log(exp(a) + exp(b)); a may be -inf, b is finite."""
    high, low = tl.maximum(a, b), tl.minimum(a, b)
    return high + log1p(tl.exp(low - high))


@triton.jit
def next_log_s(log_s, log_g, gamma, alpha, alone):
    """Step 5 of Alg. 1, s' = (1 - gamma) s + gamma alpha g. `alone`: s' = alpha g, as if gamma were 1."""
    moving = logaddexp(log1p(-gamma) + log_s, tl.log(gamma * alpha) + log_g)
    return tl.where(alone, tl.log(alpha) + log_g, moving)


@triton.jit
def robust_weight(z, log_s_high, log_s_low, max_weight):
    """Step 6 of Alg. 1, W = exp(z) / s', clamped from above; log s' in two parts, else L / lambda = 1000 costs 3e-5."""
    w = tl.exp((z - log_s_high) - log_s_low)
    return tl.where(w > max_weight, max_weight, w)


@triton.jit
def sample_factor(weight, mix, sample_weight, inverse_n):
    """d loss / d L_i of (1/n) sum_i t_i (W_i + mix) L_i, W detached."""
    return (weight + mix) * sample_weight * inverse_n


@triton.jit
def robust_weight_vjp(w, d, sum_wd, u, c, c_state, inverse_lam):
    """vjp of (W, log s') with respect to L_j for upstream d on W and u on log s', c = gamma' alpha / n."""
    return w * (d + (u * c_state - c * sum_wd)) * inverse_lam


# ---- momentum SGD (Eq. 2, and torch.optim.SGD's form of it) ----------------------------------------------------------


@triton.jit
def sgd_update(w, v, g, lr, momentum, keep, weight_decay, form: tl.constexpr, decays: tl.constexpr, maximize: tl.constexpr):
    """(w, v) after a step with gradient g; v the momentum buffer, keep = 1 - dampening. form: "plain" (leaves v alone),
    "momentum", "nesterov", "heavy_ball"."""
    if maximize:
        g = -g
    if decays:  # 0 * w is not 0 where w is infinite
        g += weight_decay * w
    if form == "plain":
        w -= lr * g
    elif form == "heavy_ball":
        v = momentum * v - lr * g
        w += v
    else:
        v = momentum * v + keep * g
        w -= lr * (g + momentum * v if form == "nesterov" else v)
    return w, v
