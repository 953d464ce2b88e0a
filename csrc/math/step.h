// The optimizer steps (MATH §3): what one step does to one element of a parameter. Momentum SGD is step 6 of the ABSGD
// paper's Alg. 1. Adam, RMSprop and AdaGrad are its Sec. 3.4.
#pragma once

#include "base.h"

namespace absgd {

// The rules. Two numbers of a step, hyper_a and hyper_b, mean by rule: sgd momentum and dampening; adam the two betas;
// rmsprop alpha and momentum; adagrad lr_decay (hyper_a).
enum class Rule : int { sgd = 0, adam = 1, rmsprop = 2, adagrad = 3 };

enum StepFlag : int {
  kMaximize = 1,
  kNesterov = 2,    // sgd
  kHeavyBall = 4,   // sgd: Eq. 2 of the paper
  kAmsgrad = 8,     // adam
  kDecoupled = 16,  // adam: weight decay acts on the parameter, not on the gradient (AdamW)
  kPaperForm = 32,  // adam: Eq. 9 of the paper, without bias correction
  kCentered = 64,   // rmsprop
};

constexpr int kStates = 3;  // most states of a rule, each an array of the parameter's shape

// The rule, the flags and the hyperparameters of a parameter group.
struct StepNumbers {
  Rule rule;
  int flags;
  double lr, weight_decay, hyper_a, hyper_b, eps;

  ABSGD_FN bool has(StepFlag flag) const { return (flags & flag) != 0; }
  // The states that the rule keeps: bit j stands for state j.
  ABSGD_FN int states() const {
    switch (rule) {
      case Rule::adam:
        return has(kAmsgrad) ? 7 : 3;
      case Rule::rmsprop:
        return 1 | (hyper_b != 0 ? 2 : 0) | (has(kCentered) ? 4 : 0);
      case Rule::adagrad:
        return 1;
      default:
        return hyper_a != 0 ? 1 : 0;
    }
  }
  // Whether the rule counts the steps of each parameter.
  ABSGD_FN bool counts() const { return rule != Rule::sgd; }
};

// The factors of the t-th step (t = 1, 2, ...) that depend on t:
//     adam       lr_divisor c_1 = 1 - beta_1^t,  root_divisor c_2 = sqrt(1 - beta_2^t); both are 1 in paper_form
//     adagrad    lr_divisor 1 + (t - 1) lr_decay
// gain multiplies the gradient before anything else. It is Normalizer::scale after deferred normalisation (MATH §5),
// and 1 otherwise. L: one double.
struct Corrections {
  double lr_divisor, root_divisor, gain = 1;

  template <class L>
  static ABSGD_FN Corrections of(const StepNumbers& n, double t) {
    if (n.rule == Rule::adagrad) return {1 + (t - 1) * n.hyper_a, 1};
    if (n.rule != Rule::adam || n.has(kPaperForm)) return {1, 1};
    return {1 - L::exp(t * L::log(n.hyper_a)), L::sqrt(1 - L::exp(t * L::log(n.hyper_b)))};
  }
};

// The gradient that a rule steps with: G = sign grad + weight_decay w. sign is Corrections::gain, or -gain if the
// objective is maximized. Decoupled weight decay leaves G alone.
template <class L>
struct Slope {
  using V = typename L::V;
  V sign, weight_decay;
  bool decays;  // weight_decay != 0. It is tested because 0 * w is NaN where w is infinite.

  template <class T>
  static ABSGD_FN Slope of(const StepNumbers& n, const Corrections& c) {
    const double decay = n.has(kDecoupled) ? 0 : n.weight_decay;
    return {L::set(T(n.has(kMaximize) ? -c.gain : c.gain)), L::set(T(decay)), decay != 0};
  }
  ABSGD_FN V operator()(V grad, V w) const { return decays ? sign * grad + weight_decay * w : sign * grad; }
};

// Each rule below is a functor that steps one element: functor(w, s, grad) updates the parameter w and the states s.
// kSlots has bit j set if the functor uses s[j].

// Momentum SGD (MATH §3.1). s[0] is b, or d with heavy_ball:
//     plain        w <- w - lr G
//     momentum     b <- momentum b + (1 - dampening) G  (b = G at first),    w <- w - lr b
//     nesterov     b as above,                                               w <- w - lr (G + momentum b)
//     heavy_ball   d <- momentum d - lr G,                                   w <- w + d,    so d = w_t - w_{t-1}
// Without dampening, b = G at first follows from a buffer of zeros. With it, plain torch takes the first step.
// heavy_ball is Eq. 2 of the paper as written. It differs from `momentum` once lr changes.
enum class SgdForm : int { plain = 0, momentum = 1, nesterov = 2, heavy_ball = 3 };

template <class L, SgdForm form>
struct SgdStep {
  using V = typename L::V;
  static constexpr int kSlots = form == SgdForm::plain ? 0 : 1;
  Slope<L> slope;
  V momentum, keep /* 1 - dampening */, lr;

  template <class T>
  static ABSGD_FN SgdStep of(const StepNumbers& n, double lr, const Corrections& c) {
    return {Slope<L>::template of<T>(n, c), L::set(T(n.hyper_a)), L::set(T(1 - n.hyper_b)), L::set(T(lr))};
  }
  ABSGD_FN void operator()(V& w, V* s, V grad) const {
    const V g = slope(grad, w);
    if (form == SgdForm::plain) {
      w = w - lr * g;
    } else if (form == SgdForm::heavy_ball) {
      s[0] = momentum * s[0] - lr * g;
      w = w + s[0];
    } else {
      s[0] = momentum * s[0] + keep * g;
      w = w - lr * (form == SgdForm::nesterov ? g + momentum * s[0] : s[0]);
    }
  }
};

// Adam (MATH §3.2), s = (v, u, u_max), with c_1 and c_2 of Corrections:
//     v <- v + (1 - beta_1)(G - v),    u <- beta_2 u + (1 - beta_2) G^2              Kingma & Ba 2015, Alg. 1
//     w <- w - lr (v / c_1) / (sqrt(u) / c_2 + eps)
//     amsgrad      u_max <- max(u_max, u), which takes the place of u in the root    Reddi et al. 2018, Alg. 2
//     decoupled    w <- w - lr weight_decay w comes first                            Loshchilov & Hutter 2019, Alg. 2
//     paper_form   decoupled, with c_1 = c_2 = 1 and eps = G_0                       ABSGD paper, Eq. 9
template <class L, bool amsgrad>
struct AdamStep {
  using V = typename L::V;
  static constexpr int kSlots = amsgrad ? 7 : 3;
  Slope<L> slope;
  V new_1, beta_2, new_2, eps, rate /* lr / c_1 */, scale /* 1 / c_2 */, shrink /* lr weight_decay */;
  bool shrinks;

  template <class T>
  static ABSGD_FN AdamStep of(const StepNumbers& n, double lr, const Corrections& c) {
    const bool shrinks = n.has(kDecoupled) && n.weight_decay != 0;
    return {Slope<L>::template of<T>(n, c),
            L::set(T(1 - n.hyper_a)),
            L::set(T(n.hyper_b)),
            L::set(T(1 - n.hyper_b)),
            L::set(T(n.eps)),
            L::set(T(lr / c.lr_divisor)),
            L::set(T(1 / c.root_divisor)),
            L::set(T(lr * n.weight_decay)),
            shrinks};
  }
  ABSGD_FN void operator()(V& w, V* s, V grad) const {
    const V g = slope(grad, w);
    s[0] = s[0] + new_1 * (g - s[0]);
    s[1] = beta_2 * s[1] + new_2 * (g * g);
    V u = s[1];
    if constexpr (amsgrad) u = s[2] = L::select((s[1] <= s[2]) | (s[2] != s[2]), s[2], s[1]);  // a NaN stays NaN
    const V kept = shrinks ? w - shrink * w : w;
    w = kept - rate * s[0] / (L::sqrt(u) * scale + eps);
  }
};

// RMSprop (Tieleman & Hinton 2012; MATH §3.3), s = (u, b, m):
//     u <- alpha u + (1 - alpha) G^2,    d = G / (sqrt(u) + eps),    w <- w - lr d
//     centered    m <- m + (1 - alpha)(G - m),  and u - m^2 takes the place of u in d    (Graves 2013, Eq. 38 to 45)
//     momentum    b <- momentum b + d,  w <- w - lr b  (mu in the code)
template <class L, bool centered, bool momentum>
struct RmsPropStep {
  using V = typename L::V;
  static constexpr int kSlots = 1 | (momentum ? 2 : 0) | (centered ? 4 : 0);
  Slope<L> slope;
  V alpha, fresh /* 1 - alpha */, mu, eps, lr;

  template <class T>
  static ABSGD_FN RmsPropStep of(const StepNumbers& n, double lr, const Corrections& c) {
    return {Slope<L>::template of<T>(n, c), L::set(T(n.hyper_a)), L::set(T(1 - n.hyper_a)),
            L::set(T(n.hyper_b)),           L::set(T(n.eps)),     L::set(T(lr))};
  }
  ABSGD_FN void operator()(V& w, V* s, V grad) const {
    const V g = slope(grad, w);
    s[0] = alpha * s[0] + fresh * (g * g);
    V u = s[0];
    if constexpr (centered) {
      s[2] = s[2] + fresh * (g - s[2]);
      u = u - s[2] * s[2];
    }
    V d = g / (L::sqrt(u) + eps);
    if constexpr (momentum) d = s[1] = mu * s[1] + d;
    w = w - lr * d;
  }
};

// AdaGrad (Duchi et al. 2011; MATH §3.3), s = (u):
//     u <- u + G^2,    w <- w - rate G / (sqrt(u) + eps),    rate = lr / (1 + (t - 1) lr_decay)
template <class L>
struct AdagradStep {
  using V = typename L::V;
  static constexpr int kSlots = 1;
  Slope<L> slope;
  V eps, rate;

  template <class T>
  static ABSGD_FN AdagradStep of(const StepNumbers& n, double lr, const Corrections& c) {
    return {Slope<L>::template of<T>(n, c), L::set(T(n.eps)), L::set(T(lr / c.lr_divisor))};
  }
  ABSGD_FN void operator()(V& w, V* s, V grad) const {
    const V g = slope(grad, w);
    s[0] = s[0] + g * g;
    w = w - rate * g / (L::sqrt(s[0]) + eps);
  }
};

// Calls f with the functor of momentum SGD. T and lr as in for_step.
template <class L, class T, class F>
ABSGD_FN void for_sgd(const StepNumbers& n, double lr, const Corrections& c, F f) {
  if (n.hyper_a == 0) return f(SgdStep<L, SgdForm::plain>::template of<T>(n, lr, c));
  if (n.has(kHeavyBall)) return f(SgdStep<L, SgdForm::heavy_ball>::template of<T>(n, lr, c));
  if (n.has(kNesterov)) return f(SgdStep<L, SgdForm::nesterov>::template of<T>(n, lr, c));
  return f(SgdStep<L, SgdForm::momentum>::template of<T>(n, lr, c));
}

// Calls f with the functor of the rule. T is the type that elements are computed in. lr is the learning rate of the
// group, which may have been read from a tensor.
template <class L, class T, class F>
ABSGD_FN void for_step(const StepNumbers& n, double lr, const Corrections& c, F f) {
  switch (n.rule) {
    case Rule::adam:
      if (n.has(kAmsgrad)) return f(AdamStep<L, true>::template of<T>(n, lr, c));
      return f(AdamStep<L, false>::template of<T>(n, lr, c));
    case Rule::rmsprop:
      if (n.has(kCentered)) {
        if (n.hyper_b != 0) return f(RmsPropStep<L, true, true>::template of<T>(n, lr, c));
        return f(RmsPropStep<L, true, false>::template of<T>(n, lr, c));
      }
      if (n.hyper_b != 0) return f(RmsPropStep<L, false, true>::template of<T>(n, lr, c));
      return f(RmsPropStep<L, false, false>::template of<T>(n, lr, c));
    case Rule::adagrad:
      return f(AdagradStep<L>::template of<T>(n, lr, c));
    default:
      return for_sgd<L, T>(n, lr, c, f);
  }
}

}  // namespace absgd
