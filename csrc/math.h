// Every formula of the package, once, templated on the lane type L (MATH: ABSGD paper Alg. 1; see each function).
//
// L describes N values of one floating type computed side by side: L::V the values, and the functions
// L::exp, L::log1p, L::select(condition, a, b), L::set(number). A lane type may hold one value (a CUDA thread, a
// double of the state update) or a whole SIMD register; the formulas cannot tell.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define ABSGD_FN __host__ __device__ __forceinline__
#else
#define ABSGD_FN inline __attribute__((always_inline))
#endif

namespace absgd {

constexpr double kLargest = 1.7976931348623157e308;  // DBL_MAX

// ---- Per-sample losses on logits -----------------------------------------------------------------------------------
//
// A loss sees the logits through a_k = S_k x_k + D_k - M_y 1[k = y] (class vectors S, D, M; 1, 0, 0 if not given). A
// row with label y is described by three numbers, from which p = softmax(a)_y, 1 - p and -log p follow without
// cancellation because the label's own term is never subtracted from a sum that contains it:
//     gap  = max - a_y >= 0                         max: the largest of the a_k, or a little more
//     rest = sum over k != y of exp(a_k - max)
//     own  = exp(-gap)                              so that  sum_k exp(a_k - max) = rest + own,  r = rest / own
// Soft targets have no label: gap = 0, own = 0, and rest is the whole sum.
template <class L>
struct Row {
  using V = typename L::V;
  V gap, rest, own;

  // Where p >= 1/2: log1p(r), which keeps every digit as p -> 1; else log(rest + own).
  ABSGD_FN V log_sum() const { return L::log1p(L::select(rest <= own, rest / own, (rest - L::set(1)) + own)); }
  // -log p
  ABSGD_FN V nll() const {
    const V x = log_sum();
    return L::select(rest <= own, x, gap + x);
  }
  // log sum_k exp(a_k - max)
  ABSGD_FN V log_total() const {
    const V x = log_sum();
    return L::select(rest <= own, x - gap, x);
  }
  // 1 / sum_k exp(a_k - max): softmax(a)_k = exp(a_k - max) * inverse_total()
  ABSGD_FN V inverse_total() const { return L::set(1) / (rest + own); }
  ABSGD_FN V p() const { return own / (rest + own); }
  // 1 - p = r / (1 + r), never 1 - (p)
  ABSGD_FN V one_minus_p() const { return rest / (rest + own); }
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

// What the functors are made from. ce: first = label smoothing e; focal: first = gamma; gce: first = q; sce: first =
// alpha, second = beta.
struct LossNumbers {
  Kind kind;
  double first, second;
  double cut;    // gce: (1 - k^q) / q, 0 without k
  double least;  // gce with prune: rows with -log p >= least = -log k do not count; else infinity

  ABSGD_FN double smoothing() const { return kind == Kind::ce ? first : 0; }
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
      return f(Focal<L>{L::set(T(n.first))});
    case Kind::weighted_focal:
      return f(WeightedFocal<L>{L::set(T(n.first))});
    case Kind::gce:
      return f(GeneralisedCrossEntropy<L>{L::set(T(n.first)), L::set(T(n.cut))});
    case Kind::sce:
      return f(SymmetricCrossEntropy<L>{L::set(T(n.first)), L::set(T(n.second * kSceA))});
    default:
      return f(CrossEntropy<L>{L::set(T(1 - n.first))});
  }
}

// The gradient u dl/dx of one row, in the four numbers a second walk over its logits needs:
//     u dl/dx_k = S_k (exp(a_k - max) scale - spread v_k)       for k != y
//     u dl/dx_y = S_y (at_label - spread v_y)
template <class L>
struct RowGradient {
  using V = typename L::V;
  V scale, at_label, spread;

  // c: coefficient of the loss; s: its spread; total_v = sum_k v_k
  static ABSGD_FN RowGradient of(const Row<L>& row, V c, V s, V total_v) {
    const V inverse = row.inverse_total();
    return {(c + s * total_v) * inverse, s * total_v * row.own * inverse - c * row.one_minus_p(), s};
  }
};

// ---- Robust weights (Alg. 1, in the log domain) --------------------------------------------------------------------

// log((1/n) sum_i exp(z_i)) from m = max z and sum_i exp(z_i - m)
template <class L>
ABSGD_FN typename L::V log_mean_exp(typename L::V max, typename L::V sum, typename L::V n) {
  return max + L::log(sum / n);
}

// log(exp(a) + exp(b)); a may be -inf, b is finite
template <class L>
ABSGD_FN typename L::V logaddexp(typename L::V a, typename L::V b) {
  const typename L::V hi = L::select(a > b, a, b), lo = L::select(a > b, b, a);
  return hi + L::log1p(L::exp(lo - hi));
}

// What gamma and alpha come to in logarithms: the same for all steps, so the host takes these logarithms (three of six
// in double that one thread of a GPU would else take in every step, 2 to 4 us by its instructions).
struct LogShares {
  double keep, take, alone;  // log(1 - gamma), log(gamma alpha), log alpha

  template <class L>
  static ABSGD_FN LogShares of(double gamma, double alpha) {
    return {L::log1p(-gamma), L::log(gamma * alpha), L::log(alpha)};
  }
};

// Step 5 of Alg. 1 in logarithms, s' = (1 - gamma) s + gamma alpha g. `alone`: s' = alpha g, as if gamma were 1.
template <class L>
ABSGD_FN double next_log_s(double log_s, double log_g, const LogShares& shares, bool alone) {
  if (alone) return shares.alone + log_g;
  return logaddexp<L>(shares.keep + log_s, shares.take + log_g);
}

// Where log s' comes from: the moving average, this batch alone, or nowhere (log s' = 0).
enum class Normalizer : int { moving = 0, batch = 1, none = 2 };

struct RobustRule {
  double lam, gamma, alpha;
  LogShares log_shares;  // of gamma and alpha
  Normalizer normalizer;
  bool init_first;  // the first batch sets s by itself
};

// What a batch does to the state.
struct Outcome {
  double log_s;        // what the weights are divided by, in logarithms
  double new_log_s;    // what the state becomes (the old value after a bad or an empty batch)
  double share;        // gamma' alpha / n: what W_j owes to log s' (robust_weight_vjp)
  double share_state;  // the same for new_log_s: 0 where the state did not move
  double inverse_n;
  int64_t good, bad;  // valid rows with a finite loss and z; valid rows without
};

// From m = max z and sum_i exp(z_i - m) over the good rows. One bad row keeps the whole batch out of the state.
template <class L>
ABSGD_FN Outcome next_outcome(const RobustRule& rule, double log_s, double max, double sum, int64_t good, int64_t bad) {
  Outcome out{0, log_s, 0, 0, 0, good, bad};
  if (good == 0) return out;
  out.inverse_n = 1.0 / double(good);
  if (rule.lam - rule.lam != 0) return out;  // lambda = +-inf, the plain mean: z = 0, W = exp(0 - 0)
  if (rule.normalizer != Normalizer::none) {
    const double log_g = log_mean_exp<L>(max, sum, double(good));
    const bool alone = rule.normalizer == Normalizer::batch || (rule.init_first && log_s < -kLargest);
    out.log_s = next_log_s<L>(log_s, log_g, rule.log_shares, alone);
    out.share = (alone ? rule.alpha : rule.gamma * rule.alpha) * out.inverse_n;
  }
  if (bad == 0) {
    out.new_log_s = out.log_s;
    out.share_state = out.share;
  }
  return out;
}

// What rows come to, of one process, one micro-batch or one chunk, and how several such are added.
struct Totals {
  double log_sum;    // log sum exp(z) over the good rows; -inf without
  double good, bad;  // valid rows with a finite loss and z; valid rows without
};
// rows: `count` of them, each at the start of `stride` doubles
template <class L>
ABSGD_FN Totals add_totals(const double* rows, int64_t count, int64_t stride) {
  double max = -kLargest, sum = 0;
  Totals out{max - kLargest /* -inf */, 0, 0};
  for (int64_t k = 0; k < count; ++k) {
    const double* row = rows + k * stride;
    out.good += row[1];
    out.bad += row[2];
    if (row[1] > 0 && row[0] > max) max = row[0];
  }
  for (int64_t k = 0; k < count; ++k)
    if (rows[k * stride + 1] > 0) sum += L::exp(rows[k * stride] - max);
  if (out.good > 0) out.log_sum = max + L::log(sum);
  return out;
}

// log s' settled for rows that were added up in Totals: W_i = exp(z_i - log_s), the loss `scale` sum_i W_i L_i.
struct Settled {
  double log_s, scale;
  double top;  // a later z beyond it counts as non-finite: exp(z - log_s) might leave the range of a gradient
  double log_sum, good, bad;
};
constexpr double kReach = 60;

// share: how many processes average their gradients, times what a framework divides the loss by. reference: the m of
// deferred normalisation (W_i = exp(z_i - m) until the step): scale then turns sums of those into the mean of the
// W_i, exp(m - log s') / n; or null.
template <class L>
ABSGD_FN Settled settled_of(const Outcome& o, const Totals& t, double share, const double* reference) {
  const double moved = reference == nullptr || t.good == 0 ? 1 : L::exp(*reference - o.log_s);
  const double top = t.good == 0 ? kLargest : o.log_s + kReach;
  return {o.log_s, moved * o.inverse_n * share, top, t.log_sum, t.good, t.bad};
}

// Whether a row counts: its loss, its score and z = score / lambda are finite. A NaN makes every comparison false; the
// score itself must be finite also where |lambda| = inf makes z = 0. `limit` is the largest z that the state can hold.
template <class L>
ABSGD_FN auto is_usable(typename L::V loss, typename L::V score, typename L::V z, typename L::V limit) {
  return (z <= limit) & (z >= -limit) & (score - score == L::set(0)) & (loss - loss == L::set(0));
}

// How the rows of a batch are weighed once its log s' is known: all that W and the factor of a row depend on beside z.
struct Weighing {
  double log_s, inverse_n, mix, max_weight;

  // The plain mean (|lambda| = inf) has W = 1 as it is, and no mix.
  static ABSGD_FN Weighing of(double lam, double mix, double max_weight, const Outcome& o) {
    const bool plain = lam - lam != 0;
    return {o.log_s, o.inverse_n, plain ? 0 : mix, plain ? 1 : max_weight};
  }
};

// Step 6 of Alg. 1: W_i = exp(L_i / lambda) / s', clamped from above by max_weight (the state does not see the clamp),
// and the factor d loss / d L_i of the loss (1/n) sum_i t_i (W_i + mix) L_i, t the sample weights, W detached.
// log s' comes in two parts, high + low: at L / lambda = 1000 a float log s' alone would put 3e-5 into every weight.
template <class L>
struct RobustNumbers {
  using V = typename L::V;
  V log_s_high, log_s_low, max_weight, mix, inverse_n;

  // T: what the rows are computed in.
  template <class T>
  static ABSGD_FN RobustNumbers of(const Weighing& w) {
    return {L::set(T(w.log_s)), L::set(T(w.log_s - double(T(w.log_s)))), L::set(T(w.max_weight)), L::set(T(w.mix)),
            L::set(T(w.inverse_n))};
  }
  ABSGD_FN V weight(V z) const {
    const V w = L::exp((z - log_s_high) - log_s_low);
    return L::select(w > max_weight, max_weight, w);
  }
  ABSGD_FN V factor(V weight, V sample_weight) const { return (weight + mix) * sample_weight * inverse_n; }
};

// vjp of (W, log s') with respect to L_j, for upstream d on W and u on log s':
//     (W_j d_j + W_j (u c_state - c sum_i W_i d_i)) / lambda,    c = gamma' alpha / n = d log s' / d z_j / W_j
// where c_state is c, or 0 where the state did not move.
template <class L>
ABSGD_FN typename L::V robust_weight_vjp(typename L::V w, typename L::V d, typename L::V sum_wd, typename L::V u,
                                         typename L::V c, typename L::V c_state, typename L::V inverse_lam) {
  return w * (d + (u * c_state - c * sum_wd)) * inverse_lam;
}

// ---- Rectified weights (Learning to Reweight: Ren et al. 2018, Eq. 8 and 9) -----------------------------------------
//
//     w_i = max(u_i, 0) / (S + 1[S = 0]),    S = sum_j max(u_j, 0) over the finite u;    NaN where u_i is not finite

// S in double, where no sum of floats leaves the range. One of doubles may, so it is also made of u 2^-64: what that
// loses is nothing beside a sum that overflows. L: double lanes.
template <class L>
struct RectifiedSum {
  using V = typename L::V;
  static constexpr double kScale = 1.0 / 18446744073709551616.0;
  V plain, scaled;

  ABSGD_FN void add(V u) {
    const V x = L::select((u > L::set(0)) & (u <= L::set(kLargest)), u, L::set(0));
    plain = plain + x;
    scaled = scaled + x * L::set(kScale);
  }
};

template <class L>
struct RectifiedNumbers {
  using V = typename L::V;
  V unit, total;

  // T: what the weights are computed in, whose range a sum of floats may leave as well.
  template <class T>
  static ABSGD_FN RectifiedNumbers of(double plain, double scaled) {
    const bool fits = T(plain) - T(plain) == 0;
    return {L::set(fits ? T(1) : T(RectifiedSum<L>::kScale)), L::set(plain == 0 ? T(1) : T(fits ? plain : scaled))};
  }
  ABSGD_FN V weight(V u) const {
    const V off = u - u;  // 0, or NaN where u is not finite
    return L::select(off == L::set(0), L::select(u > L::set(0), u, L::set(0)) * unit / total, off);
  }
};

// ---- Rules that solve for a level mu (Levy et al. 2020): CVaR and chi-squared DRO -------------------------------
//
//     CVaR, KL penalty    w = min(exp((x - mu) / reg), 1 / beta): the k largest are at the bound, and the others share
//                         what is left, n - k / beta, by their exponentials
//     chi-squared         w proportional to max(x - mu, 0), (1/2n) sum (w - 1)^2 = rho: mu follows from the mean and
//                         variance of the k losses above it
//
// CVaR takes rows in from the smallest on, as long as the largest of them stays below the bound; chi-squared drops rows
// until none lies below mu: made of too many rows, mu is never too high.

// Whether the largest of the rows that share `left` would be; sum: of their exponentials, its own being 1.
ABSGD_FN bool cvar_is_beyond(double sum, double left, double beta) { return left * beta > sum; }
template <class L>
ABSGD_FN double chi2_level(double mean, double variance, double k, double n, double rho) {
  const double share = k * (1 + 2 * rho) / n - 1;
  return mean - L::sqrt(variance / (share > 1e-15 ? share : 1e-15));  // no less than its rounding
}

// ---- Steps: momentum SGD (Alg. 1 step 6), Adam, RMSprop, AdaGrad (Sec. 3.4 of the ABSGD paper)
// -----------------------

// first, second: sgd momentum, dampening; adam the betas; rmsprop alpha, momentum; adagrad lr_decay.
enum class Rule : int { sgd = 0, adam = 1, rmsprop = 2, adagrad = 3 };

enum StepFlag : int {
  kMaximize = 1,
  kNesterov = 2,    // sgd
  kHeavyBall = 4,   // sgd
  kAmsgrad = 8,     // adam
  kDecoupled = 16,  // adam: weight decay apart from the gradient (AdamW)
  kPaperForm = 32,  // adam: Eq. 9, no bias correction
  kCentered = 64,   // rmsprop
};

constexpr int kStates = 3;  // arrays of a parameter's shape that a rule may keep

// What a parameter group asks for.
struct StepNumbers {
  Rule rule;
  int flags;
  double lr, weight_decay, first, second, eps;

  ABSGD_FN bool has(StepFlag flag) const { return (flags & flag) != 0; }
  // Bit j: the rule keeps state j.
  ABSGD_FN int states() const {
    switch (rule) {
      case Rule::adam:
        return has(kAmsgrad) ? 7 : 3;
      case Rule::rmsprop:
        return 1 | (second != 0 ? 2 : 0) | (has(kCentered) ? 4 : 0);
      case Rule::adagrad:
        return 1;
      default:
        return first != 0 ? 1 : 0;
    }
  }
  // The rule counts the steps of each parameter.
  ABSGD_FN bool counts() const { return rule != Rule::sgd; }
};

// What the t-th step (t = 1, 2, ...) owes to t. adam: 1 - beta_1^t and sqrt(1 - beta_2^t), both 1 in paper_form;
// adagrad: 1 + (t - 1) lr_decay. L: one double.
// gain: what the gradient is multiplied by first (deferred normalisation: Settled::scale).
struct Corrections {
  double first, second, gain = 1;

  template <class L>
  static ABSGD_FN Corrections of(const StepNumbers& n, double t) {
    if (n.rule == Rule::adagrad) return {1 + (t - 1) * n.first, 1};
    if (n.rule != Rule::adam || n.has(kPaperForm)) return {1, 1};
    return {1 - L::exp(t * L::log(n.first)), L::sqrt(1 - L::exp(t * L::log(n.second)))};
  }
};

// The gradient as a rule sees it: G = sign grad + weight_decay w; sign is Corrections::gain, negative where the
// objective is maximized.
template <class L>
struct Slope {
  using V = typename L::V;
  V sign, weight_decay;
  bool decays;  // weight_decay != 0: 0 * w is not 0 where w is infinite

  template <class T>
  static ABSGD_FN Slope of(const StepNumbers& n, const Corrections& c) {
    const double decay = n.has(kDecoupled) ? 0 : n.weight_decay;
    return {L::set(T(n.has(kMaximize) ? -c.gain : c.gain)), L::set(T(decay)), decay != 0};
  }
  ABSGD_FN V operator()(V grad, V w) const { return decays ? sign * grad + weight_decay * w : sign * grad; }
};

// The functors: one element each, w the parameter, s the states, of which kSlots (bits) are used.

// Momentum SGD, s[0] = v:
//     momentum     v <- momentum v + (1 - dampening) G,    w <- w - lr v
//     nesterov     v as above,                             w <- w - lr (G + momentum v)
//     heavy_ball   v <- momentum v - lr G,                 w <- w + v,    i.e. v = w_t - w_{t-1}
// The last is Eq. 2 of the paper as written; it differs from the first once lr changes.
enum class SgdForm : int { plain = 0, momentum = 1, nesterov = 2, heavy_ball = 3 };

template <class L, SgdForm form>
struct SgdStep {
  using V = typename L::V;
  static constexpr int kSlots = form == SgdForm::plain ? 0 : 1;
  Slope<L> slope;
  V momentum, keep /* 1 - dampening */, lr;

  template <class T>
  static ABSGD_FN SgdStep of(const StepNumbers& n, double lr, const Corrections& c) {
    return {Slope<L>::template of<T>(n, c), L::set(T(n.first)), L::set(T(1 - n.second)), L::set(T(lr))};
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

// Adam (Kingma & Ba 2015, Alg. 1; decoupled: Loshchilov & Hutter 2019, Alg. 2; amsgrad: Reddi et al. 2018, Alg. 2),
// with s = (v, u, u_max) and the corrections c_1 = 1 - beta_1^t, c_2 = sqrt(1 - beta_2^t):
//     v <- v + (1 - beta_1)(G - v),    u <- beta_2 u + (1 - beta_2) G^2,    u_max <- max(u_max, u)
//     w <- w - lr (v / c_1) / (sqrt(u) / c_2 + eps)  [- lr weight_decay w, decoupled]
// Eq. 9 of the ABSGD paper (paper_form) is the decoupled form with c_1 = c_2 = 1 and eps = G_0.
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
            L::set(T(1 - n.first)),
            L::set(T(n.second)),
            L::set(T(1 - n.second)),
            L::set(T(n.eps)),
            L::set(T(lr / c.first)),
            L::set(T(1 / c.second)),
            L::set(T(lr * n.weight_decay)),
            shrinks};
  }
  ABSGD_FN void operator()(V& w, V* s, V grad) const {
    const V g = slope(grad, w);
    s[0] = s[0] + new_1 * (g - s[0]);
    s[1] = beta_2 * s[1] + new_2 * (g * g);
    V u = s[1];
    if constexpr (amsgrad) u = s[2] = L::select((s[1] <= s[2]) | (s[2] != s[2]), s[2], s[1]);  // a NaN stays
    const V kept = shrinks ? w - shrink * w : w;
    w = kept - rate * s[0] / (L::sqrt(u) * scale + eps);
  }
};

// RMSprop (Tieleman & Hinton 2012; centered: Graves 2013, Eq. 40), s = (u, b, m):
//     u <- alpha u + (1 - alpha) G^2,    m <- m + (1 - alpha)(G - m),    d = G / (sqrt(u - m^2) + eps)    (m: centered)
//     w <- w - lr d, with momentum  b <- momentum b + d,  w <- w - lr b
template <class L, bool centered, bool momentum>
struct RmsPropStep {
  using V = typename L::V;
  static constexpr int kSlots = 1 | (momentum ? 2 : 0) | (centered ? 4 : 0);
  Slope<L> slope;
  V alpha, fresh, mu, eps, lr;

  template <class T>
  static ABSGD_FN RmsPropStep of(const StepNumbers& n, double lr, const Corrections& c) {
    return {Slope<L>::template of<T>(n, c),
            L::set(T(n.first)),
            L::set(T(1 - n.first)),
            L::set(T(n.second)),
            L::set(T(n.eps)),
            L::set(T(lr))};
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

// AdaGrad (Duchi et al. 2011), s = (u):    u <- u + G^2,    w <- w - lr / (1 + (t - 1) lr_decay) G / (sqrt(u) + eps)
template <class L>
struct AdagradStep {
  using V = typename L::V;
  static constexpr int kSlots = 1;
  Slope<L> slope;
  V eps, rate;

  template <class T>
  static ABSGD_FN AdagradStep of(const StepNumbers& n, double lr, const Corrections& c) {
    return {Slope<L>::template of<T>(n, c), L::set(T(n.eps)), L::set(T(lr / c.first))};
  }
  ABSGD_FN void operator()(V& w, V* s, V grad) const {
    const V g = slope(grad, w);
    s[0] = s[0] + g * g;
    w = w - rate * g / (L::sqrt(s[0]) + eps);
  }
};

// f(functor) for momentum SGD, with T and lr as below.
template <class L, class T, class F>
ABSGD_FN void for_sgd(const StepNumbers& n, double lr, const Corrections& c, F f) {
  if (n.first == 0) return f(SgdStep<L, SgdForm::plain>::template of<T>(n, lr, c));
  if (n.has(kHeavyBall)) return f(SgdStep<L, SgdForm::heavy_ball>::template of<T>(n, lr, c));
  if (n.has(kNesterov)) return f(SgdStep<L, SgdForm::nesterov>::template of<T>(n, lr, c));
  return f(SgdStep<L, SgdForm::momentum>::template of<T>(n, lr, c));
}

// f(functor). T: what the elements are computed in; lr: the group's, or what stands in its tensor.
template <class L, class T, class F>
ABSGD_FN void for_step(const StepNumbers& n, double lr, const Corrections& c, F f) {
  switch (n.rule) {
    case Rule::adam:
      if (n.has(kAmsgrad)) return f(AdamStep<L, true>::template of<T>(n, lr, c));
      return f(AdamStep<L, false>::template of<T>(n, lr, c));
    case Rule::rmsprop:
      if (n.has(kCentered)) {
        if (n.second != 0) return f(RmsPropStep<L, true, true>::template of<T>(n, lr, c));
        return f(RmsPropStep<L, true, false>::template of<T>(n, lr, c));
      }
      if (n.second != 0) return f(RmsPropStep<L, false, true>::template of<T>(n, lr, c));
      return f(RmsPropStep<L, false, false>::template of<T>(n, lr, c));
    case Rule::adagrad:
      return f(AdagradStep<L>::template of<T>(n, lr, c));
    default:
      return for_sgd<L, T>(n, lr, c, f);
  }
}

}  // namespace absgd
