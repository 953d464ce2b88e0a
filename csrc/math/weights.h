// The robust weights (ABSGD paper, Alg. 1) and their normaliser, and the rectified weights of L2RW.
#pragma once

#include "base.h"

namespace absgd {

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
struct LogRates {
  double keep, take, alone;  // log(1 - gamma), log(gamma alpha), log alpha

  template <class L>
  static ABSGD_FN LogRates of(double gamma, double alpha) {
    return {L::log1p(-gamma), L::log(gamma * alpha), L::log(alpha)};
  }
};

// Step 5 of Alg. 1 in logarithms, s' = (1 - gamma) s + gamma alpha g. `alone`: s' = alpha g, as if gamma were 1.
template <class L>
ABSGD_FN double next_log_s(double log_s, double log_g, const LogRates& rates, bool alone) {
  if (alone) return rates.alone + log_g;
  return logaddexp<L>(rates.keep + log_s, rates.take + log_g);
}

// Where log s' comes from: the moving average, this batch alone, or nowhere (log s' = 0).
enum class NormalizerKind : int { moving = 0, batch = 1, none = 2 };

struct NormalizerConfig {
  double lam, gamma, alpha;
  LogRates log_rates;  // of gamma and alpha
  NormalizerKind normalizer_kind;
  bool init_first;  // the first batch sets s by itself
};

// What a batch does to the state, and what its weights are made from.
struct WeightUpdate {
  double log_s;         // what the weights are divided by, in logarithms
  double new_log_s;     // what the state becomes (the old value after a nonfinite or an empty batch)
  double dlog_s;        // gamma' alpha / n: what W_j owes to log s' (robust_weight_vjp)
  double dlog_s_state;  // the same for new_log_s: 0 where the state did not move
  double inverse_n;
  int64_t finite, nonfinite;  // valid samples with a finite loss and z; valid samples without
};

// From m = max z and sum_i exp(z_i - m) over the finite samples. One nonfinite sample keeps the whole batch out of the
// state.
template <class L>
ABSGD_FN WeightUpdate next_weight_update(const NormalizerConfig& config, double log_s, double max, double sum,
                                         int64_t finite, int64_t nonfinite) {
  WeightUpdate out{0, log_s, 0, 0, 0, finite, nonfinite};
  if (finite == 0) return out;
  out.inverse_n = 1.0 / double(finite);
  if (config.lam - config.lam != 0) return out;  // lambda = +-inf, the plain mean: z = 0, W = exp(0 - 0)
  if (config.normalizer_kind != NormalizerKind::none) {
    const double log_g = log_mean_exp<L>(max, sum, double(finite));
    const bool alone = config.normalizer_kind == NormalizerKind::batch || (config.init_first && log_s < -kLargest);
    out.log_s = next_log_s<L>(log_s, log_g, config.log_rates, alone);
    out.dlog_s = (alone ? config.alpha : config.gamma * config.alpha) * out.inverse_n;
  }
  if (nonfinite == 0) {
    out.new_log_s = out.log_s;
    out.dlog_s_state = out.dlog_s;
  }
  return out;
}

// What the samples of one process, one micro-batch or one chunk come to.
struct PartialStats {
  double log_sum;           // log sum exp(z) over the finite samples; -inf without
  double count, nonfinite;  // valid samples with a finite loss and z; valid samples without
};
// partials: so many PartialStats, each at the start of `stride` doubles
template <class L>
ABSGD_FN PartialStats add_partial_stats(const double* partials, int64_t number, int64_t stride) {
  double max = -kLargest, sum = 0;
  PartialStats out{max - kLargest /* -inf */, 0, 0};
  for (int64_t k = 0; k < number; ++k) {
    const double* part = partials + k * stride;
    out.count += part[1];
    out.nonfinite += part[2];
    if (part[1] > 0 && part[0] > max) max = part[0];
  }
  for (int64_t k = 0; k < number; ++k)
    if (partials[k * stride + 1] > 0) sum += L::exp(partials[k * stride] - max);
  if (out.count > 0) out.log_sum = max + L::log(sum);
  return out;
}

// log s' of all samples that were added up: W_i = exp(z_i - log_s), the loss `scale` sum_i W_i L_i.
struct Normalizer {
  double log_s, scale;
  double z_max;  // a later z beyond it counts as nonfinite: exp(z - log_s) might leave the range of a gradient
  double log_sum, count, nonfinite;  // PartialStats
};
constexpr double kMaxZGap = 60;

// grad_multiplier: how many processes average their gradients, times what a framework divides the loss by. reference:
// the m of deferred normalisation (W_i = exp(z_i - m) until the step), or null. With it, scale turns sums of those W_i
// into the mean of the final ones: exp(m - log s') / n.
template <class L>
ABSGD_FN Normalizer normalizer_of(const WeightUpdate& update, const PartialStats& t, double grad_multiplier,
                                  const double* reference) {
  const double moved = reference == nullptr || t.count == 0 ? 1 : L::exp(*reference - update.log_s);
  const double z_max = t.count == 0 ? kLargest : update.log_s + kMaxZGap;
  return {update.log_s, moved * update.inverse_n * grad_multiplier, z_max, t.log_sum, t.count, t.nonfinite};
}

// Whether a sample counts: its loss, its score and z = score / lambda are finite. A NaN makes every comparison false;
// the score itself must be finite also where |lambda| = inf makes z = 0. `limit` is the largest z that the state can
// hold.
template <class L>
ABSGD_FN auto is_usable(typename L::V loss, typename L::V score, typename L::V z, typename L::V limit) {
  return (z <= limit) & (z >= -limit) & (score - score == L::set(0)) & (loss - loss == L::set(0));
}

// How the samples of a batch are weighed once its log s' is known: all that W and the factor of a sample depend on
// beside z.
struct Weighing {
  double log_s, inverse_n, mix, max_weight;

  // The plain mean (|lambda| = inf) has W = 1 as it is, and no mix.
  static ABSGD_FN Weighing of(double lam, double mix, double max_weight, const WeightUpdate& o) {
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

}  // namespace absgd
