// Every formula of the package, once, templated on the lane type L (MATH: ABSGD paper Alg. 1; see each function).
//
// L describes N values of one floating type computed side by side: L::V the values, and the functions
// L::exp, L::log1p, L::select(condition, a, b), L::set(number). A lane type may hold one value (a CUDA thread, a
// double of the state update) or a whole SIMD register; the formulas cannot tell.
#pragma once

#if defined(__CUDACC__)
#define ABSGD_FN __host__ __device__ __forceinline__
#else
#define ABSGD_FN inline __attribute__((always_inline))
#endif

namespace absgd {

// ---- Per-sample losses on logits -----------------------------------------------------------------------------------
//
// A row with adjusted logits a_k and label y is described by three numbers, from which p = softmax(a)_y, 1 - p and
// -log p follow without cancellation because the label's own term is never subtracted from a sum that contains it:
//     gap  = max_k a_k - a_y  >= 0
//     rest = sum over k != y of exp(a_k - max)
//     own  = exp(-gap)                              so that  sum_k exp(a_k - max) = rest + own,  r = rest / own
template <class L>
struct Row {
  using V = typename L::V;
  V gap, rest, own;

  // -log p = log1p(r) = gap + log(rest + own); where y is the maximum, own = 1 and log1p(rest) keeps every digit.
  ABSGD_FN V nll() const { return gap + L::log1p(L::select(gap > L::set(0), rest - L::set(1) + own, rest)); }
  // log sum_k exp(a_k - max)
  ABSGD_FN V log_total() const { return nll() - gap; }
  // 1 / sum_k exp(a_k - max): softmax(a)_k = exp(a_k - max) * inverse_total()
  ABSGD_FN V inverse_total() const { return L::set(1) / (rest + own); }
  // 1 - p = r / (1 + r), never 1 - (p)
  ABSGD_FN V one_minus_p() const { return rest / (rest + own); }
};

// Cross-entropy with class weights v and label smoothing e over C classes, as torch.nn.functional.cross_entropy:
//     l        = (1 - e) v_y (-log p_y) + (e / C) sum_k v_k (-log p_k)
//     dl/dx_k  = c (softmax_k - 1[k = y]) + s (softmax_k sum_j v_j - v_k),    c = (1 - e) v_y,  s = e / C
template <class L>
struct CrossEntropy {
  using V = typename L::V;
  V keep;    // 1 - e
  V spread;  // e / C

  // v_y: weight of the label; others = sum_k v_k (-log p_k)
  ABSGD_FN V loss(const Row<L>& row, V v_y, V others) const { return keep * v_y * row.nll() + spread * others; }
  ABSGD_FN V coefficient(const Row<L>&, V v_y) const { return keep * v_y; }
};

// ---- Robust weights (Alg. 1, in the log domain) --------------------------------------------------------------------

// log((1/n) sum_i exp(z_i)) from m = max z and sum_i exp(z_i - m)
template <class L>
ABSGD_FN typename L::V log_mean_exp(typename L::V max, typename L::V sum, typename L::V n) {
  return max + L::log(sum) - L::log(n);
}

// log(exp(a) + exp(b)); a may be -inf, b is finite
template <class L>
ABSGD_FN typename L::V logaddexp(typename L::V a, typename L::V b) {
  const typename L::V hi = L::select(a > b, a, b), lo = L::select(a > b, b, a);
  return hi + L::log1p(L::exp(lo - hi));
}

// Step 5 of Alg. 1 in logarithms, s' = (1 - gamma) s + gamma alpha g. `alone`: s' = alpha g, as if gamma were 1.
template <class L>
ABSGD_FN typename L::V next_log_s(typename L::V log_s, typename L::V log_g, typename L::V gamma, typename L::V alpha,
                                  bool alone) {
  if (alone) return L::log(alpha) + log_g;
  return logaddexp<L>(L::log1p(-gamma) + log_s, L::log(gamma * alpha) + log_g);
}

// Step 6 of Alg. 1: W_i = exp(L_i / lambda) / s', clamped from above by max_weight (the state does not see the clamp).
// log s' comes in two parts, high + low: at L / lambda = 1000 a float log s' alone would put 3e-5 into every weight.
template <class L>
ABSGD_FN typename L::V robust_weight(typename L::V z, typename L::V log_s_high, typename L::V log_s_low,
                                     typename L::V max_weight) {
  const typename L::V w = L::exp((z - log_s_high) - log_s_low);
  return L::select(w > max_weight, max_weight, w);
}

// The term of sample i in the loss (1/n) sum_i t_i (W_i + mix) L_i, and its factor d loss / d L_i (W is detached).
template <class L>
ABSGD_FN typename L::V sample_factor(typename L::V weight, typename L::V mix, typename L::V sample_weight,
                                     typename L::V inverse_n) {
  return (weight + mix) * sample_weight * inverse_n;
}

// vjp of (W, log s') with respect to L_j, for upstream d on W and u on log s':
//     (W_j d_j + W_j (u c_state - c sum_i W_i d_i)) / lambda,    c = gamma' alpha / n = d log s' / d z_j / W_j
// where c_state is c, or 0 where the state did not move.
template <class L>
ABSGD_FN typename L::V robust_weight_vjp(typename L::V w, typename L::V d, typename L::V sum_wd, typename L::V u,
                                         typename L::V c, typename L::V c_state, typename L::V inverse_lam) {
  return w * (d + (u * c_state - c * sum_wd)) * inverse_lam;
}

// ---- Momentum SGD (MATH: Eq. 2 of the ABSGD paper, and torch.optim.SGD's form of it)
// ---------------------------------

enum class SgdForm : int { plain = 0, momentum = 1, nesterov = 2, heavy_ball = 3 };

// The numbers of one step, the same for every element. `sign` is -1 where the objective is maximized.
template <class L>
struct SgdNumbers {
  typename L::V sign, weight_decay, momentum, keep /* 1 - dampening */, lr;
  bool decays;  // weight_decay != 0: 0 * w is not 0 where w is infinite
};

// One element: w the parameter, v its momentum buffer (untouched by `plain`), G the gradient.
//     g = sign G + weight_decay w
//     momentum     v <- momentum v + (1 - dampening) g,    w <- w - lr v
//     nesterov     v as above,                             w <- w - lr (g + momentum v)
//     heavy_ball   v <- momentum v - lr g,                 w <- w + v,    i.e. v = w_t - w_{t-1}
// The last is Eq. 2 as written; it differs from the first once lr changes.
template <SgdForm form, class L>
ABSGD_FN void sgd_update(typename L::V& w, typename L::V& v, typename L::V G, const SgdNumbers<L>& n) {
  typename L::V g = n.sign * G;
  if (n.decays) g = g + n.weight_decay * w;
  if (form == SgdForm::plain) {
    w = w - n.lr * g;
  } else if (form == SgdForm::heavy_ball) {
    v = n.momentum * v - n.lr * g;
    w = w + v;
  } else {
    v = n.momentum * v + n.keep * g;
    w = w - n.lr * (form == SgdForm::nesterov ? g + n.momentum * v : v);
  }
}

}  // namespace absgd
