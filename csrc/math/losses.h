// Per-sample losses on logits: the statistics of a row, the losses and the gradient.
#pragma once

#include "base.h"

namespace absgd {

// A loss sees the logits through a_k = S_k x_k + D_k - M_y 1[k = y] (class vectors S, D, M; 1, 0, 0 if not given). A
// row with label y is described by three numbers, from which p = softmax(a)_y, 1 - p and -log p follow without
// cancellation because the label's own term is never subtracted from a sum that contains it:
//     max_minus_target = max - a_y >= 0                   max: the largest of the a_k, or a little more
//     sumexp_others    = sum over k != y of exp(a_k - max)
//     exp_target       = exp(-max_minus_target)           so that  sum_k exp(a_k - max) = sumexp_others + exp_target,
//                                                         r = sumexp_others / exp_target
// Soft targets have no label: max_minus_target = 0, exp_target = 0, and sumexp_others is the whole sum.
template <class L>
struct Row {
  using V = typename L::V;
  V max_minus_target, sumexp_others, exp_target;

  // Where p >= 1/2: log1p(r), which keeps every digit as p -> 1; else log(sumexp_others + exp_target).
  ABSGD_FN V log_sum() const {
    return L::log1p(
        L::select(sumexp_others <= exp_target, sumexp_others / exp_target, (sumexp_others - L::set(1)) + exp_target));
  }
  // -log p
  ABSGD_FN V nll() const {
    const V x = log_sum();
    return L::select(sumexp_others <= exp_target, x, max_minus_target + x);
  }
  // log sum_k exp(a_k - max)
  ABSGD_FN V log_total() const {
    const V x = log_sum();
    return L::select(sumexp_others <= exp_target, x - max_minus_target, x);
  }
  // 1 / sum_k exp(a_k - max): softmax(a)_k = exp(a_k - max) * inverse_total()
  ABSGD_FN V inverse_total() const { return L::set(1) / (sumexp_others + exp_target); }
  ABSGD_FN V p() const { return exp_target / (sumexp_others + exp_target); }
  // 1 - p = r / (1 + r), never 1 - (p)
  ABSGD_FN V one_minus_p() const { return sumexp_others / (sumexp_others + exp_target); }
};

// base^exponent for base in [0, 1], exponent >= 0
template <class L>
ABSGD_FN typename L::V power(typename L::V base, typename L::V exponent) {
  const typename L::V zero = L::set(0), one = L::set(1), floor = L::set(1e-37f);
  const typename L::V x = L::exp(exponent * L::log(L::select(base > floor, base, one)));
  return L::select(exponent > zero, L::select(base > floor, x, L::select(base >= zero, zero, base)), one);
}

// 1 - exp(-x) for x >= 0, without cancellation: (1 - u) x / -log u with u = exp(-x), whose errors cancel.
template <class L>
ABSGD_FN typename L::V one_minus_exp(typename L::V x) {
  const typename L::V one = L::set(1), u = L::exp(-x), far = one - u;
  const auto inside = (u < one) & (x < L::set(16));
  return L::select(inside, far * x / -L::log(L::select(inside, u, L::set(0.5f))), L::select(u < one, far, x));
}

// The losses, each by its value and by c in dl/dx_k = S_k c (softmax(a)_k - 1[k = y]); w: class weight of the label.
enum class Kind : int { ce = 0, focal = 1, gce = 2, sce = 3, weighted_focal = 4 };

// What the functors are made from. hyper_a and hyper_b are the numbers that only this kind has: ce label smoothing e;
// focal and weighted_focal gamma; gce q; sce alpha and beta.
struct LossNumbers {
  Kind kind;
  double hyper_a, hyper_b;
  double cut;    // gce: (1 - k^q) / q, 0 without k
  double least;  // gce with prune: rows with -log p >= least = -log k do not count; else infinity

  ABSGD_FN double smoothing() const { return kind == Kind::ce ? hyper_a : 0; }
};

// Cross-entropy with class weights v and label smoothing e over C classes, as torch.nn.functional.cross_entropy:
//     l        = (1 - e) v_y (-log p_y) + (e / C) sum_k v_k (-log p_k)
//     dl/dx_k  = c (softmax_k - 1[k = y]) + s (softmax_k sum_j v_j - v_k),    c = (1 - e) v_y,  s = e / C
// The second term is the walk's (RowGradient); with soft targets t it is all there is, with t_k v_k in place of v_k.
template <class L>
struct CrossEntropy {
  using V = typename L::V;
  V keep;  // 1 - e

  ABSGD_FN V loss(const Row<L>& row, V w) const { return keep * w * row.nll(); }
  ABSGD_FN V coefficient(const Row<L>&, V w) const { return keep * w; }
};

// w (1 - p)^gamma (-log p)   (Lin et al. 2017, Eq. 5);   c = w [(1-p)^gamma + gamma n p (1-p)^(gamma-1)], n = -log p,
// written with n / (1 - p), which is 1 at p = 1.
template <class L>
struct Focal {
  using V = typename L::V;
  V gamma;

  ABSGD_FN V loss(const Row<L>& row, V w) const { return w * power<L>(row.one_minus_p(), gamma) * row.nll(); }
  ABSGD_FN V coefficient(const Row<L>& row, V w) const {
    const V q = row.one_minus_p(), n = row.nll();
    const V ratio = L::select(q > L::set(0), n / q, L::set(1));
    const V p = row.p();
    // p n -> 0 as p -> 0, where n may be infinite
    return w * power<L>(q, gamma) * (L::set(1) + gamma * L::select(p > L::set(0), p * ratio, L::set(0)));
  }
};

// The same as in the ABSGD authors' code, with the weight inside p: m = w n, q = exp(-m): (1 - q)^gamma m.
template <class L>
struct WeightedFocal {
  using V = typename L::V;
  V gamma;

  ABSGD_FN V loss(const Row<L>& row, V w) const {
    const V m = w * row.nll();
    return power<L>(one_minus_exp<L>(m), gamma) * m;
  }
  ABSGD_FN V coefficient(const Row<L>& row, V w) const {
    const V m = w * row.nll(), far = one_minus_exp<L>(m), q = L::exp(-m);
    const V ratio = L::select(far > L::set(0), m / far, L::set(1));
    return w * power<L>(far, gamma) * (L::set(1) + gamma * L::select(q > L::set(0), q * ratio, L::set(0)));
  }
};

// Generalised cross-entropy w (1 - p^q) / q (Zhang & Sabuncu 2018, Eq. 6); truncated at k: w (k^q - p^q) / q.
// c = w p^q.
template <class L>
struct GeneralisedCrossEntropy {
  using V = typename L::V;
  V q, cut;  // cut = (1 - k^q) / q, or 0

  ABSGD_FN V loss(const Row<L>& row, V w) const { return w * (one_minus_exp<L>(q * row.nll()) / q - cut); }
  ABSGD_FN V coefficient(const Row<L>& row, V w) const { return w * L::exp(-q * row.nll()); }
};

// Symmetric cross-entropy w [alpha (-log p) + beta A (1 - p)] (Wang et al. 2019, Eq. 5), A = -log 1e-4.
// c = w (alpha + beta A p).
template <class L>
struct SymmetricCrossEntropy {
  using V = typename L::V;
  V alpha, beta_a;

  ABSGD_FN V loss(const Row<L>& row, V w) const { return w * (alpha * row.nll() + beta_a * row.one_minus_p()); }
  ABSGD_FN V coefficient(const Row<L>& row, V w) const { return w * (alpha + beta_a * row.p()); }
};
constexpr double kSceA = 9.210340371976182;

// f(functor). T: what rows are computed in.
template <class L, class T, class F>
ABSGD_FN void for_loss(const LossNumbers& n, F f) {
  switch (n.kind) {
    case Kind::focal:
      return f(Focal<L>{L::set(T(n.hyper_a))});
    case Kind::weighted_focal:
      return f(WeightedFocal<L>{L::set(T(n.hyper_a))});
    case Kind::gce:
      return f(GeneralisedCrossEntropy<L>{L::set(T(n.hyper_a)), L::set(T(n.cut))});
    case Kind::sce:
      return f(SymmetricCrossEntropy<L>{L::set(T(n.hyper_a)), L::set(T(n.hyper_b * kSceA))});
    default:
      return f(CrossEntropy<L>{L::set(T(1 - n.hyper_a))});
  }
}

// The gradient u dl/dx of one row, in the four numbers a second walk over its logits needs:
//     u dl/dx_k = S_k (exp(a_k - max) scale - smoothing_coef v_k)       for k != y
//     u dl/dx_y = S_y (at_label - smoothing_coef v_y)
template <class L>
struct RowGradient {
  using V = typename L::V;
  V scale, at_label, smoothing_coef;

  // c: the loss's coefficient; s: its smoothing_coef; total_v = sum_k v_k
  static ABSGD_FN RowGradient of(const Row<L>& row, V c, V s, V total_v) {
    const V inverse = row.inverse_total();
    return {(c + s * total_v) * inverse, s * total_v * row.exp_target * inverse - c * row.one_minus_p(), s};
  }
};

}  // namespace absgd
