// Per-sample losses on logits (MATH §2): the three numbers that describe a row, the losses, and the gradient of a row.
#pragma once

#include "base.h"

namespace absgd {

// One row of logits x with label y, as a loss sees it (MATH §2.1). A loss works on the adjusted logits
//     a_k = S_k x_k + D_k - M_y 1[k = y],        with class vectors S, D, M (1, 0, 0 if they are not given).
// Three numbers describe the row:
//     max_minus_target = max - a_y >= 0          max is the largest a_k, or slightly more
//     sumexp_others    = sum over k != y of exp(a_k - max)
//     exp_target       = exp(a_y - max)
// They give p = softmax(a)_y, 1 - p and n = -log p = log(1 + r), where r = sumexp_others / exp_target. No digits are
// lost as p -> 1, because the label's own term is never subtracted from a sum that contains it.
// A row of soft targets has no label. Its max_minus_target and exp_target are 0, and its sumexp_others is the sum over
// all classes.
template <class L>
struct Row {
  using V = typename L::V;
  V max_minus_target, sumexp_others, exp_target;

  // log(1 + r) where p >= 1/2, which keeps every digit as p -> 1. Elsewhere log(sumexp_others + exp_target).
  ABSGD_FN V log_sum() const {
    return L::log1p(
        L::select(sumexp_others <= exp_target, sumexp_others / exp_target, (sumexp_others - L::set(1)) + exp_target));
  }
  // n = -log p, the negative log-likelihood of the label
  ABSGD_FN V nll() const {
    const V x = log_sum();
    return L::select(sumexp_others <= exp_target, x, max_minus_target + x);
  }
  // log sum_k exp(a_k - max)
  ABSGD_FN V log_total() const {
    const V x = log_sum();
    return L::select(sumexp_others <= exp_target, x - max_minus_target, x);
  }
  // 1 / sum_k exp(a_k - max), so softmax(a)_k = exp(a_k - max) * inverse_total()
  ABSGD_FN V inverse_total() const { return L::set(1) / (sumexp_others + exp_target); }
  ABSGD_FN V p() const { return exp_target / (sumexp_others + exp_target); }
  // 1 - p, computed as r / (1 + r): the difference of 1 and p would lose digits
  ABSGD_FN V one_minus_p() const { return sumexp_others / (sumexp_others + exp_target); }
};

// base^exponent for base in [0, 1] and exponent >= 0. A base below 1e-37 counts as 0, and exponent 0 always gives 1.
template <class L>
ABSGD_FN typename L::V power(typename L::V base, typename L::V exponent) {
  const typename L::V zero = L::set(0), one = L::set(1), floor = L::set(1e-37f);
  const typename L::V x = L::exp(exponent * L::log(L::select(base > floor, base, one)));
  return L::select(exponent > zero, L::select(base > floor, x, L::select(base >= zero, zero, base)), one);
}

// 1 - exp(-x) for x >= 0, without cancellation: (1 - u) x / -log u with u = exp(-x). The rounding error of u enters
// the numerator and the denominator alike, and cancels.
template <class L>
ABSGD_FN typename L::V one_minus_exp(typename L::V x) {
  const typename L::V one = L::set(1), u = L::exp(-x), far = one - u;
  const auto inside = (u < one) & (x < L::set(16));
  return L::select(inside, far * x / -L::log(L::select(inside, u, L::set(0.5f))), L::select(u < one, far, x));
}

// The losses (MATH §2.2). Each loss is a functor with two functions of a row and of w, the class weight of its label:
//     loss(row, w)         the loss l
//     coefficient(row, w)  the c of its gradient dl/dx_k = S_k c (softmax(a)_k - 1[k = y])
// Class vectors, label smoothing and soft targets belong to the walk along the classes, not to the functor.
enum class Kind : int { ce = 0, focal = 1, gce = 2, sce = 3, weighted_focal = 4 };

// The numbers of a loss. hyper_a and hyper_b mean, by kind: ce label smoothing e; focal and weighted_focal gamma; gce q
// (hyper_a); sce alpha and beta. The others are computed from them once for all rows.
struct LossNumbers {
  Kind kind;
  double hyper_a, hyper_b;
  double cut;    // gce truncated at k: (1 - k^q) / q. 0 without k.
  double least;  // gce with prune: a row with -log p >= least = -log k does not count. Infinity for all other losses.

  ABSGD_FN double smoothing() const { return kind == Kind::ce ? hyper_a : 0; }
};

// Cross-entropy with class weights v and label smoothing e over C classes, as torch.nn.functional.cross_entropy:
//     l        = (1 - e) v_y (-log p_y) + (e / C) sum_k v_k (-log p_k)
//     dl/dx_k  = c (softmax_k - 1[k = y]) + s (softmax_k sum_j v_j - v_k),    c = (1 - e) v_y,  s = e / C
// This functor computes the first term. The second term needs all classes, so the walk along the classes adds it
// (RowGradient). Soft targets t have the second term alone, with s = 1 and ((1 - e) t_k + e / C) v_k in place of v_k.
template <class L>
struct CrossEntropy {
  using V = typename L::V;
  V keep;  // 1 - e

  ABSGD_FN V loss(const Row<L>& row, V w) const { return keep * w * row.nll(); }
  ABSGD_FN V coefficient(const Row<L>&, V w) const { return keep * w; }
};

// Focal loss (Lin et al. 2017, Eq. 5):
//     l = w (1 - p)^gamma n,    c = w [(1 - p)^gamma + gamma n p (1 - p)^(gamma - 1)],    n = -log p
// The code writes c as w (1 - p)^gamma (1 + gamma p n / (1 - p)). The quotient n / (1 - p) is 1 at p = 1, so c is
// finite there for every gamma.
template <class L>
struct Focal {
  using V = typename L::V;
  V gamma;

  ABSGD_FN V loss(const Row<L>& row, V w) const { return w * power<L>(row.one_minus_p(), gamma) * row.nll(); }
  ABSGD_FN V coefficient(const Row<L>& row, V w) const {
    const V q = row.one_minus_p(), n = row.nll();
    const V ratio = L::select(q > L::set(0), n / q, L::set(1));
    const V p = row.p();
    // p n tends to 0 as p -> 0, where n may be infinite.
    return w * power<L>(q, gamma) * (L::set(1) + gamma * L::select(p > L::set(0), p * ratio, L::set(0)));
  }
};

// Focal loss as in the ABSGD authors' code, where the class weight stands inside p: with m = w n and q = exp(-m),
//     l = (1 - q)^gamma m,    c = w [(1 - q)^gamma + gamma m q (1 - q)^(gamma - 1)]
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

// Generalised cross-entropy (Zhang & Sabuncu 2018, Eq. 6):
//     l = w (1 - p^q) / q, or truncated at k: l = w (k^q - p^q) / q;    c = w p^q
template <class L>
struct GeneralisedCrossEntropy {
  using V = typename L::V;
  V q, cut;  // cut: LossNumbers::cut

  ABSGD_FN V loss(const Row<L>& row, V w) const { return w * (one_minus_exp<L>(q * row.nll()) / q - cut); }
  ABSGD_FN V coefficient(const Row<L>& row, V w) const { return w * L::exp(-q * row.nll()); }
};

// Symmetric cross-entropy (Wang et al. 2019, Eq. 5):
//     l = w [alpha n + beta A (1 - p)],    c = w (alpha + beta A p),    A = -log 1e-4
template <class L>
struct SymmetricCrossEntropy {
  using V = typename L::V;
  V alpha, beta_a;

  ABSGD_FN V loss(const Row<L>& row, V w) const { return w * (alpha * row.nll() + beta_a * row.one_minus_p()); }
  ABSGD_FN V coefficient(const Row<L>& row, V w) const { return w * (alpha + beta_a * row.p()); }
};
constexpr double kSceA = 9.210340371976182;  // A = -log 1e-4

// Calls f with the functor of the loss. T is the type that rows are computed in.
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

// The gradient of one row, in the numbers that a second walk along its classes needs beside max (MATH §8):
//     dl/dx_k = S_k (exp(a_k - max) scale - smoothing_coef v_k)       for k != y
//     dl/dx_y = S_y (at_label - smoothing_coef v_y)
// v_k is what class k weighs (launch.h ClassWeights). A factor of the row multiplies scale, at_label and
// smoothing_coef. The walk does not need to know the loss.
template <class L>
struct RowGradient {
  using V = typename L::V;
  V scale, at_label, smoothing_coef;

  // c is the coefficient of the loss, s its smoothing_coef, and total_v = sum_k v_k:
  //     scale = (c + s total_v) / sum_k exp(a_k - max),    at_label = s total_v p - c (1 - p)
  static ABSGD_FN RowGradient of(const Row<L>& row, V c, V s, V total_v) {
    const V inverse = row.inverse_total();
    return {(c + s * total_v) * inverse, s * total_v * row.exp_target * inverse - c * row.one_minus_p(), s};
  }
};

}  // namespace absgd
