"""Every formula of the Triton kernels, written once, on scalars or blocks of float32 or float64: the twin of csrc/math.h.

csrc/math/ says more at each function of the same name, and docs/MATH.md has the papers. The kernels use no global constants,
because Triton compares each of them at every launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ---- arithmetic ----------------------------------------------------------------------------------------------------


@triton.jit
def number(high, low, dtype: tl.constexpr):
    """A Python float, from the two float32 that it came as (launch.parts). It never widens a computation in float32."""
    x = tl.full([], high, dtype)
    if dtype == tl.float64:
        x += tl.full([], low, dtype)
    return x


@triton.jit
def multiple(x, unit: tl.constexpr):
    """x itself, a multiple of `unit`, in a form that tells the compiler so. The compiler then loads 16 bytes at a time."""
    return x // unit * unit if unit > 1 else x


@triton.jit
def divide(x, y):
    """x / y, correctly rounded. Triton's own / of float32 is off by up to 2 ulp, which
    changes a weight at L / lambda = 1000 by 2e-4."""
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def root(x):
    """sqrt(x), correctly rounded. Triton's own sqrt of float32 takes subnormal numbers for 0."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def log1p(x):
    """log(1 + x) for finite x > -1, to a few ulp.

    The rounding error of 1 + x appears in both log(u) and u - 1, and cancels.
    """
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / (u - 1)))


@triton.jit
def reference_point(running_max):
    """The running maximum, or 0 while it is -inf, because -inf - -inf would be NaN."""
    return tl.where(running_max == float("-inf"), 0.0, running_max)


# ---- per-sample losses on logits (MATH §2) --------------------------------------------------------------------------
#
# Three numbers describe a row with adjusted logits a_k and label y (csrc/math/losses.h Row):
#     max_minus_target = max - a_y >= 0,    sumexp_others = sum over k != y of exp(a_k - max),    exp_target = exp(a_y - max)
# The label's own term is never subtracted from a sum that contains it, so nothing cancels as p -> 1. With soft targets there is
# no label: max_minus_target and exp_target are 0.


@triton.jit
def log_sum(sumexp_others, exp_target):
    """log(1 + r) where p >= 1/2, which keeps every digit as p -> 1; elsewhere log(sumexp_others + exp_target)."""
    sure = sumexp_others <= exp_target
    return log1p(tl.where(sure, sumexp_others / tl.where(sure, exp_target, 1.0), sumexp_others - 1 + exp_target))


@triton.jit
def nll(max_minus_target, sumexp_others, exp_target):
    """n = -log p, the negative log-likelihood of the label."""
    x = log_sum(sumexp_others, exp_target)
    return tl.where(sumexp_others <= exp_target, x, max_minus_target + x)


@triton.jit
def log_total(max_minus_target, sumexp_others, exp_target):
    """log sum_k exp(a_k - max)."""
    x = log_sum(sumexp_others, exp_target)
    return tl.where(sumexp_others <= exp_target, x - max_minus_target, x)


@triton.jit
def power(base, exponent):
    """base^exponent for base in [0, 1] and exponent >= 0. A base below 1e-37 counts as 0."""
    positive = base > 1e-37
    x = tl.exp(exponent * tl.log(tl.where(positive, base, 1.0)))
    return tl.where(exponent > 0, tl.where(positive, x, tl.where(base >= 0, 0.0, base)), 1.0)


@triton.jit
def one_minus_exp(x):
    """1 - exp(-x) for x >= 0, without cancellation: (1 - u) x / -log u with u = exp(-x), where the rounding of u cancels."""
    u = tl.exp(-x)
    inside = (u < 1) & (x < 16)
    return tl.where(inside, (1 - u) * x / -tl.log(tl.where(inside, u, 0.5)), tl.where(u < 1, 1 - u, x))


@triton.jit
def loss_and_slope(max_minus_target, sumexp_others, exp_target, w, keep, hyper_a, hyper_b, cut, KIND: tl.constexpr):
    """Loss l and coefficient c of its gradient dl/dx_k = S_k c (softmax_k - 1[k = y]), of each loss of MATH §2.2.

    They are the functors of csrc/math/losses.h. n = -log p, w is the class weight of the label, keep = 1 - label smoothing.
    hyper_a and hyper_b: gamma of the focal losses; q of gce; alpha and beta A of sce.
    """
    n = nll(max_minus_target, sumexp_others, exp_target)
    p, far = exp_target / (sumexp_others + exp_target), sumexp_others / (sumexp_others + exp_target)
    if KIND == 0:  # cross-entropy
        loss, c = keep * w * n, keep * w + tl.zeros_like(n)
    elif KIND == 1:  # focal
        ratio = tl.where(far > 0, n / tl.where(far > 0, far, 1.0), 1.0)
        shape = w * power(far, hyper_a + tl.zeros_like(far))
        loss, c = shape * n, shape * (1 + hyper_a * tl.where(p > 0, p * ratio, 0.0))
    elif KIND == 2:  # gce
        loss, c = w * (one_minus_exp(hyper_a * n) / hyper_a - cut), w * tl.exp(-hyper_a * n)
    elif KIND == 3:  # sce
        loss, c = w * (hyper_a * n + hyper_b * far), w * (hyper_a + hyper_b * p)
    else:  # weighted focal
        m = w * n
        far, q = one_minus_exp(m), tl.exp(-m)
        ratio = tl.where(far > 0, m / tl.where(far > 0, far, 1.0), 1.0)
        shape = power(far, hyper_a + tl.zeros_like(far))
        loss, c = shape * m, w * shape * (1 + hyper_a * tl.where(q > 0, q * ratio, 0.0))
    return loss, c


@triton.jit
def shared_loss(max_minus_target, sumexp_others, exp_target, sum_weights, sum_gaps):
    """sum_k weight_k (-log p_k), from sum_gaps = sum_k weight_k (a_k - max) and sum_weights = sum_k weight_k."""
    return log_total(max_minus_target, sumexp_others, exp_target) * sum_weights - sum_gaps


@triton.jit
def row_gradient(sumexp_others, exp_target, c, smoothing_coef, sum_weights):
    """The numbers (scale, at_label) of a row's gradient (csrc/math/losses.h RowGradient).

    dl/dx_k = S_k (exp(a_k - max) scale - smoothing_coef weight_k) for k != y, and dl/dx_y = S_y (at_label - smoothing_coef
    weight_y).
    """
    inverse_total = 1 / (sumexp_others + exp_target)
    scale = (c + smoothing_coef * sum_weights) * inverse_total
    return scale, smoothing_coef * sum_weights * exp_target * inverse_total - c * sumexp_others * inverse_total


# ---- robust weights (ABSGD paper, Alg. 1, in logarithms; MATH §1) ---------------------------------------------------


@triton.jit
def log_mean_exp(z_max, sumexp, n):
    """log g = log((1/n) sum_i exp(z_i)), step 3 of Alg. 1, from z_max = max z and sumexp = sum_i exp(z_i - z_max)."""
    return z_max + tl.log(sumexp) - tl.log(n)


@triton.jit
def logaddexp(a, b):
    """log(exp(a) + exp(b)). a may be -inf, b must be finite."""
    high, low = tl.maximum(a, b), tl.minimum(a, b)
    return high + log1p(tl.exp(low - high))


@triton.jit
def next_log_s(log_s, log_g, gamma, alpha, alone):
    """log s' = log((1 - gamma) s + gamma alpha g), step 4 of Alg. 1. If `alone`, s' = alpha g, as if gamma were 1."""
    moving = logaddexp(log1p(-gamma) + log_s, tl.log(gamma * alpha) + log_g)
    return tl.where(alone, tl.log(alpha) + log_g, moving)


@triton.jit
def robust_weight(z, log_s_high, log_s_low, max_weight):
    """W = exp(z - log s'), step 5 of Alg. 1, clamped from above by max_weight.

    log s' comes in two parts, high + low. At L / lambda = 1000 a single float32 would put an error of 3e-5 into every weight.
    """
    w = tl.exp((z - log_s_high) - log_s_low)
    return tl.where(w > max_weight, max_weight, w)


@triton.jit
def sample_factor(weight, mix, sample_weight, inverse_n):
    """The factor d loss / d L_i = t_i (W_i + mix) / n of the loss (1/n) sum_i t_i (W_i + mix) L_i, where W is a constant."""
    return (weight + mix) * sample_weight * inverse_n


@triton.jit
def robust_weight_vjp(w, d, sum_wd, u, dlog_s, dlog_s_state, inverse_lam):
    """The vjp of (W, log s') with respect to L_j, for upstream gradients d on W and u on log s' (MATH §1.3).

    dlog_s is gamma' alpha / n, and dlog_s_state is the same, or 0 if the state did not move. sum_wd = sum_i W_i d_i.
    """
    return w * (d + (u * dlog_s_state - dlog_s * sum_wd)) * inverse_lam


# ---- lambda of a target for the effective sample size (csrc/math/target.h; MATH §1.7) ----------------------------------------


@triton.jit
def target_terms(d, u):
    """The terms of S1, S2, D1 and D2 at u = 1 / |lambda|. d is inf where a sample is not counted."""
    e = tl.exp(-u * d)
    finite_d = tl.where(d < float("inf"), d, 0.0)
    return e, e * e, finite_d * e, finite_d * (e * e)


@triton.jit
def target_start(target, lowest, highest, n, first, second, dtype: tl.constexpr):
    """The start of the search, from the range of the scores and the sums of d / spread and of its square. Scalars, float64.

    Returns:
        whether there is anything to solve; u; the bracket (low, high); h at the target.
    """
    spread, largest = highest - lowest, tl.maximum(tl.maximum(tl.abs(lowest), tl.abs(highest)), 1.0)
    # 64 eps of the losses. Smaller differences are their rounding, and make no weights.
    floor = largest * (1.4210854715202004e-14 if dtype == tl.float64 else 7.62939453125e-06)
    begins = spread > floor
    wanted = tl.sqrt(-tl.log(target))
    high = (750.0 if dtype == tl.float64 else 110.0) / floor
    some = tl.where(begins, spread, 1.0)
    low = tl.minimum(2 * wanted / some, high)
    mean = first / n
    variance = second / n - mean * mean
    u = tl.where(variance > 0, wanted / (some * tl.sqrt(tl.where(variance > 0, variance, 1.0))), low)
    u = tl.where(begins, tl.maximum(tl.minimum(u, high), low), 0.0)
    return begins, u, low, high, wanted


@triton.jit
def target_next(s1, s2, d1, d2, target, n, wanted, low, high, u, distance, high_was_tried, left):
    """One step of Newton's method on h(u) = sqrt(-log share(u)) in a bracket. Scalars, float64; the last two int32.

    Returns:
        whether the sums are needed again; low, high, u, distance, high_was_tried, left for them.
    """
    share = s1 * s1 / (n * s2)
    h = tl.sqrt(-tl.log(tl.minimum(share, 1.0)))
    slope = tl.where(h > 0, (d1 / s1 - d2 / s2) / tl.where(h > 0, h, 1.0), 0.0)
    below = h < wanted
    newton = tl.where(slope > 0, u + (wanted - h) / tl.where(slope > 0, slope, 1.0), tl.where(below, float("inf"), 0.0))
    here, off = tl.abs(h - wanted), tl.abs(share / target - 1)
    tied = below & (u >= high)  # even the largest u leaves the ties more than the target
    low, high = tl.where(below, u, low), tl.where(below, high, u)
    high_was_tried = tl.where(below, high_was_tried, 1)
    left -= 1
    inside = (newton > low) & (newton < high)
    met = ((here <= 1e-3 * wanted) & (off <= 1e-3)) | (off <= 1e-5)
    done = met | (left == 0) | tied | (high - low <= 1e-9 * low)
    middle = tl.where((newton >= high) & (high_was_tried == 0), high, tl.sqrt(low) * tl.sqrt(high))
    further = tl.where(inside & (here < 0.5 * distance), newton, middle)
    u = tl.where(done, tl.where(inside & (tied == 0), newton, u), further)
    return done == 0, low, high, u, here, high_was_tried, left


# ---- rectified weights (Learning to Reweight, Eq. 8 and 9; MATH §4.5) --------------------------------------------------


@triton.jit
def rectified_sum(plain, scaled, u):
    """Two running sums in float64: of max(u, 0) over the finite u, and of max(u, 0) 2^-64, which cannot overflow."""
    x = tl.where((u > 0) & (u < float("inf")), u, 0.0).to(tl.float64)
    return plain + x, scaled + x * 5.421010862427522e-20


@triton.jit
def rectified_numbers(plain, scaled, dtype: tl.constexpr):
    """The numbers (unit, total) of w = max(u, 0) unit / total, in the dtype of the weights, scaled if the sum overflows it."""
    fits = plain.to(dtype) < float("inf")
    total = tl.where(plain == 0, 1.0, tl.where(fits, plain, scaled))
    return tl.where(fits, 1.0, 5.421010862427522e-20).to(dtype), total.to(dtype)


@triton.jit
def rectified_weight(u, unit, total):
    """w = max(u, 0) unit / total. NaN where u is not finite, as u - u is."""
    w = divide(tl.where(u > 0, u, 0.0) * unit, total + tl.zeros_like(u))
    return tl.where(u - u == 0, w, u - u)


# ---- steps: momentum SGD (step 6 of Alg. 1), Adam, RMSprop, AdaGrad (Sec. 3.4 of the ABSGD paper); MATH §3 ------------
#
# Each function steps one element. It takes the parameter w, the states, and the gradient g that `slope` gives. It returns w and
# the states.


@triton.jit
def slope(grad, w, weight_decay, decays: tl.constexpr, maximize: tl.constexpr):
    """The gradient that a rule steps with: G = grad + weight_decay w, or -grad + weight_decay w if the objective is maximized."""
    g = -grad if maximize else grad
    return g + weight_decay * w if decays else g  # 0 * w would be NaN where w is infinite


@triton.jit
def corrections(t, hyper_a, hyper_b, rule: tl.constexpr):
    """The divisors (c_1, c_2) of the t-th step (t = 1, 2, ...), which depend on t, in float64.

    adam: 1 - beta_1^t and sqrt(1 - beta_2^t); hyper_a and hyper_b are the logarithms of the betas.
    adagrad: 1 + (t - 1) lr_decay and 1; hyper_a is lr_decay.
    """
    if rule == "adam":
        c_1, c_2 = 1 - tl.exp(t * hyper_a), tl.sqrt(1 - tl.exp(t * hyper_b))
    else:
        c_1, c_2 = 1 + (t - 1) * hyper_a, tl.full(t.shape, 1, tl.float64)
    return c_1, c_2


@triton.jit
def sgd_step(w, v, g, lr, momentum, keep, form: tl.constexpr):
    """Momentum SGD (MATH §3.1), keep = 1 - dampening. form: "plain" (v unused), "momentum", "nesterov", "heavy_ball" (Eq. 2)."""
    if form == "plain":
        w -= lr * g
    elif form == "heavy_ball":
        v = momentum * v - lr * g
        w += v
    else:
        v = momentum * v + keep * g
        w -= lr * (g + momentum * v if form == "nesterov" else v)
    return w, v


@triton.jit
def adam_step(w, v, u, u_max, g, new_1, beta_2, new_2, eps, rate, scale, shrink, amsgrad: tl.constexpr, shrinks: tl.constexpr):
    """Adam (MATH §3.2), with new_j = 1 - beta_j, rate = lr / c_1, scale = 1 / c_2, and shrink = lr weight_decay if decoupled.

    Eq. 9 of the ABSGD paper is the decoupled form with c_1 = c_2 = 1.
    """
    v += new_1 * (g - v)
    u = beta_2 * u + new_2 * (g * g)
    if amsgrad:
        u_max = tl.where((u <= u_max) | (u_max != u_max), u_max, u)  # a NaN stays NaN
    kept = w - shrink * w if shrinks else w
    return kept - divide(rate * v, root(u_max if amsgrad else u) * scale + eps), v, u, u_max


@triton.jit
def rms_prop_step(w, u, b, m, g, alpha, fresh, mu, eps, lr, momentum: tl.constexpr, centered: tl.constexpr):
    """RMSprop (MATH §3.3), with fresh = 1 - alpha, the momentum mu of the buffer b, and the mean m of the gradients."""
    u = alpha * u + fresh * (g * g)
    if centered:
        m += fresh * (g - m)
    d = divide(g, root(u - m * m if centered else u) + eps)
    if momentum:
        b = mu * b + d
    return w - lr * (b if momentum else d), u, b, m


@triton.jit
def adagrad_step(w, u, g, eps, rate):
    """AdaGrad (MATH §3.3), with rate = lr / (1 + (t - 1) lr_decay)."""
    u += g * g
    return w - divide(rate * g, root(u) + eps), u
