// Robust weights of losses by one block: what weights.cu launches, and what the last block of a launch over logits
// does.
#pragma once

#include "tile.cuh"

namespace absgd {
namespace gpu {

// One loss, and whether it counts.
template <class T>
struct Sample {
  T loss, z;
  bool valid, good;

  // top: the largest z that counts
  __device__ __forceinline__ Sample(const Robust& a, T lam, T top, int64_t i) {
    loss = load_shared_between_blocks(static_cast<const T*>(a.losses) + i);
    const T score = a.scores == nullptr ? loss : static_cast<const T*>(a.scores)[i];
    z = score / lam;
    valid = a.valid_rows != nullptr ? load_shared_between_blocks(static_cast<const T*>(a.valid_rows) + i) != 0
                                    : a.valid == nullptr || a.valid[i] != 0;
    good = valid & is_usable<Lane<T>>(loss, score, z, T(a.z_limit)) & (z <= top);
  }
};

template <class T>
__device__ __forceinline__ T top_of(const Robust& a) {
  return a.bounded ? T(a.settled->top) : T(INFINITY);
}

// Losses [begin, end), by a whole block.
template <class T>
__device__ Partial partial_sum(const Robust& a, T lam, int64_t begin, int64_t end) {
  using L = Lane<T>;
  const BlockTeam team = BlockTeam::here();
  const T bound = top_of<T>(a);
  T max = lowest(T()), sum = 0;
  int good = 0, bad = 0;  // end - begin is at most kOneLaunch
  for (int64_t i = begin + team.lane; i < end; i += team.width) {
    const Sample<T> s(a, lam, bound, i);
    good += s.good;
    bad += s.valid && !s.good;
    if (!s.good) continue;
    if (s.z > max) {
      sum *= L::exp(max - s.z);
      max = s.z;
    }
    sum += L::exp(s.z - max);
  }
  const T top = team.max(max);
  return {double(top), double(team.sum(sum * L::exp(max - top))), team.sum(good), team.sum(bad)};
}

__device__ __forceinline__ double lam_of(const Robust& a) {
  return a.lam_on_device.data != nullptr ? read(a.lam_on_device) : a.lam;
}

// Weight and factor of loss i: 0 where it is ignored, NaN where it is bad.
template <class T>
struct Weighed {
  T weight, factor;

  __device__ __forceinline__ Weighed(const Robust& a, const RobustNumbers<Lane<T>>& numbers, const Sample<T>& s,
                                     int64_t i) {
    const T otherwise = s.valid ? T(NAN) : T(0);
    weight = s.good ? numbers.weight(s.z) : otherwise;
    const T t = a.sample_weight == nullptr ? T(1) : static_cast<const T*>(a.sample_weight)[i];
    factor = s.good ? numbers.factor(weight, t) : otherwise;
  }
};

// Weights and factors of losses [begin, end), by a whole block; the sum of factor_i * loss_i.
template <class T>
__device__ double apply(const Robust& a, double lam, const Outcome& o, int64_t begin, int64_t end) {
  const BlockTeam team = BlockTeam::here();
  const auto numbers = RobustNumbers<Lane<T>>::template of<T>(lam, a.mix, a.max_weight, o);
  const T bound = top_of<T>(a);
  T sum = 0;
  for (int64_t i = begin + team.lane; i < end; i += team.width) {
    const Sample<T> s(a, T(lam), bound, i);
    const Weighed<T> own(a, numbers, s, i);
    const T factor = own.factor;
    if (s.valid) sum += factor * s.loss;
    static_cast<T*>(a.weights)[i] = own.weight;
    if (a.factor != nullptr) static_cast<T*>(a.factor)[i] = factor;
    if (a.losses_out != nullptr) static_cast<T*>(a.losses_out)[i] = s.valid ? s.loss : T(0);
    if (a.valid_out != nullptr) static_cast<T*>(a.valid_out)[i] = T(s.valid);
    if (a.stats != nullptr)
      for (int k = 1; k < 4; ++k) {
        T* stat = static_cast<T*>(a.stats) + k * a.count + i;
        *stat = load_shared_between_blocks(stat) * factor;
      }
  }
  return double(team.sum(sum));
}

// By one thread: the outcome of the sums.
__device__ inline Outcome outcome_of(const Robust& a, double lam, const Partial& p) {
  RobustRule rule = a;
  rule.lam = lam;
  return next_outcome<Lane<double>>(rule, read(a.log_s), p.max, p.sum, p.good, p.bad);
}

// By one thread of the launch: the same, and the state after it. Or the sums alone, where those are asked for.
__device__ inline Outcome settle(const Robust& a, double lam, const Partial& p) {
  if (a.totals != nullptr) {
    a.totals[0] = p.good > 0 ? p.max + Lane<double>::log(p.sum) : -INFINITY;
    a.totals[1] = double(p.good);
    a.totals[2] = double(p.bad);
    return {};
  }
  const Outcome o = outcome_of(a, lam, p);
  if (a.new_log_s.data != nullptr) write(a.new_log_s, o.new_log_s);
  if (a.shares != nullptr) {
    a.shares[0] = o.share;
    a.shares[1] = o.share_state;
  }
  if (a.update) {
    if (o.bad > 0)
      ++*a.nonfinite;
    else
      write(a.log_s, o.new_log_s);
  }
  return o;
}

// What was settled elsewhere, as far as weights need it.
__device__ inline Outcome known(const Settled& s) { return {s.log_s, 0, 0, 0, s.scale, 0, 0}; }

// All of it by one block, or one of the stages.
template <class T>
__device__ void robust_in_block(const Robust& a) {
  SHARED(Outcome[1], outcome);
  const double lam = lam_of(a);
  if (a.settled == nullptr || a.totals != nullptr) {
    const Partial p = partial_sum<T>(a, T(lam), 0, a.count);
    if (threadIdx.x == 0) outcome[0] = settle(a, lam, p);
    if (a.totals != nullptr) return;
  } else if (threadIdx.x == 0) {
    outcome[0] = known(*a.settled);
  }
  __syncthreads();
  const double loss = apply<T>(a, lam, outcome[0], 0, a.count);
  if (threadIdx.x == 0 && a.loss != nullptr) *static_cast<T*>(a.loss) = T(loss);
}

}  // namespace gpu
}  // namespace absgd
