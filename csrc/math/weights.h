// The robust weights of ABSGD and their normaliser (MATH §1, §5), and the rectified weights of L2RW (MATH §4.5).
#pragma once

#include "base.h"

namespace absgd {

// ---- Robust weights ------------------------------------------------------------------------------------------------
//
// Alg. 1 of the ABSGD paper, in logarithms so that exp(L_i / lambda) cannot overflow (MATH §1.1). L_i are the losses of
// the n finite samples of a batch, t_i their sample weights:
//     z_i    = L_i / lambda                                                  or score_i / lambda
//     log g  = log((1/n) sum_i exp(z_i))                         step 3      log_mean_exp
//     log s' = log((1 - gamma) s + gamma alpha g)                step 4      next_log_s
//     W_i    = exp(z_i - log s')                                 step 5      RobustNumbers::weight
//     loss   = (1/n) sum_i t_i (W_i + mix) L_i, W constant       Eq. 2       RobustNumbers::factor

// log g = log((1/n) sum_i exp(z_i)), from max = max_i z_i and sum = sum_i exp(z_i - max).
template <class L>
ABSGD_FN typename L::V log_mean_exp(typename L::V max, typename L::V sum, typename L::V n) {
  return max + L::log(sum / n);
}

// log(exp(a) + exp(b)). a may be -inf, b must be finite.
template <class L>
ABSGD_FN typename L::V logaddexp(typename L::V a, typename L::V b) {
  const typename L::V hi = L::select(a > b, a, b), lo = L::select(a > b, b, a);
  return hi + L::log1p(L::exp(lo - hi));
}

// The logarithms of gamma and alpha. They are the same in all steps, so the host takes them. Otherwise one thread of a
// GPU would take six logarithms in double in every step instead of three (2 to 4 us by its instructions).
struct LogRates {
  double keep, take, alone;  // log(1 - gamma), log(gamma alpha), log alpha

  template <class L>
  static ABSGD_FN LogRates of(double gamma, double alpha) {
    return {L::log1p(-gamma), L::log(gamma * alpha), L::log(alpha)};
  }
};

// log s' = log((1 - gamma) s + gamma alpha g), step 4 of Alg. 1. If `alone`, this batch settles s by itself as if gamma
// were 1: s' = alpha g.
template <class L>
ABSGD_FN double next_log_s(double log_s, double log_g, const LogRates& rates, bool alone) {
  if (alone) return rates.alone + log_g;
  return logaddexp<L>(rates.keep + log_s, rates.take + log_g);
}

// The source of log s' (MATH §1.2): the moving average, this batch alone, or none (log s' = 0). With target it is this
// batch alone, and so is lambda (math/target.h).
enum class NormalizerKind : int { moving = 0, batch = 1, none = 2, target = 3 };

struct NormalizerConfig {
  double lam, gamma, alpha;
  LogRates log_rates;  // of gamma and alpha
  NormalizerKind normalizer_kind;
  bool init_first;  // the first batch settles s alone (MATH §1.4)
  // With NormalizerKind::target, where lam and shift are solved for: z = (score - shift) / lam. Otherwise both are 0.
  double target_share;  // of the effective sample size, with the sign of lambda
  double shift;         // the largest score for lambda > 0, the smallest for lambda < 0
};

// The result of one batch: the numbers that its weights need, and the next state.
struct WeightUpdate {
  double log_s;               // log s', by which the weights of this batch are divided
  double new_log_s;           // the next state: log s', or the old log s where the state does not move
  double dlog_s;              // c = gamma' alpha / n in d log s' / d z_j = c W_j (MATH §1.3; gamma' is 1 if `alone`)
  double dlog_s_state;        // the same for new_log_s: 0 where the state did not move
  double inverse_n;           // 1 / n, or 0 for an empty batch
  int64_t finite, nonfinite;  // n, the valid samples with a finite loss and z; and the valid samples without
};

// Settles log s' and the next state from max = max_i z_i and sum = sum_i exp(z_i - max) over the finite samples. An
// empty batch, |lambda| = inf, or a single nonfinite sample leaves the state as it was (MATH §1.4).
template <class L>
ABSGD_FN WeightUpdate next_weight_update(const NormalizerConfig& config, double log_s, double max, double sum,
                                         int64_t finite, int64_t nonfinite) {
  WeightUpdate out{0, log_s, 0, 0, 0, finite, nonfinite};
  if (finite == 0) return out;
  out.inverse_n = 1.0 / double(finite);
  if (config.lam - config.lam != 0) return out;  // lambda = +-inf is the plain mean: z = 0 and log s' = 0 give W = 1
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

// next_weight_update with NormalizerKind::target, where z = (score - shift) / lam. The state is that of scores without
// the shift: log mean exp(score / lam), and 0 at |lambda| = inf. It is a function of its own, because it would take a
// register of every kernel that knows lambda.
template <class L>
ABSGD_FN WeightUpdate target_weight_update(NormalizerConfig config, double log_s, double max, double sum,
                                           int64_t finite, int64_t nonfinite) {
  config.normalizer_kind = NormalizerKind::batch;
  WeightUpdate out = next_weight_update<L>(config, log_s, max, sum, finite, nonfinite);
  if (finite > 0 && nonfinite == 0)
    out.new_log_s = config.lam - config.lam != 0 ? 0 : out.log_s + config.shift / config.lam;
  return out;
}

// The contribution of one process, one micro-batch or one chunk to a normaliser that they share (MATH §1.6, §5).
struct PartialStats {
  double log_sum;           // log sum_i exp(z_i) over the finite samples; -inf if there are none
  double count, nonfinite;  // number of valid samples with a finite loss and z, and of valid samples without
};
// The sum of `number` PartialStats: log_sum adds by log-sum-exp, the counts add. Each stands at the start of `stride`
// doubles of `partials`.
template <class L>
ABSGD_FN PartialStats add_partial_stats(const double* partials, int64_t number, int64_t stride) {
  double max = -kLargest, sum = 0;
  PartialStats out{max - kLargest /* overflows to -inf */, 0, 0};
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

// A settled normaliser of samples that were added up: W_i = exp(z_i - log_s), and the loss is scale sum_i W_i L_i.
// Python reads the six numbers by their places (MATH §8).
struct Normalizer {
  double log_s, scale;
  double z_max;  // a later z above it counts as nonfinite: exp(z - log_s) might leave the range of a gradient
  double log_sum, count, nonfinite;  // the PartialStats of all samples
};
constexpr double kMaxZGap = 60;  // z_max - log_s

// The normaliser after `update`. grad_multiplier is the number of processes that average their gradients, times what a
// framework divides the loss by. reference is the reference point m of deferred normalisation, or null (MATH §5). Until
// the step all gradients are sums with the weights exp(z_i - m). scale = grad_multiplier exp(m - log s') / n then turns
// such a sum into the mean with the true weights.
template <class L>
ABSGD_FN Normalizer normalizer_of(const WeightUpdate& update, const PartialStats& t, double grad_multiplier,
                                  const double* reference) {
  const double moved = reference == nullptr || t.count == 0 ? 1 : L::exp(*reference - update.log_s);
  const double z_max = t.count == 0 ? kLargest : update.log_s + kMaxZGap;
  return {update.log_s, moved * update.inverse_n * grad_multiplier, z_max, t.log_sum, t.count, t.nonfinite};
}

// Whether a sample is finite: its loss, its score and z = score / lambda are. `limit` is the largest |z| that the state
// can hold. A NaN makes every comparison false. The score is tested too, because |lambda| = inf makes z = 0 of any
// finite score.
template <class L>
ABSGD_FN auto is_usable(typename L::V loss, typename L::V score, typename L::V z, typename L::V limit) {
  return (z <= limit) & (z >= -limit) & (score - score == L::set(0)) & (loss - loss == L::set(0));
}

// All numbers beside z that the weight and the factor of a sample depend on, once log s' is known.
struct Weighing {
  double log_s, inverse_n, mix, max_weight;

  // |lambda| = inf is the plain mean: W = 1, whatever mix and max_weight are.
  static ABSGD_FN Weighing of(double lam, double mix, double max_weight, const WeightUpdate& o) {
    const bool plain = lam - lam != 0;
    return {o.log_s, o.inverse_n, plain ? 0 : mix, plain ? 1 : max_weight};
  }
};

// The weight and the factor of a sample (MATH §1.1):
//     weight   W_i = min(exp(z_i - log s'), max_weight)       step 5 of Alg. 1; the state does not see the clamp
//     factor   d loss / d L_i = t_i (W_i + mix) / n           of the loss in Eq. 2, where W is a constant
// log s' comes in two parts, high + low. At L / lambda = 1000 a single float would put an error of 3e-5 into every
// weight.
template <class L>
struct RobustNumbers {
  using V = typename L::V;
  V log_s_high, log_s_low, max_weight, mix, inverse_n;

  // T is the type that the samples are computed in.
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

// The vjp of (W, log s') with respect to L_j, for upstream gradients d on W and u on log s' (MATH §1.3):
//     W_j (d_j + u c_state - c sum_i W_i d_i) / lambda,    c = gamma' alpha / n, from d log s' / d z_j = c W_j
// c_state is c where the state moved, and 0 elsewhere (WeightUpdate::dlog_s, dlog_s_state).
template <class L>
ABSGD_FN typename L::V robust_weight_vjp(typename L::V w, typename L::V d, typename L::V sum_wd, typename L::V u,
                                         typename L::V c, typename L::V c_state, typename L::V inverse_lam) {
  return w * (d + (u * c_state - c * sum_wd)) * inverse_lam;
}

// ---- Rectified weights (Learning to Reweight: Ren et al. 2018, Eq. 8 and 9; MATH §4.5) ------------------------------
//
//     w_i = max(u_i, 0) / (S + 1[S = 0]),    S = sum_j max(u_j, 0) over the finite u
// All weights are 0 if S = 0. A u_i that is not finite has weight NaN.

// S, added up in double. A sum of floats cannot overflow there. A sum of doubles can, so the sum of u 2^-64 is kept
// beside it. What the scaled sum loses to underflow does not matter where the plain one overflows. L: double lanes.
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

// w = max(u, 0) unit / total: unit 1 and total S. If S overflows, both u and S are scaled by 2^-64.
template <class L>
struct RectifiedNumbers {
  using V = typename L::V;
  V unit, total;

  // T is the type that the weights are computed in. A sum of floats may leave the range of float.
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
